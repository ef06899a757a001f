import re

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import get_peft_model
from peft.utils import ModulesToSaveWrapper
from torch import nn

import tiny
from sfa_peft import SFAConfig, SFALayer
from sfa_peft.planning.budget import external_cost, widths_within

ARCHITECTURES = {
    "swin": (tiny.swin, ["decode_head"], 32),
    "swinv2": (tiny.swinv2, None, 32),
    "dinov2": (tiny.dinov2, ["decode_head"], 32),
    "dinov2_swiglu": (tiny.dinov2_swiglu, ["decode_head"], 32),
    "dinov2_with_registers": (tiny.dinov2_with_registers, None, 32),
    "dinov3": (tiny.dinov3, None, 32),
    "dinov3_gated": (tiny.dinov3_gated, None, 32),
    "vit": (tiny.vit, None, 32),
    "dpt": (tiny.dpt_on_dinov2, ["neck", "head"], 32),
    "mask2former": (tiny.mask2former_on_swin, ["class_predictor"], 64),
    "rf_detr": (tiny.rf_detr, None, 64),
}
EVERY_PLACE = ["attention", "mlp", "mlp_parallel", "block"]


def adapter_parameters(model):
    return {n: p for n, p in model.named_parameters() if ".sfa_" in n}


def backbone_size(model, heads):
    heads = heads or []
    return sum(p.numel() for n, p in model.named_parameters() if not any(re.match(rf"(.*\.)?{h}\.", n) for h in heads))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_known_architectures_start_as_the_identity_at_the_exact_budget(name):
    make, heads, size = ARCHITECTURES[name]
    # Frozen, as an adapted base is: torch multiplies by a weight that takes a gradient in another way, and on some
    # processors rounds differently then.
    base = make().requires_grad_(False)
    x = tiny.pixels(size=size)
    expected, budget = tiny.output(base, x), backbone_size(base, heads) // 5
    model = get_peft_model(base, SFAConfig(budget=budget, external_places=EVERY_PLACE, modules_to_save=heads))
    assert torch.equal(tiny.output(model, x), expected)
    adapter = adapter_parameters(model)
    assert sum(p.numel() for p in adapter.values()) == budget
    assert all(p.requires_grad for p in adapter.values())


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_targets_and_places_lie_in_the_backbone_only(name):
    make, heads, _ = ARCHITECTURES[name]
    model = get_peft_model(make(), SFAConfig(budget=0.2, external_places=EVERY_PLACE, modules_to_save=heads))
    layers = [n for n, m in model.named_modules() if isinstance(m, SFALayer)]
    assert layers
    outside = ("decode_head", "neck", ".head", "decoder", "class_", "bbox", "pixel_level_module.decoder", "projector")
    assert not [n for n in layers if any(part in n for part in outside)]


@pytest.mark.parametrize("name", ["swin", "swinv2", "dinov2", "dinov3", "vit"])
def test_every_external_adapter_acts_and_learns(name):
    make, heads, size = ARCHITECTURES[name]
    x = tiny.pixels(size=size)
    for place in EVERY_PLACE:
        base = make()
        expected = tiny.output(base, x)
        config = SFAConfig(external_width=2, external_places=[place], modules_to_save=heads, init_weights=False)
        model = get_peft_model(base, config).eval()
        assert not torch.allclose(tiny.output(model, x), expected)
        first = next(v for v in model(x).values() if isinstance(v, torch.Tensor))
        first.square().sum().backward()
        adapter = adapter_parameters(model)
        assert adapter
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in adapter.values())


@pytest.mark.parametrize("make", [tiny.dinov2, tiny.dinov3, tiny.dinov2_with_registers])
def test_the_place_is_behind_layer_scale(make):
    model = make()
    for n, p in model.named_parameters():
        if "lambda1" in n:
            nn.init.zeros_(p)  # a LayerScale of zero would silence an adapter in front of it
    x = tiny.pixels()
    expected = tiny.output(model, x)
    adapted = get_peft_model(model, SFAConfig(external_width=2, external_places=["mlp_parallel"], init_weights=False))
    assert not torch.allclose(tiny.output(adapted, x), expected)


def test_sequential_and_parallel_adapters_compute_their_formulas():
    base = tiny.swin()
    config = SFAConfig(
        external_width=3,
        external_places=["mlp", "mlp_parallel"],
        external_scale=0.5,
        external_conv=0,
        init_weights=False,
    )
    model = get_peft_model(base, config).eval()
    mlp = model.base_model.model.backbone.swin.encoder.layers[0].blocks[0].mlp
    x = torch.randn(2, 5, 8)
    sequential, parallel = mlp.fc2.sfa_external["default"], mlp.fc2.sfa_parallel["default"]

    def bottleneck(adapter, value):
        return 0.5 * adapter.up(nn.functional.gelu(adapter.down(value)))

    with torch.no_grad():
        y = mlp.fc2.base_layer(mlp.activation_fn(mlp.fc1(x)))
        expected = y + bottleneck(sequential, y) + bottleneck(parallel, x)
        assert torch.allclose(mlp(x), expected, atol=1e-6)


def test_no_activation_is_kept_after_a_forward_pass():
    model = get_peft_model(tiny.swin(), SFAConfig(external_width=2, external_places=["mlp_parallel"]))
    tiny.output(model)
    with model.disable_adapter():
        tiny.output(model)
    layers = [m for m in model.modules() if isinstance(m, SFALayer)]
    assert all(not parallel.hook.values for layer in layers for parallel in layer.parallel_inputs.values())


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_the_share_decides_what_external_adapters_may_take(share):
    model = get_peft_model(tiny.swin(), SFAConfig(budget=1000, external_share=share))
    external = sum(p.numel() for n, p in adapter_parameters(model).items() if "sfa_internal" not in n)
    total = sum(p.numel() for p in adapter_parameters(model).values())
    assert external <= share * 1000
    assert external > share * 1000 - 33 * 2  # what one more unit of the widest place would cost
    assert total == 1000 if share < 1 else total == external


def test_switching_one_kind_off_gives_the_other_everything():
    internal = get_peft_model(tiny.swin(), SFAConfig(budget=1000, external_places=[]))
    assert sum(p.numel() for p in adapter_parameters(internal).values()) == 1000
    external = get_peft_model(tiny.swin(), SFAConfig(budget=1000, target_modules=[]))
    assert 1000 - 17 < sum(p.numel() for p in adapter_parameters(external).values()) <= 1000


def test_row_granularity_takes_whole_neurons_within_the_budget():
    model = get_peft_model(tiny.swin(), SFAConfig(budget=1000, external_share=0.0, internal_granularity="row"))
    total = 0
    for layer in (m for m in model.modules() if isinstance(m, SFALayer)):
        delta = layer.sfa_internal["default"]
        weight = layer.get_base_layer().weight
        assert delta.weight.shape == (len(delta.weight_positions), weight[0].numel())
        if layer.get_base_layer().bias is not None:
            assert torch.equal(delta.weight_positions, delta.bias_positions)  # a neuron with its bias
        total += delta.num_values
    assert 1000 - 65 < total <= 1000


def test_a_second_adapters_budget_counts_the_base_alone():
    model = get_peft_model(tiny.swin(), SFAConfig(budget=0.1, modules_to_save=["decode_head"]))
    model.add_adapter("whole", SFAConfig(budget=0.1))
    model.add_adapter("headless", SFAConfig(budget=0.1, modules_to_save=["decode_head"]))
    for name, heads in (("whole", None), ("headless", ["decode_head"])):
        own = sum(p.numel() for n, p in adapter_parameters(model).items() if f".{name}." in n)
        assert own == int(0.1 * backbone_size(tiny.swin(), heads))


def test_explicit_widths_and_density():
    width = {"attention.o_proj": 4, r"layers\.1\.blocks\.\d\.mlp\.fc2": 0.25}
    places = ["attention", "mlp"]
    config = SFAConfig(external_width=width, external_places=places, internal_density=0.1, target_modules=["fc1"])
    model = get_peft_model(tiny.swin(), config)
    recorded = model.peft_config["default"].external_widths
    assert set(recorded["attention"].values()) == {4}
    assert set(recorded["mlp"].values()) == {4}  # a quarter of 16 channels
    assert all("layers.1" in name for name in recorded["mlp"])
    fc1 = sum(p.numel() for n, p in tiny.swin().named_parameters() if ".fc1." in n)
    assert sum(model.peft_config["default"].ticket_sizes.values()) == int(0.1 * fc1)


def test_layers_and_excluded_modules_are_respected():
    config = SFAConfig(budget=300, layers_to_transform=[1], layers_pattern="layers", exclude_modules=["fc1"])
    model = get_peft_model(tiny.swin(), config)
    layers = [n for n, m in model.named_modules() if isinstance(m, SFALayer)]
    assert layers
    assert all("layers.1." in n and not n.endswith("fc1") for n in layers)


@pytest.mark.parametrize("initial", ["magnitude", "random"])
def test_the_initial_ticket_is_reproducible(initial):
    first, second = (
        get_peft_model(tiny.swin(), SFAConfig(budget=0.1, external_share=0, initial_ticket=initial)) for _ in range(2)
    )
    assert tiny.same_state(tiny.state(first), tiny.state(second))
    if initial == "random":
        other = get_peft_model(
            tiny.swin(), SFAConfig(budget=0.1, external_share=0, initial_ticket=initial, ticket_seed=1)
        )
        assert other.peft_config["default"].ticket_sizes != first.peft_config["default"].ticket_sizes


def test_training_leaves_frozen_parameters_alone_and_without_gradient():
    base = tiny.swin()
    before = {n: p.clone() for n, p in base.named_parameters()}
    model = get_peft_model(base, SFAConfig(budget=0.1, modules_to_save=["decode_head"]))
    model.train()
    model(**tiny.batch()).loss.backward()
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    tiny.train(model)
    unloaded = model.unload()
    assert all(torch.equal(p, before[n]) for n, p in unloaded.named_parameters())


def test_conv2d_targets_are_adapted_and_followed_by_an_external():
    model = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 4, 1))
    x = tiny.pixels()
    expected = model(x)
    adapted = get_peft_model(model, SFAConfig(budget=60, target_modules=["0"], external_modules=["2"]))
    assert torch.equal(adapted(x), expected)
    adapted(x).square().sum().backward()
    assert sum(p.numel() for p in adapter_parameters(adapted).values()) == 60


@settings(deadline=None, max_examples=100)
@given(
    channels=st.lists(st.integers(1, 2000), min_size=1, max_size=30),
    allowance=st.integers(0, 10**7),
)
def test_widths_never_cost_more_than_allowed_and_waste_little(channels, allowance):
    cheapest = external_cost(min(channels), 1)
    if allowance < cheapest:
        with pytest.raises(ValueError, match="costs"):
            widths_within(channels, allowance)
        return
    widths = widths_within(channels, allowance)
    cost = sum(external_cost(c, w) for c, w in zip(channels, widths, strict=True))
    assert cost <= allowance
    assert allowance - cost < external_cost(max(channels), 1) * len(channels)
    assert any(widths)


@settings(deadline=None, max_examples=15, suppress_health_check=[HealthCheck.too_slow])
@given(budget=st.integers(200, 3000), share=st.floats(0, 0.9))
def test_element_tickets_meet_any_budget_exactly(budget, share):
    if share * budget < 66:  # less than one unit of the cheapest external adapter
        share = 0.0
    model = get_peft_model(tiny.swin(), SFAConfig(budget=budget, external_share=share))
    assert sum(p.numel() for p in adapter_parameters(model).values()) == budget


def test_a_full_name_in_modules_to_save_means_that_module_alone():
    model = get_peft_model(tiny.rf_detr(), SFAConfig(budget=0.1, modules_to_save=["class_embed", "bbox_embed"]))
    wrapped = [n for n, m in model.base_model.model.named_modules() if isinstance(m, ModulesToSaveWrapper)]
    assert wrapped == ["class_embed", "bbox_embed"]
    # In DPT, `head` is a name, and the ending of `head.head` in it.
    model = get_peft_model(tiny.dpt_on_dinov2(), SFAConfig(budget=0.1, modules_to_save=["neck", "head"]))
    wrapped = [n for n, m in model.base_model.model.named_modules() if isinstance(m, ModulesToSaveWrapper)]
    assert wrapped == ["neck", "head"]


def test_an_ending_in_modules_to_save_means_every_module_with_it():
    model = get_peft_model(tiny.swin(), SFAConfig(budget=0.1, modules_to_save=["batch_norm", "classifier"]))
    wrapped = [n for n, m in model.base_model.model.named_modules() if isinstance(m, ModulesToSaveWrapper)]
    assert len(wrapped) > 2
    assert all(name.endswith(("batch_norm", "classifier")) for name in wrapped)


def test_a_list_of_modules_is_no_head():
    with pytest.raises(
        ValueError, match=r"modules_to_save names 'model.enc_output', a ModuleList.*'model.enc_output.0'"
    ):
        get_peft_model(tiny.rf_detr(), SFAConfig(budget=0.1, modules_to_save=["enc_output"]))

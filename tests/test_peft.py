"""Gestures of PEFT that no other file is about."""

import copy

import pytest
import torch
from peft import (
    LoraConfig,
    NoMatchingPeftModuleError,
    PeftMixedModel,
    PeftModel,
    TaskType,
    functional,
    get_layer_status,
    get_model_status,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from torch import nn
from transformers import ViTConfig, ViTForImageClassification

import tiny
from adapters import adapted
from sfa_peft import BaseMismatchWarning, CheckpointError, SFAConfig, SFALayer, search_ticket

HEADS = {"modules_to_save": ["decode_head"]}


def vit():
    torch.manual_seed(0)
    options = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    return ViTForImageClassification(ViTConfig(image_size=tiny.SIZE, patch_size=8, **options)).eval()


# Several adapters


def test_adapters_of_any_kind_stand_side_by_side_and_leave_no_trace():
    """Budgets, places, tickets and heads of their own; what is deleted is gone, and the rest computes as before."""
    model = adapted()
    kinds = {
        "external": {"budget": 0.05, "target_modules": []},
        "internal": {"budget": 0.2, "external_places": [], "initial_ticket": "random"},
        "rows": {"internal_granularity": "row", "external_places": ["attention"], "modules_to_save": None},
    }
    names, before = {n for n, _ in model.named_modules()}, tiny.state(model)
    for name, options in kinds.items():
        model.add_adapter(name, SFAConfig(**{"budget": 0.1, "init_weights": False} | HEADS | options))
    outputs = {}
    for name in kinds:
        model.set_adapter(name)
        outputs[name] = tiny.output(model)
        own = {n for n, p in model.named_parameters() if p.requires_grad}
        assert own
        assert all(f".{name}." in n for n in own)
    assert not torch.equal(outputs["external"], outputs["internal"])
    for name in kinds:
        model.set_adapter("default")
        model.delete_adapter(name)
        assert not any(name in n.split(".") for n, _ in model.named_modules())
    assert {n for n, _ in model.named_modules()} == names
    assert tiny.same_state(tiny.state(model), before)
    assert list(model.peft_config) == ["default"]


def test_two_active_adapters_add_up_and_two_heads_cannot():
    model = adapted(init_weights=False)
    model.add_adapter("other", SFAConfig(budget=0.05, init_weights=False))
    model.add_adapter("head", SFAConfig(budget=0.05, **HEADS))
    model.base_model.set_adapter(["default", "other"])
    both = tiny.output(model)
    model.base_model.add_weighted_adapter(["default", "other"], [1.0, 1.0], "sum")
    model.set_adapter("sum")
    torch.testing.assert_close(tiny.output(model), both, atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="Only one adapter can be set at a time"):
        model.base_model.set_adapter(["default", "head"])


@pytest.mark.parametrize("inference_mode", [False, True])
def test_another_adapter_with_a_head_leaves_the_flags_of_the_active_one(tmp_path, inference_mode):
    adapted().save_pretrained(tmp_path)
    model = adapted()
    if inference_mode:
        model.set_requires_grad("default", False)
    flags = {n: p.requires_grad for n, p in model.named_parameters() if ".default." in n}
    assert set(flags.values()) == {not inference_mode}
    model.load_adapter(tmp_path, "loaded", is_trainable=inference_mode)
    model.add_adapter("added", SFAConfig(budget=0.05, inference_mode=not inference_mode, **HEADS))
    assert {n: p.requires_grad for n, p in model.named_parameters() if ".default." in n} == flags
    assert not any(p.requires_grad for n, p in model.named_parameters() if ".added." in n)


def test_an_adapter_that_is_added_while_another_is_merged_is_of_the_base(tmp_path):
    model = adapted(init_weights=False)
    model.base_model.merge_adapter()
    merged = tiny.state(model)
    model.add_adapter("new", SFAConfig(budget=0.1))
    assert all(torch.equal(merged[n], t) for n, t in tiny.state(model).items() if n in merged)
    plain = get_peft_model(tiny.swin(), SFAConfig(budget=0.1))
    found, expected = model.base_model.positions("new"), plain.base_model.positions("default")
    assert all(torch.equal(found[m][p], expected[m][p]) for m in expected for p in expected[m])
    assert model.peft_config["new"].base_fingerprint is not None
    model.unmerge_adapter()
    model.save_pretrained(tmp_path, selected_adapters=["new"])
    with pytest.warns(BaseMismatchWarning):
        PeftModel.from_pretrained(tiny.swin(seed=1), tmp_path / "new")


def test_an_adapter_is_deleted_while_two_others_are_active():
    model = adapted()
    for name in ("one", "two"):
        model.add_adapter(name, SFAConfig(budget=0.05))
    model.base_model.set_adapter(["one", "two"])
    model.delete_adapter("default")
    assert model.base_model.active_adapters == ["one", "two"]
    assert not any("default" in name.split(".") for name, _ in model.named_modules())


# Loading paths


@pytest.mark.parametrize("name", ["default", "mine"])
def test_injecting_without_a_peft_model(name):
    base = tiny.swin()
    before = tiny.output(base)
    model = inject_adapter_in_model(SFAConfig(budget=0.1, **HEADS), base, adapter_name=name)
    assert model is base
    assert torch.equal(tiny.output(model), before)
    tiny.train(model)
    tensors = get_peft_model_state_dict(model, adapter_name=name)

    other = inject_adapter_in_model(SFAConfig(budget=0.1, **HEADS), tiny.swin(), low_cpu_mem_usage=True)
    result = set_peft_model_state_dict(other, tensors, low_cpu_mem_usage=True)
    assert not result.unexpected_keys
    assert torch.equal(tiny.output(other), tiny.output(model))


def test_the_functional_interface():
    model = functional.inject_adapter_in_model(SFAConfig(budget=0.1, init_weights=False), tiny.swin(), "one")
    one = tiny.output(model)
    options = {"budget": 0.05, "external_share": 0.25, "init_weights": False, "external_places": ["attention"]}
    functional.inject_adapter_in_model(SFAConfig(**options), model, "two")
    functional.set_adapter(model, "two")
    two = tiny.output(model)
    functional.set_adapter(model, "one")
    assert torch.equal(tiny.output(model), one)
    functional.set_requires_grad(model, "two", True)
    assert any(p.requires_grad for n, p in model.named_parameters() if ".two." in n)
    assert functional.delete_adapter(model, "one", prefix="sfa_") == ["two"]
    assert torch.equal(tiny.output(model), two)
    assert not any("one" in name.split(".") for name, _ in model.named_modules())


def test_a_config_that_is_given_is_the_adapters(tmp_path):
    adapted().save_pretrained(tmp_path)
    config = SFAConfig.from_pretrained(tmp_path)
    model = PeftModel.from_pretrained(tiny.swin(), tmp_path, config=config)
    assert model.peft_config["default"] is config


def test_a_config_can_be_used_for_several_models():
    config = SFAConfig(budget=0.1)
    kept = copy.deepcopy(config.to_dict())
    get_peft_model(tiny.swin(), config)
    assert config.to_dict() == kept
    get_peft_model(tiny.dinov2(), config)


@pytest.mark.parametrize(
    ("task", "heads"),
    [
        (TaskType.SEQ_CLS, ["classifier"]),
        (TaskType.TOKEN_CLS, ["classifier"]),
        (TaskType.QUESTION_ANS, []),
        (TaskType.FEATURE_EXTRACTION, []),
    ],
)
def test_task_types_bring_their_heads(task, heads, tmp_path):
    model = get_peft_model(vit(), SFAConfig(budget=0.1, task_type=task))
    trained = {n.split(".")[2] for n, p in model.named_parameters() if p.requires_grad and "sfa_" not in n}
    assert sorted(trained) == heads
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * p.requires_grad)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(vit(), tmp_path)
    x = tiny.pixels()
    assert torch.equal(loaded.get_base_model().eval()(x).logits, model.get_base_model().eval()(x).logits)


def test_mixed_models_refuse_sfa_with_pefts_own_error():
    with pytest.raises(ValueError, match="'SFA' is not compatible with the `PeftMixedModel`"):
        get_peft_model(tiny.swin(), SFAConfig(budget=0.1), mixed=True)
    model = PeftMixedModel(tiny.swin(), LoraConfig(target_modules=["fc1"]))
    with pytest.raises(ValueError, match="'SFA' is not compatible with the `PeftMixedModel`"):
        model.add_adapter("s", SFAConfig(budget=0.1))


# Precision


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_adapters_of_half_precision_bases_are_float32_unless_that_is_switched_off(dtype, autocast):
    base = tiny.swin().to(dtype)
    x = tiny.pixels().to(dtype)
    before = tiny.output(base, x)
    model = get_peft_model(base, SFAConfig(budget=0.1, **HEADS), autocast_adapter_dtype=autocast)
    own = {p.dtype for n, p in model.named_parameters() if ".sfa_" in n}
    assert own == {torch.float32 if autocast else dtype}
    assert torch.equal(tiny.output(model, x), before)
    model.train()(x).logits.float().square().mean().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


# Inspection


def test_status_tells_what_there_is():
    model = adapted()
    model.add_adapter("other", SFAConfig(budget=0.05, external_places=["attention"]))
    layers = {status.name: status for status in get_layer_status(model)}
    assert {s.module_type for s in layers.values()} >= {"sfa.Linear", "sfa.LayerNorm"}
    assert all(s.active_adapters == ["default"] and s.enabled and not s.merged_adapters for s in layers.values())
    status = get_model_status(model)
    assert status.adapter_model_type == "SFAModel"
    assert status.peft_types == {"default": "SFA", "other": "SFA"}
    assert status.available_adapters == ["default", "other"]
    assert status.requires_grad == {"default": True, "other": False}
    assert (status.trainable_params, status.total_params) == model.get_nb_trainable_parameters()
    alone = adapted(modules_to_save=None)  # PEFT calls it irregular that heads are not merged
    alone.merge_adapter()
    assert get_model_status(alone).merged_adapters == ["default"]


def test_a_printed_model_tells_widths_places_and_tickets(capsys):
    model = adapted(external_places=["attention", "mlp_parallel"])
    model.print_trainable_parameters()
    assert "trainable%" in capsys.readouterr().out
    text = repr(model)
    layers = [m for m in model.modules() if isinstance(m, SFALayer)]
    externals = [e for m in layers for _, e in m.externals_of("default")]
    assert text.count("ExternalAdapter(") == len(externals)
    assert all(f"width={e.width}" in text for e in externals)
    assert all(f"{m.sfa_internal['default'].num_values} values" in text for m in layers if m.sfa_internal)
    assert "(sfa_parallel): ModuleDict(\n" in text
    assert "(decode_head): ModulesToSaveWrapper(" in text


def test_get_delta_weight_is_what_merging_adds():
    model = adapted(init_weights=False, external_places=[])
    layers = [m for m in model.modules() if isinstance(m, SFALayer)]
    before = [{p: getattr(m.base_layer, p).clone() for p in m.sfa_internal["default"].changed} for m in layers]
    deltas = [{p: m.get_delta_weight("default", p) for p in own} for m, own in zip(layers, before, strict=True)]
    model.merge_adapter()
    for layer, old, delta in zip(layers, before, deltas, strict=True):
        for name in old:
            assert torch.equal(getattr(layer.base_layer, name), old[name] + delta[name])
            assert delta[name].count_nonzero() == len(layer.sfa_internal["default"].positions(name))


# Any module tree


class Grouped(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 3, groups=2, padding=1)
        self.norm = nn.LayerNorm(8)
        self.body = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))

    def forward(self, x):
        return self.body(self.norm(self.conv(x).movedim(1, -1)))


@pytest.mark.parametrize("targets", [["conv"], ["norm"], ["body.0", "2"], r"body\.[02]", "all-linear"])
def test_modules_of_any_kind_of_model(targets):
    torch.manual_seed(0)
    base = Grouped()
    x = torch.randn(2, 4, 6, 6)
    before = base(x)
    options = {"target_modules": targets, "external_modules": targets, "internal_density": 0.5, "external_width": 2}
    model = get_peft_model(base, SFAConfig(**options))
    assert torch.equal(model(x), before)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        model(x).square().mean().backward()
        optimizer.step()
    after = model(x)
    assert not torch.equal(after, before)
    with model.disable_adapter():
        assert torch.equal(model(x), before)
    torch.testing.assert_close(copy.deepcopy(model).merge_and_unload()(x), after)
    assert torch.equal(model.unload()(x), before)


def test_errors_are_of_pefts_types():
    with pytest.raises(NoMatchingPeftModuleError, match="nowhere"):
        get_peft_model(Grouped(), SFAConfig(budget=10, target_modules=["nowhere"]))
    with pytest.raises(ValueError, match="a GELU"):
        get_peft_model(Grouped(), SFAConfig(internal_density=0.5, target_modules=["body.1"]))
    model = adapted()
    with pytest.raises(ValueError, match="not found"):
        model.set_adapter("nobody")
    with pytest.raises(ValueError, match="nobody"):
        model.delete_adapter("nobody")
    with pytest.raises(ValueError, match="already exists"):
        model.add_adapter("default", SFAConfig(budget=0.1))


def test_lora_beside_sfa_is_refused_as_any_two_kinds_are():
    model = adapted()
    with pytest.raises(ValueError, match="different peft types"):
        model.add_adapter("lora", LoraConfig(target_modules=["fc1"]))


def test_a_fresh_adapter_takes_the_ticket_of_a_file_and_a_trained_one_does_not(tmp_path):
    model = adapted()
    search_ticket(model, [tiny.batch()], steps=2, progress=False)
    tiny.train(model).save_pretrained(tmp_path)
    fresh = adapted()
    fresh.load_adapter(tmp_path, "default", is_trainable=True)  # the ticket comes along
    assert torch.equal(tiny.output(fresh), tiny.output(model))
    other = tiny.train(adapted(initial_ticket="random"))  # has learned something with its own ticket
    before = tiny.state(other)
    with pytest.raises(ValueError, match="another ticket"):
        other.load_adapter(tmp_path, "default", is_trainable=True)
    assert tiny.same_state(tiny.state(other), before)
    fresh.merge_adapter()
    with pytest.raises(ValueError, match="unmerge_adapter"):
        fresh.load_adapter(tmp_path, "default")


def test_a_failed_load_under_a_name_that_is_there_leaves_the_very_same_parameters(tmp_path):
    base = tiny.upernet(tiny.swin_config(), num_labels=5)
    other = get_peft_model(base, SFAConfig(budget=0.1, init_weights=False, initial_ticket="random", **HEADS))
    other.save_pretrained(tmp_path)
    model = adapted()
    before = {n: (id(p), p.clone(), p.requires_grad) for n, p in model.named_parameters()}
    modes = [m.training for m in model.modules()]
    with pytest.raises(CheckpointError, match="num_labels"):
        model.load_adapter(tmp_path, "default", is_trainable=True)
    after = dict(model.named_parameters())
    assert after.keys() == before.keys()
    for name, (identity, value, flag) in before.items():
        assert (id(after[name]), after[name].requires_grad) == (identity, flag)
        assert torch.equal(after[name], value)
    assert [m.training for m in model.modules()] == modes

"""The sparse op against plain autograd on the dense, changed weight."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import get_peft_model
from torch import nn

import tiny
from adapters import checkpoint_activations
from saved_tensors import Saved
from sfa_peft import SFAConfig, SFALayer


def linear():
    return nn.Linear(7, 5), torch.randn(2, 3, 7)


def conv():
    return nn.Conv2d(3, 6, 3, stride=2, padding=1), torch.randn(2, 3, 9, 8)


def grouped_conv():
    return nn.Conv2d(4, 6, 3, groups=2, dilation=2, bias=False), torch.randn(2, 4, 9, 8)


def same_conv():
    return nn.Conv2d(3, 4, (2, 3), padding="same"), torch.randn(2, 3, 6, 7)


def reflect_conv():
    return nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), torch.randn(2, 3, 6, 7)


def layer_norm():
    norm = nn.LayerNorm((4, 6))
    nn.init.normal_(norm.weight)
    return norm, torch.randn(2, 5, 4, 6)


MODULES = [linear, conv, grouped_conv, same_conv, reflect_conv, layer_norm]


GRANULARITIES = ["element", "row", "column"]


def adapted(module, density, granularity="element", seed=0):
    """A model of one adapted leaf with random values, and its layer."""
    config = SFAConfig(
        internal_density=density,
        target_modules=["0"],
        external_modules=[],
        internal_granularity=granularity,
        initial_ticket="random",
        ticket_seed=seed,
        init_weights=False,
    )
    model = get_peft_model(nn.Sequential(module), config)
    return model, model.base_model.model[0]


def dense_reference(module, layer, x, names=("default",)):
    """The same module with its parameters replaced by dense changed ones that require gradients."""
    parameters = {}
    for name, p in module.named_parameters():
        changed = p.detach() + sum(layer.get_delta_weight(adapter, name) for adapter in names)
        parameters[name] = changed.requires_grad_(True)
    return torch.func.functional_call(module, parameters, (x,)), parameters


@pytest.mark.parametrize("make", MODULES)
@pytest.mark.parametrize("granularity", GRANULARITIES)
@settings(deadline=None, max_examples=8)
@given(density=st.floats(0.25, 1.0), seed=st.integers(0, 1000))
def test_output_and_gradients_equal_those_of_the_dense_weight(make, granularity, density, seed):
    torch.manual_seed(seed)
    module, x = make()
    if granularity == "column":
        density = max(density, 0.5)  # half of a grouped convolution's weight is one column
    model, layer = adapted(module, density, granularity, seed)
    base = layer.get_base_layer()
    x1, x2 = x.clone().requires_grad_(True), x.clone().requires_grad_(True)
    y = model(x1)
    expected, parameters = dense_reference(base, layer, x2)
    assert torch.allclose(y, expected, atol=1e-5)
    weight = torch.randn_like(y)
    (y * weight).sum().backward()
    (expected * weight).sum().backward()
    assert torch.allclose(x1.grad, x2.grad, atol=1e-4)
    delta = layer.sfa_internal["default"]
    for name in delta.changed:
        dense = parameters[name].grad
        expected = delta.granularity.read(dense, delta.positions(name).long())
        assert torch.allclose(getattr(delta, name).grad, expected, atol=1e-4)
    assert all(p.grad is None for p in base.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_few_positions_of_a_large_weight_get_the_gradient_of_the_dense_weight(dtype):
    module, x = nn.Linear(200, 160, dtype=dtype), torch.randn(2, 700, 200, dtype=dtype)
    _, layer = adapted(module, density=0.02)
    delta = layer.sfa_internal["default"]
    grad = torch.randn(2, 700, 160, dtype=dtype)
    few = layer.op.grad_units(grad, x, module.weight, delta.granularity, delta.positions("weight"))
    assert few is not None, "the whole gradient was computed"
    layer(x).backward(grad)
    y, dense = dense_reference(module, layer, x)
    y.backward(grad)
    wanted = dense["weight"].grad.flatten()[delta.positions("weight").long()]
    torch.testing.assert_close(delta.weight.grad, wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))


@pytest.mark.parametrize("make", [linear, conv, layer_norm])
def test_two_active_adapters_add_up(make):
    module, x = make()
    model, layer = adapted(module, 0.5)
    config = SFAConfig(
        internal_density=0.4,
        target_modules=["0"],
        external_modules=[],
        internal_granularity="row",
        initial_ticket="random",
        init_weights=False,
    )
    model.add_adapter("other", config)
    model.base_model.set_adapter(["default", "other"])
    y = model(x)
    expected, _ = dense_reference(layer.get_base_layer(), layer, x, ("default", "other"))
    assert torch.allclose(y, expected, atol=1e-5)
    y.sum().backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if "sfa_internal" in n)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("make", [linear, conv, layer_norm])
def test_autocast_runs_in_its_dtype_and_gives_float32_gradients(make, dtype):
    module, x = make()
    model, layer = adapted(module, 0.5)
    x = x.requires_grad_(True)
    with torch.autocast("cpu", dtype):
        y = model(x)
        expected, parameters = dense_reference(layer.get_base_layer(), layer, x)
    assert y.dtype == expected.dtype
    assert torch.allclose(y.float(), expected.float(), atol=2e-2, rtol=2e-2)
    y.float().square().sum().backward()
    expected.float().square().sum().backward()
    delta = layer.sfa_internal["default"]
    for name in delta.changed:
        values = getattr(delta, name)
        assert values.grad.dtype == torch.float32
        dense = parameters[name].grad.reshape(-1)[delta.positions(name).long()].float()
        assert torch.allclose(values.grad, dense, atol=0.1, rtol=0.1)


@pytest.mark.parametrize("make", [linear, conv, layer_norm])
def test_half_precision_models(make):
    module, x = make()
    model, layer = adapted(module.to(torch.bfloat16), 0.5)
    delta = layer.sfa_internal["default"]
    assert delta.weight.dtype == torch.float32  # PEFT keeps adapters in float32 by default
    y = model(x.to(torch.bfloat16))
    assert y.dtype == torch.bfloat16
    # The sum is taken in float32 and rounded once.
    dense = layer.get_base_layer().weight.float().reshape(-1).clone()
    dense[delta.weight_positions.long()] += delta.weight.detach()
    changed = layer.get_base_layer().weight.float().reshape(-1) + layer.get_delta_weight("default").float().reshape(-1)
    assert torch.allclose(changed, dense, atol=1e-2)
    y.float().sum().backward()
    assert delta.weight.grad.dtype == torch.float32


@pytest.mark.parametrize("make", MODULES)
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_nothing_of_the_weights_size_is_saved(make, granularity):
    module, x = make()
    model, layer = adapted(module, 0.5, granularity)
    x = x.requires_grad_(True)
    with Saved(model) as saved:
        y = model(x)
    shapes = {tuple(p.shape) for p in layer.get_base_layer().parameters()}
    sizes = {p.numel() for p in layer.get_base_layer().parameters()}
    assert saved.shapes
    assert not shapes & set(saved.shapes)
    mean_and_rstd = 2 * x.numel() // max(module.weight.numel(), 1) if isinstance(module, nn.LayerNorm) else 0
    assert saved.bytes <= 4 * (F.pad(x, [3] * 4).numel() + mean_and_rstd), (saved.shapes, sizes)
    y.sum().backward()


def test_memory_for_backward_on_a_whole_backbone():
    from peft import LoraConfig

    linears = ["q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"]

    def saved_bytes(config):
        model = get_peft_model(tiny.dinov2(hidden_size=32, num_attention_heads=4).backbone, config)
        with Saved(model) as saved:
            model(tiny.pixels(8)).feature_maps[-1].sum().backward()
        return saved.bytes

    lora = saved_bytes(LoraConfig(r=8, target_modules=linears))
    internal = saved_bytes(SFAConfig(internal_density=0.05, target_modules=linears, external_modules=[]))
    assert internal <= lora
    both = saved_bytes(SFAConfig(internal_density=0.05, target_modules=linears, external_width=8))
    tokens, width, places = 8 * (1 + 16), 32, 4  # one float32 input for each of two places in two blocks
    assert both <= internal + places * tokens * width * 4


def test_gradient_checkpointing_gives_the_same_gradients():
    def gradients(checkpointing):
        model = get_peft_model(
            tiny.swin(),
            SFAConfig(budget=0.1, external_places=["attention", "mlp_parallel"], modules_to_save=["decode_head"]),
        )
        for n, p in model.named_parameters():
            if ".up." in n:
                nn.init.constant_(p, 0.01)
        if checkpointing:
            checkpoint_activations(model.base_model.model.backbone)
        model.train()
        model(**tiny.batch()).loss.backward()
        return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    plain, checkpointed = gradients(False), gradients(True)
    assert plain.keys() == checkpointed.keys()
    assert any("sfa_parallel" in name for name in plain)
    assert all(torch.allclose(plain[n], checkpointed[n], atol=1e-6) for n in plain)


def test_hooks_inside_an_adapted_layer_warn():
    module, x = linear()
    module.register_forward_hook(lambda *args: None)
    model, _ = adapted(module, 0.5)
    with pytest.warns(UserWarning, match="hooks on the Linear inside an SFA layer"):
        model(x)


def test_the_layer_shows_what_it_holds():
    model = get_peft_model(tiny.swin(), SFAConfig(budget=0.1, external_places=["mlp"]))
    layer = next(m for m in model.modules() if isinstance(m, SFALayer) and m.sfa_internal and m.sfa_external)
    shown = repr(layer)
    assert shown.startswith("sfa.Linear")
    assert "values, granularity=element" in shown
    assert "width=" in shown

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from saved_tensors import Saved
from sfa_peft.layers.bottleneck import ACTIVATIONS, ExternalAdapter


def random_adapter(**options):
    adapter = ExternalAdapter(6, 4, init_weights=False, **options)
    nn.init.normal_(adapter.down.bias)
    return adapter


def plain(adapter, x):
    return adapter.up(ACTIVATIONS[adapter.activation].forward(adapter.down(x)) * adapter.scale)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_function_equals_plain_autograd(activation):
    adapter = random_adapter(activation=activation, scale=0.7).double()
    x = torch.randn(3, 5, 6, dtype=torch.double, requires_grad=True)
    grads = []
    for y in (adapter(x), plain(adapter, x)):
        grads.append(torch.autograd.grad(y.sin().sum(), [x, *adapter.parameters()]))
        assert torch.allclose(y, plain(adapter, x))
    assert all(torch.allclose(a, b) for a, b in zip(*grads, strict=True))
    assert torch.autograd.gradcheck(adapter, (x,))


def test_only_the_input_and_the_hidden_states_are_saved():
    adapter = random_adapter()
    x = torch.randn(3, 5, 6, requires_grad=True)
    with Saved(adapter) as saved:
        adapter(x)
    assert saved.shapes == [(3, 5, 6), (3, 5, adapter.width)]


def test_channels_first():
    adapter = ExternalAdapter(6, 4, init_weights=False, channel_dim=1)
    x = torch.randn(2, 6, 3, 4)
    assert torch.allclose(adapter(x), plain(adapter, x.movedim(1, -1)).movedim(-1, 1))


def test_dropout_drops_hidden_units_while_training_only():
    adapter = random_adapter(dropout=0.5)
    x = torch.randn(50, 6)
    assert not torch.equal(adapter.train()(x), adapter(x))
    assert torch.allclose(adapter.eval()(x), plain(adapter, x), atol=1e-6)
    torch.manual_seed(3)
    found = adapter.train()(x)
    torch.manual_seed(3)
    assert torch.allclose(found, adapter.up(F.dropout(F.gelu(adapter.down(x)), 0.5)), atol=1e-6)


def test_it_starts_at_exactly_zero():
    assert not ExternalAdapter(6, 4)(torch.randn(5, 6)).any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_and_half_inputs(dtype):
    adapter = random_adapter()
    x = torch.randn(5, 6, requires_grad=True)
    with torch.autocast("cpu", dtype):
        y = adapter(x.to(dtype))
    assert y.dtype == dtype
    assert torch.allclose(y.float(), plain(adapter, x), atol=0.1)
    y.float().sum().backward()
    assert adapter.up.weight.grad.dtype == torch.float32
    assert adapter(x.detach().to(dtype)).dtype == dtype

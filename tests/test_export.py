"""`torch.export` and ONNX of adapted and of merged models."""

import numpy as np
import onnxruntime
import pytest
import torch
from peft import get_peft_model
from torch import nn

import tiny
from sfa_peft import SFAConfig, SFALayer

MODELS = {
    "swin": (tiny.swin, tiny.SIZE),
    "dinov2": (tiny.dinov2, tiny.SIZE),
    "dpt": (tiny.dpt_on_dinov2, tiny.SIZE),
    "mask2former": (tiny.mask2former_on_swin, 64),
    "rf_detr": (tiny.rf_detr, 64),
}
# The same kernels run in an exported program; onnxruntime has its own, and sums in another order.
TOLERANCE = 1e-5

# Deprecated by torch, and still used.
torchscript = pytest.mark.filterwarnings(
    "ignore:`torch.jit:DeprecationWarning",
    "ignore:You are using the legacy TorchScript:DeprecationWarning",
    "ignore:The feature will be removed:DeprecationWarning",
)


class FirstTensor(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, pixel_values):
        return next(value for value in self.model(pixel_values).values() if isinstance(value, torch.Tensor))


@pytest.fixture(params=MODELS)
def name(request):
    return request.param


@pytest.fixture(params=["adapted", "merged"])
def model_and_input(request, name):
    make, size = MODELS[name]
    config = SFAConfig(budget=0.1, init_weights=False, external_places=["attention", "mlp_parallel"])
    model = get_peft_model(make(), config)
    return FirstTensor(model.merge_and_unload() if request.param == "merged" else model).eval(), tiny.pixels(size=size)


def test_an_exported_program_computes_the_same(model_and_input):
    model, x = model_and_input
    program = torch.export.export(model, (x,))
    assert torch.equal(program.module()(x), model(x))


@pytest.mark.slow
def test_onnxruntime_computes_the_same(model_and_input, tmp_path):
    model, x = model_and_input
    file = tmp_path / "model.onnx"
    torch.onnx.export(model, (x,), file, dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(file)
    (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    expected = model(x).detach().numpy()
    assert np.abs(y - expected).max() <= TOLERANCE * max(1.0, np.abs(expected).max())


@torchscript
@pytest.mark.parametrize("granularity", ["element", "row", "column"])
@pytest.mark.parametrize("make", [tiny.vit, tiny.swinv2])
def test_the_older_onnx_exporter_keeps_the_adapter(make, granularity, tmp_path):
    config = SFAConfig(
        budget=0.1,
        init_weights=False,
        external_places=["attention", "mlp", "mlp_parallel"],
        internal_granularity=granularity,
    )
    model, x, file = FirstTensor(get_peft_model(make(), config)).eval(), tiny.pixels(), tmp_path / "model.onnx"
    torch.onnx.export(model, (x,), file, dynamo=False)
    session = onnxruntime.InferenceSession(file)
    (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    expected = model(x).detach().numpy()
    assert np.abs(y - expected).max() <= TOLERANCE * max(1.0, np.abs(expected).max())
    base = make()(x)[0].detach().numpy()
    assert np.abs(y - base).max() > 0.1


@torchscript
@pytest.mark.parametrize("with_gradients", [True, False])
def test_a_traced_model_can_be_saved_and_computes_the_same(model_and_input, with_gradients, tmp_path):
    model, x = model_and_input
    with torch.set_grad_enabled(with_gradients):
        torch.jit.trace(model, x, check_trace=False).save(tmp_path / "model.pt")
    with torch.no_grad():
        assert torch.allclose(torch.jit.load(tmp_path / "model.pt")(x), model(x), rtol=1e-5, atol=1e-5)


def test_whether_a_leaf_takes_internal_adapters_can_be_asked():
    model = get_peft_model(tiny.dinov2(), SFAConfig(budget=0.1))
    layers = [layer for layer in model.modules() if isinstance(layer, SFALayer)]
    assert {hasattr(layer, "op") for layer in layers} == {True, False}

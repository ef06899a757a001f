"""`torch.export` and ONNX of adapted and of merged models."""

import numpy as np
import onnxruntime
import pytest
import torch
from peft import get_peft_model
from torch import nn

import tiny
from sfa_peft import SFAConfig

MODELS = {
    "swin": (tiny.swin, tiny.SIZE),
    "dinov2": (tiny.dinov2, tiny.SIZE),
    "dpt": (tiny.dpt_on_dinov2, tiny.SIZE),
    "mask2former": (tiny.mask2former_on_swin, 64),
    "rf_detr": (tiny.rf_detr, 64),
}
# The same kernels run in an exported program; onnxruntime has its own, and sums in another order.
TOLERANCE = 1e-5


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

"""`torch.export`, AOTInductor, ONNX and TorchScript of adapted and of merged models."""

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from peft import get_peft_model
from torch import nn
from torch._inductor.cpp_builder import get_cpp_compiler
from torch._inductor.exc import InvalidCxxCompiler
from torch.export import Dim
from transformers import SwinModel

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


def bare_swin():
    return SwinModel(tiny.swin_config())


class FirstTensor(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, pixel_values):
        return next(value for value in self.model(pixel_values).values() if isinstance(value, torch.Tensor))


def of_kind(kind, make, **options):
    """A frozen base, adapted or merged model. Nothing in the base is at its initial value, where an exporter finds
    operations that are the same, and leaves them out."""
    torch.manual_seed(0)
    model = make()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.1)
    if kind != "base":
        model = get_peft_model(model, SFAConfig(budget=0.1, init_weights=False, **options))
    if kind == "merged":
        model = model.merge_and_unload(widen=True)
    return FirstTensor(model).eval().requires_grad_(False)


def run_onnx(file, x):
    session = onnxruntime.InferenceSession(file)
    return session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]


def nodes(file):
    return len(onnx.load(file).graph.node)


def assert_close(y, expected):
    expected = expected.detach().numpy()
    assert np.abs(y - expected).max() <= TOLERANCE * max(1.0, np.abs(expected).max())


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
    assert_close(run_onnx(file, x), model(x))


# The base decides which sizes its graph takes: DINOv3 any; Swin multiples of patch times window.
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["adapted", "merged"])
@pytest.mark.parametrize(
    ("make", "dynamic", "sizes"),
    [
        (tiny.vit, {0: Dim.DYNAMIC}, [(3, 32), (5, 32)]),
        (tiny.swin, {0: Dim.DYNAMIC}, [(3, 32), (5, 32)]),
        (tiny.dinov3, {0: Dim.DYNAMIC, 2: Dim.DYNAMIC, 3: Dim.DYNAMIC}, [(3, 32), (2, 40), (5, 64)]),
    ],
)
def test_a_graph_for_batches_and_images_of_any_size(make, dynamic, sizes, kind, tmp_path):
    model, file = of_kind(kind, make), tmp_path / "model.onnx"
    program = torch.export.export(model, (tiny.pixels(),), dynamic_shapes=(dynamic,))
    torch.onnx.export(program, (), file, dynamo=True, verbose=False)
    for batch, size in sizes:
        x = tiny.pixels(batch, size)
        assert torch.equal(program.module()(x), model(x))
        assert_close(run_onnx(file, x), model(x))


# The older exporter fails on UperNet's pooling where it does not know the size, as behind DINOv2.
@torchscript
@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "dynamo"),
    [(tiny.vit, True), (tiny.swin, True), (tiny.dinov2, True), (tiny.vit, False), (bare_swin, False)],
)
def test_the_graph_of_a_folded_model_has_no_more_nodes_than_its_base(make, dynamo, tmp_path):
    x, counted = tiny.pixels(), {}
    for kind in ("base", "adapted", "merged"):
        model, file = of_kind(kind, make, external_conv=0), tmp_path / f"{kind}.onnx"
        torch.onnx.export(model, (x,), file, dynamo=dynamo, verbose=False)
        assert_close(run_onnx(file, x), model(x))
        counted[kind] = nodes(file)
    assert counted["merged"] <= counted["base"] < counted["adapted"]


def has_cpp_compiler():
    try:
        return bool(get_cpp_compiler())
    except InvalidCxxCompiler:
        return False


@pytest.mark.slow
@pytest.mark.skipif(not has_cpp_compiler(), reason="AOTInductor compiles C++, and there is no compiler")
@pytest.mark.parametrize("kind", ["adapted", "merged"])
def test_aotinductor_computes_the_same(kind, tmp_path):
    model, dynamic = of_kind(kind, tiny.vit), ({0: Dim("batch", min=1, max=8)},)
    program = torch.export.export(model, (tiny.pixels(),), dynamic_shapes=dynamic)
    package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
    compiled = torch._inductor.aoti_load_package(package)
    for batch in (1, 3):
        assert_close(compiled(tiny.pixels(batch)).numpy(), model(tiny.pixels(batch)))


@torchscript
@pytest.mark.parametrize("granularity", ["element", "row", "column"])
@pytest.mark.parametrize("make", [tiny.vit, tiny.swinv2])
def test_the_older_onnx_exporter_keeps_the_adapter(make, granularity, tmp_path):
    config = SFAConfig(
        budget=0.1,
        init_weights=False,
        external_places=["attention", "mlp", "mlp_parallel", "block"],
        internal_granularity=granularity,
    )
    model, x, file = FirstTensor(get_peft_model(make(), config)).eval(), tiny.pixels(), tmp_path / "model.onnx"
    torch.onnx.export(model, (x,), file, dynamo=False)
    y = run_onnx(file, x)
    assert_close(y, model(x))
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

"""Every tensor of an adapter is on the device and in the dtype of the module that it serves, by every way in."""

import pytest
import torch
from peft import PeftModel, get_peft_model, inject_adapter_in_model
from torch import nn

import tiny
from sfa_peft import SFAConfig, SFALayer

ARCHITECTURES = [
    tiny.swin,
    tiny.swinv2,
    tiny.dinov2,
    tiny.dinov2_swiglu,
    tiny.dinov2_with_registers,
    tiny.dinov3,
    tiny.dinov3_gated,
    tiny.vit,
    tiny.dpt_on_dinov2,
    tiny.mask2former_on_swin,
    tiny.rf_detr,
]
EVERYWHERE = ("attention", "mlp", "mlp_parallel", "block")

architectures = pytest.mark.parametrize("make", ARCHITECTURES, ids=lambda make: make.__name__)
without_values = pytest.mark.filterwarnings("ignore:.*has no values yet", "ignore:.*which is a no-op")


def config(**changes):
    return SFAConfig(**{"budget": 0.05, "external_places": EVERYWHERE} | changes)


def adapter_tensors(model):
    """All tensors of the adapters of a model, by name; there are some of both kinds."""
    named = [*model.named_parameters(), *model.named_buffers()]
    found = {name: tensor for name, tensor in named if ".sfa_" in name}
    assert any(".sfa_internal." in name for name in found)
    assert any(".sfa_external." in name or ".sfa_parallel." in name for name in found)
    return found


def assert_on(model, device):
    assert {name for name, tensor in adapter_tensors(model).items() if tensor.device.type != device} == set()


@architectures
@without_values
def test_adapters_are_on_the_device_of_the_base(make):
    model = get_peft_model(make().to("meta"), config())
    assert_on(model, "meta")
    model.add_adapter("second", config(external_placement="auto"))
    assert_on(model, "meta")


@without_values
@pytest.mark.parametrize("make", [tiny.swin, tiny.dinov2])
def test_shapes_can_be_asked_for_on_meta(make):
    model = get_peft_model(make().to("meta"), config())
    assert model(tiny.pixels().to("meta")).logits.shape == (2, 3, tiny.SIZE, tiny.SIZE)


@without_values
@pytest.mark.parametrize("make", [tiny.swin, tiny.dinov2])
def test_every_way_in_knows_the_device(make, tmp_path):
    tiny.train(get_peft_model(make(), config())).save_pretrained(tmp_path)

    def load_twice():
        model = PeftModel.from_pretrained(make().to("meta"), tmp_path, torch_device="cpu")
        model.load_adapter(tmp_path, "second", torch_device="cpu")
        return model

    def transformers_own():
        model = make().to("meta")
        model.add_adapter(config())
        return model

    for way_in in (
        load_twice,
        transformers_own,
        lambda: inject_adapter_in_model(config(), make().to("meta")),
    ):
        assert_on(way_in(), "meta")


@without_values
def test_loaded_weights_stay_where_a_base_has_none_yet(tmp_path):
    tiny.train(get_peft_model(tiny.dinov2(), config())).save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(tiny.dinov2().to("meta"), tmp_path, torch_device="cpu", low_cpu_mem_usage=True)
    assert_on(model, "cpu")


def test_a_base_without_values_is_told():
    with pytest.warns(UserWarning, match="UperNetForSemanticSegmentation has no values yet"):
        get_peft_model(tiny.swin().to("meta"), config())


@architectures
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_adapters_have_the_dtype_of_the_base(make, dtype):
    model = get_peft_model(make().to(dtype), config(), autocast_adapter_dtype=False)
    floating = {name: t.dtype for name, t in adapter_tensors(model).items() if t.is_floating_point()}
    assert set(floating.values()) == {dtype}
    if make not in (tiny.rf_detr, tiny.mask2former_on_swin):  # whose decoders run in float32 alone
        tiny.output(model, tiny.pixels().to(dtype))


def test_a_leaf_without_parameters_has_those_of_its_block():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(8, 8)
            self.norm = nn.LayerNorm(8, elementwise_affine=False)

        def forward(self, x):
            return self.norm(self.linear(x))

    base = nn.Sequential(Block()).to(torch.bfloat16)
    model = get_peft_model(
        base,
        SFAConfig(external_width=2, external_modules=["norm"], target_modules=[]),
        autocast_adapter_dtype=False,
    )
    layers = [layer for layer in model.modules() if isinstance(layer, SFALayer)]
    assert {p.dtype for layer in layers for p in layer.parameters_of("default")} == {torch.bfloat16}
    assert model(torch.randn(2, 8, dtype=torch.bfloat16)).dtype == torch.bfloat16

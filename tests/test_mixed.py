"""One adapter for each sample of a batch."""

import pytest
import torch
from peft import get_peft_model

import tiny
from adapters import alone, disturb
from sfa_peft import SFAConfig

MODELS = {
    "swin": (tiny.swin, tiny.SIZE, ["decode_head"]),
    "dinov2": (tiny.dinov2, tiny.SIZE, ["decode_head"]),
    "swinv2": (tiny.swinv2, tiny.SIZE, None),
    "dpt": (tiny.dpt_on_dinov2, tiny.SIZE, ["neck", "head"]),
    "rf_detr": (tiny.rf_detr, 64, ["class_embed"]),
}
SAMPLES = ["both", "__base__", "external", "internal", "both"]


def with_adapters(make, heads):
    model = get_peft_model(make(), SFAConfig(budget=0.1, modules_to_save=heads), adapter_name="both")
    model.add_adapter("external", SFAConfig(budget=0.05, target_modules=[], external_places=["mlp_parallel"]))
    model.add_adapter("internal", SFAConfig(budget=0.05, external_places=[], modules_to_save=heads))
    for name in ("both", "external", "internal"):
        disturb(model, name)
    return model.eval().double()


@torch.no_grad()
def mixed(model, x, names):
    result = model(x, adapter_names=names)
    return next(v for v in result.values() if isinstance(v, torch.Tensor))


@pytest.mark.parametrize("name", MODELS)
def test_each_sample_gets_what_its_adapter_gives_alone(name):
    make, size, heads = MODELS[name]
    model = with_adapters(make, heads)
    x = tiny.pixels(len(SAMPLES), size).double()
    expected = torch.cat([alone(model, adapter, x[i : i + 1]) for i, adapter in enumerate(SAMPLES)])
    assert not torch.allclose(expected, alone(model, "both", x), atol=1e-4)  # the adapters do differ
    model.set_adapter("external")
    torch.testing.assert_close(mixed(model, x, SAMPLES), expected)
    # Nothing of it stays: the active adapter is what it was.
    torch.testing.assert_close(tiny.output(model, x), alone(model, "external", x))


def test_a_batch_for_one_adapter_and_a_batch_for_the_base():
    model = with_adapters(tiny.swin, ["decode_head"])
    x = tiny.pixels(2).double()
    torch.testing.assert_close(mixed(model, x, ["both", "both"]), alone(model, "both", x))
    torch.testing.assert_close(mixed(model, x, ["__base__"] * 2), alone(model, "__base__", x))


def test_what_cannot_be_mixed_is_refused_and_leaves_no_hook():
    model = with_adapters(tiny.swin, ["decode_head"])
    x = tiny.pixels(2).double()
    hooks = sum(len(m._forward_pre_hooks) for m in model.modules())
    with pytest.raises(ValueError, match=r"non-existing adapter.*nobody"):
        model(x, adapter_names=["both", "nobody"])
    with pytest.raises(ValueError, match="same as the number of inputs"):
        model(x, adapter_names=["both", "both", "both"])
    with pytest.raises(ValueError, match="training mode"):
        model.train()(x, adapter_names=["both", "both"])
    model.eval().merge_adapter(["both"])
    with pytest.raises(ValueError, match="unmerge_adapter"):
        model(x, adapter_names=["both", "both"])
    assert sum(len(m._forward_pre_hooks) for m in model.modules()) == hooks


def test_a_head_that_the_model_reads_without_calling_it_cannot_be_mixed():
    config = SFAConfig(budget=0.1, modules_to_save=["transformer_module"])
    model = get_peft_model(tiny.mask2former_on_swin(), config).eval()
    with pytest.raises(ValueError, match=r"group the samples by adapter|without a row for each sample"):
        model(tiny.pixels(2, 64), adapter_names=["default", "__base__"])
    assert torch.isfinite(tiny.output(model, tiny.pixels(2, 64))).all()


def test_fewer_names_than_images_are_refused_though_windows_would_divide():
    model = get_peft_model(tiny.swin(), SFAConfig(budget=0.1)).eval()
    with pytest.raises(ValueError, match="got 2 and 4 respectively"):
        model(tiny.pixels(4), adapter_names=["default", "__base__"])
    with pytest.raises(ValueError, match="got 2 and 4 respectively"):
        model(pixel_values=tiny.pixels(4), adapter_names=["default", "__base__"])


@pytest.mark.parametrize("samples", [2, 4])
def test_layers_that_do_not_have_the_batch_first_are_refused(samples):
    """Mask2Former's decoder has (queries, batch, channels), with 4 queries here."""
    targets = r".*transformer_module\.decoder\.layers\..*(fc1|fc2)"
    model = get_peft_model(tiny.mask2former_on_swin(), SFAConfig(internal_density=0.3, target_modules=targets)).eval()
    with pytest.raises(ValueError, match="adapter_names" if samples == 2 else "cannot be told from tokens"):
        model(tiny.pixels(samples, 64), adapter_names=["default", "__base__"] * (samples // 2))


def test_a_heads_output_whose_first_dimension_is_the_batch_by_chance_is_refused():
    """RF-DETR's decoder gives (layers, batch, queries, channels), with one layer here."""
    config = SFAConfig(budget=0.1, modules_to_save=["model.decoder"])
    model = get_peft_model(tiny.rf_detr(), config).eval()
    with pytest.raises(ValueError, match="without a row for each sample"):
        model(tiny.pixels(2, 64), adapter_names=["default", "__base__"])
    x = tiny.pixels(2, 64)
    torch.testing.assert_close(mixed(model, x, ["default"] * 2), alone(model, "default", x))

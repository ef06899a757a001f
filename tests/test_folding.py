"""Merged models whose external adapters are folded into wider MLPs: plain models of transformers."""

import copy
import json
import subprocess
import sys
import warnings
from collections import Counter

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import get_peft_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    Dinov2Backbone,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    SwinBackbone,
    SwinModel,
    ViTForImageClassification,
)

import tiny
from adapters import disturb
from sfa_peft import SFAConfig
from sfa_peft.layers.merged import merged_leaves
from sfa_peft.tuner.folding import ExternalsKeptWarning


def bare_swin():
    return SwinModel(tiny.swin_config()).eval()


def bare_dinov2():
    return Dinov2Backbone(tiny.dinov2_config()).eval()


def vit_classifier():
    return ViTForImageClassification(tiny.vit().config).eval()


FAMILIES = {
    "swin": (bare_swin, tiny.SIZE),
    "upernet_swin": (tiny.swin, tiny.SIZE),
    "upernet_dinov2": (tiny.dinov2, tiny.SIZE),
    "dinov2_with_registers": (tiny.dinov2_with_registers, tiny.SIZE),
    "dinov3": (tiny.dinov3, tiny.SIZE),
    "vit": (vit_classifier, tiny.SIZE),
    "dpt_dinov2": (tiny.dpt_on_dinov2, tiny.SIZE),
    "mask2former_swin": (tiny.mask2former_on_swin, 64),
    "rf_detr": (tiny.rf_detr, 64),
    "deformable_detr_swin": (tiny.deformable_detr, 64),
}
TOLERANCE = 1e-5
FOLDABLE = {"budget": 0.1, "external_share": 0.25, "external_conv": 0, "init_weights": False}


def disturbed(model):
    """A model whose norms, biases and LayerScale are not at their initial values."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator), alpha=0.1)
    return model


def outputs(model, size=tiny.SIZE):
    """All floating-point tensors that a model gives, as one vector."""
    model.eval()
    found = []

    def collect(value):
        if isinstance(value, torch.Tensor):
            found.extend([value.float().flatten()] if value.is_floating_point() else [])
        elif isinstance(value, dict):
            collect(list(value.values()))
        elif isinstance(value, list | tuple):
            for one in value:
                collect(one)

    with torch.no_grad():
        collect(model(tiny.pixels(size=size).to(next(model.parameters()).dtype), output_hidden_states=True))
    return torch.cat(found)


def difference(a, b):
    return float((a - b).abs().max() / b.abs().max())


def adapted(make=vit_classifier, **options):
    return get_peft_model(disturbed(make()), SFAConfig(**FOLDABLE | options)).eval()


def loaded(model, folder):
    model.save_pretrained(folder)
    return type(model).from_pretrained(folder)


class Operations(TorchDispatchMode):
    """Counts the operations that torch dispatches."""

    def __init__(self):
        super().__init__()
        self.counted = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.counted[str(function)] += 1
        return function(*args, **kwargs or {})


def operations(model, size):
    with Operations() as mode, torch.no_grad():
        model(tiny.pixels(size=size))
    return mode.counted


@pytest.mark.parametrize("name", FAMILIES)
def test_a_merged_model_is_a_stock_model_with_the_same_outputs(name, tmp_path):
    make, size = FAMILIES[name]
    base = make()
    model = adapted(make)
    expected = outputs(model, size)
    with model.disable_adapter():
        assert difference(outputs(model, size), expected) > 1e-3
    with warnings.catch_warnings():
        warnings.simplefilter("error", ExternalsKeptWarning)
        merged = model.merge_and_unload(widen=True)
    assert type(merged) is type(base)
    assert not any(type(module).__module__.startswith(("sfa_peft", "peft")) for module in merged.modules())
    assert difference(outputs(merged, size), expected) < TOLERANCE
    # torch folds a batched matrix product by what needs gradients, so both are frozen.
    assert operations(merged.requires_grad_(False), size) == operations(base.requires_grad_(False), size)
    plain = loaded(merged, tmp_path)
    assert plain.state_dict().keys() == base.state_dict().keys()
    assert difference(outputs(plain, size), expected) < TOLERANCE


def test_a_merged_model_needs_neither_sfa_peft_nor_peft(tmp_path):
    model = adapted(tiny.swin)
    model.merge_and_unload().save_pretrained(tmp_path)
    expected = tiny.output(model)
    torch.save((tiny.pixels(), expected), tmp_path / "expected.pt")
    script = """
import sys
sys.modules["sfa_peft"] = sys.modules["peft"] = None
import torch
from transformers import UperNetForSemanticSegmentation
x, expected = torch.load(sys.argv[1] + "/expected.pt")
model = UperNetForSemanticSegmentation.from_pretrained(sys.argv[1]).eval()
with torch.no_grad():
    assert torch.allclose(model(x).logits, expected, rtol=1e-5, atol=1e-5)
assert not any(name.split(".")[0] in ("sfa_peft", "peft") for name, module in sys.modules.items() if module)
"""
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_config_says_the_wider_mlp(tmp_path):
    merged = adapted(tiny.swin, budget=None, external_width=0.25, internal_density=0.0).merge_and_unload()
    assert merged.config.backbone_config.mlp_ratio == 4.25
    assert merged.config.backbone_config is merged.backbone.config
    merged.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["backbone_config"]["mlp_ratio"] == 4.25
    linear = merged.backbone.swin.encoder.layers[1].blocks[0].mlp.fc1
    assert (linear.in_features, linear.out_features, *linear.weight.shape) == (16, 68, 68, 16)
    merged = adapted(external_width=3, budget=None, internal_density=0.0).merge_and_unload()
    assert merged.config.intermediate_size == 35


def test_a_config_that_another_model_uses_is_not_changed(tmp_path):
    config = tiny.dinov2_config()
    first, second = tiny.upernet(config), tiny.upernet(config)
    whole = second.config
    expected = outputs(second)
    model = get_peft_model(first, SFAConfig(**FOLDABLE))
    model.merge_and_unload(widen=True)
    assert first.config.backbone_config.mlp_ratio == 5
    assert config.mlp_ratio == second.backbone.config.mlp_ratio == whole.backbone_config.mlp_ratio == 4
    assert all(m.config.mlp_ratio == 5 for m in first.backbone.modules() if hasattr(m, "config"))
    assert difference(outputs(loaded(second, tmp_path)), expected) < TOLERANCE


def test_a_backbone_with_a_copy_of_the_config_is_saved_with_both_changed(tmp_path):
    model = adapted(tiny.swin)
    base = model.get_base_model()
    base.config.backbone_config = copy.deepcopy(base.config.backbone_config)
    expected = outputs(model)
    merged = model.merge_and_unload()
    assert merged.config.backbone_config.mlp_ratio == merged.backbone.config.mlp_ratio > 4
    assert difference(outputs(loaded(merged, tmp_path)), expected) < TOLERANCE


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes(dtype, tmp_path):
    tolerance = {torch.float64: 1e-12, torch.bfloat16: 0.1, torch.float16: 0.02}[dtype]
    model = get_peft_model(disturbed(tiny.dinov2()).to(dtype), SFAConfig(**FOLDABLE))
    if dtype is torch.float64:
        model.double()
    expected = outputs(model)
    merged = model.merge_and_unload(widen=True)
    assert {p.dtype for p in merged.parameters()} == {dtype}
    assert difference(outputs(merged), expected) < tolerance
    merged.save_pretrained(tmp_path)
    again = type(merged).from_pretrained(tmp_path, dtype=dtype)
    assert difference(outputs(again), outputs(merged)) < tolerance / 10


@pytest.mark.parametrize("make", [tiny.swin, vit_classifier])
def test_several_adapters_are_folded_together(make, tmp_path):
    model = adapted(make, external_scale=0.5)
    model.add_adapter("other", SFAConfig(budget=0.05, external_conv=0, init_weights=False, external_dropout=0.3))
    disturb(model, "other")
    model.base_model.set_adapter(["default", "other"])
    expected = outputs(model)
    merged = model.merge_and_unload()
    assert difference(outputs(merged), expected) < TOLERANCE
    assert difference(outputs(loaded(merged, tmp_path)), expected) < TOLERANCE


def test_one_of_several_adapters_is_folded(tmp_path):
    model = adapted()
    expected = outputs(model)
    model.add_adapter(
        "other", SFAConfig(budget=0.05, external_conv=0, init_weights=False, external_places=["attention"])
    )
    merged = model.merge_and_unload(adapter_names=["default"])
    assert difference(outputs(loaded(merged, tmp_path)), expected) < TOLERANCE


def test_internal_changes_of_the_mlp_and_of_layer_scale_count():
    targets = ["mlp.fc1", "mlp.fc2", "layer_scale2"]
    with pytest.raises(ValueError, match="layer_scale2"):  # a ticket has no LayerScale
        adapted(tiny.dinov2, target_modules=targets)
    model = adapted(tiny.dinov2, target_modules=targets[:2], external_share=0.3)
    disturb(model, "default")
    expected = outputs(model)
    assert difference(outputs(model.merge_and_unload(widen=True)), expected) < TOLERANCE


def test_a_folded_model_is_a_base_for_another_adapter():
    merged = adapted().merge_and_unload()
    expected = outputs(merged)
    model = get_peft_model(merged, SFAConfig(budget=0.1, external_conv=0))
    assert torch.equal(outputs(model), expected)
    tiny_config = model.get_base_model().config
    assert tiny_config.intermediate_size > 32
    assert not any(p.requires_grad for n, p in model.named_parameters() if ".sfa_" not in n)


def test_a_factor_of_zero_removes_what_the_adapter_does_not_add():
    model = adapted(tiny.dinov3)
    block = model.get_base_model().model.layer[0]
    with torch.no_grad():
        block.layer_scale2.base_layer.lambda1[3] = 0
        block.layer_scale2.sfa_parallel["default"].up.weight[3] = 0
    expected = outputs(model)
    merged = model.merge_and_unload()
    assert difference(outputs(merged), expected) < TOLERANCE


# What is not folded


class OtherMLP(nn.Module):
    """Has the names of a plain MLP, and another forward."""

    def __init__(self, mlp):
        super().__init__()
        self.fc1, self.activation_fn, self.fc2 = mlp.fc1, mlp.activation_fn, mlp.fc2

    def forward(self, x):
        return self.fc2(nn.functional.normalize(self.activation_fn(self.fc1(x)), dim=-1))


def with_other_mlp():
    model = vit_classifier()
    for layer in model.vit.layers:
        layer.mlp = OtherMLP(layer.mlp)
    return model


def with_shared_mlp():
    model = vit_classifier()
    model.vit.layers[1].mlp.fc1.weight = model.vit.layers[0].mlp.fc1.weight
    return model


def with_own_parameter():
    model = vit_classifier()
    model.vit.own = nn.Parameter(torch.ones(1))
    return model


def with_other_activation():
    model = vit_classifier()
    for layer in model.vit.layers:
        layer.mlp.activation_fn = nn.Softmax(dim=-1)
    return model


def without_layer_scale():
    model = tiny.dinov3()
    model.model.layer[0].layer_scale2 = nn.Identity()
    return model


def without_bias():
    return DINOv3ViTModel(DINOv3ViTConfig(**tiny._vit_options(), mlp_bias=False)).eval()


def with_tanh_gelu():
    config = tiny.vit().config
    config.hidden_act = "gelu_pytorch_tanh"
    return ViTForImageClassification(config).eval()


REFUSED = {
    "another place": (vit_classifier, {"external_places": ["attention"]}, "only adapters without filters"),
    "sequential": (vit_classifier, {"external_places": ["mlp"]}, "only adapters without filters"),
    "before it": (vit_classifier, {"external_places": ["mlp", "mlp_parallel"]}, "another external adapter reads"),
    "activation": (vit_classifier, {"external_activation": "relu"}, "'relu' is not the activation of the MLP"),
    "gelu variant": (with_tanh_gelu, {}, "'gelu' is not the activation of the MLP"),
    "not elementwise": (with_other_activation, {}, "'gelu' is not the activation of the MLP"),
    "no factor": (without_layer_scale, {"exclude_modules": ["0.layer_scale2"]}, "`lambda1`"),
    "gated": (tiny.dinov3_gated, {}, "not a plain MLP"),
    "swiglu": (tiny.dinov2_swiglu, {}, "not a plain MLP"),
    "post norm": (tiny.swinv2, {}, "no config makes the MLP of Swinv2Layer wider"),
    "whole ratios": (tiny.dinov2, {}, r"mlp_ratio=5 in Dinov2Config.*merge_and_unload\(widen=True\)"),
    "bias": (without_bias, {}, "the MLP has no bias"),
    "other forward": (with_other_mlp, {}, "a wider OtherMLP computes something else"),
    "shared": (with_shared_mlp, {"target_modules": []}, "shared with another module"),
    "other shapes": (with_own_parameter, {}, r"built from the wider config has another vit\.own"),
}


@pytest.mark.parametrize("why", REFUSED)
def test_what_is_not_folded_is_told_once_and_not_saved(why, tmp_path):
    make, options, message = REFUSED[why]
    model = get_peft_model(make(), SFAConfig(**FOLDABLE | options))
    disturb(model, "default")
    expected = outputs(model)
    with pytest.warns(ExternalsKeptWarning, match=message) as told:
        merged = model.merge_and_unload()
    assert len([w for w in told if w.category is ExternalsKeptWarning]) == 1
    assert "Save the adapter itself" in str(told[0].message)
    assert difference(outputs(merged), expected) < TOLERANCE
    with pytest.raises(ValueError, match="Save the adapter itself"):
        merged.save_pretrained(tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_a_factor_of_zero_is_not_folded():
    model = adapted(tiny.dinov3)
    with torch.no_grad():
        model.get_base_model().model.layer[0].layer_scale2.base_layer.lambda1[3] = 0
    expected = outputs(model)
    with pytest.warns(ExternalsKeptWarning, match=r"on 1 modules.*layer_scale2\.lambda1 is 0"):
        merged = model.merge_and_unload()
    assert difference(outputs(merged), expected) < TOLERANCE
    assert list(merged_leaves(merged)) == ["model.layer.0.layer_scale2"]


def test_values_that_half_precision_cannot_hold_are_not_folded():
    model = get_peft_model(tiny.dinov3().half(), SFAConfig(**FOLDABLE))
    with torch.no_grad():
        for layer in model.get_base_model().model.layer:
            layer.layer_scale2.base_layer.lambda1.fill_(1e-7)
    with pytest.warns(ExternalsKeptWarning, match=r"not finite in torch\.float16"):
        model.merge_and_unload()


def test_an_adapter_on_fc1_keeps_the_others():
    model = adapted()
    model.add_adapter("other", SFAConfig(external_width=2, external_modules=["mlp.fc1"], init_weights=False))
    model.base_model.set_adapter(["default", "other"])
    expected = outputs(model)
    with pytest.warns(ExternalsKeptWarning, match=r"an external adapter sits on mlp\.fc1"):
        merged = model.merge_and_unload()
    assert difference(outputs(merged), expected) < TOLERANCE


def test_one_block_that_cannot_be_wider_keeps_all_with_its_config():
    class OwnLinear(nn.Linear):
        pass

    base = vit_classifier()
    base.vit.layers[0].mlp.fc1.__class__ = OwnLinear
    model = get_peft_model(base, SFAConfig(**FOLDABLE))
    expected = outputs(model)
    message = r"layers\.0.*are not both nn\.Linear.*layers\.1.*another block with the same config.*vit\.layers\.0\.mlp"
    with pytest.warns(ExternalsKeptWarning, match=message):
        merged = model.merge_and_unload()
    assert difference(outputs(merged), expected) < TOLERANCE
    assert merged.config.intermediate_size == 32


def test_models_of_others_are_not_folded():
    own = nn.Sequential(nn.Linear(4, 4))
    model = get_peft_model(
        own, SFAConfig(external_width=2, external_modules=["0"], target_modules=[], init_weights=False)
    )
    with pytest.warns(ExternalsKeptWarning, match="only adapters without filters"):
        model.merge_and_unload()
    layers = nn.Sequential(tiny.vit().layers[0])
    model = get_peft_model(
        layers, SFAConfig(external_width=2, external_conv=0, internal_density=0.0, init_weights=False)
    )
    with pytest.warns(ExternalsKeptWarning, match="no model of transformers around it has a config"):
        model.merge_and_unload()


def test_a_backbone_in_a_module_of_the_user_is_folded():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone = SwinBackbone(tiny.swin_config())

        def forward(self, x, **options):
            return self.backbone(x, **options)

    model = adapted(Own)
    expected = outputs(model)
    merged = model.merge_and_unload()
    assert merged.backbone.config.mlp_ratio > 4
    assert difference(outputs(merged), expected) < TOLERANCE


def test_folding_can_be_refused_and_required():
    with pytest.raises(ValueError, match="widen='always'"):
        adapted().merge_and_unload(widen="always")
    with pytest.warns(ExternalsKeptWarning, match="widen=False"):
        merged = adapted().merge_and_unload(widen=False)
    assert merged.config.intermediate_size == 32
    with pytest.warns(ExternalsKeptWarning, match=r"zeros would add [\d,]+ parameters, \d+% of the MLPs'"):
        adapted(tiny.dinov2).merge_and_unload()


def test_a_warning_that_is_an_error_leaves_the_adapter():
    model = adapted(external_places=["attention", "mlp_parallel"])
    before, expected = tiny.state(model), outputs(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error", ExternalsKeptWarning)
        with pytest.raises(ExternalsKeptWarning):
            model.merge_and_unload()
    assert tiny.same_state(tiny.state(model), before)
    assert model.get_base_model().config.intermediate_size == 32
    assert torch.equal(outputs(model), expected)


def test_a_model_with_kept_adapters_can_be_copied_pickled_and_read(tmp_path):
    model = adapted(external_places=["attention", "mlp_parallel"])
    expected = outputs(copy.deepcopy(model))  # transformers' hooks for hidden states cannot be pickled
    with pytest.warns(ExternalsKeptWarning):
        merged = model.merge_and_unload(widen=False)
    for other in (copy.deepcopy(merged), _pickled(merged, tmp_path)):
        assert difference(outputs(other), expected) < TOLERANCE
        assert other.state_dict().keys() == merged.state_dict().keys()
        with pytest.raises(ValueError, match="Save the adapter itself"):
            other.save_pretrained(tmp_path / "merged")
    with pytest.raises(ValueError, match="Save the adapter itself"):
        merged.vit.save_pretrained(tmp_path / "backbone")


def _pickled(model, folder):
    torch.save(model, folder / "model.pt")
    return torch.load(folder / "model.pt", weights_only=False)


def test_models_without_adapters_are_saved_as_ever(tmp_path):
    base = vit_classifier()
    assert difference(outputs(loaded(base, tmp_path)), outputs(base)) < TOLERANCE


def test_a_dropout_is_inactive_while_folding():
    model = adapted(external_dropout=0.5).train()
    expected = outputs(copy.deepcopy(model))
    merged = model.merge_and_unload()
    assert difference(outputs(merged), expected) < TOLERANCE


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    make=st.sampled_from([bare_swin, vit_classifier, tiny.dinov3, bare_dinov2]),
    places=st.sets(st.sampled_from(["attention", "mlp", "mlp_parallel", "block"]), min_size=1),
    sizes=st.one_of(
        st.fixed_dictionaries({"budget": st.floats(0.05, 0.3), "external_share": st.floats(0.1, 1)}),
        st.fixed_dictionaries({"external_width": st.integers(1, 9), "internal_density": st.floats(0, 0.3)}),
    ),
    scale=st.sampled_from([1.0, -0.3, 2.0]),
    excluded=st.sampled_from([None, ["0.mlp.fc2", "0.layer_scale2"]]),
    widen=st.sampled_from([True, "auto", False]),
)
def test_every_merged_model_computes_the_same_and_is_saved_whole_or_not(
    tmp_path_factory, make, places, sizes, scale, excluded, widen
):
    config = SFAConfig(
        external_places=sorted(places),
        external_scale=scale,
        external_conv=0,
        exclude_modules=excluded,
        init_weights=False,
        **sizes,
    )
    model = get_peft_model(disturbed(make()), config).eval()
    expected = outputs(model)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", ExternalsKeptWarning)
        merged = model.merge_and_unload(widen=widen)
    assert difference(outputs(merged), expected) < TOLERANCE
    if any(w.category is ExternalsKeptWarning for w in told):
        with pytest.raises(ValueError, match="Save the adapter itself"):
            merged.save_pretrained("nowhere")
    else:
        assert difference(outputs(loaded(merged, tmp_path_factory.mktemp("merged"))), expected) < TOLERANCE

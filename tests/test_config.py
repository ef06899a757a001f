import copy
import dataclasses
import json
import pickle

import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from torch import nn

import tiny
from sfa_peft import RecordedConfig, SFAConfig


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("budget", 0),
        ("budget", -3),
        ("budget", 0.0),
        ("budget", 1.0),
        ("budget", 1.5),
        ("budget", float("nan")),
        ("budget", "2%"),
        ("budget", True),
        ("external_share", -0.1),
        ("external_share", 1.1),
        ("external_share", None),
        ("external_share", "auto"),
        ("external_places", ["attention", "head"]),
        ("external_places", ["mlp", "mlp"]),
        ("external_places", "mlp"),
        ("external_modules", [3]),
        ("external_modules", "("),
        ("external_width", -1),
        ("external_width", 1.5),
        ("external_width", "wide"),
        ("external_width", {"(": 3}),
        ("external_width", {"fc2": -3}),
        ("external_activation", "swish"),
        ("external_dropout", 1.0),
        ("external_scale", 0),
        ("external_scale", float("inf")),
        ("target_modules", "("),
        ("target_modules", [""]),
        ("exclude_modules", "("),
        ("internal_density", 1.5),
        ("internal_granularity", "tile"),
        ("initial_ticket", "lottery"),
        ("ticket_seed", 0.5),
        ("init_weights", "yes"),
        ("layers_pattern", "layer"),
        ("layers_to_transform", "x"),
        ("modules_to_save", "decode_head"),
        ("modules_to_save", [""]),
    ],
)
def test_a_bad_value_names_its_field_and_itself(field, value):
    with pytest.raises(ValueError, match=field) as error:
        SFAConfig(**{field: value})
    parts = value if isinstance(value, list) else [value]
    assert all(repr(part) in str(error.value) for part in parts)


@pytest.mark.parametrize("explicit", [{"external_width": 4}, {"internal_density": 0.1}])
def test_budget_and_explicit_sizes_exclude_each_other(explicit):
    with pytest.raises(ValueError, match=f"budget=0.02 and {next(iter(explicit))}"):
        SFAConfig(budget=0.02, **explicit)


def test_without_any_size_the_budget_is_the_documented_default():
    assert SFAConfig().budget == 0.02
    assert SFAConfig(external_width=4).budget is None


def test_config_survives_a_file(tmp_path):
    config = SFAConfig(
        budget=1234,
        external_places=["mlp"],
        target_modules=["fc1", "fc2"],
        exclude_modules=["blocks.0"],
        internal_granularity="row",
        modules_to_save=["decode_head"],
    )
    config.save_pretrained(tmp_path)
    again = PeftConfig.from_pretrained(tmp_path)
    assert type(again) is SFAConfig
    assert again == config == SFAConfig.from_pretrained(tmp_path)


def test_the_config_of_an_adapter_survives_a_file_and_copies(tmp_path):
    config = get_peft_model(tiny.swin(), SFAConfig()).peft_config["default"]
    config.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["format_version"] == 1
    for again in (
        PeftConfig.from_pretrained(tmp_path),
        SFAConfig.from_pretrained(tmp_path),
        copy.deepcopy(config),
        pickle.loads(pickle.dumps(config)),
        dataclasses.replace(config),
        RecordedConfig(**config.to_dict()),
    ):
        assert type(again) is RecordedConfig
        assert again == config


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("format_version", 99),
        ("ticket_sizes", {"a.weight": -1}),
        ("ticket_sizes", None),
        ("external_widths", {"mlp": {"a": 0}}),
        ("external_widths", {"head": {"a": 1}}),
        ("base_fingerprint", {"roots": []}),
        ("weights_digest", 3),
    ],
)
def test_a_bad_recorded_value_names_its_field(field, value):
    fields = get_peft_model(tiny.swin(), SFAConfig()).peft_config["default"].to_dict()
    with pytest.raises(ValueError, match=field):
        RecordedConfig(**fields | {field: value})


def test_what_is_recorded_is_no_field_of_the_users_config():
    with pytest.raises(TypeError, match="ticket_sizes"):
        SFAConfig(ticket_sizes={})


def refused(model, match, **options):
    before, modules = tiny.state(model), [(n, type(m), m.training) for n, m in model.named_modules()]
    trainable = [p.requires_grad for p in model.parameters()]
    with pytest.raises(ValueError, match=match):
        get_peft_model(model, SFAConfig(**options))
    assert tiny.same_state(tiny.state(model), before)
    assert [(n, type(m), m.training) for n, m in model.named_modules()] == modules
    assert [p.requires_grad for p in model.parameters()] == trainable
    assert not any(m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize(
    ("match", "options"),
    [
        (r"one hidden unit of the cheapest costs 66", {"budget": 20, "external_share": 0.5}),
        (r"budget=10\*\*9|larger than the backbone", {"budget": 10**9}),
        (r"less than one parameter", {"budget": 1e-9}),
        (r"targets have only", {"budget": 0.99, "external_share": 0.0}),
        (r"target_modules=\['nothing'\] matches no module", {"target_modules": ["nothing"]}),
        (
            r"modules_to_save.*exclude all of them",
            {"target_modules": ["classifier"], "modules_to_save": ["decode_head"]},
        ),
        (r"external_modules=\['nothing'\] matches no module", {"external_modules": ["nothing"]}),
        (r"external_modules matches '.*mlp', a SwinMLP with submodules", {"external_modules": ["mlp"]}),
        (r"its channel width is not known", {"external_modules": ["activation_fn"]}),
        (r"target_modules matches '.*mlp', a SwinMLP", {"target_modules": ["blocks.0.mlp"]}),
        (r"the pattern 'fc9' matches no place", {"external_width": {"fc9": 4}}),
        (r"leaves no place", {"budget": 0.1, "exclude_modules": ["o_proj", "fc2"]}),
        (
            r"every width and the density are 0",
            {"external_modules": [], "internal_density": 1e-9},
        ),
        (r"leaves nothing to adapt", {"budget": 0.1, "external_modules": [], "target_modules": []}),
    ],
)
def test_a_config_that_does_not_fit_leaves_the_model_untouched(match, options):
    refused(tiny.swin(), match, **options)


def test_an_unknown_architecture_needs_names():
    def model():
        return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))

    refused(model(), "no block of a known architecture.*target_modules")
    refused(model(), "external_modules", external_width=2, internal_density=0.1, target_modules=["0"])
    with pytest.warns(UserWarning, match="internal only.*external_modules"):
        adapted = get_peft_model(model(), SFAConfig(budget=30, target_modules=["0"]))
    assert sum(p.numel() for p in adapted.parameters() if p.requires_grad) == 30
    adapted = get_peft_model(model(), SFAConfig(budget=40, target_modules=["0"], external_modules=["2"]))
    assert sum(p.numel() for p in adapted.parameters() if p.requires_grad) == 40


def test_functional_use_of_a_leaf_is_refused():
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2)})
    refused(model, "uses its parameters without calling", target_modules=["out_proj"], external_modules=[])


def test_a_linear_with_a_forward_of_its_own_takes_no_internal_adapter():
    class Scaled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    refused(nn.Sequential(Scaled(4, 4)), "keep their forward", target_modules=["0"], external_modules=[])


def test_leaves_of_another_method_are_refused():
    model = get_peft_model(tiny.swin(), LoraConfig(target_modules=["fc1"])).base_model.model
    refused(model, "another PEFT method", target_modules=["fc1"], external_modules=[])


def test_one_config_object_serves_several_models():
    config = SFAConfig(budget=0.1, initial_ticket="random")
    first = get_peft_model(tiny.swin(), config)
    assert type(config) is SFAConfig
    assert config == SFAConfig(budget=0.1, initial_ticket="random")
    second = get_peft_model(tiny.dinov2(), config)
    assert first.peft_config["default"].ticket_sizes != second.peft_config["default"].ticket_sizes


@pytest.mark.parametrize("part", ["all of it", "its backbone"])
def test_a_compiled_model_is_refused_since_its_modules_have_other_names(part, tmp_path):
    get_peft_model(tiny.dinov2(), SFAConfig()).save_pretrained(tmp_path)

    def compiled():
        model = tiny.dinov2()
        if part == "all of it":
            return torch.compile(model)
        model.backbone = torch.compile(model.backbone)
        return model

    for inject in (
        lambda: get_peft_model(compiled(), SFAConfig()),
        lambda: PeftModel.from_pretrained(compiled(), tmp_path),
    ):
        with pytest.raises(ValueError, match=r"is compiled.*_orig_mod.*torch.compile\(get_peft_model\(model, config"):
            inject()
    in_place = tiny.dinov2()
    in_place.compile()
    assert get_peft_model(in_place, SFAConfig()).peft_config["default"].ticket_sizes

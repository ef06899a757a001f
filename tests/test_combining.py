"""`add_weighted_adapter`."""

import pytest
import torch
from peft import PeftModel, get_peft_model

import tiny
from adapters import alone, disturb
from sfa_peft import SFAConfig


def two_adapters(first=None, **second):
    first = {"budget": 0.1, "external_conv": 0, "external_scale": 0.5} | (first or {})
    second = {"budget": 0.07, "external_conv": 0, "initial_ticket": "random", "external_scale": 2.0} | second
    model = get_peft_model(tiny.swin(), SFAConfig(**first), adapter_name="a")
    model.add_adapter("b", SFAConfig(**second))
    for name in ("a", "b"):
        disturb(model, name)
    return model.eval()


def test_the_sum_of_two_is_what_both_active_adapters_compute():
    model = two_adapters()
    x = tiny.pixels()
    model.base_model.set_adapter(["a", "b"])
    both = tiny.output(model, x)
    model.base_model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "sum")
    torch.testing.assert_close(alone(model, "sum", x), both, atol=1e-5, rtol=1e-4)


def test_adapters_at_several_places_of_a_leaf_are_combined_place_by_place(tmp_path):
    model = two_adapters({"external_places": ["mlp_parallel", "block"]}, external_places=["mlp", "block"])
    x = tiny.pixels()
    model.base_model.set_adapter(["a", "b"])
    both = tiny.output(model, x)
    model.base_model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "sum")
    torch.testing.assert_close(alone(model, "sum", x), both, atol=1e-5, rtol=1e-4)
    assert set(model.peft_config["sum"].external_widths) == {"mlp", "mlp_parallel", "block"}
    model.save_pretrained(tmp_path, selected_adapters=["sum"])
    loaded = PeftModel.from_pretrained(tiny.swin(), tmp_path / "sum")
    assert torch.equal(tiny.output(loaded, x), alone(model, "sum", x))


def test_one_adapter_of_weight_one_is_a_copy():
    model = two_adapters()
    x = tiny.pixels()
    model.base_model.add_weighted_adapter(["a"], [1.0], "copy")
    torch.testing.assert_close(alone(model, "copy", x), alone(model, "a", x))


@pytest.mark.parametrize("places", [["attention", "mlp"], ["mlp_parallel"], ["block"], []])
def test_deltas_are_weighted_on_the_union_of_the_tickets(places):
    model = two_adapters(external_places=places)
    model.base_model.add_weighted_adapter(["a", "b"], [0.7, -0.3], "c")
    layers = [m for m in model.modules() if hasattr(m, "get_delta_weight") and "c" in m.sfa_internal]
    assert layers
    for layer in layers:
        expected = 0.7 * layer.get_delta_weight("a") - 0.3 * layer.get_delta_weight("b")
        torch.testing.assert_close(layer.get_delta_weight("c"), expected)


def test_widths_are_concatenated_and_weighted():
    model = two_adapters({"external_places": ["attention"]}, external_places=["attention", "mlp"])
    model.base_model.add_weighted_adapter(["a", "b"], [0.7, -0.3], "c")
    layers = [m for m in model.modules() if getattr(m, "sfa_external", None) and "a" in m.sfa_external]
    assert layers
    for layer in layers:
        a, b, c = (layer.sfa_external[name] for name in "abc")
        y = torch.randn(3, c.up.weight.shape[0])
        assert c.width == a.width + b.width
        torch.testing.assert_close(c(y), 0.7 * a(y) - 0.3 * b(y), atol=1e-6, rtol=1e-4)


def test_a_combined_adapter_is_saved_and_loaded(tmp_path):
    model = two_adapters()
    x = tiny.pixels()
    model.base_model.add_weighted_adapter(["a", "b"], [0.5, 0.5], "c")
    expected = alone(model, "c", x)
    model.save_pretrained(tmp_path, selected_adapters=["c"])
    loaded = PeftModel.from_pretrained(tiny.swin(), tmp_path / "c")
    assert torch.equal(tiny.output(loaded, x), expected)


def test_the_new_adapter_is_frozen_and_not_active_and_an_old_name_is_left_alone():
    model = two_adapters()
    active = list(model.active_adapters)
    model.base_model.add_weighted_adapter(["a", "b"], [1, 2], "c")
    assert list(model.active_adapters) == active
    assert not any(p.requires_grad for n, p in model.named_parameters() if ".c." in n)
    before = tiny.state(model)
    model.base_model.add_weighted_adapter(["a"], [3], "c")
    assert tiny.same_state(before, tiny.state(model))


@pytest.mark.parametrize(
    ("match", "second", "adapters", "weights"),
    [
        ("does not exist", {}, ["a", "nobody"], [1, 1]),
        ("as many weights", {}, ["a", "b"], [1]),
        ("at least one", {}, [], []),
        ("twice", {}, ["a", "a"], [1, 1]),
        ("external_activation", {"external_activation": "relu"}, ["a", "b"], [1, 1]),
        ("internal_granularity", {"internal_granularity": "row"}, ["a", "b"], [1, 1]),
    ],
)
def test_what_cannot_be_combined_is_refused_and_changes_nothing(match, second, adapters, weights):
    model = two_adapters(**second)
    before = tiny.state(model)
    with pytest.raises(ValueError, match=match):
        model.base_model.add_weighted_adapter(adapters, weights, "c")
    assert tiny.same_state(before, tiny.state(model))
    assert list(model.peft_config) == ["a", "b"]


def test_another_combination_type_is_refused():
    with pytest.raises(ValueError, match="combination_type"):
        two_adapters().base_model.add_weighted_adapter(["a", "b"], [1, 1], "c", combination_type="svd")


def test_one_head_is_taken_over_and_two_are_refused():
    heads = {"modules_to_save": ["decode_head"]}
    model = get_peft_model(tiny.swin(), SFAConfig(budget=0.1, **heads), adapter_name="a")
    model.add_adapter("b", SFAConfig(budget=0.1))
    model.add_adapter("with_head", SFAConfig(budget=0.1, **heads))
    for name in ("a", "b", "with_head"):
        disturb(model, name)
    model.base_model.add_weighted_adapter(["b", "a"], [0.0, 1.0], "c")
    torch.testing.assert_close(
        alone(model, "c", tiny.pixels()), alone(model, "a", tiny.pixels()), atol=1e-5, rtol=1e-4
    )
    with pytest.raises(ValueError, match="modules_to_save"):
        model.base_model.add_weighted_adapter(["a", "with_head"], [1, 1], "d")


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"target_modules": ["fc1"]}, {"target_modules": ["fc2"]}),
        ({}, {"target_modules": "all-linear"}),
        ({"target_modules": []}, {}),
        ({"layers_to_transform": [0], "layers_pattern": "layers"}, {"exclude_modules": ["fc1"]}),
        ({"external_share": 1.0}, {"external_places": []}),
        ({}, {"external_activation": "relu", "external_places": ["mlp"]}),
    ],
)
@pytest.mark.parametrize("turned", [False, True])
def test_adapters_of_different_targets_are_combined_saved_and_loaded(one, other, turned, tmp_path):
    if "external_activation" in other:
        one = one | {"external_places": []}
    model = get_peft_model(tiny.swin(), SFAConfig(**{"budget": 0.05} | one), adapter_name="a")
    model.add_adapter("b", SFAConfig(**{"budget": 0.05} | other))
    for name in ("a", "b"):
        disturb(model, name)
    model.eval().base_model.set_adapter(["a", "b"])
    both = tiny.output(model)
    model.base_model.add_weighted_adapter(["b", "a"] if turned else ["a", "b"], [1.0, 1.0], "c")
    expected = alone(model, "c", tiny.pixels())
    torch.testing.assert_close(expected, both, atol=1e-5, rtol=1e-4)
    model.save_pretrained(tmp_path, selected_adapters=["c"])
    loaded = PeftModel.from_pretrained(tiny.swin(), tmp_path / "c")
    assert torch.equal(tiny.output(loaded), expected)
    model.delete_adapter("a")
    model.delete_adapter("b")
    assert torch.equal(tiny.output(model), expected)
    model.base_model.add_weighted_adapter(["c"], [0.5], "half_of_it")


@pytest.mark.parametrize("weight", [None, "1", float("nan"), float("inf")])
def test_weights_are_finite_numbers(weight):
    model = two_adapters()
    with pytest.raises(ValueError, match="finite numbers"):
        model.base_model.add_weighted_adapter(["a"], [weight], "c")
    assert list(model.peft_config) == ["a", "b"]

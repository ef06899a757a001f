"""Blocks that no adapter changes run once for several adapters."""

import copy

import pytest
import torch
from peft import get_peft_model

import tiny
from sfa_peft import SFAConfig, shared_trunk

LAST = {"swin": [1], "dinov2": [3, 4]}  # of two blocks in each of two stages; of five


def tasks(kind, *layers, **options):
    """A model with an adapter for each of `layers`, which do something."""
    base = tiny.swin() if kind == "swin" else tiny.dinov2(num_hidden_layers=5, out_features=["stage2", "stage5"])
    model = None
    for place, own in enumerate(layers):
        torch.manual_seed(place)
        config = SFAConfig(budget=0.05, layers_to_transform=own, init_weights=False, **options)
        if model is None:
            model = get_peft_model(base, config, "task_0")
        else:
            model.add_adapter(f"task_{place}", config)
    return model.eval()


def outputs(model, x):
    found = []
    for name in model.peft_config:
        model.set_adapter(name)
        found.append(model(x).logits)
    return found


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("swin", {"target_modules": r".*encoder\.layers\.1\.blocks\..*(q_proj|v_proj|fc1|fc2)"}),
        ("dinov2", {}),
        ("dinov2", {"external_places": ("attention", "mlp_parallel")}),
        ("dinov2", {"external_places": ("block",)}),
    ],
)
@torch.no_grad()
def test_the_outputs_are_those_of_single_runs_and_the_trunk_runs_once(kind, options):
    last = None if "target_modules" in options else LAST[kind]
    if kind == "swin":
        options |= {"external_modules": r".*encoder\.layers\.1\.blocks\.1\.mlp\.fc2"}
    model = tasks(kind, last, last, last, **options)
    x, other = tiny.pixels(), tiny.pixels(seed=1)
    expected, of_other = outputs(model, x), outputs(model, other)
    assert not torch.equal(expected[0], expected[1])
    before = tiny.state(model)
    with shared_trunk(model) as shared:
        runs = []
        inner = {name: model.get_submodule(name).forward for name in shared}
        for kept in inner.values():
            own = kept.forward
            kept.forward = lambda *args, own=own, **kwargs: runs.append(1) or own(*args, **kwargs)
        for again in (x, x.clone()):  # the same image, also as a copy
            assert all(map(torch.equal, outputs(model, again), expected))
        called = [name for name in shared if inner[name].output is not None]
        assert len(runs) == len(called) > 1
        assert all(map(torch.equal, outputs(model, other), of_other))
        assert all(map(torch.equal, outputs(model, x), expected))
    assert all("forward" not in vars(module) for module in model.modules())
    assert tiny.same_state(tiny.state(model), before)
    assert all(map(torch.equal, outputs(model, x), expected))


@torch.no_grad()
def test_an_image_that_is_changed_in_place_is_another_one():
    model = tasks("dinov2", LAST["dinov2"])
    x, other = tiny.pixels(), tiny.pixels(seed=1)
    expected = model(other).logits
    with shared_trunk(model):
        model(x)
        x.copy_(other)
        assert torch.equal(model(x).logits, expected)


def test_adapters_of_other_depths_share_what_all_leave_alone():
    model = tasks("dinov2", [4], [2, 3, 4])
    with shared_trunk(model) as shared:
        blocks = [name for name in shared if ".layer." in name]
    assert [name.rpartition(".")[2] for name in blocks][:2] == ["0", "1"]
    assert not [name for name in blocks if ".layer.3" in name or ".layer.4" in name]


def test_where_nothing_can_be_shared_it_is_told():
    with (
        pytest.raises(ValueError, match=r"changes the first one, in '.*layer\.0.*layers_to_transform"),
        shared_trunk(tasks("dinov2", [4], None)),
    ):
        pass
    with pytest.raises(ValueError, match=r"model\.eval\(\)"), shared_trunk(tasks("dinov2", [4]).train()):
        pass
    with pytest.raises(ValueError, match="has no SFA adapter"), shared_trunk(tiny.swin()):
        pass
    model = tasks("dinov2", [4])
    with (
        pytest.raises(RuntimeError, match=r"use torch\.no_grad"),
        torch.inference_mode(),
        shared_trunk(model),
    ):
        model(tiny.pixels())
    assert all("forward" not in vars(module) for module in model.modules())
    copy.deepcopy(model)

"""Running statistics of the base's norms do not move under an adapter; those of its heads do, and are saved."""

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from torch import nn

import tiny
from sfa_peft import SFAConfig, search_ticket

PART_OF_A_HEAD = ["decode_head.classifier"]


def statistics(model, mark="running_"):
    return {name: b.clone() for name, b in model.named_buffers() if mark in name}


def base_statistics(model):
    return {name: b for name, b in statistics(model).items() if "modules_to_save" not in name}


def assert_equal(a, b):
    assert a.keys() == b.keys()
    assert {name for name in a if not torch.equal(a[name], b[name])} == set()


@pytest.mark.parametrize("make", [tiny.swin, tiny.dinov2])
def test_part_of_a_head_is_loaded_as_it_was_trained(make, tmp_path):
    base = make()
    model = get_peft_model(copy.deepcopy(base), SFAConfig(budget=0.05, modules_to_save=PART_OF_A_HEAD))
    search_ticket(model, [tiny.batch(seed=seed) for seed in range(3)], steps=3, progress=False)
    tiny.train(model, steps=5)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert torch.equal(tiny.output(again), tiny.output(model))
    with model.disable_adapter():
        assert torch.equal(tiny.output(model), tiny.output(base))
    assert tiny.same_state(model.unload().state_dict(), base.state_dict())


def test_a_head_that_is_saved_whole_moves_its_own_statistics(tmp_path):
    base = tiny.swin()
    model = get_peft_model(copy.deepcopy(base), SFAConfig(budget=0.05, modules_to_save=["decode_head"]))
    first = statistics(model)
    tiny.train(model)
    moved = {name for name, own in statistics(model).items() if not torch.equal(own, first[name])}
    assert moved == {name for name in first if "modules_to_save.default" in name}
    assert_equal(base_statistics(model), {name: first[name] for name in base_statistics(model)})


def test_a_second_head_is_as_free_as_the_first():
    model = get_peft_model(tiny.swin(), SFAConfig(budget=0.05))
    for name, heads in (("norms", ["batch_norm"]), ("head", ["decode_head.classifier", "batch_norm"])):
        model.add_adapter(name, SFAConfig(budget=0.05, modules_to_save=heads))
        model.set_adapter(name)
        before = statistics(model, f"modules_to_save.{name}.running_mean")
        assert before
        tiny.train(model)
        after = statistics(model, f"modules_to_save.{name}.running_mean")
        assert not any(torch.equal(before[key], after[key]) for key in before)


def test_a_pretrained_head_can_be_adapted_with_its_norms_left_as_they_are(tmp_path):
    model = get_peft_model(tiny.swin(), SFAConfig(budget=0.1, target_heads=["decode_head"]))
    tiny.train(model).save_pretrained(tmp_path)
    assert torch.equal(tiny.output(PeftModel.from_pretrained(tiny.swin(), tmp_path)), tiny.output(model))


@pytest.mark.parametrize(
    "restore",
    [
        lambda model: model.unload(),
        lambda model: model.merge_and_unload(),
        lambda model: (model.delete_adapter("default"), model.base_model.model)[1],
    ],
    ids=["unload", "merge_and_unload", "delete_adapter"],
)
def test_without_adapters_statistics_move_again(restore):
    base = restore(get_peft_model(tiny.swin(), SFAConfig(budget=0.05)))
    before = statistics(base)
    base.train()(**tiny.batch())
    assert not any(torch.equal(before[name], own) for name, own in statistics(base).items())


def test_without_a_peft_model_as_well():
    model = inject_adapter_in_model(SFAConfig(budget=0.05), tiny.swin())
    before = statistics(model)
    model.train()(**tiny.batch())
    assert_equal(before, statistics(model))


def test_every_kind_of_norm_with_statistics():
    base = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.InstanceNorm2d(4, track_running_stats=True))
    model = get_peft_model(base, SFAConfig(internal_density=0.1, target_modules=["0"], external_modules=[]))
    before = statistics(model)
    model.train()(torch.randn(2, 3, 5, 5))
    assert_equal(before, statistics(model))


def test_other_methods_move_them():
    model = get_peft_model(tiny.swin(), LoraConfig(target_modules=["q_proj"]))
    before = statistics(model)
    model.train()(**tiny.batch())
    assert not any(torch.equal(before[name], own) for name, own in statistics(model).items())

"""Damaged and forged adapters are refused with one kind of error, and leave the model as it was."""

from dataclasses import replace

import pytest

from fuzz_attacks import KINDS
from fuzz_runner import World, run
from fuzz_saves import kill, race, swaps

from fuzz_checkpoints import CHANGES, fuzz

LEAF = "base_model.model.backbone.swin.encoder.layers.0.blocks.0.mlp.fc1"
HEAD = "base_model.model.decode_head.classifier"


def test_five_hundred_damaged_adapters():
    ends, failures = fuzz(count=500, seed=0)
    assert not failures, failures[:5]
    for kind in CHANGES:
        assert ends[f"{kind}: refused"] > 50


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return World(tmp_path_factory.mktemp("world"))


def failures(world, kind, name, *ways):
    """What is wrong when the file of this kind and name is loaded by these ways, or by all."""
    (attack,) = [one for one in KINDS[kind](world, 0, 10) if one.name == name]
    results = run(world, replace(attack, ways=ways or attack.ways), kill_after=2.5)
    return [str(result) for result in results if result.failure]


def held(*arguments):
    return pytest.param(arguments, id="-".join(arguments[:2]))


FILES = [
    held("good", "elements", "from_pretrained", "load_adapter", "transformers", "auto", "verify"),
    held("good", "a ticket"),
    held("good", "a search"),
    held("extra", f"{LEAF}.base_layer.weight (sealed)", "from_pretrained", "verify"),
    held("extra", f"{LEAF}.base_layer.weight (unsealed)", "load_adapter"),
    held("extra", "base_model.model.backbone.swin.layernorm.weight (sealed)", "hotswap", "state_dict"),
    held("extra", "base_model.model.decode_head.bottleneck.batch_norm.running_mean (sealed)", "transformers"),
    held("extra", f"{HEAD}.original_module.weight (sealed)", "from_pretrained"),
    held("extra", f"{HEAD}.modules_to_save.default.weight (sealed)", "load_adapter"),
    held("missing", f"{HEAD}.bias (sealed)", "hotswap", "state_dict"),
    held("missing", f"{HEAD}.bias (sealed)", "from_pretrained"),
    held("patterns", "exclude_modules: ( (forged)", "from_pretrained"),
    held("patterns", "exclude_modules: slow (forged)", "from_pretrained"),
    held("patterns", "external_modules: 5,000 brackets (edited)", "from_pretrained"),
    held("fields", "exclude_modules: nested lists (edited)", "from_pretrained", "transformers"),
    held("fields", "ticket_sizes: surrogate (forged)", "from_pretrained"),
    held("texts", "deep lists", "from_pretrained"),
    held("texts", "deep objects", "hotswap", "transformers"),
    held("bombs", 'a seal of 60 MB of {"":0}', "config"),
    held("bombs", "262,144,000 empty rows (sealed)", "from_pretrained"),
    held("bombs", "a ticket of 262,144,000 positions"),
    held("bombs", "2.6e10 rows, coded by zeros (sealed)", "from_pretrained"),
    held("bombs", "a width of 1,000,000,000 without bytes (forged)", "from_pretrained"),
    held("dtypes", "offsets: overlap", "from_pretrained"),
    held("dtypes", "classifier.bias as C64", "from_pretrained"),
    held("paths", "adapter_model.safetensors: a pipe", "from_pretrained"),
    held("paths", "adapter_model.safetensors: a folder", "from_pretrained"),
    held("shapes", "Infinity (elements)", "from_pretrained", "inspect"),
    held("search", "losses: a number"),
]


@pytest.mark.parametrize("arguments", FILES)
def test_a_file_that_was_made_to_do_harm(world, arguments):
    assert failures(world, *arguments) == []


def test_a_load_during_saves_gets_one_of_them_whole(world):
    results = swaps(world) + race(world, seconds=2)
    assert len(results) > 8
    assert [str(result) for result in results if result.failure] == []


@pytest.mark.parametrize("below", ["SFA", "LoRA"])
def test_a_killed_save_leaves_the_old_adapter_or_the_new_one(world, below):
    results = kill(world, [below])
    assert any(result.case.endswith("not killed") for result in results)
    assert [str(result) for result in results if result.failure] == []

"""Damaged adapters are refused with one kind of error, and leave the model as it was."""

from fuzz_checkpoints import CHANGES, fuzz


def test_five_hundred_damaged_adapters():
    ends, failures = fuzz(count=500, seed=0)
    assert not failures, failures[:5]
    for kind in CHANGES:
        assert ends[f"{kind}: refused"] > 50

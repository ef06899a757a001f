"""The coding of positions: exact, near the entropy bound, and safe on any bytes."""

from math import lgamma, log

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sfa_peft.checkpoint.coding import CHUNK, CodeError, decode_positions, encode_positions


def bound(units, count):
    """log2 C(units, count) in bytes."""
    return (lgamma(units + 1) - lgamma(count + 1) - lgamma(units - count + 1)) / log(2) / 8


def random_positions(units, count, seed=0):
    chosen = np.random.default_rng(seed).choice(units, count, replace=False)
    return torch.from_numpy(np.sort(chosen))


@settings(deadline=None, max_examples=200)
@given(st.sets(st.integers(0, 1 << 34), max_size=200), st.integers(0, 5))
def test_any_positions_come_back(chosen, more):
    positions = torch.tensor(sorted(chosen), dtype=torch.int64)
    units = (max(chosen) + 1 if chosen else 0) + more
    assert torch.equal(decode_positions(encode_positions(positions), len(positions), units), positions)


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 400), st.floats(0, 1), st.integers(0, 100))
def test_runs_and_holes_come_back(units, density, seed):
    rng = np.random.default_rng(seed)
    dense = np.repeat(rng.random(units) < density, rng.integers(1, 200, units))
    positions = torch.from_numpy(np.flatnonzero(dense))
    assert torch.equal(decode_positions(encode_positions(positions), len(positions), len(dense)), positions)


@pytest.mark.parametrize("density", [1e-4, 1e-3, 0.01, 0.03, 0.06, 0.12, 0.2, 0.23, 0.3, 0.35, 0.38, 0.42, 0.5])
@pytest.mark.parametrize("units", [1_000, 50_000, 2_000_000])
def test_the_code_is_near_the_entropy_bound(units, density):
    count = max(round(units * density), 1)
    code = encode_positions(random_positions(units, count))
    assert len(code) <= 1.02 * bound(units, count) + 9


@pytest.mark.parametrize("count", [CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK])
def test_chunks_join(count):
    units = 5 * count
    positions = random_positions(units, count)
    assert torch.equal(decode_positions(encode_positions(positions), count, units), positions)


def test_a_ticket_that_clusters_takes_less_than_the_bound():
    rng = np.random.default_rng(0)
    rows = rng.random((512, 1)) ** 6
    positions = torch.from_numpy(np.flatnonzero(rng.random((512, 2048)) < rows))
    assert len(encode_positions(positions)) < 0.9 * bound(512 * 2048, len(positions))


def test_bits_do_not_change_between_versions():
    """What was written once has to be read for ever: a code, byte by byte."""
    code = encode_positions(torch.tensor([3, 4, 9, 100, 101, 1000]))
    assert bytes(code.numpy()).hex() == "86810000414a200800016a970000"
    assert decode_positions(code, 6, 1001).tolist() == [3, 4, 9, 100, 101, 1000]


@settings(deadline=None, max_examples=500)
@given(st.binary(max_size=60), st.integers(0, 1000), st.integers(0, 5000))
def test_other_bytes_are_refused_or_give_valid_positions(data, count, units):
    code = torch.tensor(list(data), dtype=torch.uint8)
    try:
        positions = decode_positions(code, count, units)
    except CodeError:
        return
    assert len(positions) == count
    assert (positions[1:] > positions[:-1]).all()
    assert not count or (positions[0] >= 0 and positions[-1] < units)


@settings(deadline=None, max_examples=300)
@given(st.integers(1, 3000), st.floats(0.001, 1), st.data())
def test_flipped_bits_and_cut_codes_never_crash(units, density, data):
    count = max(round(units * density), 1)
    code = encode_positions(random_positions(units, count))
    kind = data.draw(st.sampled_from(["flip", "cut", "grow"]))
    if kind == "flip":
        code[data.draw(st.integers(0, len(code) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    elif kind == "cut":
        code = code[: data.draw(st.integers(0, len(code) - 1))]
    else:
        code = torch.cat([code, torch.zeros(data.draw(st.integers(1, 9)), dtype=torch.uint8)])
    try:
        positions = decode_positions(code, count, units)
    except CodeError:
        return
    assert kind == "flip"
    assert len(positions) == count
    assert positions[-1] < units


def test_absurd_counts_are_refused_without_memory():
    with pytest.raises(CodeError, match="cannot hold"):
        decode_positions(torch.zeros(3, dtype=torch.uint8), 1 << 40, 1 << 41)
    with pytest.raises(CodeError, match="cannot be among"):
        decode_positions(torch.zeros(3, dtype=torch.uint8), 11, 10)
    with pytest.raises(CodeError, match="left over"):
        decode_positions(torch.zeros(3, dtype=torch.uint8), 0, 10)

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sfa_peft.ticket.selection import choose, top_k, top_units

scores_of_many = st.lists(
    st.lists(st.floats(0, 2.0**100, width=32) | st.sampled_from([0.0, -0.0, 1.0, 1e-45]), min_size=1, max_size=40),
    min_size=1,
    max_size=6,
)


@settings(deadline=None, max_examples=300)
@given(lists=scores_of_many, data=st.data())
def test_top_k_is_the_stable_sort(lists, data):
    named = {f"p{i}": torch.tensor(values) for i, values in enumerate(lists)}
    total = sum(len(v) for v in named.values())
    k = data.draw(st.integers(0, total))
    chosen = top_k(named.items, k)
    flat = torch.cat(list(named.values()))
    expected = torch.sort(flat, descending=True, stable=True).indices[:k].sort().values
    offset, found = 0, []
    for name, values in named.items():
        assert chosen[name].dtype == torch.int32
        found.append(chosen[name].long() + offset)
        offset += len(values)
    assert torch.equal(torch.cat(found), expected)


def test_scores_of_any_shape_and_dtype():
    named = {"a": torch.tensor([[1.0, 3.0], [2.0, 0.0]], dtype=torch.bfloat16), "b": torch.tensor([2.5])}
    chosen = top_k(named.items, 2)
    assert chosen["a"].tolist() == [1]
    assert chosen["b"].tolist() == [0]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1.0])
def test_scores_must_be_finite_and_not_negative(bad):
    with pytest.raises(ValueError, match="scores of 'a' must be finite and not negative"):
        top_k({"a": torch.tensor([1.0, bad])}.items, 1)


def test_more_than_there_are():
    with pytest.raises(ValueError, match="cannot choose 3 of 2 positions"):
        top_k({"a": torch.tensor([1.0, 2.0])}.items, 3)


@settings(deadline=None, max_examples=200)
@given(
    units=st.dictionaries(
        st.sampled_from("abcd"), st.tuples(st.integers(1, 9), st.lists(st.floats(0, 9), min_size=1, max_size=8))
    ),
    budget=st.integers(0, 120),
)
def test_top_units_is_greedy_and_never_over_budget(units, budget):
    scores = {name: torch.tensor(values) for name, (_, values) in units.items()}
    sizes = {name: size for name, (size, _) in units.items()}
    chosen = top_units(scores, sizes, budget)
    every = sorted(
        ((-float(s), i, name, j) for i, name in enumerate(scores) for j, s in enumerate(scores[name])),
    )
    left, expected = budget, {name: [] for name in scores}
    for _, _, name, j in every:
        if sizes[name] <= left:
            left -= sizes[name]
            expected[name].append(j)
    assert {n: p.tolist() for n, p in chosen.items()} == {n: sorted(p) for n, p in expected.items()}


def test_a_row_is_a_neuron_with_its_bias():
    parameters = {
        "m": {"weight": torch.tensor([[1.0, 1.0], [3.0, 3.0], [2.0, 2.0]]), "bias": torch.tensor([9.0, 0.0, 2.0])},
        "n": {"weight": torch.tensor([[2.5, 2.5]])},
    }
    chosen = choose(parameters, lambda name, p: p, "row", 5)
    assert chosen["m"]["weight"].tolist() == chosen["m"]["bias"].tolist() == [0]
    assert chosen["n"]["weight"].tolist() == [0]

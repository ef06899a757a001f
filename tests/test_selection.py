import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sfa_peft.layers.granularity import Column, Element, Row
from sfa_peft.ticket import selection
from sfa_peft.ticket.quotas import Quotas, layer_of, type_of
from sfa_peft.ticket.selection import Limits, choose, top_k, top_units

numbers = st.floats(-(2.0**100), 2.0**100, width=32) | st.sampled_from([0.0, -0.0, 1.0, -1.0, 1e-45, -1e-45])
scores_of_many = st.lists(
    st.lists(numbers, min_size=1, max_size=40),
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


@settings(deadline=None, max_examples=200)
@given(lists=scores_of_many, data=st.data())
def test_a_parameter_larger_than_a_chunk_is_read_in_parts(lists, data):
    named = {f"p{i}": torch.tensor(values) for i, values in enumerate(lists)}
    k = data.draw(st.integers(0, sum(len(v) for v in named.values())))
    whole = top_k(named.items, k)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(selection, "CHUNK", 3)
        parts = top_k(named.items, k)
    assert all(torch.equal(parts[name], whole[name]) for name in named)


@settings(deadline=None, max_examples=500)
@given(
    lists=st.lists(st.lists(st.integers(-1, 1) | numbers, min_size=1, max_size=12), min_size=1, max_size=6),
    data=st.data(),
)
def test_limits_are_kept_and_the_rest_is_greedy(lists, data):
    """Against the plain greedy: each group's best up to its lower limit, then the best of all below the upper ones."""
    named = {f"{i % 3}.p{i}": torch.tensor([float(v) for v in values]) for i, values in enumerate(lists)}
    group_of = lambda name: name.partition(".")[0]  # noqa: E731
    sizes = {}
    for name, values in named.items():
        sizes[group_of(name)] = sizes.get(group_of(name), 0) + len(values)
    limits = {}
    for group, size in sizes.items():
        low = data.draw(st.integers(0, size))
        limits[group] = Limits(low, data.draw(st.integers(low, size + 2)))
    least = sum(x.low for x in limits.values())
    k = data.draw(st.integers(least, sum(min(limits[g].high, n) for g, n in sizes.items())))

    order = sorted(
        (-float(v), i, j, name) for i, (name, values) in enumerate(named.items()) for j, v in enumerate(values)
    )
    taken, counts = set(), dict.fromkeys(sizes, 0)
    for bound in (0, 1):
        for item in order:
            group = group_of(item[3])
            if item not in taken and counts[group] < limits[group][bound] and (bound == 0 or len(taken) < k):
                taken.add(item)
                counts[group] += 1
    expected = {name: sorted(j for _, _, j, n in taken if n == name) for name in named}
    assert {n: p.tolist() for n, p in top_k(named.items, k, group_of, limits).items()} == expected


def test_limits_that_cannot_be_kept():
    named = {"a": torch.rand(5), "b": torch.rand(5)}
    with pytest.raises(ValueError, match="allow at most 4 positions, but 5"):
        top_k(named.items, 5, lambda name: name, {"a": Limits(0, 2), "b": Limits(0, 2)})


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("granularity", [Element(), Row()])
def test_scores_must_be_finite(bad, granularity):
    with pytest.raises(ValueError, match=r"scores of 'm.weight' must be finite"):
        choose({"m": {"weight": torch.zeros(2, 2)}}, lambda n, p: torch.full((2, 2), bad), granularity, 2)


@pytest.mark.parametrize("k", [1, 7, 300, 1500])
@pytest.mark.parametrize("levels", [None, 40, 2])
@pytest.mark.parametrize("misleads", [0, 1, -1])
@pytest.mark.parametrize("sign", [1, -1])
def test_few_of_many_are_the_stable_sort(k, levels, misleads, sign, monkeypatch):
    """So few that a sample finds them, with ties, also where the sample has only the highest or the lowest scores."""
    monkeypatch.setattr(selection, "CHUNK", 5000)
    numbers = torch.randn(40_000, generator=torch.Generator().manual_seed(k))
    flat = numbers if levels is None else (levels * torch.rand(40_000)).floor()
    flat[:: selection.STRIDE] += 50 * misleads
    named = dict(zip("abcd", (sign * flat).split([17, 20_000, 1, 19_982]), strict=True))
    chosen = top_k(lambda: ((n, s.view(-1, 2) if len(s) > 100 else s) for n, s in named.items()), k)
    expected = torch.sort(sign * flat, descending=True, stable=True).indices[:k].sort().values
    offsets = {"a": 0, "b": 17, "c": 20_017, "d": 20_018}
    assert torch.equal(torch.cat([chosen[name].long() + offsets[name] for name in named]), expected)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("place", [0, 12_345])
def test_few_of_many_must_be_finite(bad, place):
    scores = torch.rand(20_000)
    scores[place] = bad
    with pytest.raises(ValueError, match="scores of 'a' must be finite"):
        top_k({"a": scores}.items, 10)


def test_the_highest_finite_numbers_are_finite():
    most = torch.finfo(torch.float32).max
    scores = torch.rand(20_000)
    scores[[5, 6]] = torch.tensor([most, -most])
    assert top_k({"a": scores}.items, 1)["a"].tolist() == [5]


def test_scores_that_change_are_noticed():
    with pytest.raises(ValueError, match="the same scores every time"):
        top_k(lambda: [("a", torch.rand(20_000))], 10)


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


@settings(deadline=None, max_examples=100)
@given(
    units=st.dictionaries(
        st.sampled_from("abcd"), st.tuples(st.integers(1, 9), st.lists(st.floats(0, 9), min_size=1, max_size=8))
    ),
    budget=st.integers(0, 120),
    low=st.integers(0, 20),
    high=st.integers(20, 60),
)
def test_units_keep_to_limits(units, budget, low, high):
    scores = {name: torch.tensor(values) for name, (_, values) in units.items()}
    sizes = {name: size for name, (size, _) in units.items()}
    chosen = top_units(scores, sizes, budget, lambda name: name, {name: Limits(low, high) for name in units})
    spent = {name: sizes[name] * len(positions) for name, positions in chosen.items()}
    assert sum(spent.values()) <= budget
    assert all(cost <= high for cost in spent.values())
    if budget >= low * len(units):
        # Nothing is left out of a group below its lower limit, if it would fit there.
        assert all(spent[n] + sizes[n] > low or len(chosen[n]) == len(scores[n]) for n in units)


WEIGHTS = {
    "m": {"weight": torch.tensor([[1.0, 1.0], [3.0, 3.0], [2.0, 2.0]]), "bias": torch.tensor([9.0, 0.0, 2.0])},
    "n": {"weight": torch.tensor([[2.5, 2.5]])},
}


def test_a_row_is_a_neuron_with_its_bias():
    chosen = choose(WEIGHTS, lambda name, p: p, Row(), 5)
    assert chosen["m"]["weight"].tolist() == chosen["m"]["bias"].tolist() == [0]
    assert chosen["n"]["weight"].tolist() == [0]


def test_columns_are_chosen_by_their_mean():
    scores = torch.zeros(4, 6)
    scores[:, 3] = 1.0
    scores[2:, 4:] = 5.0
    parameters = {"m": {"weight": scores}}
    assert choose(parameters, lambda n, p: p, Column(), 8)["m"]["weight"].tolist() == [4, 5]


@settings(deadline=None, max_examples=100)
@given(
    shape=st.tuples(st.integers(1, 7), st.integers(1, 7))
    | st.tuples(st.integers(1, 4), st.integers(1, 4), st.just(3)),
    granularity=st.sampled_from([Element(), Row(), Column()]),
    data=st.data(),
)
def test_units_are_disjoint_and_read_back_what_was_written(shape, granularity, data):
    count = granularity.count(shape)
    every = torch.arange(count)
    parameter = torch.zeros(shape, dtype=torch.int64)
    granularity.write(parameter, every, (every + 1).repeat_interleave(granularity.size(shape)))
    assert torch.bincount(parameter.reshape(-1), minlength=count + 1)[1:].tolist() == [granularity.size(shape)] * count
    some = torch.tensor(sorted(data.draw(st.sets(st.integers(0, count - 1)))) if count else [], dtype=torch.int64)
    values = granularity.read(parameter, some)
    assert values.shape == granularity.values_shape(shape, len(some))
    assert values.reshape(len(some), granularity.size(shape)).float().mean(1).tolist() == [float(i + 1) for i in some]
    scores = granularity.unit_scores(parameter.float()) if count else torch.zeros(0)
    assert scores.tolist() == [float(i + 1) for i in every]


def test_layers_and_types_of_names():
    swin = "backbone.encoder.layers.0.blocks.1.mlp.fc1"
    assert (layer_of(swin), type_of(swin)) == ("layers.0.blocks.1", "mlp.fc1")
    merging = "swin.encoder.layers.1.downsample.reduction"
    assert (layer_of(merging), type_of(merging)) == ("layers.1", "downsample.reduction")
    dino = "encoder.layer.11.attention.q_proj"
    assert (layer_of(dino), type_of(dino)) == ("layer.11", "attention.q_proj")
    assert (layer_of("encoder.layer.3.norm1"), type_of("encoder.layer.3.norm1")) == ("layer.3", "norm1")
    assert (layer_of("embeddings.norm"), type_of("embeddings.norm")) == ("other", "embeddings.norm")
    assert (layer_of("0"), type_of("0")) == ("other", "other")
    assert type_of("blocks.1.attention.output.dense") != type_of("blocks.1.output.dense")


def test_quotas_become_limits():
    sizes = {"x.layers.0.a": 10, "x.layers.0.b": 30, "x.layers.1.a": 60}
    assert Quotas(equal_density=True).limits(sizes, 11) == {"layers.0": (4, 4), "layers.1": (7, 7)}
    assert Quotas("type", floor=0.25, cap=0.75).limits(sizes, 20) == {"a": (5, 15), "b": (5, 15)}
    assert Quotas(floor=0.5).limits({"x.layers.0.a": 2, "x.layers.1.a": 60}, 10) == {
        "layers.0": (2, 2),
        "layers.1": (5, 10),
    }


@pytest.mark.parametrize(
    ("match", "options"),
    [
        ("Quotas.per='colour'", {"per": "colour"}),
        ("floor=0.5 and cap=0.2", {"floor": 0.5, "cap": 0.2}),
        ("Quotas.equal_density=True cannot be used", {"equal_density": True, "floor": 0.1}),
    ],
)
def test_bad_quotas(match, options):
    with pytest.raises(ValueError, match=match):
        Quotas(**options)


def test_quotas_that_no_ticket_can_keep():
    sizes = {f"layers.{i}.a": 100 for i in range(4)}
    with pytest.raises(ValueError, match=r"Quotas.floor=0.3 cannot be met: 4 groups \(layers\)"):
        Quotas(floor=0.3).check(sizes, 100)
    with pytest.raises(ValueError, match=r"Quotas.cap=0.2 cannot be met: .* at most 80"):
        Quotas(cap=0.2).check(sizes, 100)

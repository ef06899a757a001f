"""Exact selection of the k positions with the highest scores among all parameters, in bounded memory.

Float32 numbers sort like their bits read as integers, if the order of the negative ones is reversed. So radix
selection finds the k-th highest score: one histogram of the upper 16 bits of all scores, and one of the lower 16 bits
in the bin of the k-th score, give the exact threshold. A last pass takes all scores above the threshold, and of those
equal to it the first ones in position order. With quotas there is one histogram for each group, and a group at one of
its limits has a separate threshold.

A ticket is usually a small part of all positions. Then, without quotas, two passes are enough: the histogram of a
sample gives a score a little below the k-th highest one, and few scores are above it.

The scores of a parameter are computed once per pass, two or three times in total. Memory beside the scores of one
parameter: for each group a histogram of 65,536 counters of 8 bytes (0.5 MB) and twice as much while the threshold is
computed, buffers for `CHUNK` scores (under 16 MB), and the chosen positions, twice while they are copied to the end.
In two passes, these are up to twice as many positions, with their scores (more where they are few).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..layers.granularity import Element, Granularity, position_dtype

BINS = 1 << 16
CHUNK = 1 << 19
INFINITE = 0x7F800000  # the bits of infinity; those of a NaN are higher
STRIDE = 61  # of a sample of scores. A prime, so that it takes all columns of a matrix

CHANGED = "were different when they were computed again; a criterion must give the same scores every time"

Scores = Callable[[], Iterable[tuple[str, Tensor]]]
Parameters = Mapping[str, Mapping[str, Tensor]]
Positions = dict[str, dict[str, Tensor]]


def count_elements(parameters: Parameters) -> int:
    """The number of elements of all parameters together."""
    return sum(p.numel() for tensors in parameters.values() for p in tensors.values())


class NotFiniteError(ValueError):
    """A score is infinite or NaN."""


class Limits(NamedTuple):
    """The smallest and the largest number of positions of a group."""

    low: int
    high: int


@dataclass
class Threshold:
    """The threshold of a group: all scores above `bits` are chosen, and the first `ties` of those equal to it.

    Up to `spare` more of the equal ones are chosen if the selection as a whole needs more positions.
    """

    bits: int
    ties: int
    spare: int = 0


Bits = npt.NDArray[np.int32]


def _chunks(name: str, scores: Tensor) -> Iterator[Bits]:
    """The scores as int32 numbers that sort in the same way, flat and on the CPU, in parts of `CHUNK`.

    With NumPy, since its bincount and nonzero are several times faster on a CPU than torch's.

    Raises:
        NotFiniteError: If a score is infinite or NaN.
    """
    for part in scores.detach().reshape(-1).split(CHUNK):
        floats = part.to(device="cpu", dtype=torch.float32).numpy()
        bits = floats.view(np.int32)
        if len(bits) and bits.view(np.uint32).max() >= INFINITE:  # or negative, which has the highest bit
            bits = (floats + np.float32(0)).view(np.int32)  # adding 0 turns -0.0 into 0.0
            bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
            if bits.max() >= INFINITE or bits.min() < -INFINITE:
                raise NotFiniteError(f"scores of {name!r} must be finite.")
        yield bits


def _upper(bits: Bits) -> Bits:
    return (bits >> 16) + (BINS >> 1)


def top_k(
    scores: Scores,
    k: int,
    group_of: Callable[[str], str] = lambda name: "",
    limits: Mapping[str, Limits] | None = None,
) -> dict[str, Tensor]:
    """Choose the `k` highest scores over all parameters; ties break by position.

    Args:
        scores: Called once per pass. Yields ``(name, scores)`` for each parameter, always in the same order. Scores
            must be finite. They may have any shape, and are compared in float32.
        k: The number of positions to choose, at most the number of scores.
        group_of: The group of a parameter, for `limits`.
        limits: For each group, the smallest and largest number of its positions. Groups that are not in it have no
            limits. The result has the highest sum of scores that the limits allow.

    Returns:
        For every parameter the sorted flat indices, 1-D int32 (int64 above 2**31 - 1 elements). They may be empty.

    Raises:
        ValueError: If `k` is larger than the number of scores, the limits cannot be met, or a score is not finite.
    """
    if not limits:
        chosen = _top_k_from_sample(scores, k)
        if chosen is not None:
            return chosen
    sizes: dict[str, int] = {}
    histograms: dict[str, Tensor] = {}
    for name, score in scores():
        sizes[name] = score.numel()
        histogram = histograms.setdefault(group_of(name), torch.zeros(BINS, dtype=torch.int64))
        for bits in _chunks(name, score):
            histogram += torch.from_numpy(np.bincount(_upper(bits), minlength=BINS))
    total = sum(sizes.values())
    if not 0 <= k <= total:
        raise ValueError(f"cannot choose {k:,} of {total:,} positions.")
    if k in (0, total) and not limits:
        return {n: torch.arange(s if k else 0, dtype=position_dtype(s)) for n, s in sizes.items()}

    groups = list(histograms)
    low, high = _bounds(groups, [int(h.sum()) for h in histograms.values()], limits or {}, k)
    upper = _from_top(torch.stack(list(histograms.values())))
    # `bin_` holds the threshold that the groups share. A group that reaches its upper limit above this bin, or does
    # not reach its lower limit in it, gets exactly the number of that limit, and a separate threshold.
    bin_, above, count = _level(upper, torch.zeros_like(low), low, high, k)
    free = (above < high) & (count > low)
    fixed = torch.where(above >= high, high, low)
    bins = torch.where(free, bin_, torch.searchsorted(upper, fixed[:, None]).squeeze(1).clamp(max=BINS - 1))
    bins_above = torch.where(bins > 0, upper.gather(1, (bins - 1).clamp(min=0)[:, None]).squeeze(1), 0)

    lower = torch.zeros(len(groups), BINS, dtype=torch.int64)
    for name, score in scores():
        i = groups.index(group_of(name))
        group_bin = BINS - 1 - int(bins[i])
        for bits in _chunks(name, score):
            inside = bits[np.flatnonzero(_upper(bits) == group_bin)]
            lower[i] += torch.from_numpy(np.bincount(inside & (BINS - 1), minlength=BINS))
    lower = _from_top(lower) + bins_above[:, None]

    wanted, spare, shared = fixed.clone(), torch.zeros_like(fixed), 0
    if bool(free.any()):
        remaining = k - int(fixed[~free].sum())
        shared, above, count = _level(lower[free], bins_above[free], low[free], high[free], remaining)
        wanted[free] = above.clamp(low[free], high[free])
        spare[free] = count.clamp(low[free], high[free]) - wanted[free]
    thresholds: dict[str, Threshold] = {}
    for i, group in enumerate(groups):
        n, ties = int(wanted[i]), int(spare[i])
        # A group with spare ties has the shared threshold. Otherwise its threshold is its n-th highest score.
        j = shared if ties else int(torch.searchsorted(lower[i], n).clamp(max=BINS - 1))
        higher = int(lower[i, j - 1]) if j else int(bins_above[i])
        least = (((BINS - 1 - int(bins[i])) - (BINS >> 1)) << 16) | (BINS - 1 - j)
        thresholds[group] = Threshold(least, n - higher, ties)
    return _take(scores, sizes, group_of, thresholds, k, k - int(wanted.sum()))


def _top_k_from_sample(scores: Scores, k: int) -> dict[str, Tensor] | None:
    """As `top_k` without limits, in two passes; None if `k` is a large part of the scores, or the sample is no help.

    A sample gives a score that is a little lower than the k-th highest one. One pass collects all scores that are not
    lower, and the k highest of them are the k highest of all.
    """
    sizes: dict[str, int] = {}
    histogram = np.zeros(BINS, dtype=np.int64)
    sample: list[Bits] = []
    check = 0
    for name, score in scores():
        sizes[name] = score.numel()
        for bits in _chunks(name, score.reshape(-1)[::STRIDE]):
            check += int(bits.sum(dtype=np.int64))
            sample.append(bits.copy())  # a view would keep the scores
        if sum(map(len, sample)) >= CHUNK:
            histogram += _histogram(sample)
            sample = []
    histogram += _histogram(sample)
    total = sum(sizes.values())
    expected = k / STRIDE
    wanted = expected + 6 * expected**0.5 + 10  # of the sample, so that too few scores are very unlikely
    sampled = int(histogram.sum())
    if not 0 < k <= total or wanted > sampled / 8:
        return None
    from_top = histogram[::-1].cumsum()
    bin_ = int(np.searchsorted(from_top, wanted))
    if from_top[bin_] > 1.5 * wanted:  # too many scores are nearly equal
        return None
    least = (BINS - 1 - bin_ - (BINS >> 1)) << 16
    most = int(1.2 * STRIDE * from_top[bin_])

    dtype = np.int64 if max(sizes.values()) > np.iinfo(np.int32).max else np.int32
    places, values = np.empty(most, dtype=dtype), np.empty(most, dtype=np.int32)
    ends, end = [0], 0
    for name, score in scores():
        start = 0
        for bits in _chunks(name, score):
            check -= int(bits[-start % STRIDE :: STRIDE].sum(dtype=np.int64))
            found = np.flatnonzero(bits >= least)
            begin, end = end, end + len(found)
            if end > most:
                return None
            values[begin:end] = bits[found]
            np.add(found, start, out=places[begin:end], casting="unsafe")
            start += len(bits)
        ends.append(end)
    if check:
        raise ValueError(f"scores {CHANGED}.")
    if end < k:
        return None
    values = values[:end]
    threshold = np.partition(values, end - k)[end - k]
    is_chosen = values > threshold
    ties = np.flatnonzero(values == threshold)
    is_chosen[ties[: k - np.count_nonzero(is_chosen)]] = True
    return {
        name: torch.from_numpy(places[begin:end][is_chosen[begin:end]]).to(position_dtype(sizes[name]))
        for name, begin, end in zip(sizes, ends, ends[1:], strict=False)
    }


def _histogram(parts: Sequence[Bits]) -> npt.NDArray[np.int64]:
    return np.bincount(_upper(np.concatenate(parts)), minlength=BINS) if parts else np.zeros(BINS, dtype=np.int64)


def _from_top(histograms: Tensor) -> Tensor:
    """Cumulative counts from the highest bin down, of shape ``(groups, BINS)``, with the highest bin first."""
    return histograms.flip(1).cumsum(1)


def _level(cumulated: Tensor, before: Tensor, low: Tensor, high: Tensor, k: int) -> tuple[int, Tensor, Tensor]:
    """The first bin from the top at which the groups together reach `k` within their limits.

    `before` is the count of each group above the highest bin. `cumulated` includes it.

    Returns:
        The bin, and for each group its count above the bin and its count including the bin, without limits.
    """
    total = torch.zeros(cumulated.shape[1], dtype=torch.int64)
    for counts, least, most in zip(cumulated, low.tolist(), high.tolist(), strict=True):
        total += counts.clamp(least, most)
    i = min(int(torch.searchsorted(total, k)), len(total) - 1)
    return i, cumulated[:, i - 1] if i else before, cumulated[:, i]


def _bounds(groups: list[str], sizes: list[int], limits: Mapping[str, Limits], k: int) -> tuple[Tensor, Tensor]:
    low = [min(limits[g].low, n) if g in limits else 0 for g, n in zip(groups, sizes, strict=True)]
    high = [min(limits[g].high, n) if g in limits else n for g, n in zip(groups, sizes, strict=True)]
    if not sum(low) <= k <= sum(high):
        raise ValueError(
            f"the limits need at least {sum(low):,} and allow at most {sum(high):,} positions, but {k:,} are to be "
            f"chosen."
        )
    return torch.tensor(low), torch.tensor(high)


def _take(
    scores: Scores,
    sizes: Mapping[str, int],
    group_of: Callable[[str], str],
    thresholds: dict[str, Threshold],
    count: int,
    left: int,
) -> dict[str, Tensor]:
    """The last pass: chooses `count` positions, of which `left` are spare ties of the groups."""
    # One buffer for all positions: many small arrays between large temporary ones would fragment the memory.
    found = np.empty(count, dtype=np.int64 if max(sizes.values()) > np.iinfo(np.int32).max else np.int32)
    ends: dict[str, int] = {}
    end = 0
    for name, score in scores():
        threshold = thresholds[group_of(name)]
        start = 0
        for bits in _chunks(name, score):
            above = bits > threshold.bits
            if threshold.ties or (threshold.spare and left):
                equal = np.flatnonzero(bits == threshold.bits)
                sure = min(threshold.ties, len(equal))
                extra = min(threshold.spare, left, len(equal) - sure)
                above[equal[: sure + extra]] = True
                threshold.ties -= sure
                threshold.spare -= extra
                left -= extra
            positions = np.flatnonzero(above)
            if end + len(positions) > count:
                raise ValueError(f"scores of {name!r} {CHANGED}.")
            np.add(positions, start, out=found[end : end + len(positions)], casting="unsafe")
            end += len(positions)
            start += len(bits)
        ends[name] = end
    if end != count:
        raise ValueError(f"scores {CHANGED}.")
    starts = [0, *ends.values()]
    return {
        name: torch.from_numpy(found[begin:end].copy()).to(position_dtype(sizes[name]))
        for (name, end), begin in zip(ends.items(), starts, strict=False)
    }


def top_units(
    scores: Mapping[str, Tensor],
    sizes: Mapping[str, int],
    budget: int,
    group_of: Callable[[str], str] = lambda name: "",
    limits: Mapping[str, Limits] | None = None,
) -> dict[str, Tensor]:
    """Choose whole units with at most `budget` elements together, highest score first; ties break by position.

    A unit that no longer fits is skipped, and smaller ones with lower scores are chosen instead. So the rest of the
    budget is smaller than every unit that was not chosen. Memory: a few numbers for each unit.

    Args:
        scores: For each name, one score per unit, 1-D.
        sizes: For each name, the number of elements in one of its units.
        budget: The largest number of elements to choose.
        group_of: The group of a name, for `limits`.
        limits: For each group, the smallest number of elements (rounded down to whole units) and the largest.

    Returns:
        For every name the sorted indices of the chosen units, 1-D int32. They may be empty.
    """
    if not scores:
        return {}
    counts = torch.tensor([len(s) for s in scores.values()])
    cost = torch.tensor([sizes[name] for name in scores]).repeat_interleave(counts)
    order = torch.sort(torch.cat(list(scores.values())), descending=True, stable=True).indices
    chosen = torch.zeros(len(order), dtype=torch.bool)
    if limits:
        names = {g: i for i, g in enumerate(dict.fromkeys(group_of(n) for n in scores))}
        group = torch.tensor([names[group_of(name)] for name in scores]).repeat_interleave(counts)
        allowed = torch.ones_like(chosen)
        for name, i in names.items():
            if name in limits:
                members = order[group[order] == i]
                spent = _fill(members, cost, min(limits[name].low, budget), chosen)
                budget -= spent
                within = torch.zeros_like(chosen)
                _fill(members[~chosen[members]], cost, limits[name].high - spent, within)
                allowed &= (group != i) | within
        order = order[allowed[order] & ~chosen[order]]
    _fill(order, cost, budget, chosen)
    return {
        name: part.nonzero().squeeze(1).to(torch.int32)
        for name, part in zip(scores, chosen.split(counts.tolist()), strict=True)
    }


def _fill(order: Tensor, cost: Tensor, budget: int, chosen: Tensor) -> int:
    """Mark units in `chosen`, in `order`, if they fit in `budget`. Returns their cost."""
    spent = 0
    order = order[cost[order] <= budget]
    # Each round takes the longest prefix that fits, then drops the units that are larger than the rest of the budget.
    while len(order):
        total = cost[order].cumsum(0)
        fit = int((total <= budget - spent).sum())
        chosen[order[:fit]] = True
        spent += int(total[fit - 1])
        order = order[fit:]
        order = order[cost[order] <= budget - spent]
    return spent


def choose(
    parameters: Parameters,
    score: Callable[[str, Tensor], Tensor],
    granularity: Granularity,
    size: int,
    group_of: Callable[[str], str] = lambda name: "",
    limits: Mapping[str, Limits] | None = None,
) -> Positions:
    """Choose a ticket of `size` elements over all parameters of all modules.

    Args:
        parameters: For each module, its candidate parameters (``weight``, ``bias``), in model order.
        score: Computes the scores of a parameter from its name, ``"module.parameter"``, and the parameter. They have
            the parameter's shape. Called once per pass.
        granularity: The unit of selection. The score of a unit is the mean over its elements; a row includes its bias.
        size: The number of elements to choose. It is met exactly with elements, and not exceeded with larger units.
        group_of: The group of a module, for `limits`.
        limits: For each group, the smallest and largest number of its elements.

    Returns:
        For each module and parameter, the sorted positions.

    Raises:
        ValueError: If `size` or the limits cannot be met, or a score is not finite.
    """
    if isinstance(granularity, Element):

        def scores() -> Iterable[tuple[str, Tensor]]:
            for module, tensors in parameters.items():
                for name, p in tensors.items():
                    yield f"{module}.{name}", score(f"{module}.{name}", p)

        flat = top_k(scores, size, lambda name: group_of(name.rpartition(".")[0]), limits)
        return {module: {name: flat[f"{module}.{name}"] for name in names} for module, names in parameters.items()}

    unit_scores: dict[str, Tensor] = {}
    sizes: dict[str, int] = {}
    members: dict[str, list[tuple[str, str]]] = {}
    for module, tensors in parameters.items():
        for name, p in tensors.items():
            # A row of the weight and its bias are one unit; other units are in one parameter.
            key = f"{module}." if granularity.joins_bias else f"{module}.{name}"
            unit_size = granularity.size(p.shape)
            scored = score(f"{module}.{name}", p).detach().to(device="cpu", dtype=torch.float32)
            require_finite(f"{module}.{name}", scored)
            totals = granularity.unit_scores(scored) * unit_size
            unit_scores[key] = unit_scores[key] + totals if key in unit_scores else totals
            sizes[key] = sizes.get(key, 0) + unit_size
            members.setdefault(key, []).append((module, name))
    means = {key: s / sizes[key] for key, s in unit_scores.items()}
    chosen = top_units(means, sizes, size, lambda key: group_of(key.rpartition(".")[0]), limits)
    positions: Positions = {}
    for key, names in members.items():
        for module, name in names:
            positions.setdefault(module, {})[name] = chosen[key].clone()
    return positions


def require_finite(name: str, scores: Tensor) -> None:
    """Raise a `NotFiniteError` unless all scores are finite."""
    if not torch.isfinite(scores).all():
        raise NotFiniteError(f"scores of {name!r} must be finite.")

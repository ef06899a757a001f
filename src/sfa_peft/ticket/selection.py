"""Exact selection of the k positions with the highest scores among all parameters, in bounded memory.

Non-negative float32 numbers order like the integers that their bits spell. So the k-th highest score is found as a
radix selection does: one histogram of the upper 16 bits of all scores, one of the lower 16 bits inside the bin that
holds the k-th, and the threshold is known exactly. A last pass takes what is above it, and of what equals it the first
in position order. Scores are asked for once per pass and parameter. Memory beside one parameter's scores: two
histograms of 65,536 counters, and the positions chosen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from ..internal import position_dtype

BINS = 1 << 16

Scores = Callable[[], Iterable[tuple[str, Tensor]]]


def _bits(name: str, scores: Tensor) -> Tensor:
    """The scores' bits as int32, which order like the scores; + 0.0 turns a negative zero into zero."""
    flat = scores.detach().reshape(-1).to(device="cpu", dtype=torch.float32) + 0.0
    bits = flat.view(torch.int32)
    # inf and NaN are the largest of the positive floats, negative numbers the negative integers
    if bits.numel() and (int(bits.max()) >= 0x7F800000 or int(bits.min()) < 0):
        raise ValueError(f"scores of {name!r} must be finite and not negative")
    return bits


class Threshold(NamedTuple):
    """Everything whose bits exceed `bits` is chosen, and the first `ties` of what equals it."""

    bits: int
    ties: int


def find_threshold(scores: Scores, k: int) -> Threshold:
    """The k-th highest score over all parameters, for 1 <= k <= number of scores."""
    upper = torch.zeros(BINS, dtype=torch.int64)
    for name, score in scores():
        upper += torch.bincount(_bits(name, score) >> 16, minlength=BINS)
    bin_, above = _bin_of(upper, k)
    lower = torch.zeros(BINS, dtype=torch.int64)
    for name, score in scores():
        bits = _bits(name, score)
        lower += torch.bincount(bits[bits >> 16 == bin_] & (BINS - 1), minlength=BINS)
    low, above_low = _bin_of(lower, k - above)
    return Threshold((bin_ << 16) | low, k - above - above_low)


def _bin_of(histogram: Tensor, k: int) -> tuple[int, int]:
    """The bin that holds the k-th from the top, and how many lie in the bins above it."""
    from_top = histogram.flip(0).cumsum(0)
    i = int(torch.searchsorted(from_top, k))
    return len(histogram) - 1 - i, int(from_top[i - 1]) if i else 0


def top_k(scores: Scores, k: int) -> dict[str, Tensor]:
    """Choose the `k` highest scores over all parameters; ties break by position.

    Args:
        scores: Called once per pass; gives ``(name, scores)`` for each parameter, always in the same order. Scores
            are finite and not negative, of any shape, and are compared in float32.
        k: How many to choose, at most the number of scores.

    Returns:
        For every parameter the sorted flat indices chosen, 1-D int32 (int64 beyond 2**31 - 1 elements), maybe empty.

    Raises:
        ValueError: If `k` is larger than the number of scores, or a score is negative or not finite.
    """
    sizes = {name: score.numel() for name, score in scores()}
    total = sum(sizes.values())
    if not 0 <= k <= total:
        raise ValueError(f"cannot choose {k:,} of {total:,} positions")
    if k in (0, total):
        return {n: torch.arange(s if k else 0, dtype=position_dtype(s)) for n, s in sizes.items()}
    threshold = find_threshold(scores, k)
    ties = threshold.ties
    chosen = {}
    for name, score in scores():
        bits = _bits(name, score)
        above = bits > threshold.bits
        if ties:
            equal = (bits == threshold.bits).nonzero().squeeze(1)[:ties]
            above[equal] = True
            ties -= len(equal)
        chosen[name] = above.nonzero().squeeze(1).to(position_dtype(sizes[name]))
    return chosen


def top_units(scores: Mapping[str, Tensor], sizes: Mapping[str, int], budget: int) -> dict[str, Tensor]:
    """Choose whole units, highest score first, whose elements together are at most `budget`; ties break by position.

    A unit that no longer fits is passed over for smaller ones behind it, so that less than the smallest unit left out
    remains of the budget.

    Args:
        scores: For each name, one score per unit, 1-D.
        sizes: For each name, the elements in one of its units.
        budget: Elements that may be chosen.

    Returns:
        For every name the sorted indices of the units chosen, 1-D int32, maybe empty.
    """
    if not scores:
        return {}
    counts = [len(s) for s in scores.values()]
    cost = torch.tensor([sizes[name] for name in scores]).repeat_interleave(torch.tensor(counts))
    order = torch.sort(torch.cat(list(scores.values())), descending=True, stable=True).indices
    chosen = torch.zeros(len(order), dtype=torch.bool)
    order = order[cost[order] <= budget]
    # Each round takes the longest prefix that fits, then drops the units that are too large for what is left.
    while len(order):
        total = cost[order].cumsum(0)
        fit = int((total <= budget).sum())
        chosen[order[:fit]] = True
        budget -= int(total[fit - 1])
        order = order[fit:]
        order = order[cost[order] <= budget]
    return {
        name: part.nonzero().squeeze(1).to(torch.int32)
        for name, part in zip(scores, chosen.split(counts), strict=True)
    }


Parameters = Mapping[str, Mapping[str, Tensor]]
Positions = dict[str, dict[str, Tensor]]


def choose(parameters: Parameters, score: Callable[[str, Tensor], Tensor], granularity: str, size: int) -> Positions:
    """Choose a ticket of `size` elements over all parameters of all modules.

    Args:
        parameters: For each module, its candidate parameters (``weight``, ``bias``), in model order.
        score: Gives the scores of ``"module.parameter"``, of the parameter's shape. Called once per pass.
        granularity: ``element``, or ``row``: one output neuron with its bias, ranked by the mean of its scores.
        size: Elements to choose. Met exactly with ``element``; with ``row`` not exceeded.

    Returns:
        For each module and parameter, the sorted positions: flat indices, or indices of rows.
    """
    if granularity == "row":
        rows: dict[str, Tensor] = {}
        sizes: dict[str, int] = {}
        for module, own in parameters.items():
            parts = []
            for name, p in own.items():
                full_name = f"{module}.{name}"
                scores = score(full_name, p)
                _bits(full_name, scores)
                parts.append(scores.reshape(p.shape[0], -1).to(device="cpu", dtype=torch.float32))
            together = torch.cat(parts, dim=1)
            rows[module], sizes[module] = together.mean(1), together.shape[1]
        chosen = top_units(rows, sizes, size)
        return {module: dict.fromkeys(own, chosen[module]) for module, own in parameters.items()}

    def scores() -> Iterable[tuple[str, Tensor]]:
        for module, own in parameters.items():
            for name, p in own.items():
                yield f"{module}.{name}", score(f"{module}.{name}", p)

    flat = top_k(scores, size)
    return {module: {name: flat[f"{module}.{name}"] for name in own} for module, own in parameters.items()}

"""Criteria: each computes a score for every position of a parameter. Higher is more important.

A criterion is a small function from the `Evidence` about one parameter to scores of its shape. The decorator says
what evidence it needs, and so what a search has to do for it: nothing (data-free), one pass of gradients, or dense
training.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class Evidence:
    """What is known of one parameter.

    Attributes:
        name: ``"module.parameter"``.
        before: The base model's values.
        after: The values after dense training; None for criteria that do not train.
        sums: For each statistic that the criterion asked for, its sum over the steps; see `STATISTICS`.
        seed: Of the search, or of the initial ticket.
    """

    name: str
    before: Tensor
    after: Tensor | None = None
    sums: Mapping[str, Tensor] = field(default_factory=dict)
    seed: int = 0


class Step(NamedTuple):
    """What a statistic sees of one training step: a parameter, its gradient, and how it moved in the step before."""

    parameter: Tensor
    gradient: Tensor
    last_move: Tensor | None


# How each statistic grows with a step, in place.
STATISTICS: dict[str, Callable[[Tensor, Step], object]] = {
    "gradient": lambda total, step: total.add_(step.gradient),
    "squared_gradient": lambda total, step: total.addcmul_(step.gradient, step.gradient),
    "movement": lambda total, step: total.addcmul_(step.parameter, step.gradient, value=-1),
    # The loss's decrease by the last move, to first order. The batch is another than the one that caused the move, so
    # that noise is not credited.
    "credit": lambda total, step: (
        None if step.last_move is None else total.addcmul_(step.gradient, step.last_move, value=-1)
    ),
}

Score = Callable[[Evidence], Tensor]


@dataclass(frozen=True)
class Criterion:
    """A scoring function and the evidence it needs.

    Attributes:
        score: From the evidence about a parameter to scores of its shape, all finite.
        trains: Whether the candidates are trained densely meanwhile. Otherwise the backbone stays as it is, and costs
            no optimizer state; external adapters and heads are trained in any case, since the gradients of a fresh
            head say little.
        statistics: Keys of `STATISTICS`; each costs one tensor of the candidates' size.
    """

    score: Score
    trains: bool = False
    statistics: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return getattr(self.score, "__name__", type(self.score).__name__)

    @property
    def needs_data(self) -> bool:
        return self.trains or bool(self.statistics)


CRITERIA: dict[str, Criterion] = {}


def criterion(*statistics: str, trains: bool = False) -> Callable[[Score], Criterion]:
    """Declare what a criterion of one's own needs; pass the result to `search_ticket`.

    Args:
        statistics: Keys of `STATISTICS`.
        trains: Whether it needs dense training, and so `Evidence.after`.

    Raises:
        ValueError: If a statistic is not known.

    Example:

        ```py
        >>> @criterion("squared_gradient", trains=True)
        ... def moved_where_it_matters(e):
        ...     return (e.after - e.before).abs() * e.sums["squared_gradient"].sqrt()
        >>> search_ticket(model, loader, criterion=moved_where_it_matters)
        ```
    """
    for name in statistics:
        if name not in STATISTICS:
            raise ValueError(f"statistic {name!r} is not known; choose from {sorted(STATISTICS)}")
    return lambda score: Criterion(score, trains, statistics)


def _known(*statistics: str, trains: bool = False) -> Callable[[Score], Score]:
    def register(score: Score) -> Score:
        CRITERIA[score.__name__] = criterion(*statistics, trains=trains)(score)
        return score

    return register


@_known()
def magnitude(e: Evidence) -> Tensor:
    """``|w|``: large weights first (Han et al., "Learning both Weights and Connections", 2015)."""
    return e.before.detach().abs()


@_known()
def random(e: Evidence) -> Tensor:
    """Uniform noise: the control that every other criterion has to beat. The same for a name, shape and seed."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{e.seed} {e.name}".encode()))
    return torch.rand(e.before.shape, generator=generator)


@_known(trains=True)
def lottery(e: Evidence) -> Tensor:
    """``|w_after - w_before|``: how far dense training moves a weight.

    The sparse fine-tuning form of the lottery-ticket search: Ansell et al., "Composable Sparse Fine-Tuning for
    Cross-Lingual Transfer" (2022), after Frankle & Carbin, "The Lottery Ticket Hypothesis" (2019).
    """
    assert e.after is not None
    return (e.after - e.before.to(e.after)).abs()


@_known("movement", trains=True)
def movement(e: Evidence) -> Tensor:
    """``|sum_t -w_t g_t|``: how consistently training pushes a weight away from zero or towards it.

    Sanh et al., "Movement Pruning: Adaptive Sparsity by Fine-Tuning" (2020), keep what moves away from zero. A ticket
    changes weights in both directions, so the amount counts here, not its sign.
    """
    return e.sums["movement"].abs()


@_known("credit", trains=True)
def credit(e: Evidence) -> Tensor:
    """``-sum_t g_{t+1} (w_{t+1} - w_t)``: how much of the loss's decrease a weight accounts for, to first order.

    Lan et al., "LCA: Loss Change Allocation for Neural Network Training" (2019); here each move is judged by the
    gradient of the next batch, which did not cause it.
    """
    return e.sums["credit"]


@_known("squared_gradient")
def fisher(e: Evidence) -> Tensor:
    """``sum g^2`` over batches: the diagonal of the empirical Fisher information.

    Sung et al., "Training Neural Networks with Fixed Sparse Masks" (FISH Mask, 2021), there for single examples.
    """
    return e.sums["squared_gradient"]


@_known("gradient")
def gradient(e: Evidence) -> Tensor:
    """``|sum g|`` over batches: the first step of gradient descent; Zhang et al., "Gradient-based Parameter Selection
    for Efficient Fine-Tuning" (2024), there within each neuron."""
    return e.sums["gradient"].abs()


@_known("gradient")
def taylor(e: Evidence) -> Tensor:
    """``|w * sum g|``: the first-order estimate of what setting a weight to zero would change.

    Molchanov et al., "Importance Estimation for Neural Network Pruning" (2019); SNIP (Lee et al., 2019).
    """
    return (e.before.to(e.sums["gradient"]) * e.sums["gradient"]).abs()


DATA_FREE = tuple(sorted(name for name, known in CRITERIA.items() if not known.needs_data))


def as_criterion(given: str | Criterion | Score) -> Criterion:
    """The criterion of that name, or a function of one's own; an undeclared function gets what `lottery` gets.

    Raises:
        ValueError: If the name is not known.
        TypeError: If it is none of the three.
    """
    if isinstance(given, Criterion):
        return given
    if isinstance(given, str):
        if given not in CRITERIA:
            raise ValueError(f"criterion={given!r} is not known; choose one of {sorted(CRITERIA)} or pass a function.")
        return CRITERIA[given]
    if callable(given):
        return Criterion(given, trains=True)
    raise TypeError(f"criterion={given!r} must be a name of {sorted(CRITERIA)}, or a function of an Evidence.")

"""Criteria: each computes a score for every position of a parameter. A higher score means more important.

A criterion is a small function that maps the `Evidence` about one parameter to scores of the parameter's shape. Its
decorator says what evidence it needs, and so what a search must do: nothing (data-free), compute gradients, or train
the candidates densely.
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
    """What a criterion gets to know about one parameter. All tensors have the parameter's shape.

    Attributes:
        name (`str`): The parameter, ``"module.parameter"``.
        before (`Tensor`): The base model's values.
        after (`Tensor`, *optional*, defaults to `None`):
            The values after dense training; None for criteria without it.
        sums (`Mapping[str, Tensor]`, defaults to `{}`):
            For each statistic that the criterion needs, its sum over the steps: ``gradient`` (``g``),
            ``squared_gradient`` (``g^2``), ``movement`` (``-w g``) or ``credit`` (``-g`` times the weight's last
            change). ``w`` is the weight and ``g`` its gradient.
        seed (`int`, defaults to 0): The seed of the search, or of the initial ticket.
    """

    name: str
    before: Tensor
    after: Tensor | None = None
    sums: Mapping[str, Tensor] = field(default_factory=dict)
    seed: int = 0


class Step(NamedTuple):
    """The input of a statistic at one training step: a parameter, its gradient, and its change in the last step."""

    parameter: Tensor
    gradient: Tensor
    last_move: Tensor | None


# Each function adds one step to the sum of its statistic, in place.
STATISTICS: dict[str, Callable[[Tensor, Step], object]] = {
    "gradient": lambda total, step: total.add_(step.gradient),
    "squared_gradient": lambda total, step: total.addcmul_(step.gradient, step.gradient),
    "movement": lambda total, step: total.addcmul_(step.parameter, step.gradient, value=-1),
    # The decrease of the loss by the last move, to first order. It uses the gradient of the next batch, not of the one
    # that caused the move, so that noise gets no credit.
    "credit": lambda total, step: (
        None if step.last_move is None else total.addcmul_(step.gradient, step.last_move, value=-1)
    ),
}

Score = Callable[[Evidence], Tensor]


@dataclass(frozen=True)
class Criterion:
    """A scoring function and the evidence that it needs.

    Attributes:
        score: Maps the evidence about a parameter to finite scores of the parameter's shape.
        trains: Whether the search trains the candidates densely. Without it the backbone is not changed and needs no
            optimizer state. External adapters and heads are trained in any case, since the gradients of a fresh head
            are not informative.
        statistics: Keys of `STATISTICS`. Each costs one tensor of the candidates' size.
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
    """Declare a user-defined criterion for `search_ticket`. Used as a decorator.

    The decorated function maps an `Evidence` to finite scores of the parameter's shape. It is called several times for
    a parameter, and must return the same scores each time.

    Args:
        statistics (`str`):
            The statistics that it needs in `Evidence.sums`: ``gradient``, ``squared_gradient``, ``movement`` or
            ``credit``. Each costs one tensor of the candidates' size during the search.
        trains (`bool`, defaults to `False`):
            Whether the search trains the candidates densely, and so fills in `Evidence.after`.

    Returns:
        A decorator that turns the function into a `Criterion`.

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
            raise ValueError(f"statistic {name!r} is not known; choose from {sorted(STATISTICS)}.")
    return lambda score: Criterion(score, trains, statistics)


def _known(*statistics: str, trains: bool = False) -> Callable[[Score], Score]:
    def register(score: Score) -> Score:
        CRITERIA[score.__name__] = criterion(*statistics, trains=trains)(score)
        return score

    return register


@_known()
def magnitude(e: Evidence) -> Tensor:
    """``|w|``: the largest weights (Han et al., "Learning both Weights and Connections", 2015)."""
    return e.before.detach().abs()


@_known()
def random(e: Evidence) -> Tensor:
    """Uniform noise, as a baseline. The same name, shape and seed give the same scores."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{e.seed} {e.name}".encode()))
    return torch.rand(e.before.shape, generator=generator)


@_known(trains=True)
def lottery(e: Evidence) -> Tensor:
    """``|w_after - w_before|``: how far dense training moves a weight.

    The lottery-ticket search in its form for sparse fine-tuning: Ansell et al., "Composable Sparse Fine-Tuning for
    Cross-Lingual Transfer" (2022), after Frankle & Carbin, "The Lottery Ticket Hypothesis" (2019).
    """
    assert e.after is not None
    return (e.after - e.before.to(e.after)).abs()


@_known("movement", trains=True)
def movement(e: Evidence) -> Tensor:
    """``|sum_t -w_t g_t|``: how consistently training moves a weight away from zero or towards zero.

    Sanh et al., "Movement Pruning: Adaptive Sparsity by Fine-Tuning" (2020), keep weights that move away from zero. A
    ticket changes weights in both directions, so the absolute value is used here.
    """
    return e.sums["movement"].abs()


@_known("credit", trains=True)
def credit(e: Evidence) -> Tensor:
    """``-sum_t g_{t+1} (w_{t+1} - w_t)``: the decrease of the loss due to a weight, to first order.

    Lan et al., "LCA: Loss Change Allocation for Neural Network Training" (2019). Here the gradient is that of the next
    batch, which did not cause the move.
    """
    return e.sums["credit"]


@_known("squared_gradient")
def fisher(e: Evidence) -> Tensor:
    """``sum g^2`` over batches: the diagonal of the empirical Fisher information.

    Sung et al., "Training Neural Networks with Fixed Sparse Masks" (FISH Mask, 2021), who use single examples.
    """
    return e.sums["squared_gradient"]


@_known("gradient")
def gradient(e: Evidence) -> Tensor:
    """``|sum g|`` over batches: the size of the first step of gradient descent.

    Zhang et al., "Gradient-based Parameter Selection for Efficient Fine-Tuning" (2024), who select within each neuron.
    """
    return e.sums["gradient"].abs()


@_known("gradient")
def taylor(e: Evidence) -> Tensor:
    """``|w * sum g|``: how much the loss would change if the weight were zero, to first order.

    Molchanov et al., "Importance Estimation for Neural Network Pruning" (2019); SNIP (Lee et al., 2019).
    """
    return (e.before.to(e.sums["gradient"]) * e.sums["gradient"]).abs()


DATA_FREE = tuple(sorted(name for name, known in CRITERIA.items() if not known.needs_data))


def as_criterion(given: str | Criterion | Score) -> Criterion:
    """The criterion for a name, a `Criterion` or a function. A plain function gets the same evidence as `lottery`.

    Raises:
        ValueError: If the name is not known.
        TypeError: If it is not a name, a `Criterion` or a function.
    """
    if isinstance(given, Criterion):
        return given
    if isinstance(given, str):
        if given not in CRITERIA:
            raise ValueError(f"criterion={given!r} is not known; choose one of {sorted(CRITERIA)} or pass a function.")
        return CRITERIA[given]
    if callable(given):
        return Criterion(given, trains=True)
    raise TypeError(f"criterion={given!r} must be one of {sorted(CRITERIA)}, or a function that takes an Evidence.")

"""The rounds of a search: from evidence to scores, from scores to what is kept for the next round, to the ticket."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Mapping

import torch
from torch import Tensor, nn

from ..layers.granularity import Granularity
from ..ticket.criteria import Criterion
from ..ticket.quotas import Quotas
from ..ticket.selection import Limits, Positions, choose, count_elements, require_finite
from .training import DenseTraining, Slot


class Rounds:
    """Chooses among an adapter's candidates, round by round.

    Args:
        candidates: For each module, its parameters by name.
        granularity: The unit of selection.
        size: Elements in the ticket.
        criterion: Scores the positions.
        quotas: Limits on the spread of what is chosen.
        count: How many rounds there are.
        seed: Of the search.
        finds_size: Whether `size` is the most that a ticket may have, and the search finds out how many.
        agree: Makes all processes choose alike.
    """

    def __init__(
        self,
        candidates: Mapping[str, Mapping[str, nn.Parameter]],
        granularity: Granularity,
        size: int,
        criterion: Criterion,
        quotas: Quotas | None,
        count: int,
        seed: int,
        finds_size: bool = False,
        agree: Callable[[Positions], Positions] = lambda positions: positions,
    ) -> None:
        self.candidates, self.granularity = candidates, granularity
        self.total = count_elements(candidates)
        self.size, self.finds_size = size, finds_size
        self.criterion, self.quotas, self.count, self.seed = criterion, quotas, count, seed
        self.sizes = {m: sum(p.numel() for p in own.values()) for m, own in self.candidates.items()}
        self.agree = agree
        if quotas:
            quotas.check(self.sizes, size)
        self.slots: dict[str, Slot] = {}

    def make_slots(self, rate: float) -> list[Slot]:
        """A slot for each candidate, trained at `rate` if the criterion trains."""
        rate = rate if self.criterion.trains else 0.0
        self.slots = {
            f"{module}.{name}": Slot(f"{module}.{name}", p, rate, self.criterion.statistics, True)
            for module, own in self.candidates.items()
            for name, p in own.items()
        }
        return list(self.slots.values())

    def leave_out(self, modules: Collection[str]) -> None:
        """Choose from these modules no more.

        Raises:
            ValueError: If the others do not have enough.
        """
        left_out = [module for module in modules if module in self.candidates]
        if not left_out:
            return
        self.candidates = {m: own for m, own in self.candidates.items() if m not in left_out}
        self.total = count_elements(self.candidates)
        self.sizes = {m: sum(p.numel() for p in own.values()) for m, own in self.candidates.items()}
        which = f"{left_out[:3]}{' and others' if len(left_out) > 3 else ''}"
        if self.finds_size:
            self.size = min(self.size, self.total)
        if self.size > self.total:
            raise ValueError(
                f"the model never calls {which}, so no adapter can act there, and the other targets have only "
                f"{self.total:,} parameters for a ticket of {self.size:,}; lower `budget` or name more targets"
            )
        if self.quotas:
            self.quotas.check(self.sizes, self.size)
        warnings.warn(
            f"the model never calls {which}: it does not use them, or reads their weights past them. An adapter could "
            f"not act there, so the ticket leaves them out.",
            stacklevel=3,
        )

    def limits(self, size: int) -> dict[str, Limits] | None:
        return self.quotas.limits(self.sizes, size) if self.quotas else None

    def choose(self, training: DenseTraining, size: int) -> Positions:
        """The best `size` elements, by the evidence so far.

        Raises:
            ValueError: If a score is not finite, or of another shape than its parameter.
        """

        def score(name: str, parameter: Tensor) -> Tensor:
            slot = self.slots[name]
            scores = self.criterion.score(training.evidence(slot, self.criterion, self.seed))
            if not isinstance(scores, Tensor) or scores.shape != parameter.shape:
                given = (
                    f"shape {tuple(scores.shape)}" if isinstance(scores, Tensor) else f"type {type(scores).__name__}"
                )
                raise ValueError(
                    f"criterion {self.criterion.name!r} gave scores of {given} for {name!r} of shape "
                    f"{tuple(parameter.shape)}"
                )
            if slot.kept is None:
                return scores
            require_finite(name, scores)
            scores = scores.to(slot.kept.device, torch.float32)
            return torch.where(slot.kept, scores, torch.finfo(torch.float32).min)  # survivors before the rest

        group_of = self.quotas.group_of if self.quotas else lambda module: ""
        return self.agree(choose(self.candidates, score, self.granularity, size, group_of, self.limits(size)))

    def end(self, round_: int, training: DenseTraining) -> None:
        """Keep what the next round may train after round `round_` (from 1), and rewind everything."""
        size = round(self.total * (self.size / self.total) ** (round_ / self.count))
        limits = self.limits(size)
        if limits:  # a cap that the ticket keeps to may be too low for what a round keeps of small groups
            size = min(size, sum(limit.high for limit in limits.values()))
        chosen = self.choose(training, size)
        for module, own in chosen.items():
            for name, positions in own.items():
                slot = self.slots[f"{module}.{name}"]
                kept = torch.zeros(slot.parameter.shape, dtype=torch.bool, device=slot.parameter.device)
                at = positions.to(kept.device).long()
                values = torch.ones(self.granularity.values_shape(kept.shape, len(at)), dtype=torch.bool)
                self.granularity.write(kept, at, values.to(kept.device))
                slot.kept = kept
        training.rewind()

    def early_values(self, positions: Positions) -> dict[str, Tensor]:
        """How far each chosen position had come at the step that the search rewinds to."""
        values = {}
        for module, own in positions.items():
            for name, at in own.items():
                slot = self.slots[f"{module}.{name}"]
                if slot.early is not None and len(at):
                    moved = (slot.early.float() - slot.before.float()).to(slot.parameter.device)
                    values[f"{module}.{name}"] = self.granularity.read(moved.contiguous(), at.to(moved.device).long())
        return values

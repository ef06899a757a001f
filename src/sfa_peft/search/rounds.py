"""The rounds of a search: computes scores, and chooses the survivors of each round and the ticket."""

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
    """Chooses positions from an adapter's candidates, round by round.

    Args:
        candidates: For each module, its candidate parameters by name.
        granularity: The unit of selection.
        size: The number of elements in the ticket.
        criterion: The criterion that scores the positions.
        quotas: Limits on the part of the ticket that each group gets.
        count: The number of rounds.
        seed: The seed of the search.
        finds_size: Whether `size` is only an upper limit, because the search decides the size.
        agree: Gives all processes the same positions.
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
        self.sizes = {m: sum(p.numel() for p in named.values()) for m, named in self.candidates.items()}
        self.agree = agree
        if quotas:
            quotas.check(self.sizes, size)
        self.slots: dict[str, Slot] = {}

    def make_slots(self, rate: float) -> list[Slot]:
        """Make a slot for each candidate. Its learning rate is `rate` if the criterion needs training, otherwise 0."""
        rate = rate if self.criterion.trains else 0.0
        self.slots = {
            f"{module}.{name}": Slot(f"{module}.{name}", p, rate, self.criterion.statistics, True)
            for module, parameters in self.candidates.items()
            for name, p in parameters.items()
        }
        return list(self.slots.values())

    def leave_out(self, modules: Collection[str]) -> None:
        """Remove modules from the candidates.

        Raises:
            ValueError: If the other candidates have too few parameters for the ticket.
        """
        left_out = [module for module in modules if module in self.candidates]
        if not left_out:
            return
        self.candidates = {m: parameters for m, parameters in self.candidates.items() if m not in left_out}
        self.total = count_elements(self.candidates)
        self.sizes = {m: sum(p.numel() for p in named.values()) for m, named in self.candidates.items()}
        which = f"{left_out[:3]}{' and others' if len(left_out) > 3 else ''}"
        if self.finds_size:
            self.size = min(self.size, self.total)
        if self.size > self.total:
            raise ValueError(
                f"the model never calls {which}, so no adapter can act there, and the other targets have only "
                f"{self.total:,} parameters for a ticket of {self.size:,}; lower `budget` or name more modules."
            )
        if self.quotas:
            self.quotas.check(self.sizes, self.size)
        warnings.warn(
            f"the model never calls {which}: it does not use them, or reads their weights without a call. An adapter "
            f"would have no effect there, so the ticket does not include them.",
            stacklevel=3,
        )

    def limits(self, size: int) -> dict[str, Limits] | None:
        return self.quotas.limits(self.sizes, size) if self.quotas else None

    def choose(self, training: DenseTraining, size: int) -> Positions:
        """The `size` elements with the highest scores.

        Raises:
            ValueError: If a score is not finite, or the scores do not have the shape of their parameter.
        """

        def score(name: str, parameter: Tensor) -> Tensor:
            slot = self.slots[name]
            scores = self.criterion.score(training.evidence(slot, self.criterion, self.seed))
            if not isinstance(scores, Tensor) or scores.shape != parameter.shape:
                given = (
                    f"shape {tuple(scores.shape)}" if isinstance(scores, Tensor) else f"type {type(scores).__name__}"
                )
                raise ValueError(
                    f"criterion {self.criterion.name!r} gave scores of {given} for {name!r}; expected a tensor of "
                    f"shape {tuple(parameter.shape)}."
                )
            if slot.kept is None:
                return scores
            require_finite(name, scores)
            scores = scores.to(slot.kept.device, torch.float32)
            return torch.where(slot.kept, scores, torch.finfo(torch.float32).min)  # survivors come first

        group_of = self.quotas.group_of if self.quotas else lambda module: ""
        return self.agree(choose(self.candidates, score, self.granularity, size, group_of, self.limits(size)))

    def end(self, round_: int, training: DenseTraining) -> None:
        """End round `round_` (from 1): choose the survivors that the next round trains, and rewind all parameters."""
        size = round(self.total * (self.size / self.total) ** (round_ / self.count))
        limits = self.limits(size)
        if limits:  # caps that fit the ticket may be too low for the more numerous survivors of a round
            size = min(size, sum(limit.high for limit in limits.values()))
        chosen = self.choose(training, size)
        for module, survivors in chosen.items():
            for name, positions in survivors.items():
                slot = self.slots[f"{module}.{name}"]
                kept = torch.zeros(slot.parameter.shape, dtype=torch.bool, device=slot.parameter.device)
                at = positions.to(kept.device).long()
                values = torch.ones(self.granularity.values_shape(kept.shape, len(at)), dtype=torch.bool)
                self.granularity.write(kept, at, values.to(kept.device))
                slot.kept = kept
        training.rewind()

    def changes(self, positions: Positions) -> dict[str, Tensor]:
        """The change of each chosen position since the start of the search."""
        values = {}
        for module, chosen in positions.items():
            for name, at in chosen.items():
                slot = self.slots[f"{module}.{name}"]
                if slot.rate and len(at):
                    moved = slot.value.float() - slot.before.to(slot.parameter.device, torch.float32)
                    values[f"{module}.{name}"] = self.granularity.read(moved.contiguous(), at.to(moved.device).long())
        return values

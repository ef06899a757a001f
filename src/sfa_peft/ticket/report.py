"""The report: where a ticket went, as a table by stage and by module type."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Share:
    """How much of one parameter is in the ticket, in elements."""

    name: str
    chosen: int
    size: int

    @property
    def stage(self) -> str:
        """The layer's index in the model: of a Swin, the stage; of a plain transformer, the block."""
        numbered = re.search(r"(?:^|\.)(\w+)\.(\d+)\.", self.name)
        return f"{numbered[1]}.{numbered[2]}" if numbered else "other"

    @property
    def module_type(self) -> str:
        """The last two parts of the module's name that are no index, such as ``mlp.fc1`` or ``norm1``."""
        module = self.name.rpartition(".")[0]
        parts = re.split(r"\.\d+\.", f".{module}")[-1].strip(".")
        return ".".join(parts.split(".")[-2:])


@dataclass(frozen=True)
class TicketReport:
    """Where a ticket went.

    Attributes:
        shares: For each candidate parameter, how much of it was chosen.
        criterion: The criterion that scored the positions.
        granularity: The unit of selection.
        steps: Training steps of the search.
        losses: The loss of each step.
    """

    shares: tuple[Share, ...]
    criterion: str
    granularity: str
    steps: int
    losses: tuple[float, ...]

    @property
    def ticket_size(self) -> int:
        return sum(share.chosen for share in self.shares)

    @property
    def density(self) -> float:
        return self.ticket_size / sum(share.size for share in self.shares)

    def __str__(self) -> str:
        head = (
            f"Ticket of {self.ticket_size:,} positions, density {self.density:.2%}, "
            f"granularity {self.granularity}, criterion {self.criterion} ({self.steps} steps"
            + (f", loss {self.losses[0]:.3f} -> {self.losses[-1]:.3f})" if self.losses else ")")
        )
        by_stage = _table("stage", self.shares, lambda share: share.stage)
        by_type = _table("module type", self.shares, lambda share: share.module_type)
        return f"{head}\n\n{by_stage}\n\n{by_type}"


def _table(title: str, shares: tuple[Share, ...], key: Callable[[Share], str]) -> str:
    rows: dict[str, list[int]] = {}
    for share in shares:
        row = rows.setdefault(key(share), [0, 0])
        row[0] += share.chosen
        row[1] += share.size
    total = sum(chosen for chosen, _ in rows.values()) or 1
    width = max(len(title), *(len(name) for name in rows))
    lines = [f"{title:<{width}} {'positions':>10} {'of':>12} {'density':>8} {'share':>7}"]
    lines += [
        f"{name:<{width}} {chosen:>10,} {size:>12,} {chosen / size:>8.2%} {chosen / total:>7.1%}"
        for name, (chosen, size) in rows.items()
    ]
    return "\n".join(lines)

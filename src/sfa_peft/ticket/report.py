"""The report of a search: the ticket by layer and module type, as tables and as a picture."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .quotas import GROUPINGS
from .text import printable
from .ticket import Ticket

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class TicketReport:
    """Shows where the positions of a ticket are. `print(report)` prints it as tables by layer and by module type.

    Attributes:
        ticket (`Ticket`): The ticket. It can be saved, compared with another, or installed in another model.
        steps (`int`, defaults to 0): The training steps of the search, over all rounds.
        losses (`tuple[float, ...]`, defaults to `()`): The loss of each step.
    """

    ticket: Ticket
    steps: int = 0
    losses: tuple[float, ...] = ()

    @property
    def ticket_size(self) -> int:
        """The number of elements in the ticket."""
        return self.ticket.size

    @property
    def density(self) -> float:
        """The fraction of the candidate elements that is in the ticket; 0 without candidates."""
        return self.ticket.density

    def counts(self, per: str) -> dict[str, tuple[int, int, int]]:
        """For each group: elements in the ticket, candidate elements, and the sum of its external widths.

        Args:
            per (`str`): The groups: `layer`, `type` or `module`.

        Raises:
            ValueError: If `per` is not known.
        """
        if per not in GROUPINGS:
            raise ValueError(f"per={per!r} is not known; choose one of {sorted(GROUPINGS)}.")
        group_of = GROUPINGS[per]
        elements = self.ticket.counts(group_of)
        widths: dict[str, int] = {}
        for modules in self.ticket.widths.values():
            for module, width in modules.items():
                widths[group_of(module)] = widths.get(group_of(module), 0) + width
        return {g: (*elements.get(g, (0, 0)), widths.get(g, 0)) for g in dict.fromkeys((*elements, *widths))}

    def __str__(self) -> str:
        ticket = self.ticket
        head = "No ticket"
        if ticket.shapes:
            head = (
                f"Ticket of {ticket.size:,} positions, density {ticket.density:.2%}, granularity "
                f"{ticket.granularity.name}"
            )
            if ticket.criterion:
                head += f", criterion {printable(ticket.criterion)}"
        if self.losses:
            head += f" ({self.steps} steps, loss {self.losses[0]:.3f} -> {self.losses[-1]:.3f})"
        return "\n\n".join([head, self._table("layer", "layer"), self._table("module type", "type")])

    def _table(self, title: str, per: str) -> str:
        rows = [(printable(name), *row) for name, row in self.counts(per).items()]
        total = self.ticket.size or 1
        wide = max(map(len, (title, *(name for name, *_ in rows))))
        lines = [f"{title:<{wide}} {'positions':>10} {'of':>12} {'density':>8} {'share':>7} {'width':>6}"]
        for name, chosen, size, width in rows:
            density = f"{chosen / size:.2%}" if size else "-"
            lines.append(
                f"{name:<{wide}} {chosen:>10,} {size:>12,} {density:>8} {chosen / total:>7.1%} {width or '-':>6}"
            )
        return "\n".join(lines)

    def picture(self, path: str | Path | None = None) -> Figure:
        """Draw the density by layer and module type, and the widths of the external adapters beside it.

        Args:
            path (`str` or `Path`, *optional*, defaults to `None`):
                The file to write. Its ending gives the format: PNG, PDF or SVG. None writes no file.

        Returns:
            A matplotlib figure.

        Raises:
            ImportError: If matplotlib is not installed.
        """
        from .picture import draw_ticket

        return draw_ticket(self.ticket, path)

"""Draws a ticket's density by layer and module type, and the overlap of two tickets."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .quotas import layer_of, type_of
from .text import printable
from .ticket import Ticket

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Cells = dict[tuple[str, str], float]

# Names are shown as they are: matplotlib would read `$` as the begin of a formula, and fail if it is none.
_AS_IT_IS: dict[str, Any] = {"parse_math": False, "usetex": False}
_LONGEST = 40  # characters of a name


def draw_ticket(ticket: Ticket, path: str | Path | None = None) -> Figure:
    """Draw the density by layer and module type, with the widths of the external adapters beside it.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    counts = ticket.counts(_cell_of)
    widths: Cells = {}
    for place, modules in ticket.widths.items():
        for module, width in modules.items():
            key = (layer_of(module), place)
            widths[key] = widths.get(key, 0) + width
    layers = list(dict.fromkeys(layer for layer, _ in (*counts, *widths)))
    panels = [
        (
            "ticket density (%)",
            {key: 100 * chosen / size for key, (chosen, size) in counts.items()},
            "{:.1f}",
            "viridis",
        ),
        ("external width", widths, "{:.0f}", "magma"),
    ]
    title = "external adapters"
    if ticket.shapes:
        kind = f"{ticket.criterion} ticket" if ticket.criterion else "ticket"
        title = f"{kind}: {ticket.size:,} positions, density {ticket.density:.2%}"
    return _draw([p for p in panels if p[1]], layers, title, path)


def draw_overlap(a: Ticket, b: Ticket, path: str | Path | None = None, names: Sequence[str] = ("a", "b")) -> Figure:
    """Draw the overlap (IoU) of two tickets by layer and module type.

    Raises:
        ValueError: If the tickets are of different models or granularities.
        ImportError: If matplotlib is not installed.
    """
    total = a.overlap(b)
    if not a.shapes:
        raise ValueError("tickets without candidates (external adapters only) have no overlap to draw.")
    cells = a.overlaps(b, _cell_of)
    layers = list(dict.fromkeys(layer for layer, _ in cells))
    title = f"overlap (IoU) of {names[0]} and {names[1]}: {total:.2f}"
    return _draw([("IoU", cells, "{:.2f}", "viridis")], layers, title, path)


def _cell_of(module: str) -> tuple[str, str]:
    return layer_of(module), type_of(module)


def _draw(
    panels: Sequence[tuple[str, Cells, str, str]], layers: list[str], title: str, path: str | Path | None
) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('drawing a ticket needs matplotlib: pip install "sfa-peft[pictures]"') from error

    columns = [list(dict.fromkeys(column for _, column in cells)) for _, cells, _, _ in panels]
    beside, below = _extra(layers), max(map(_extra, columns), default=0)
    size = (3 + 0.08 * beside + 0.75 * sum(map(len, columns)), 1.9 + 0.06 * below + 0.34 * len(layers))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False, width_ratios=[max(len(c), 1) for c in columns])[0]
    for axis, names, (label, cells, form, colours) in zip(axes, columns, panels, strict=True):
        _heatmap(axis, layers, names, cells, form, colours)
        axis.set_title(label, fontsize=10)
    for axis in axes[1:]:
        axis.set_yticks([])
    figure.suptitle(printable(title), fontsize=11, **_AS_IT_IS)
    if path is not None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=130)
    return figure


def _labels(names: Sequence[str]) -> list[str]:
    shown = map(printable, names)
    return [name if len(name) <= _LONGEST else f"{name[: _LONGEST - 3]}..." for name in shown]


def _extra(names: Sequence[str]) -> int:
    """The characters of the longest name beyond 20, which need more room."""
    return max([20, *map(len, _labels(names))]) - 20


def _heatmap(axis: Axes, rows: list[str], columns: list[str], cells: Cells, form: str, colours: str) -> None:
    values = [[cells.get((row, column), float("nan")) for column in columns] for row in rows]
    shown = axis.imshow(values, aspect="auto", cmap=colours, vmin=0)
    axis.set_xticks(range(len(columns)), _labels(columns), rotation=45, ha="right", fontsize=8, **_AS_IT_IS)
    axis.set_yticks(range(len(rows)), _labels(rows), fontsize=8, **_AS_IT_IS)
    bright = shown.get_clim()[1] or 1
    for i, row in enumerate(values):
        for j, value in enumerate(row):
            if value == value:
                colour = "black" if value > 0.6 * bright else "white"
                axis.text(j, i, form.format(value), ha="center", va="center", fontsize=6.5, color=colour)

"""A ticket on the backbone: a table of blocks and modules, whose cells say how much of each may change."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import jinja2
from markupsafe import Markup

from sfa_peft import Ticket

# What the leaves of a block are called, and what its column is; all others are in the last one.
COLUMNS = {
    "q": ("q_proj", "query", "q"),
    "k": ("k_proj", "key", "k"),
    "v": ("v_proj", "value", "v"),
    "qkv": ("qkv",),
    "out": ("o_proj", "out_proj", "proj", "dense"),
    "fc1": ("fc1", "weights_in", "up_proj"),
    "fc2": ("fc2", "weights_out", "down_proj"),
}
REST = "rest"
# How dense, compared with the whole ticket: below which factor, the words, and the colour of the cell and its text.
LEVELS = (
    (0.0, "nothing", "#f3f3f1", "#767676"),
    (0.5, "little: less than half of the mean", "#dbe9f6", "#1f2d3d"),
    (1.5, "about the mean", "#a6cbe8", "#1f2d3d"),
    (4.0, "much: up to 4 times the mean", "#4e93c9", "#ffffff"),
    (float("inf"), "most: more than 4 times the mean", "#0b4a84", "#ffffff"),
)


@dataclass
class Cell:
    """A module of a block: its density in percent, and which of `LEVELS` that is."""

    percent: str
    level: int

    @property
    def words(self) -> str:
        return LEVELS[self.level][1]


@dataclass
class Diagram:
    """The table.

    Attributes:
        columns: What the modules are called.
        rows: For each block, its name, a cell for each column (None where it has no such module), and how wide its
            external adapters are together (0 for none).
        mean: The density of the whole ticket.
        size: How many weights it has.
    """

    columns: list[str]
    rows: list[tuple[str, list[Cell | None], int]]
    mean: str
    size: int

    @property
    def has_widths(self) -> bool:
        return any(width for _, _, width in self.rows)

    def as_html(self) -> Markup:
        """The table for a page, with its style and what its colours mean."""
        environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
        template = environment.from_string(Path(__file__).with_suffix(".html").read_text())
        return Markup(template.render(vars(self), has_widths=self.has_widths, levels=LEVELS))


def diagram_of(ticket: Ticket) -> Diagram:
    """Draw a ticket as a table."""
    counts = ticket.counts(lambda module: (block_of(module), column_of(module)))
    widths: dict[str, int] = {}
    for modules in ticket.widths.values():
        for module, width in modules.items():
            widths[block_of(module)] = widths.get(block_of(module), 0) + width
    blocks = list(dict.fromkeys([*(block for block, _ in counts), *widths]))
    columns = [name for name in (*COLUMNS, REST) if any(column == name for _, column in counts)]
    rows = []
    for block in blocks:
        cells: list[Cell | None] = []
        for column in columns:
            chosen, size = counts.get((block, column), (0, 0))
            cells.append(cell_of(chosen / size, ticket.density) if size else None)
        rows.append((block, cells, widths.get(block, 0)))
    return Diagram(columns, rows, _percent(ticket.density), ticket.size)


def cell_of(density: float, mean: float) -> Cell:
    """A cell of this density, where that of the whole ticket is `mean`."""
    factor = density / mean if mean else 0.0
    level = next(i for i, (below, *_) in enumerate(LEVELS) if factor <= below)
    return Cell(_percent(density), level)


def block_of(module: str) -> str:
    """What a module's block is called for people: by its numbers, counted from 1."""
    numbers = [int(number) + 1 for number in re.findall(r"(?<=\.)\d+(?=\.|$)", module)]
    if len(numbers) >= 2:
        return f"stage {numbers[0]}, block {numbers[1]}"
    if numbers:
        return f"stage {numbers[0]}, end" if ".layers." in module and "blocks" not in module else f"block {numbers[0]}"
    return "outside of blocks"


def column_of(module: str) -> str:
    leaf = module.rpartition(".")[2]
    return next((name for name, leaves in COLUMNS.items() if leaf in leaves), REST)


def _percent(density: float) -> str:
    percent = 100 * density
    return "0" if not density else f"{percent:.0f}" if percent >= 9.95 else f"{percent:.1f}".removeprefix("0")

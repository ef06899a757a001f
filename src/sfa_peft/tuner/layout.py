"""Reads an adapter's ticket and external widths from the state dict of a whole model."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from ..layers.adapted import EXTERNAL_KINDS
from ..ticket.selection import Positions

Widths = dict[tuple[str, str], int]  # by module, and the kind of external adapter


def layout_in(state: Mapping[str, Tensor], prefix: str, adapter_name: str) -> tuple[Positions, Widths]:
    """The positions and widths of one adapter.

    Args:
        state: A state dict with decoded positions.
        prefix: The prefix of the base model's names in it.
        adapter_name: The adapter.
    """
    name, kinds = re.escape(adapter_name), "|".join(EXTERNAL_KINDS)
    internal = re.compile(rf"{re.escape(prefix)}(.+)\.sfa_internal\.{name}\.(weight|bias)_positions")
    external = re.compile(rf"{re.escape(prefix)}(.+)\.({kinds})\.{name}\.down\.weight")
    positions: Positions = {}
    widths: Widths = {}
    for key, tensor in state.items():
        if found := internal.fullmatch(key):
            positions.setdefault(found[1], {})[found[2]] = tensor
        elif found := external.fullmatch(key):
            widths[found[1], found[2]] = len(tensor)
    return positions, widths


def lengths(positions: Positions) -> dict[tuple[str, str], int]:
    return {(module, name): len(indices) for module, named in positions.items() for name, indices in named.items()}

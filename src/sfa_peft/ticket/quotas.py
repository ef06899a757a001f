"""Quotas: how evenly a ticket must spread over layers or over types of modules."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from .selection import Limits


def layer_of(module: str) -> str:
    """The layer that a module is in: its name up to the last index, without what is before the first.

    ``backbone.encoder.layers.0.blocks.1.mlp.fc1`` is in ``layers.0.blocks.1``; what has no index is in ``other``.
    """
    found = re.search(r"(?:^|\.)(\w+\.\d+(?:\..*\.\d+)?)(?=\.|$)", module)
    return found[1] if found else "other"


def type_of(module: str) -> str:
    """A module's type: its name behind the last index, such as ``mlp.fc1`` or ``norm1``; ``other`` if that is nothing.

    Without any index, the last two parts of the name.
    """
    *before, last = re.split(r"(?:^|\.)\d+(?:\.|$)", module)
    return (last if before else ".".join(last.split(".")[-2:])) or "other"


GROUPINGS: dict[str, Callable[[str], str]] = {"layer": layer_of, "type": type_of, "module": lambda module: module}


@dataclass(frozen=True)
class Quotas:
    """Limits on how the ticket spreads. Without any, the selection is global.

    Attributes:
        per: The groups: ``layer`` (a block), ``type`` (all modules of one type, such as ``mlp.fc1``) or ``module``.
        equal_density: Every group gets the same density, as near as whole positions allow.
        floor: The least part of the ticket that a group gets, in [0, 1]; a group that is smaller is taken whole.
        cap: The largest part of the ticket that a group may get, in (0, 1].

    Raises:
        ValueError: If a value is not valid.
    """

    per: str = "layer"
    equal_density: bool = False
    floor: float = 0.0
    cap: float = 1.0

    def __post_init__(self) -> None:
        if self.per not in GROUPINGS:
            raise ValueError(f"Quotas.per={self.per!r} is not known; choose one of {sorted(GROUPINGS)}.")
        if not 0 <= self.floor <= self.cap <= 1 or self.cap == 0:
            raise ValueError(f"Quotas.floor={self.floor!r} and cap={self.cap!r} need 0 <= floor <= cap <= 1, cap > 0.")
        if self.equal_density and (self.floor > 0 or self.cap < 1):
            raise ValueError("Quotas.equal_density leaves nothing for `floor` and `cap` to decide; leave them out.")

    def group_of(self, module: str) -> str:
        return GROUPINGS[self.per](module)

    def limits(self, sizes: Mapping[str, int], size: int) -> dict[str, Limits]:
        """The limits of each group, in elements.

        Args:
            sizes: For each module, its candidate elements.
            size: Of the ticket.
        """
        groups: dict[str, int] = {}
        for module, count in sizes.items():
            groups[self.group_of(module)] = groups.get(self.group_of(module), 0) + count
        if self.equal_density:
            return {group: Limits(n, n) for group, n in _proportional(groups, size).items()}
        # To the next whole position, so that a cap of exactly 1 / groups can be kept.
        low, high = math.floor(self.floor * size), math.ceil(self.cap * size)
        return {group: Limits(min(low, n), min(high, n)) for group, n in groups.items()}

    def check(self, sizes: Mapping[str, int], size: int) -> None:
        """Raise a `ValueError` if no ticket of that size keeps to the limits."""
        limits = self.limits(sizes, size)
        groups = len(limits)
        least, most = sum(x.low for x in limits.values()), sum(x.high for x in limits.values())
        if not least <= size <= most:
            name, value = ("floor", self.floor) if least > size else ("cap", self.cap)
            raise ValueError(
                f"Quotas.{name}={value!r} cannot be kept: {groups} groups ({self.per}s) would get "
                f"{'at least ' + format(least, ',') if least > size else 'at most ' + format(most, ',')} of the "
                f"ticket's {size:,} positions; {'lower' if least > size else 'raise'} it."
            )


def _proportional(groups: Mapping[str, int], size: int) -> dict[str, int]:
    """Split `size` in proportion to the groups' sizes, by the largest remainder method."""
    total = sum(groups.values())
    quotas = {group: size * n // total for group, n in groups.items()}
    by_remainder = sorted(groups, key=lambda group: -(size * groups[group] % total))
    for group in by_remainder[: size - sum(quotas.values())]:
        quotas[group] += 1
    return quotas

"""Quotas: limits on the positions that layers or types of modules get from a ticket."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from .selection import Limits


def layer_of(module: str) -> str:
    """The layer of a module: the part of its name from before the first index to the last index.

    ``backbone.encoder.layers.0.blocks.1.mlp.fc1`` is in ``layers.0.blocks.1``, a name without an index in ``other``.
    """
    found = re.search(r"(?:^|\.)(\w+\.\d+(?:\..*\.\d+)?)(?=\.|$)", module)
    return found[1] if found else "other"


def type_of(module: str) -> str:
    """The type of a module: its name after the last index, such as ``mlp.fc1``, or ``other`` if this is empty.

    For a name without an index, its last two parts.
    """
    *before, last = re.split(r"(?:^|\.)\d+(?:\.|$)", module)
    return (last if before else ".".join(last.split(".")[-2:])) or "other"


GROUPINGS: dict[str, Callable[[str], str]] = {"layer": layer_of, "type": type_of, "module": lambda module: module}


@dataclass(frozen=True)
class Quotas:
    """Limits on the part of the ticket that each group of modules gets. Without limits the selection is global.

    Args:
        per (`str`, defaults to `"layer"`):
            The groups: `layer` (a block), `type` (all modules of one type, such as `mlp.fc1`) or `module`.
        equal_density (`bool`, defaults to `False`):
            Whether every group gets the same density, rounded to whole positions. Not together with `floor` or `cap`.
        floor (`float`, defaults to 0.0):
            The smallest fraction of the ticket that a group gets, in [0, 1]. A group with fewer candidates is chosen
            as a whole.
        cap (`float`, defaults to 1.0):
            The largest fraction of the ticket that a group gets, in (0, 1].

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
            raise ValueError(
                f"Quotas.floor={self.floor!r} and cap={self.cap!r} are not valid; use 0 <= floor <= cap <= 1 and "
                f"cap > 0."
            )
        if self.equal_density and (self.floor > 0 or self.cap < 1):
            raise ValueError(
                f"Quotas.equal_density=True cannot be used with floor={self.floor!r} and cap={self.cap!r}; leave out "
                f"`floor` and `cap`."
            )

    def group_of(self, module: str) -> str:
        """The group of a module."""
        return GROUPINGS[self.per](module)

    def limits(self, sizes: Mapping[str, int], size: int) -> dict[str, Limits]:
        """The limits of each group, in elements.

        Args:
            sizes: For each module, the number of its candidate elements.
            size: The size of the ticket, in elements.
        """
        groups: dict[str, int] = {}
        for module, count in sizes.items():
            groups[self.group_of(module)] = groups.get(self.group_of(module), 0) + count
        if self.equal_density:
            return {group: Limits(n, n) for group, n in _proportional(groups, size).items()}
        # Rounded outwards, so that a cap of exactly 1 / groups can be met.
        low, high = math.floor(self.floor * size), math.ceil(self.cap * size)
        return {group: Limits(min(low, n), min(high, n)) for group, n in groups.items()}

    def check(self, sizes: Mapping[str, int], size: int) -> None:
        """Check that a ticket of this size can meet the limits.

        Args:
            sizes: For each module, the number of its candidate elements.
            size: The size of the ticket, in elements.

        Raises:
            ValueError: If no ticket of this size meets the limits.
        """
        limits = self.limits(sizes, size)
        groups = len(limits)
        least, most = sum(x.low for x in limits.values()), sum(x.high for x in limits.values())
        if not least <= size <= most:
            name, value = ("floor", self.floor) if least > size else ("cap", self.cap)
            raise ValueError(
                f"Quotas.{name}={value!r} cannot be met: {groups} groups ({self.per}s) would get "
                f"{'at least ' + format(least, ',') if least > size else 'at most ' + format(most, ',')} of the "
                f"ticket's {size:,} positions; {'lower' if least > size else 'raise'} it."
            )


def _proportional(groups: Mapping[str, int], size: int) -> dict[str, int]:
    """Divide `size` in proportion to the sizes of the groups, by the largest remainder method."""
    total = sum(groups.values())
    quotas = {group: size * n // total for group, n in groups.items()}
    by_remainder = sorted(groups, key=lambda group: -(size * groups[group] % total))
    for group in by_remainder[: size - sum(quotas.values())]:
        quotas[group] += 1
    return quotas

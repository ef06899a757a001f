"""Computes the widths of the external adapters from a budget of trainable parameters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..checkpoint.names import external_kind


def external_cost(channels: int, width: int, conv: int = 0) -> int:
    """The trainable parameters of one external adapter: ``width * (2 * channels + 1 + conv^2)``.

    These are ``channels * width`` for the down projection, ``width`` for its bias, ``width * channels`` for the up
    projection, and ``width * conv^2`` for the filters. A width of 0 means no adapter.
    """
    return width * (2 * channels + 1 + conv * conv)


@dataclass(frozen=True)
class External:
    """A planned external adapter: at `place`, on the leaf `module`. Some read the input of another module, `reads`.

    With filters of `conv` x `conv`, `grid` says where the grid of its tokens comes from: the name of a module, and of
    an argument of its forward. See `layers.grid`.
    """

    place: str
    module: str
    reads: str | None
    channels: int
    channel_dim: int
    width: int = 0
    conv: int = 0
    grid: tuple[str, str | None] | None = None

    @property
    def kind(self) -> str:
        return external_kind(self.place)

    @property
    def cost(self) -> int:
        """Its trainable parameters."""
        return external_cost(self.channels, self.width, self.conv)


def absolute_budget(budget: int | float, backbone_parameters: int) -> int:
    """Convert a budget to a number of parameters.

    Args:
        budget: A number of parameters, or a fraction of the backbone in (0, 1).
        backbone_parameters: The number of parameters of the base model outside `modules_to_save`.

    Raises:
        ValueError: If the result is less than one parameter, or more than the backbone has.
    """
    parameters = int(budget * backbone_parameters) if isinstance(budget, float) else budget
    if parameters < 1:
        raise ValueError(
            f"budget={budget!r} of a backbone of {backbone_parameters:,} parameters allows less than one parameter; "
            f"use a larger fraction or an int."
        )
    if parameters > backbone_parameters:
        raise ValueError(
            f"budget={budget!r} is larger than the backbone ({backbone_parameters:,} parameters); "
            f"use at most this number, or a fraction in (0, 1)."
        )
    return parameters


def widths_within(channels: Sequence[int], allowance: int, conv: int = 0) -> list[int]:
    """The widths of external adapters that together have at most `allowance` parameters.

    Every adapter gets the same fraction of its channel width, rounded down. The rest of the allowance goes to the
    adapters that lost most by rounding, one hidden unit each (largest remainder method). Deterministic; ties go to the
    first.

    Args:
        channels: The channel width of each place, in model order.
        allowance: The largest number of parameters of all external adapters together.
        conv: The height and width of the filters of each hidden unit; 0 for none.

    Returns:
        One width per place. Some may be 0 if the allowance is small.

    Raises:
        ValueError: If the allowance is too small for one hidden unit of the cheapest adapter.
    """
    if not channels:
        return []
    units = [external_cost(c, 1, conv) for c in channels]
    cheapest = min(units)
    if allowance < cheapest:
        filters = f" + {conv} * {conv}" if conv else ""
        smaller = ", lower `external_conv`" if conv else ""
        raise ValueError(
            f"the external adapters get {allowance:,} parameters of the budget, but one hidden unit of the cheapest "
            f"costs {cheapest:,} (2 * {min(channels)} channels + 1{filters}); raise `budget` or `external_share`"
            f"{smaller}, or set `external_share=0` for internal adapters only."
        )
    fraction = allowance / sum(c * unit for c, unit in zip(channels, units, strict=True))
    exact = [fraction * c for c in channels]
    widths = [int(w) for w in exact]
    left = allowance - sum(w * unit for w, unit in zip(widths, units, strict=True))
    for i in sorted(range(len(channels)), key=lambda i: (widths[i] - exact[i], i)):
        if units[i] <= left:
            widths[i] += 1
            left -= units[i]
    return widths

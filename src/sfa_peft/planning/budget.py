"""From a budget of trainable parameters to the widths of the external adapters and the size of the ticket."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


def external_cost(channels: int, width: int) -> int:
    """Trainable parameters of one external adapter: ``width * (2 * channels + 1)``.

    ``channels * width`` for the down projection, ``width`` for its bias, ``width * channels`` for the up projection.
    A width of 0 is no adapter and costs nothing.
    """
    return width * (2 * channels + 1)


@dataclass(frozen=True)
class External:
    """An external adapter to be made: by `place` on `module`, read from `mlp_input` if it is parallel."""

    place: str
    module: str
    mlp_input: str | None
    channels: int
    channel_dim: int
    width: int = 0

    @property
    def cost(self) -> int:
        return external_cost(self.channels, self.width)


def absolute_budget(budget: int | float, backbone_parameters: int) -> int:
    """Turn a budget into a number of parameters.

    Args:
        budget: A number of parameters, or a fraction of the backbone in (0, 1).
        backbone_parameters: Parameters of the base model outside `modules_to_save`.

    Raises:
        ValueError: If the budget comes out at less than one parameter or at more than the backbone has.
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
            f"use at most that, or a fraction in (0, 1)."
        )
    return parameters


def widths_within(channels: Sequence[int], allowance: int) -> list[int]:
    """The widths of external adapters that together cost at most `allowance` parameters.

    Every adapter gets the same fraction of its channel width, rounded down, and what rounding leaves goes to the
    adapters that lost most by it, one unit each (largest remainder method). Deterministic; ties go to the first.

    Args:
        channels: The channel width of each place, in model order.
        allowance: Parameters that the external adapters may take together.

    Returns:
        One width per place; some may be 0 when the allowance is small.

    Raises:
        ValueError: If the allowance does not pay for one unit of the cheapest adapter.
    """
    if not channels:
        return []
    cheapest = external_cost(min(channels), 1)
    if allowance < cheapest:
        raise ValueError(
            f"the external adapters may take {allowance:,} parameters of the budget, but one unit of the cheapest "
            f"costs {cheapest:,} (2 * {min(channels)} channels + 1); raise `budget` or `external_share`, or set "
            f"`external_share=0` for internal adapters only."
        )
    fraction = allowance / sum(c * (2 * c + 1) for c in channels)
    exact = [fraction * c for c in channels]
    widths = [int(w) for w in exact]
    left = allowance - sum(external_cost(c, w) for c, w in zip(channels, widths, strict=True))
    for i in sorted(range(len(channels)), key=lambda i: (widths[i] - exact[i], i)):
        if external_cost(channels[i], 1) <= left:
            widths[i] += 1
            left -= external_cost(channels[i], 1)
    return widths

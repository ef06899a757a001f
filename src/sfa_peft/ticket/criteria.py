"""Criteria: each computes a score for every position of a parameter. Higher is more important; scores are >= 0."""

from __future__ import annotations

import zlib
from collections.abc import Callable

import torch
from torch import Tensor


def magnitude(name: str, parameter: Tensor, seed: int) -> Tensor:
    """``|w|``: large weights first (Han et al., "Learning both Weights and Connections", 2015). Needs no data."""
    return parameter.detach().abs()


def random(name: str, parameter: Tensor, seed: int) -> Tensor:
    """Uniform noise: the control that every other criterion has to beat. The same for a name, shape and seed."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
    return torch.rand(parameter.shape, generator=generator)


def lottery(before: Tensor, after: Tensor) -> Tensor:
    """``|w_after - w_before|``: how far dense training moves a weight.

    The sparse fine-tuning form of the lottery-ticket search: Ansell et al., "Composable Sparse Fine-Tuning for
    Cross-Lingual Transfer" (2022), after Frankle & Carbin, "The Lottery Ticket Hypothesis" (2019).
    """
    return (after.detach().float() - before.to(after.device).float()).abs()


DATA_FREE_CRITERIA: dict[str, Callable[[str, Tensor, int], Tensor]] = {"magnitude": magnitude, "random": random}

"""Granularity: the units that a ticket is made of, and where they lie in a parameter.

A unit is an `element`, a `row` (one output neuron, with its bias) or a `column` (one input of all neurons). A position
is the index of a unit.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

Shape = tuple[int, ...] | torch.Size


@dataclass(frozen=True)
class Granularity(ABC):
    """How one parameter divides into units of equal size, numbered from 0.

    Attributes:
        joins_bias: Whether a unit of the weight takes the same unit of the bias with it.
    """

    joins_bias = False

    @property
    def name(self) -> str:
        return type(self).__name__.lower()

    def __str__(self) -> str:
        return self.name

    @abstractmethod
    def count(self, shape: Shape) -> int:
        """The number of units in a parameter of that shape; 0 if a ticket of this granularity cannot change it."""

    @abstractmethod
    def size(self, shape: Shape) -> int:
        """The number of elements in one unit."""

    @abstractmethod
    def view(self, parameter: Tensor) -> Tensor:
        """The parameter's units along the first dimension, without a copy. `parameter` must be contiguous."""

    def values_shape(self, shape: Shape, count: int) -> tuple[int, ...]:
        """The shape of the values of `count` units: ``(count, size)``."""
        return (count, self.size(shape))

    def read(self, parameter: Tensor, positions: Tensor) -> Tensor:
        """Copy the units at `positions`, in the shape of their values."""
        return (
            self.view(parameter).index_select(0, positions).reshape(self.values_shape(parameter.shape, len(positions)))
        )

    def write(self, parameter: Tensor, positions: Tensor, values: Tensor) -> None:
        """Put `values` into the units at `positions` of a contiguous parameter."""
        view = self.view(parameter)
        view.index_copy_(0, positions, values.reshape(len(positions), *view.shape[1:]))

    def unit_scores(self, scores: Tensor) -> Tensor:
        """A score for each unit: the mean over its elements; of shape ``(count,)``."""
        view = self.view(scores.contiguous())
        return view.reshape(len(view), -1).mean(1)


class Element(Granularity):
    def count(self, shape: Shape) -> int:
        return prod(shape)

    def size(self, shape: Shape) -> int:
        return 1

    def view(self, parameter: Tensor) -> Tensor:
        return parameter.view(-1)

    def values_shape(self, shape: Shape, count: int) -> tuple[int, ...]:
        """``(count,)``."""
        return (count,)


class Row(Granularity):
    joins_bias = True

    def count(self, shape: Shape) -> int:
        return shape[0]

    def size(self, shape: Shape) -> int:
        return prod(shape[1:])

    def view(self, parameter: Tensor) -> Tensor:
        return parameter.view(parameter.shape[0], -1)


class Column(Granularity):
    """An input channel of the weight. What has one dimension, as biases and most norms, has no columns."""

    def count(self, shape: Shape) -> int:
        return shape[1] if len(shape) > 1 else 0

    def size(self, shape: Shape) -> int:
        return prod(shape) // shape[1]

    def view(self, parameter: Tensor) -> Tensor:
        return parameter.transpose(0, 1)


GRANULARITIES: dict[str, Granularity] = {unit.name: unit for unit in (Element(), Row(), Column())}
NO_BLOCKS = "block granularity was removed in 0.2; sfa_peft 0.1 reads what has it"


def position_dtype(units: int) -> torch.dtype:
    """int32, as long as it can number the units."""
    return torch.int32 if units <= torch.iinfo(torch.int32).max else torch.int64

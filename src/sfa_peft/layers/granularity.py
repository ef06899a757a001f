"""Granularity: the unit of selection, and where the units of a parameter are.

A unit is an `element`, a `row` (one output neuron with its bias) or a `column` (one input of all neurons). A position
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
    """How a parameter is divided into units of equal size, numbered from 0.

    Attributes:
        joins_bias: Whether a unit of the weight and the same unit of the bias are selected together.
    """

    joins_bias = False

    @property
    def name(self) -> str:
        return type(self).__name__.lower()

    def __str__(self) -> str:
        return self.name

    @abstractmethod
    def count(self, shape: Shape) -> int:
        """The number of units in a parameter of this shape. 0 if a ticket of this granularity cannot change it."""

    @abstractmethod
    def size(self, shape: Shape) -> int:
        """The number of elements in one unit."""

    @abstractmethod
    def view(self, parameter: Tensor) -> Tensor:
        """A view of a contiguous parameter with its units along the first dimension."""

    def values_shape(self, shape: Shape, count: int) -> tuple[int, ...]:
        """The shape of the values of `count` units: ``(count, size)``."""
        return (count, self.size(shape))

    def read(self, parameter: Tensor, positions: Tensor) -> Tensor:
        """A copy of the units at `positions`, in the shape of `values_shape`."""
        return (
            self.view(parameter).index_select(0, positions).reshape(self.values_shape(parameter.shape, len(positions)))
        )

    def write(self, parameter: Tensor, positions: Tensor, values: Tensor) -> None:
        """Write `values` to the units at `positions` of a contiguous parameter."""
        view = self.view(parameter)
        view.index_copy_(0, positions, values.reshape(len(positions), *view.shape[1:]))

    def unit_scores(self, scores: Tensor) -> Tensor:
        """The score of each unit, the mean over its elements, of shape ``(count,)``."""
        view = self.view(scores.contiguous())
        return view.reshape(len(view), -1).mean(1)


class Element(Granularity):
    """A single element of a parameter."""

    def count(self, shape: Shape) -> int:
        return prod(shape)

    def size(self, shape: Shape) -> int:
        return 1

    def view(self, parameter: Tensor) -> Tensor:
        return parameter.view(-1)

    def values_shape(self, shape: Shape, count: int) -> tuple[int, ...]:
        """``(count,)``."""
        return (count,)

    def read(self, parameter: Tensor, positions: Tensor) -> Tensor:
        return parameter.view(-1).index_select(0, positions)


class Row(Granularity):
    """An output channel of the weight, with its bias."""

    joins_bias = True

    def count(self, shape: Shape) -> int:
        return shape[0]

    def size(self, shape: Shape) -> int:
        return prod(shape[1:])

    def view(self, parameter: Tensor) -> Tensor:
        return parameter.view(parameter.shape[0], -1)


class Column(Granularity):
    """An input channel of the weight. Parameters with one dimension, such as biases and norms, have no columns."""

    def count(self, shape: Shape) -> int:
        return shape[1] if len(shape) > 1 else 0

    def size(self, shape: Shape) -> int:
        return prod(shape) // shape[1]

    def view(self, parameter: Tensor) -> Tensor:
        return parameter.transpose(0, 1)


GRANULARITIES: dict[str, Granularity] = {unit.name: unit for unit in (Element(), Row(), Column())}
NO_BLOCKS = "block granularity was removed in 0.2; sfa_peft 0.1 reads such files"


def position_dtype(units: int) -> torch.dtype:
    """The dtype of positions: int32 if it can number the units, otherwise int64."""
    return torch.int32 if units <= torch.iinfo(torch.int32).max else torch.int64

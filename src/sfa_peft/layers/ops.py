"""Ops: what each kind of leaf computes with a changed weight and bias, and its gradients."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from .bottleneck import autocasts, compute_dtype
from .granularity import Column, Element, Granularity, Row

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]
Needs = tuple[bool, bool, bool]


class Used(NamedTuple):
    """What a forward pass has used, and saved beside its arguments."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    saved: tuple[Tensor, ...]


class Op(Protocol):
    """The function of one kind of leaf, and its gradients, with a changed weight and bias."""

    def compute_dtype(self, x: Tensor, weight: Tensor) -> torch.dtype: ...

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, tuple[Tensor, ...]]: ...

    def gradients(self, grad: Tensor, used: Used, needs: Needs) -> Gradients:
        """The gradients of the input, the weight and the bias, where they are needed."""

    def grad_units(
        self, grad: Tensor, x: Tensor, weight: Tensor, granularity: Granularity, positions: Tensor
    ) -> Tensor | None:
        """The gradient of only the units at `positions`, or None if this is not cheaper than the whole gradient."""


class LinearOp:
    """``x @ weight.T + bias`` on ``(..., in_features)``."""

    def compute_dtype(self, x: Tensor, weight: Tensor) -> torch.dtype:
        return compute_dtype(x, weight.dtype)

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, tuple[Tensor, ...]]:
        return F.linear(x, weight, bias), ()

    def gradients(self, grad: Tensor, used: Used, needs: Needs) -> Gradients:
        flat = grad.reshape(-1, grad.shape[-1])
        return (
            grad @ used.weight if needs[0] else None,
            flat.t() @ used.x.reshape(-1, used.x.shape[-1]) if needs[1] else None,
            flat.sum(0, dtype=torch.promote_types(grad.dtype, torch.float32)) if needs[2] else None,
        )

    def grad_units(
        self, grad: Tensor, x: Tensor, weight: Tensor, granularity: Granularity, positions: Tensor
    ) -> Tensor | None:
        if isinstance(granularity, Element) and not _is_sparse(grad, weight, positions.numel()):
            return None
        grad, x = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
        match granularity:
            case Row():
                return grad.index_select(1, positions).t() @ x
            case Column():
                return x.index_select(1, positions).t() @ grad
            case Element():
                return _products(grad, x, positions)
        return None


CHUNK = 512  # elements of a dot product, so that the vectors stay in the cache


def _is_sparse(grad: Tensor, weight: Tensor, count: int) -> bool:
    """Whether `_products` takes less time than the product of the whole matrices. The factors were measured.

    In half precision and on accelerators it never does.
    """
    is_slow = grad.device.type == "cpu" and grad.dtype in (torch.float32, torch.float64)
    is_few = 4 * count + 40 * sum(weight.shape) < weight.numel()
    return is_slow and is_few and not torch.compiler.is_compiling()


def _products(left: Tensor, right: Tensor, positions: Tensor) -> Tensor:
    """The elements of ``left.T @ right`` at sorted flat `positions`."""
    _hear_warning()
    rows, columns = left.shape[1], right.shape[1]
    starts = columns * torch.arange(rows + 1, dtype=positions.dtype)
    starts = torch.searchsorted(positions, starts, out_int32=positions.dtype == torch.int32)
    zeros = left.new_zeros(len(positions))
    sums = torch.sparse_csr_tensor(starts, positions % columns, zeros, (rows, columns), check_invariants=False)
    for part, other in zip(left.split(CHUNK), right.split(CHUNK), strict=True):
        # Copied, so that the vectors of the dot products are contiguous.
        sums = torch.sparse.sampled_addmm(sums, part.t().contiguous(), other.t().contiguous().t())
    return sums.values()


@cache
def _hear_warning() -> None:
    """The first sparse matrix in this layout gives a warning, that it is in beta. Users need not see it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        torch.sparse_csr_tensor([0, 0], torch.empty(0, dtype=torch.int64), torch.empty(0), (1, 1))


class Conv2dOp:
    """A 2-D convolution of ``(batch, in_channels, height, width)``. Padding other than zeros is done by the caller."""

    def __init__(self, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int) -> None:
        self.stride, self.padding, self.dilation, self.groups = list(stride), list(padding), list(dilation), groups

    def compute_dtype(self, x: Tensor, weight: Tensor) -> torch.dtype:
        return compute_dtype(x, weight.dtype)

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, tuple[Tensor, ...]]:
        return F.conv2d(x, weight, bias, self.stride, self.padding, self.dilation, self.groups), ()

    def _backward(self, grad: Tensor, x: Tensor, weight: Tensor, groups: int, needs: Needs) -> Gradients:
        grads: Gradients = torch.ops.aten.convolution_backward(
            grad, x, weight, [weight.shape[0]], self.stride, self.padding, self.dilation, False, [0, 0], groups, needs
        )
        return grads

    def gradients(self, grad: Tensor, used: Used, needs: Needs) -> Gradients:
        return self._backward(grad, used.x, used.weight, self.groups, needs)

    def grad_units(
        self, grad: Tensor, x: Tensor, weight: Tensor, granularity: Granularity, positions: Tensor
    ) -> Tensor | None:
        if self.groups != 1:  # output channels of different groups see different inputs
            return None
        match granularity:
            case Row():
                grad, weight = grad.index_select(1, positions), weight.index_select(0, positions)
                return self._backward(grad, x, weight, 1, (False, True, False))[1]
            case Column():
                x, weight = x.index_select(1, positions), weight.index_select(1, positions)
                columns = self._backward(grad, x, weight, 1, (False, True, False))[1]
                assert columns is not None
                return columns.transpose(0, 1)
        return None


class LayerNormOp:
    """Layer normalisation over the last ``len(shape)`` dimensions."""

    def __init__(self, shape: Sequence[int], eps: float) -> None:
        self.shape, self.eps = list(shape), eps

    def compute_dtype(self, x: Tensor, weight: Tensor) -> torch.dtype:
        # Autocast keeps layer_norm in float32.
        return torch.float32 if autocasts(x) else weight.dtype

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, tuple[Tensor, ...]]:
        y, mean, rstd = torch.native_layer_norm(x, self.shape, weight, bias, self.eps)
        return y, (mean, rstd)

    def gradients(self, grad: Tensor, used: Used, needs: Needs) -> Gradients:
        grads: Gradients = torch.ops.aten.native_layer_norm_backward(
            grad, used.x, self.shape, *used.saved, used.weight, used.bias, needs
        )
        return grads

    def grad_units(
        self, grad: Tensor, x: Tensor, weight: Tensor, granularity: Granularity, positions: Tensor
    ) -> Tensor | None:
        return None

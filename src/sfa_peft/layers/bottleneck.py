"""The external adapter: an added bottleneck MLP, ``scale * up(act(down(x)))``."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .grid import Grid, Size, TokenFilter, filtered, filtered_backward
from .offloading import is_hooked, onloaded


class Activation(NamedTuple):
    """An elementwise function and its gradient ``(grad_output, input) -> grad_input``."""

    forward: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, Tensor], Tensor]


ACTIVATIONS: dict[str, Activation] = {
    "gelu": Activation(F.gelu, torch.ops.aten.gelu_backward),
    "identity": Activation(lambda h: h, lambda g, h: g),
    "relu": Activation(F.relu, lambda g, h: torch.ops.aten.threshold_backward(g, h, 0)),
    "silu": Activation(F.silu, torch.ops.aten.silu_backward),
    "tanh": Activation(torch.tanh, lambda g, h: torch.ops.aten.tanh_backward(g, torch.tanh(h))),
}


def autocasts(x: Tensor) -> bool:
    """Whether autocast is on for the device of `x`. It leaves float64 as it is."""
    return not x.is_meta and x.dtype != torch.float64 and torch.is_autocast_enabled(x.device.type)


def compute_dtype(x: Tensor, otherwise: torch.dtype) -> torch.dtype:
    """The dtype of matrix products: autocast's if autocast is on for the device of `x`, else `otherwise`."""
    if autocasts(x):
        return torch.get_autocast_dtype(x.device.type)
    return otherwise


class _LastCast(threading.local):
    """The last input that was cast in this thread, and its cast. Both live only as long as others use them."""

    def __init__(self) -> None:
        self.source: weakref.ref[Tensor] | None = None
        self.result: weakref.ref[Tensor] | None = None
        self.version = -1


_last_cast = _LastCast()


def cast_input(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x` in `dtype`. Modules in a row with the same input (query, key and value; `fc1` and a parallel adapter) share
    one cast, and one cast of its gradient.
    """
    if x.dtype == dtype or torch.compiler.is_compiling() or torch.jit.is_tracing() or x.is_inference():
        return x.to(dtype)
    last = _last_cast
    if last.source is not None and last.result is not None and last.source() is x and last.version == x._version:
        result = last.result()
        if result is not None and result.dtype == dtype and result.requires_grad == _needs_grad(x):
            return result
    result = x.to(dtype)
    last.source, last.result, last.version = weakref.ref(x), weakref.ref(result), x._version
    return result


def _needs_grad(x: Tensor) -> bool:
    return x.requires_grad and torch.is_grad_enabled()


class BottleneckFunction(torch.autograd.Function):
    """``scale * up(act(down(x)))``, in `dtype`. With `filters`, the hidden states are `filtered`, on a grid of `size`.

    Saves `x` and the hidden states, which are narrow.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        down: Tensor,
        bias: Tensor,
        up: Tensor,
        filters: Tensor | None,
        size: Size,
        activation: str,
        scale: float,
        dtype: torch.dtype,
    ) -> Tensor:
        ctx.dtypes = x.dtype, down.dtype, bias.dtype, up.dtype, None if filters is None else filters.dtype
        x, down, bias, up = x.to(dtype), down.to(dtype), bias.to(dtype), up.to(dtype)
        filters = None if filters is None else filters.to(dtype)
        ctx.size, ctx.activation, ctx.scale = size, activation, scale
        linear = F.linear(x, down, bias)
        hidden = linear if filters is None else filtered(linear, filters, size)
        ctx.save_for_backward(x, down, up, filters, None if filters is None else linear, hidden)
        return F.linear(_scaled(ACTIVATIONS[activation].forward(hidden), scale), up)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, down, up, filters, linear, hidden = ctx.saved_tensors
        x_dtype, down_dtype, bias_dtype, up_dtype, filters_dtype = ctx.dtypes
        activation = ACTIVATIONS[ctx.activation]
        flat_x = x.reshape(-1, x.shape[-1])
        flat_grad = grad.reshape(-1, grad.shape[-1])

        flat_hidden = hidden.reshape(-1, hidden.shape[-1])
        grad_hidden = activation.backward(_scaled(flat_grad @ up, ctx.scale), flat_hidden)

        grad_x = grad_down = grad_bias = grad_up = grad_filters = None
        if ctx.needs_input_grad[3]:
            grad_up = (flat_grad.t() @ _scaled(activation.forward(flat_hidden), ctx.scale)).to(up_dtype)
        if filters is not None:
            grad_linear, grad_filters = filtered_backward(grad_hidden.view(linear.shape), linear, filters, ctx.size)
            grad_hidden, grad_filters = grad_linear.reshape(grad_hidden.shape), grad_filters.to(filters_dtype)
        if ctx.needs_input_grad[0]:
            grad_x = (grad_hidden @ down).to(x_dtype).view(x.shape)
        if ctx.needs_input_grad[1]:
            grad_down = (grad_hidden.t() @ flat_x).to(down_dtype)
        if ctx.needs_input_grad[2]:
            grad_bias = grad_hidden.sum(0, dtype=bias_dtype)
        return grad_x, grad_down, grad_bias, grad_up, grad_filters, None, None, None, None


def _scaled(values: Tensor, scale: float) -> Tensor:
    return values if scale == 1 else values * scale


def add_in_dtype(y: Tensor, delta: Tensor) -> Tensor:
    """``y + delta`` in the dtype of `y`."""
    is_narrower = torch.promote_types(y.dtype, delta.dtype) == y.dtype
    return y + (delta if is_narrower else delta.to(y.dtype))


class ExternalAdapter(nn.Module):
    """A bottleneck MLP that is added to a place's output.

    ``delta(x) = scale * up(dropout(act(down(x))))`` with ``down: channels -> width`` and ``up: width -> channels``.
    `down` has a bias. `up` has none: a constant shift is cheaper as an internal change of the bias at the place.
    `up` starts at zero, so that `delta` starts at exactly zero. After Houlsby et al., "Parameter-Efficient Transfer
    Learning for NLP" (2019), and AdaptFormer (Chen et al., 2022), which puts it in parallel with the MLP.

    With filters, ``act(h + conv(h))`` takes the place of ``act(h)``, where ``h = down(x)``. See `TokenFilter`.

    Args:
        channels: The channel width of the place.
        width: The bottleneck's hidden size, at least 1.
        activation: A key of `ACTIVATIONS`.
        dropout: The probability that a hidden unit is dropped in training, in [0, 1).
        scale: Constant factor on the output.
        channel_dim: The dimension of the channels: -1 for ``(..., channels)``, 1 for ``(batch, channels, ...)``.
        init_weights: With False, `up` is random too, and `delta` is not zero at the start (for tests).
        conv: The height and width of the filters on the hidden units, an odd number; 0 for no filters.
        grid: Where the grid of the tokens comes from; see `TokenFilter`.
    """

    def __init__(
        self,
        channels: int,
        width: int,
        activation: str = "gelu",
        dropout: float = 0.0,
        scale: float = 1.0,
        channel_dim: int = -1,
        init_weights: bool = True,
        conv: int = 0,
        grid: Grid | None = None,
    ) -> None:
        super().__init__()
        self.down = nn.Linear(channels, width)
        self.conv = TokenFilter(width, conv, grid, init_weights) if conv else None
        self.up = nn.Linear(width, channels, bias=False)
        nn.init.zeros_(self.down.bias)
        if init_weights:
            nn.init.zeros_(self.up.weight)
        self.activation = activation
        self.dropout = dropout
        self.scale = scale
        self.channel_dim = channel_dim

    @property
    def width(self) -> int:
        return self.down.out_features

    @property
    def kernel_size(self) -> int:
        """The height and width of the filters; 0 without filters."""
        return 0 if self.conv is None else self.conv.weight.shape[-1]

    def remove_hooks(self) -> None:
        """Remove the hook that gives the filters the grid of the tokens."""
        if self.conv is not None and self.conv.grid is not None:
            self.conv.grid.remove()

    def forward(self, x: Tensor, keeps_dtype: bool = True) -> Tensor:
        """Compute ``delta(x)``.

        Args:
            x: A tensor of shape ``(..., channels)`` or ``(batch, channels, ...)``, as the output.
            keeps_dtype: Whether the output has the dtype of `x`, and not that of the matrix products.
        """
        if is_hooked(self.down):
            with onloaded(*self.children()):
                delta = self._delta(x.to(self.down.weight.device))
        else:
            delta = self._delta(x)
        return delta.to(x.dtype) if keeps_dtype else delta

    def _delta(self, x: Tensor) -> Tensor:
        if self.channel_dim != -1:
            x = x.movedim(self.channel_dim, -1)
        dtype = compute_dtype(x, self.down.weight.dtype)
        delta: Tensor
        if (self.dropout and self.training) or torch.jit.is_tracing():
            # With dropout, autograd keeps the hidden states, so that the mask is the same in backward; these are only
            # `width` numbers per token. TorchScript supports no autograd functions.
            hidden = self.down(x.to(dtype))
            hidden = hidden if self.conv is None else self.conv(hidden)
            hidden = ACTIVATIONS[self.activation].forward(hidden)
            delta = self.up(F.dropout(hidden, self.dropout, self.training) * self.scale)
        else:
            delta = BottleneckFunction.apply(
                cast_input(x, dtype),
                self.down.weight,
                self.down.bias,
                self.up.weight,
                None if self.conv is None else self.conv.weight,
                None if self.conv is None else self.conv.size_of(x),
                self.activation,
                self.scale,
                dtype,
            )
        return delta if self.channel_dim == -1 else delta.movedim(-1, self.channel_dim)

    def extra_repr(self) -> str:
        filters = f", conv={self.kernel_size}" if self.conv is not None else ""
        return f"width={self.width}, activation={self.activation}, scale={self.scale}, dropout={self.dropout}{filters}"

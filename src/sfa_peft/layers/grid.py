"""The grid of an image's tokens, whose height and width a hook keeps, and the filters of external adapters on it."""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .leaves import base_layer_of
from .parallel import InputOf


class GridOf(InputOf):
    """A forward pre-hook that keeps the height and width of the token grid.

    Args:
        module: A block whose forward has an argument with them, or the convolution that makes the tokens from the
            image: then they are those of its output.
        argument: The name of that argument; None for a convolution.
    """

    def __init__(self, module: nn.Module, argument: str | None) -> None:
        super().__init__()
        self.argument = argument
        self.index = list(inspect.signature(module.forward).parameters).index(argument) if argument else 0
        self.sizes: dict[int, tuple[int, int]] = {}
        self.last: tuple[int, int] | None = None

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.argument is None:
            size = _output_size(module, args[0] if args else next(iter(kwargs.values())))
        else:
            height, width = kwargs[self.argument] if self.argument in kwargs else args[self.index]
            size = (height, width)
        self.last = size
        if not torch.compiler.is_compiling():  # there the sizes are part of the graph
            self.sizes[self.thread] = size

    def size(self) -> tuple[int, int] | None:
        """The grid of this thread's last forward pass.

        Without one, that of any thread: activations that are computed again in backward may be in a thread of their
        own, and the convolution is not run again there.
        """
        return self.last if torch.compiler.is_compiling() else self.sizes.get(self.thread, self.last)

    def forget(self) -> None:
        """Nothing: one grid serves all blocks, and it holds no activation."""

    def __deepcopy__(self, memo: dict[int, Any]) -> GridOf:
        copied = object.__new__(type(self))
        memo[id(self)] = copied
        copied.__setstate__(self.__getstate__())
        return copied

    def __getstate__(self) -> dict[str, Any]:
        return {"values": {}, "argument": self.argument, "index": self.index, "sizes": {}, "last": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)


def _output_size(convolution: Any, x: Tensor) -> tuple[int, int]:
    padding = (0, 0) if convolution.padding == "valid" else convolution.padding
    height, width = (
        (x.shape[i - 2] + 2 * padding[i] - convolution.kernel_size[i]) // convolution.stride[i] + 1 for i in (0, 1)
    )
    return height, width


class Grid:
    """Where an external adapter gets the grid of its tokens from, with the hook there.

    Args:
        module: As in `GridOf`.
        argument: As in `GridOf`.
    """

    def __init__(self, module: nn.Module, argument: str | None) -> None:
        base = base_layer_of(module)
        self.hook = GridOf(base, argument)
        self.handle = base.register_forward_pre_hook(self.hook, with_kwargs=True)

    def remove(self) -> None:
        self.handle.remove()


Size = tuple[int, int] | None  # the grid of tokens; None for maps of shape (batch, height, width, units)


def filtered(hidden: Tensor, weight: Tensor, size: Size) -> Tensor:
    """``h + conv(h)`` on the tokens of an image, with a filter for each hidden unit.

    Args:
        hidden: A tensor of shape ``(batch, tokens, units)``, or ``(batch, height, width, units)``.
        weight: The filters, of shape ``(units, 1, k, k)``.
        size: The grid of the tokens. Tokens before it (class and register tokens) stay as they are.
    """
    before, image = _split(hidden, size)
    convolved = F.conv2d(image, weight, padding=weight.shape[-1] // 2, groups=len(weight))
    return _with(hidden, before, convolved)


def filtered_backward(grad: Tensor, hidden: Tensor, weight: Tensor, size: Size) -> tuple[Tensor, Tensor]:
    """The gradients of `filtered`: of `hidden` and of `weight`."""
    before, image = _split(hidden, size)
    _, grad_image = _split(grad, size)
    padding = weight.shape[-1] // 2
    grad_convolved, grad_weight, _ = torch.ops.aten.convolution_backward(
        *(grad_image, image, weight, None, (1, 1), (padding, padding), (1, 1), False, (0, 0), len(weight)),
        (True, True, False),
    )
    return _with(grad, before, grad_convolved), grad_weight


def _split(hidden: Tensor, size: Size) -> tuple[int, Tensor]:
    """The number of tokens before the grid, and the grid as an image ``(batch, units, height, width)``.

    The image is a view: tokens lie in memory as an image with its channels last.
    """
    if size is None:
        return 0, hidden.permute(0, 3, 1, 2)
    before = hidden.shape[1] - size[0] * size[1]
    return before, hidden[:, before:].unflatten(1, size).permute(0, 3, 1, 2)


def _with(hidden: Tensor, before: int, image: Tensor) -> Tensor:
    """`hidden` with an image added to the tokens of the grid."""
    added = image.permute(0, 2, 3, 1)
    if hidden.dim() == 3:
        added = added.flatten(1, 2)
    return torch.cat((hidden[:, :before], hidden[:, before:] + added), dim=1) if before else hidden + added


class TokenFilter(nn.Module):
    """The filters of an external adapter; see `filtered`. They start at zero, and so as the identity.

    After Mona (Yin et al., "5%>100%: Breaking Performance Shackles of Full Fine-Tuning on Visual Recognition Tasks",
    2025), whose filters are such residuals, and Convpass (Jie & Deng, "Convolutional Bypasses Are Better Vision
    Transformer Adapters", 2022).

    Args:
        units: The number of hidden units, each with its filter.
        kernel_size: The height and width of a filter, odd.
        grid: Where the grid of tokens comes from. Not needed for maps of shape ``(batch, height, width, units)``.
        init_weights: With False, the filters are random (for tests).
    """

    def __init__(self, units: int, kernel_size: int, grid: Grid | None = None, init_weights: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(units, 1, kernel_size, kernel_size))
        if not init_weights:
            nn.init.normal_(self.weight, std=1 / kernel_size)
        self.grid = grid

    def size_of(self, x: Tensor) -> Size:
        """The grid of the tokens of `x`, of shape ``(batch, tokens, ...)`` or ``(batch, height, width, ...)``.

        Raises:
            RuntimeError: If the tokens do not lie on a grid that is known.
        """
        if x.dim() == 4:
            return None
        size = None if self.grid is None else self.grid.hook.size()
        if x.dim() != 3 or size is None or x.shape[1] < size[0] * size[1]:
            known = "is not known" if size is None else f"is {size[0]} x {size[1]}"
            raise RuntimeError(
                f"SFAConfig.external_conv: an external adapter got an input of shape {tuple(x.shape)}, and the grid "
                f"of the image's tokens {known}. Its filters need all tokens of the image, in order, after any "
                f"others; use external_conv=0 for this model."
            )
        return size

    def forward(self, hidden: Tensor) -> Tensor:
        return filtered(hidden, self.weight, self.size_of(hidden))

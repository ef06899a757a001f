"""The grid of an image's tokens, whose height and width a hook keeps, and the filters of external adapters on it."""

from __future__ import annotations

import inspect
from typing import Any

import torch
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
        self.sizes[self.thread] = self.last = size

    def size(self) -> tuple[int, int] | None:
        """The grid of this thread's last forward pass.

        Without one, that of any thread: activations that are computed again in backward may be in a thread of their
        own, and the convolution is not run again there.
        """
        return self.sizes.get(self.thread, self.last)

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


class TokenFilter(nn.Conv2d):
    """A depthwise convolution on tokens, ``h + conv(h)``, which starts as the identity.

    Tokens before the grid (class and register tokens) stay as they are. After Mona (Yin et al., "5%>100%: Breaking
    Performance Shackles of Full Fine-Tuning on Visual Recognition Tasks", 2025), whose filters are such residuals, and
    Convpass (Jie & Deng, "Convolutional Bypasses Are Better Vision Transformer Adapters", 2022).

    Args:
        units: The number of hidden units, each with its filter.
        kernel_size: The height and width of a filter, odd.
        grid: Where the grid of tokens comes from. Not needed for maps of shape ``(batch, height, width, units)``.
        init_weights: With False, the filters are random (for tests).
    """

    def __init__(self, units: int, kernel_size: int, grid: Grid | None = None, init_weights: bool = True) -> None:
        super().__init__(units, units, kernel_size, padding=kernel_size // 2, groups=units, bias=False)
        if init_weights:
            nn.init.zeros_(self.weight)
        self.grid = grid

    def forward(self, hidden: Tensor) -> Tensor:
        """Filter hidden units.

        Args:
            hidden: A tensor of shape ``(batch, tokens, units)`` or ``(batch, height, width, units)``.

        Raises:
            RuntimeError: If the tokens do not lie on a grid that is known.
        """
        if hidden.dim() == 4:
            return hidden + self._convolved(hidden)
        height, width = self._size(hidden)
        before = hidden.shape[1] - height * width
        tokens = hidden[:, before:]
        tokens = tokens + self._convolved(tokens.unflatten(1, (height, width))).flatten(1, 2)
        return torch.cat((hidden[:, :before], tokens), dim=1) if before else tokens

    def _convolved(self, grid: Tensor) -> Tensor:
        # Channels last is how tokens lie in memory, so nothing is copied.
        return super().forward(grid.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)

    def _size(self, hidden: Tensor) -> tuple[int, int]:
        size = None if self.grid is None else self.grid.hook.size()
        if hidden.dim() != 3 or size is None or hidden.shape[1] < size[0] * size[1]:
            known = "is not known" if size is None else f"is {size[0]} x {size[1]}"
            raise RuntimeError(
                f"SFAConfig.external_conv: an external adapter got an input of shape {(*hidden.shape[:-1], '...')}, "
                f"and the grid of the image's tokens {known}. Its filters need all tokens of the image, in order, "
                f"after any others; use external_conv=0 for this model."
            )
        return size

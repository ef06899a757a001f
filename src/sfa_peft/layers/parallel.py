"""Where a parallel external adapter reads: the input of a container, which a hook keeps for it."""

from __future__ import annotations

from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn


class InputOf:
    """A forward pre-hook that remembers a container's input for the parallel external adapter on its output.

    Each thread has its own, since several may run one model (nn.DataParallel, servers).
    """

    def __init__(self) -> None:
        self.values: dict[int, Tensor] = {}

    @property
    def thread(self) -> int:
        # A compiled graph runs in the thread that calls it, and cannot ask which one that is.
        return 0 if torch.compiler.is_compiling() else get_ident()

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self.values[self.thread] = args[0]

    def __deepcopy__(self, memo: dict[int, Any]) -> InputOf:
        memo[id(self)] = copied = InputOf()
        return copied

    def __getstate__(self) -> dict[str, Any]:
        return {"values": {}}

    def take(self) -> Tensor:
        """Hand the input over, once: an activation must not outlive its forward pass in an attribute."""
        value = self.values.pop(self.thread, None)
        if value is None:
            raise RuntimeError(
                "a parallel external adapter ran before the module whose input it reads; was the hook removed, or "
                "the module called by another way than its __call__?"
            )
        return value

    def forget(self) -> None:
        self.values.pop(self.thread, None)


class ParallelInput:
    """Where a parallel external adapter reads: a container module, and the hook on it."""

    def __init__(self, container: nn.Module) -> None:
        self.container = container
        self.hook = InputOf()
        self.handle = container.register_forward_pre_hook(self.hook)

    def remove(self) -> None:
        self.handle.remove()

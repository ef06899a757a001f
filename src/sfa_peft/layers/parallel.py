"""The input of a parallel external adapter: a hook keeps the input of a container module."""

from __future__ import annotations

from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn

from .leaves import base_layer_of


class InputOf:
    """A forward pre-hook that keeps a container's input for the parallel external adapter.

    Each thread has a separate input, since several threads may run one model (nn.DataParallel, servers).
    """

    def __init__(self) -> None:
        self.values: dict[int, Tensor] = {}

    @property
    def thread(self) -> int:
        # A compiled graph runs in the calling thread, but cannot read the thread's identity.
        return 0 if torch.compiler.is_compiling() else get_ident()

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.values[self.thread] = args[0] if args else next(iter(kwargs.values()))

    def __deepcopy__(self, memo: dict[int, Any]) -> InputOf:
        memo[id(self)] = copied = InputOf()
        return copied

    def __getstate__(self) -> dict[str, Any]:
        return {"values": {}}

    def take(self) -> Tensor:
        """Return the input and drop it, so that no activation is kept after the forward pass.

        Raises:
            RuntimeError: If the container has not run before.
        """
        value = self.values.pop(self.thread, None)
        if value is None:
            raise RuntimeError(
                "an external adapter ran before the module whose input it reads. Call that module by its "
                "__call__, and do not remove its hooks."
            )
        return value

    def forget(self) -> None:
        self.values.pop(self.thread, None)


class ParallelInput:
    """The container module that a parallel external adapter reads from, and the hook on it.

    A leaf may be a container too. The hook is then on the leaf itself, and stays there if an SFA layer is put around
    it: `keep_input` calls the hook where such a layer does not call its leaf.
    """

    def __init__(self, container: nn.Module) -> None:
        self.container = base_layer_of(container)
        self.hook = InputOf()
        self.handle = self.container.register_forward_pre_hook(self.hook, with_kwargs=True)

    def remove(self) -> None:
        self.handle.remove()


def keep_input(leaf: nn.Module, x: Tensor) -> None:
    """Give the input of a leaf to the parallel external adapters that read it."""
    for hook in leaf._forward_pre_hooks.values():
        if isinstance(hook, InputOf):
            hook(leaf, (x,), {})

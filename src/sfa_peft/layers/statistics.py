"""Running statistics of the base's norms: they belong to the base, and stay as they are while adapters are on it.

A BatchNorm in training mode moves its statistics with every batch. They are no parameters, so freezing does not hold
them, and they are saved with an adapter only in its heads. So outside the heads norms run with their own statistics in
training as well, as they do in inference, and as detectors are fine-tuned.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from peft.utils import ModulesToSaveWrapper
from torch import nn


def keep_statistics(model: nn.Module) -> None:
    """Freeze the statistics of the base's norms; those of the adapters' heads move in training."""
    for module in _base_modules(model):
        has_statistics = getattr(module, "running_mean", None) is not None
        if has_statistics and _without_training not in module._forward_pre_hooks.values():
            module.register_forward_pre_hook(_without_training)


def release_statistics(module: nn.Module) -> None:
    """Undo `keep_statistics` in a module and all that is in it."""
    for inner in module.modules():
        for key, hook in list(inner._forward_pre_hooks.items()):
            if hook is _without_training:
                del inner._forward_pre_hooks[key]


def _without_training(module: nn.Module, args: tuple[Any, ...]) -> None:
    # A function without state, since models are copied and pickled with their hooks.
    if module.training:
        module.training = False


def _base_modules(module: nn.Module) -> Iterator[nn.Module]:
    if isinstance(module, ModulesToSaveWrapper):
        module = module.original_module
    yield module
    for child in module.children():
        yield from _base_modules(child)

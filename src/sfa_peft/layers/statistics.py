"""Running statistics of the base's norms. They do not change while adapters are on the base.

A BatchNorm in training mode updates its statistics with every batch. They are not parameters, so freezing does not
stop this, and only the statistics in the heads are saved with an adapter. So the norms outside the heads use their
running statistics in training too, as in inference, and as is usual when detectors are fine-tuned.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import nn

from .leaves import base_layer_of, modules_outside


def keep_statistics(model: nn.Module) -> None:
    """Freeze the running statistics of the base's norms. Norms in the heads are still updated in training."""
    for module in _base_modules(model):
        has_statistics = module._buffers.get("running_mean") is not None
        if has_statistics and _without_training not in module._forward_pre_hooks.values():
            module.register_forward_pre_hook(_without_training)


def release_statistics(module: nn.Module) -> None:
    """Undo `keep_statistics` in a module and all its submodules."""
    for inner in module.modules():
        for key, hook in list(inner._forward_pre_hooks.items()):
            if hook is _without_training:
                del inner._forward_pre_hooks[key]


def _without_training(module: nn.Module, args: tuple[Any, ...]) -> None:
    # A plain function, since models are copied and pickled with their hooks.
    if module.training:
        module.training = False


def _base_modules(module: nn.Module) -> Iterator[nn.Module]:
    for _, outside in modules_outside(module):
        if isinstance(outside, ModulesToSaveWrapper):
            yield from _base_modules(outside.original_module)
        else:
            yield from base_layer_of(outside).modules() if isinstance(outside, BaseTunerLayer) else (outside,)

"""Functions that read the leaves of a base model: their parameters and channels."""

from __future__ import annotations

from collections.abc import Iterator

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import nn


def base_layer_of(module: nn.Module) -> nn.Module:
    """The module inside a tuner's layer; any other module is returned as it is."""
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def base_parameters_of(module: nn.Module) -> Iterator[nn.Parameter]:
    """The parameters of a module, without those of adapters and of trained heads."""
    module = module.original_module if isinstance(module, ModulesToSaveWrapper) else base_layer_of(module)
    yield from module.parameters(recurse=False)
    for child in module.children():
        yield from base_parameters_of(child)


def channels_of(module: nn.Module) -> tuple[int, int] | None:
    """``(channel width, channel dimension)`` of a leaf's output, or None if they are not known."""
    module = base_layer_of(module)
    if isinstance(module, nn.Linear):
        return module.out_features, -1
    if isinstance(module, nn.Conv2d):
        return module.out_channels, 1
    if isinstance(module, nn.LayerNorm):
        return module.normalized_shape[-1], -1
    vectors = {p.numel() for p in module.parameters(recurse=False) if p.dim() == 1}
    is_leaf = next(module.children(), None) is None
    if is_leaf and len(vectors) == 1:  # LayerScale, RMSNorm and other scales along the last dimension
        return vectors.pop(), -1
    return None

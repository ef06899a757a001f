"""Wraps leaves of a base model in SFA layers, and removes the wrappers."""

from __future__ import annotations

from torch import nn

from ..layers.adapted import SFALayer, sfa_layers
from ..layers.kept import ChangedParameters
from ..layers.kinds import layer_class
from ..layers.leaves import base_parameters_of, parameters_in
from ..layers.statistics import release_statistics


def sfa_layer(model: nn.Module, name: str, active: list[str], shared: ChangedParameters) -> SFALayer:
    """The `SFALayer` of this name. A leaf of this name is replaced by one around it.

    Args:
        model: The base model.
        name: The name of the leaf.
        active: The adapters that are active.
        shared: Keeps the changed parameters of all layers.
    """
    around, _, child = name.rpartition(".")
    parent = model.get_submodule(around)
    leaf: nn.Module = getattr(parent, child)
    if isinstance(leaf, SFALayer):
        return leaf
    block = _block_of(model, name) if next(parameters_in(leaf), None) is None else None
    layer = layer_class(leaf)(leaf, active, block, shared)
    if not leaf.training:
        layer.eval()
    setattr(parent, child, layer)
    return layer


def _block_of(model: nn.Module, name: str) -> nn.Module | None:
    """The nearest module around a leaf that has parameters of the base."""
    path = name.split(".")
    around = (model.get_submodule(".".join(path[:depth])) for depth in reversed(range(len(path))))
    return next((module for module in around if next(base_parameters_of(module), None) is not None), None)


def unwrap_empty_layers(model: nn.Module) -> None:
    for name, layer in sfa_layers(model):
        if not layer.adapter_names:
            model.set_submodule(name, layer.base_layer)
    if not sfa_layers(model):
        release_statistics(model)

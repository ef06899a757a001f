"""The base model under the adapters: its parameters, and the check of its fingerprint."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..checkpoint.fingerprint import BaseMismatchWarning, Fingerprint
from ..config import SFAConfig
from ..layers.adapted import sfa_layers
from ..layers.leaves import base_layer_of, modules_outside
from ..layers.quantized import numel
from ..recorded import RecordedConfig


def in_module(name: str, modules: Iterable[str]) -> bool:
    """Whether `name` is in one of `modules`, which are full names or endings of names."""
    return any(f".{module}." in f".{name}." for module in modules)


def head_modules(model: nn.Module, config: SFAConfig) -> list[str]:
    """The full names of the modules in `modules_to_save`, in model order.

    A full name matches only that module. Any other string matches all modules whose names end with it, as in PEFT.
    PEFT takes every string as an ending, so RF-DETR's `class_embed` would also match `model.enc_out_class_embed`.
    """
    names = [name for name, _ in modules_outside(model)]
    wanted = config.modules_to_save or ()
    exact = set(wanted) & set(names)
    endings = tuple(head for head in wanted if head not in exact)
    found = [name for name in names if name in exact or (endings and name.endswith(endings))]
    return [name for name in found if not in_heads(name.rpartition(".")[0], found)]


def head_tensors(model: nn.Module, heads: Iterable[str]) -> dict[str, Tensor]:
    """The base's parameters and buffers in the modules `heads`, which are full names, by their names in the base."""
    tensors: dict[str, Tensor] = {}
    for name in heads:
        head = model.get_submodule(name)
        head = head.original_module if isinstance(head, ModulesToSaveWrapper) else head
        tensors |= {f"{name}.{key}": tensor for key, tensor in head.state_dict().items()}
    return tensors


def in_heads(name: str, heads: Iterable[str]) -> bool:
    """Whether `name` is in one of `heads`, which are full names."""
    return any(name == head or name.startswith(f"{head}.") for head in heads)


def base_parameters(model: nn.Module, roots: Sequence[str], config: SFAConfig) -> list[tuple[str, Tensor]]:
    """The base's parameters in the modules `roots`, outside the heads, by their names in the base, in model order."""
    heads = head_modules(model, config)
    inside = tuple(f"{root}." if root else "" for root in roots)
    found: dict[int, tuple[str, Tensor]] = {}
    for name, module in modules_outside(model):
        if isinstance(module, ModulesToSaveWrapper):
            parameters = dict(module.original_module.named_parameters())
        else:
            parameters = base_layer_of(module)._parameters
        for parameter, tensor in parameters.items():
            if tensor is None:
                continue
            full = f"{name}.{parameter}" if name else parameter
            if full.startswith(inside) and not in_heads(full, heads):
                found.setdefault(id(tensor), (full, tensor))
    return list(found.values())


def backbone_parameters(model: nn.Module, config: SFAConfig) -> int:
    """The number of parameters of the backbone. Tied parameters count once, and adapters do not count."""
    return sum(numel(tensor) for _, tensor in base_parameters(model, [""], config))


def shared_parameters(model: nn.Module) -> dict[int, list[str]]:
    """All names of each parameter with several names, by `id`: tied parameters, or a module that is used twice."""
    names: dict[int, list[str]] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(p), []).append(name)
    return {key: same for key, same in names.items() if len(same) > 1}


def check_base(
    model: nn.Module, adapter_name: str, config: SFAConfig, adapted: Iterable[str]
) -> dict[str, Any] | None:
    """The fingerprint that an adapter on this base is to have. Warns if it was trained on other base weights.

    Args:
        model: The base model, before the adapter is injected.
        adapter_name: The adapter.
        config: The adapter's config.
        adapted: The modules that will be adapted.

    Returns:
        The recorded fingerprint, or that of this base if there is none, or if an adapter of another base will be
        trained on this one. None if it cannot be known.

    Raises:
        BaseMismatchWarning: If the user has turned this warning into an error.
    """
    described = config.base_fingerprint if isinstance(config, RecordedConfig) else None
    if any(layer.merged for _, layer in sfa_layers(model)):
        return described  # merged weights are not those of the base
    if described is None:
        roots = _roots(model, adapted, config)
        return _described(Fingerprint.of(roots, base_parameters(model, roots, config)))
    recorded = Fingerprint.from_dict(described)
    parameters = base_parameters(model, recorded.roots, config)
    differing = recorded.differences(parameters)
    if differing == []:
        return described
    what = (
        f"its parameters have other shapes or another order ({len(parameters)} here, {len(recorded.samples)} there)"
        if differing is None
        else f"{len(differing)} of {len(parameters)} parameters have other values, such as {differing[0]!r}"
    )
    trained_on = f" ({config.base_model_name_or_path})" if config.base_model_name_or_path else ""
    warnings.warn(
        f"adapter {adapter_name!r} was trained on a base model that differs from this {type(model).__name__}: {what}. "
        f"Load the base model that it was trained on{trained_on}; with this one its outputs are not reliable.",
        BaseMismatchWarning,
        stacklevel=2,
    )
    if config.inference_mode:
        return described
    return _described(Fingerprint.of(recorded.roots, parameters))


def _described(fingerprint: Fingerprint | None) -> dict[str, Any] | None:
    return None if fingerprint is None else fingerprint.to_dict()


def _roots(model: nn.Module, adapted: Iterable[str], config: SFAConfig) -> list[str]:
    """The modules that the fingerprint covers: the backbone, and the `target_heads`.

    The backbone is the largest model of transformers inside the base that has all adapted modules, or else the base.
    The base itself may have a head without adapters that is newly initialized at every start.
    """
    heads = config.target_heads or ()
    roots, common = set(), None
    for name in adapted:
        inside = next((path for path in _paths(name.split(".")) if in_module(path, heads)), None)
        if inside is not None:
            roots.add(inside)
        else:
            parts = name.split(".")[:-1]
            common = parts if common is None else list(_same_begin(common, parts))
    if common is not None:
        models = (path for path in _paths(common) if isinstance(model.get_submodule(path), PreTrainedModel))
        roots.add(next(models, ""))
    return sorted(roots)


def _paths(parts: Sequence[str]) -> list[str]:
    """The names of the modules around a module, from the outside, and its own."""
    return [".".join(parts[:depth]) for depth in range(1, len(parts) + 1)]


def _same_begin(a: Sequence[str], b: Sequence[str]) -> Iterator[str]:
    for one, other in zip(a, b, strict=False):
        if one != other:
            return
        yield one

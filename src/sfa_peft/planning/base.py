"""The base model under the adapters: which parameters are its own, and whether they are those of the training."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Iterator, Sequence

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from ..checkpoint.fingerprint import BaseMismatchWarning, Fingerprint
from ..config import SFAConfig
from ..layers.adapted import sfa_layers
from ..layers.quantized import numel


def in_module(name: str, modules: Iterable[str]) -> bool:
    """Whether `name` is, or lies in, a module that `modules` names by its full name or its ending."""
    return any(re.match(rf"(^|.*\.){module}($|\..*)", name) for module in modules)


def modules_outside_adapters(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The base model's modules by their own names; tuner layers stand for what they wrap, without their insides."""
    found: list[tuple[str, nn.Module]] = []
    inside = None
    for name, module in model.named_modules():
        if inside is not None and name.startswith(inside):
            continue
        found.append((name, module))
        if isinstance(module, BaseTunerLayer | ModulesToSaveWrapper):
            inside = f"{name}."  # what is in it comes next
    return found


def head_modules(model: nn.Module, config: SFAConfig) -> list[str]:
    """The full names of the modules that `modules_to_save` means, in model order.

    A module's full name means that module alone. What is no full name means every module whose name ends with it, as
    in PEFT, where RF-DETR's `class_embed` could not be named, since `model.enc_out_class_embed` ends with it.
    """
    names = [name for name, _ in modules_outside_adapters(model)]
    wanted = config.modules_to_save or ()
    exact = set(wanted) & set(names)
    endings = tuple(head for head in wanted if head not in exact)
    found = [name for name in names if name in exact or (endings and name.endswith(endings))]
    return [name for name in found if not in_heads(name.rpartition(".")[0], found)]


def in_heads(name: str, heads: Iterable[str]) -> bool:
    """Whether `name` is, or lies in, one of the modules with the full names `heads`."""
    return any(name == head or name.startswith(f"{head}.") for head in heads)


def base_parameters(model: nn.Module, roots: Sequence[str], config: SFAConfig) -> list[tuple[str, Tensor]]:
    """The base's parameters in the modules `roots`, outside the heads, by their own names and in model order."""
    heads = head_modules(model, config)
    found: dict[int, tuple[str, Tensor]] = {}
    for name, module in modules_outside_adapters(model):
        if isinstance(module, ModulesToSaveWrapper):
            own = module.original_module.named_parameters()
        else:
            base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
            own = base.named_parameters(recurse=False)
        for parameter, tensor in own:
            full = f"{name}.{parameter}" if name else parameter
            is_inside = any(not root or full.startswith(f"{root}.") for root in roots)
            if is_inside and not in_heads(full, heads):
                found.setdefault(id(tensor), (full, tensor))
    return list(found.values())


def backbone_parameters(model: nn.Module, config: SFAConfig) -> int:
    """Parameters of the base model outside the heads (`modules_to_save`); tied ones count once, adapters not."""
    return sum(numel(tensor) for _, tensor in base_parameters(model, [""], config))


def shared_parameters(model: nn.Module) -> dict[int, list[str]]:
    """The names of each parameter that has several: tied parameters, or a module that stands in two positions."""
    names: dict[int, list[str]] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(p), []).append(name)
    return {key: own for key, own in names.items() if len(own) > 1}


def check_base(model: nn.Module, adapter_name: str, config: SFAConfig, adapted: Iterable[str]) -> None:
    """Warn if a recorded adapter was trained on other base weights; give a new one this base's fingerprint.

    Args:
        model: The base model, before the adapter is injected.
        adapter_name: The adapter.
        config: Its config; a missing fingerprint is filled in.
        adapted: The modules that the adapter is going to be on.

    Raises:
        BaseMismatchWarning: If warnings of that kind are errors.
    """
    if any(layer.merged for _, layer in sfa_layers(model)):
        return  # what is in the weights is not the base
    if config.base_fingerprint is None:
        roots = _roots(adapted, config)
        own = Fingerprint.of(roots, base_parameters(model, roots, config))
        config.base_fingerprint = None if own is None else own.to_dict()
        return
    recorded = Fingerprint.from_dict(config.base_fingerprint)
    parameters = base_parameters(model, recorded.roots, config)
    differing = recorded.differences(parameters)
    if differing == []:
        return
    what = (
        f"its parameters have other shapes or another order ({len(parameters)} here, {len(recorded.samples)} there)"
        if differing is None
        else f"{len(differing)} of {len(parameters)} parameters have other values, such as {differing[0]!r}"
    )
    trained_on = f" ({config.base_model_name_or_path})" if config.base_model_name_or_path else ""
    warnings.warn(
        f"adapter {adapter_name!r} was trained on another base model than this {type(model).__name__}: {what}. Load "
        f"the base model that it was trained on{trained_on}; with this one its outputs are not to be trusted.",
        BaseMismatchWarning,
        stacklevel=2,
    )
    if not config.inference_mode:  # it is going to be trained on this base
        own = Fingerprint.of(recorded.roots, parameters)
        config.base_fingerprint = None if own is None else own.to_dict()


def _roots(adapted: Iterable[str], config: SFAConfig) -> list[str]:
    """The modules whose parameters matter: the deepest that holds all adapted ones, and `target_heads` by themselves.

    Not the whole model, where a head that the adapter has nothing to do with may be fresh each time.
    """
    heads = config.target_heads or ()
    roots, common = set(), None
    for name in adapted:
        parts = name.split(".")
        inside = [".".join(parts[:i]) for i in range(1, len(parts) + 1) if in_module(".".join(parts[:i]), heads)]
        if inside:
            roots.add(inside[0])
        else:
            common = parts[:-1] if common is None else list(_same_begin(common, parts))
    return sorted(roots | ({".".join(common)} if common is not None else set()))


def _same_begin(a: Sequence[str], b: Sequence[str]) -> Iterator[str]:
    for one, other in zip(a, b, strict=False):
        if one != other:
            return
        yield one

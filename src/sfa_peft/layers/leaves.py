"""Functions that read the leaves of a base model: their parameters and channels."""

from __future__ import annotations

from collections.abc import Iterator

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import nn

CLOSED = (BaseTunerLayer, ModulesToSaveWrapper)


def modules_outside(model: nn.Module, closed: tuple[type, ...] = CLOSED) -> list[tuple[str, nn.Module]]:
    """The modules of a model by name as in `named_modules`, without those inside modules of the classes `closed`.

    With adapters, most modules of a model are inside such modules.
    """
    found: list[tuple[str, nn.Module]] = []
    seen: set[nn.Module] = set()
    are_closed: dict[type, bool] = {}  # `isinstance` is slow for abstract classes, which PEFT's are

    def visit(name: str, module: nn.Module) -> None:
        if module in seen:
            return
        seen.add(module)
        found.append((name, module))
        kind = type(module)
        if kind not in are_closed:
            are_closed[kind] = issubclass(kind, closed)
        if are_closed[kind]:
            for part in module._modules.values():  # what the base has under this name is not listed under another one
                if part is not None and not isinstance(part, nn.ModuleDict):
                    seen.update(part.modules())
            return
        prefix = f"{name}." if name else ""
        for key, child in module._modules.items():
            if child is not None:
                visit(prefix + key, child)

    visit("", model)
    return found


def parameters_in(module: nn.Module) -> Iterator[nn.Parameter]:
    """As `nn.Module.parameters`, which takes ten times as long for a module of a few parameters."""
    for p in module._parameters.values():
        if p is not None:
            yield p
    for part in module._modules.values():
        if part is not None:
            yield from parameters_in(part)


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

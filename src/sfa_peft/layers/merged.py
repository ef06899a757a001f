"""External adapters of a merged model, which run in forward hooks on plain leaves."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

from torch import Tensor, nn

from .bottleneck import ExternalAdapter
from .parallel import InputOf

# The kinds of `SFALayer`, as names of submodules.
SEQUENTIAL, PARALLEL, BLOCK = "external", "parallel", "block"


class AddExternals:
    """The forward hook that adds a merged model's external adapters. They are submodules of the hooked leaf.

    Args:
        names: The adapters.
        inputs: The inputs of other modules, by the name of the submodule that reads it.
    """

    def __init__(self, names: list[str], inputs: dict[str, InputOf]) -> None:
        self.names, self.inputs = names, inputs

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        result = output
        for name in self.names:
            for kind in (SEQUENTIAL, PARALLEL, BLOCK):
                child = f"{kind}_{name}"
                external = getattr(module, child, None)
                if external is None:
                    continue
                x = self.inputs[child].take() if child in self.inputs else output
                delta = external(x.to(output.device) + output if kind == BLOCK else x)
                result = result + delta.to(output)
        return result


class MergedExternal(NamedTuple):
    """An external adapter on a leaf of a merged model. `kind` is `SEQUENTIAL`, `PARALLEL` or `BLOCK`."""

    kind: str
    adapter_name: str
    adapter: ExternalAdapter

    @property
    def child(self) -> str:
        """Its name as a submodule of the leaf."""
        return f"{self.kind}_{self.adapter_name}"


def hook_of(leaf: nn.Module) -> AddExternals | None:
    """The hook that adds external adapters to a leaf, or None if it has none."""
    return next((hook for hook in leaf._forward_hooks.values() if isinstance(hook, AddExternals)), None)


def merged_leaves(model: nn.Module) -> dict[str, nn.Module]:
    """The leaves of a merged model with external adapters, by name, in model order."""
    return {name: module for name, module in model.named_modules() if hook_of(module) is not None}


def merged_externals(leaf: nn.Module) -> list[MergedExternal]:
    """The external adapters on a leaf of a merged model."""
    hook = hook_of(leaf)
    found = []
    for name in hook.names if hook is not None else ():
        for kind in (SEQUENTIAL, PARALLEL, BLOCK):
            adapter = getattr(leaf, f"{kind}_{name}", None)
            if isinstance(adapter, ExternalAdapter):
                found.append(MergedExternal(kind, name, adapter))
    return found


def remove_externals(model: nn.Module, leaves: Iterable[nn.Module]) -> None:
    """Remove the external adapters from leaves of a merged model, with their hooks."""
    inputs = set()
    for leaf in leaves:
        for external in merged_externals(leaf):
            external.adapter.remove_hooks()
            delattr(leaf, external.child)
        for key, hook in list(leaf._forward_hooks.items()):
            if isinstance(hook, AddExternals):
                inputs |= {id(one) for one in hook.inputs.values()}
                del leaf._forward_hooks[key]
    for module in model.modules():
        for key, hook in list(module._forward_pre_hooks.items()):
            if id(hook) in inputs:
                del module._forward_pre_hooks[key]
                module._forward_pre_hooks_with_kwargs.pop(key, None)

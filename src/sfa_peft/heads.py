"""Heads: the copy of a module that an adapter trains whole."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from .mixed import run_each


class Head(ModulesToSaveWrapper):
    """PEFT's wrapper of a head, which also runs mixed batches through heads of any kind.

    PEFT's own does that for single layers; a dense head takes lists of feature maps, and may give several tensors.
    """

    is_mixed = False

    def _get_name(self) -> str:
        return ModulesToSaveWrapper.__name__  # what people know it by, in messages and when a model is printed

    def forward(self, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Any:
        if adapter_names is None or self.disable_adapters:
            return super().forward(*args, **kwargs)

        def run(name: str, *args: Any, **kwargs: Any) -> Any:
            is_own = name in self.modules_to_save
            return (self.modules_to_save[name] if is_own else self.original_module)(*args, **kwargs)

        return run_each(adapter_names, run, args, kwargs, f"the head {type(self.original_module).__name__}")

    def _getattr_wrapped(self, name: str, modules: dict[str, nn.Module]) -> Any:
        value = super()._getattr_wrapped(name, modules)
        if self.is_mixed and isinstance(value, Tensor):
            raise ValueError(
                f"the model reads `{name}` of the head {type(self.original_module).__name__} without calling it, so "
                f"samples cannot have heads of their own: group the samples by adapter, and use set_adapter."
            )
        return value


def wrap_heads(
    model: nn.Module, heads: Sequence[str], adapter_name: str, is_active: bool, inference_mode: bool
) -> None:
    """Give an adapter its own copy of each head, as PEFT does it.

    Args:
        model: The base model.
        heads: The full names of the modules.
        adapter_name: The adapter.
        is_active: Whether it is active at once.
        inference_mode: Whether it is frozen then.
    """
    for name in heads:
        head = model.get_submodule(name)
        if isinstance(head, ModulesToSaveWrapper):
            head.update(adapter_name)
            head.set_adapter(head.active_adapter, inference_mode=inference_mode)
            continue
        wrapper = Head(head, adapter_name)
        wrapper.set_adapter(adapter_name if is_active else [], inference_mode=inference_mode)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, wrapper)

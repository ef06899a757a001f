"""Heads: modules of which each adapter trains a whole copy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from .mixed import mixture_of, run_each
from .statistics import release_statistics


class Head(ModulesToSaveWrapper):
    """PEFT's wrapper of a head, extended to mixed batches in any kind of head.

    PEFT's wrapper supports mixed batches in single layers only. A dense head takes lists of feature maps, and may
    return several tensors.
    """

    def _get_name(self) -> str:
        return ModulesToSaveWrapper.__name__  # the name that users know from messages and printed models

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        mixture = mixture_of(self)
        if mixture is None or self.disable_adapters:
            return super().forward(*args, **kwargs)

        def run(name: str, *args: Any, **kwargs: Any) -> Any:
            has_copy = name in self.modules_to_save
            return (self.modules_to_save[name] if has_copy else self.original_module)(*args, **kwargs)

        return run_each(mixture.names, run, args, kwargs, f"the head {type(self.original_module).__name__}")

    def delete_adapter(self, adapter_name: str, new_active_adapters: list[str] | None) -> None:
        # The wrapper accepts only adapters that have this head, and of the active adapters at most one has it.
        with_head = [name for name in new_active_adapters or () if name in self.modules_to_save]
        super().delete_adapter(adapter_name, with_head)

    def _getattr_wrapped(self, name: str, modules: dict[str, nn.Module]) -> Any:
        value = super()._getattr_wrapped(name, modules)
        if isinstance(value, Tensor) and mixture_of(self) is not None:
            raise ValueError(
                f"the model reads `{name}` of the head {type(self.original_module).__name__} without calling the "
                f"head, so the samples of a batch cannot use different heads: group the samples by adapter, and use "
                f"set_adapter."
            )
        return value


def wrap_heads(
    model: nn.Module, heads: Sequence[str], adapter_name: str, is_active: bool, inference_mode: bool
) -> None:
    """Make a copy of each head for an adapter, as PEFT does.

    Args:
        model: The base model.
        heads: The full names of the heads.
        adapter_name: The adapter.
        is_active: Whether the adapter becomes active.
        inference_mode: Whether an active adapter is frozen.
    """
    for name in heads:
        head = model.get_submodule(name)
        if isinstance(head, ModulesToSaveWrapper):
            flags = [(p, p.requires_grad) for p in head.modules_to_save.parameters()]
            head.update(adapter_name)
            release_statistics(head.modules_to_save[adapter_name])
            head.modules_to_save[adapter_name].requires_grad_(False)
            if is_active:
                head.set_adapter(adapter_name, inference_mode=inference_mode)
            else:
                for p, requires_grad in flags:
                    p.requires_grad_(requires_grad)
            continue
        wrapper = Head(head, adapter_name)
        release_statistics(wrapper.modules_to_save[adapter_name])
        wrapper.set_adapter(adapter_name if is_active else [], inference_mode=inference_mode)
        model.set_submodule(name, wrapper)

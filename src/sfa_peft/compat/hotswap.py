"""PEFT's `hotswap_adapter` for SFA: other values, and another ticket, in the place of an adapter that is loaded.

`peft.utils.hotswap` knows LoRA alone, and has no hook; the function that swaps is replaced by one that asks first.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from peft import PeftModel, set_peft_model_state_dict
from peft.utils import PeftType, hotswap
from torch import Tensor, nn

from ..checkpoint.reader import LOAD, Load, difference_of
from ..config import SFAConfig
from ..layers.adapted import sfa_layers
from ..planning.base import check_base
from ..planning.plan import Planner
from ..tuner.model import SFAModel, tuner_of
from ..tuner.optimizers import tell_left_behind
from .patching import Method, arguments_of, patch
from .registration import NAME, incompatible


def swap(model: nn.Module, tensors: dict[str, Tensor], adapter_name: str, config: SFAConfig) -> None:
    """Give an adapter what another was saved with; if that fails, it has its own again.

    With the same numbers of units in each parameter, values and positions are copied into the tensors that are there,
    so that a compiled model goes on without compiling anew.

    Args:
        model: A `PeftModel`, or what `torch.compile` made of one.
        tensors: Of the other adapter's file, with the adapter's name in them.
        adapter_name: The adapter.
        config: The other adapter's.

    Raises:
        CheckpointError: If the file does not fit.
        ValueError: If the adapter is merged, or the model is compiled and the ticket has other sizes.
    """
    compiled = getattr(model, "_orig_mod", None)
    peft_model = cast(PeftModel, model if compiled is None else compiled)
    tuner = tuner_of(peft_model)
    layers = sfa_layers(tuner.model)
    if any(adapter_name in layer.merged_adapters for _, layer in layers):
        raise ValueError(
            f"Cannot hot-swap adapter {adapter_name!r} because it is currently merged into the base weights; call "
            f"unmerge_adapter() first."
        )
    tensors = {SFAModel._remove_adapter_name_from_key(key, adapter_name): tensor for key, tensor in tensors.items()}
    own = tuner.peft_config[adapter_name]
    difference = difference_of(own.to_dict() | {"ticket_sizes": config.ticket_sizes}, config.to_dict())
    if difference:
        raise ValueError(f"Configs are incompatible: the adapters have another {difference}.")
    check_base(tuner.model, adapter_name, config, [name for name, _ in layers])
    if (own.ticket_sizes or {}) == (config.ticket_sizes or {}):
        set_peft_model_state_dict(peft_model, tensors, adapter_name)
        return
    if compiled is not None:
        raise ValueError(
            f"the ticket of the adapter to be swapped in has other sizes than that of {adapter_name!r}, for which the "
            f"model is compiled; swap before torch.compile, or load it as an adapter of its own."
        )
    with resized(peft_model, adapter_name, config):
        set_peft_model_state_dict(peft_model, tensors, adapter_name)


@contextmanager
def resized(model: PeftModel, adapter_name: str, config: SFAConfig) -> Iterator[None]:
    """Give an adapter the sizes of another, whose weights are loaded meanwhile; if that fails, it is as it was.

    Args:
        model: The model.
        adapter_name: The adapter. What it has learned is dropped.
        config: The other adapter's, as it was saved.

    Raises:
        CheckpointError: If the other adapter does not fit the model.
    """
    tuner = tuner_of(model)
    token = LOAD.set(LOAD.get() or Load())  # positions come with the weights
    try:
        plan = Planner(tuner.model, config).plan()
    finally:
        LOAD.reset(token)
    before = tuner.parameters_of(adapter_name)
    with tuner.restoring(adapter_name, only_on_error=True):
        tuner.install(adapter_name, plan.positions, plan.all_externals)
        yield
    tell_left_behind(before, tuner.parameters_of(adapter_name), adapter_name)


@patch(hotswap, "hotswap_adapter_from_state_dict", "model", "state_dict", "adapter_name", "config")
def hotswap_adapter_from_state_dict(original: Method, *args: Any, **kwargs: Any) -> Any:
    """Swap an adapter as PEFT does; for one of SFA, see `swap`."""
    given = arguments_of(original, args, kwargs)
    if not isinstance(given.get("config"), SFAConfig):
        return original(*args, **kwargs)
    with torch.no_grad():
        return swap(given["model"], given["state_dict"], given["adapter_name"], given["config"])


if not hasattr(hotswap, "CONFIG_KEYS_TO_CHECK"):
    raise incompatible("there is no peft.utils.hotswap.CONFIG_KEYS_TO_CHECK")
# Not more: PEFT compares with the active adapter, which need not be the one that is swapped.
hotswap.CONFIG_KEYS_TO_CHECK[PeftType[NAME]] = ["peft_type"]

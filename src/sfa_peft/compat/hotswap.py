"""PEFT's `hotswap_adapter` for SFA: replaces the values and the ticket of a loaded adapter.

`peft.utils.hotswap` supports only LoRA and has no hook, so the function that swaps is patched.
"""

from __future__ import annotations

from contextvars import copy_context
from typing import Any, cast

import peft
import torch
from peft import PeftModel
from peft.utils import PeftType, hotswap
from torch import Tensor, nn

from ..checkpoint.reader import LOAD, Load, difference_of
from ..config import SFAConfig
from ..layers.adapted import sfa_layers
from ..planning.base import check_base
from ..planning.plan import Plan, Planner
from ..recorded import RecordedConfig
from ..tuner.model import SFAModel, tuner_of
from ..tuner.optimizers import warn_of_replaced
from .loads import AdapterLoad, readable_errors, restoring
from .patching import Method, arguments_of, in_own_context, patch
from .registration import NAME


def swap(model: nn.Module, tensors: dict[str, Tensor], adapter_name: str, config: RecordedConfig) -> None:
    """Replace an adapter by a saved one. If this fails, the adapter is not changed.

    If the ticket has the same number of units in each parameter, values and positions are copied into the existing
    tensors, so that a compiled model is not compiled again.

    Args:
        model: A `PeftModel`, compiled or not.
        tensors: The tensors of the saved adapter, with `adapter_name` in their names.
        adapter_name: The adapter to replace.
        config: The config of the saved adapter.

    Raises:
        CheckpointError: If the saved adapter does not fit the model.
        ValueError: If the adapter is merged, the configs differ, or the model is compiled and the ticket has other
            sizes.
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
    present = tuner.peft_config[adapter_name]
    difference = difference_of(present.to_dict() | {"ticket_sizes": config.ticket_sizes}, config.to_dict())
    if difference:
        raise ValueError(
            f"Configs are incompatible: the adapters differ in {difference}. Load the other one with load_adapter."
        )
    check_base(tuner.model, adapter_name, config, [name for name, _ in layers])
    has_same_sizes = present.ticket_sizes == config.ticket_sizes
    if not has_same_sizes and compiled is not None:
        raise ValueError(
            f"the ticket of the new adapter has other sizes than that of {adapter_name!r}, and the model is already "
            f"compiled; swap before torch.compile, or load the new one as another adapter."
        )
    with restoring(peft_model, adapter_name), torch.no_grad():
        if not has_same_sizes:
            resize(peft_model, adapter_name, config)
        peft.set_peft_model_state_dict(peft_model, tensors, adapter_name)


def resize(model: PeftModel, adapter_name: str, config: RecordedConfig) -> None:
    """Give an adapter the sizes of a saved one, whose weights are loaded afterwards.

    Args:
        model: The model.
        adapter_name: The adapter. Its values are dropped.
        config: The config of the saved adapter.

    Raises:
        CheckpointError: If the saved adapter does not fit the model.
    """
    tuner = tuner_of(model)

    def plan_without_positions() -> Plan:  # they are loaded with the weights
        LOAD.set(LOAD.get() or Load())
        return Planner(tuner.model, config).plan()

    plan = copy_context().run(plan_without_positions)
    before = tuner.parameters_of(adapter_name)
    tuner.install(adapter_name, plan.positions, plan.all_externals)
    warn_of_replaced(before, tuner.parameters_of(adapter_name), adapter_name)


@patch(hotswap, "hotswap_adapter", "model", "model_name_or_path", "adapter_name", "kwargs")
@in_own_context
def hotswap_adapter(original: Method, *args: Any, **kwargs: Any) -> Any:
    """Swap an adapter as PEFT does. The file of an SFA adapter is read once, with its checks.

    Raises:
        CheckpointError: If the adapter is damaged, or does not fit the model.
    """
    given = arguments_of(original, args, kwargs)
    compiled = getattr(given.get("model"), "_orig_mod", None)
    model = given.get("model") if compiled is None else compiled
    with (
        AdapterLoad(model, given.get("adapter_name")) as load,
        readable_errors(load, given.get("model_name_or_path"), given.get("kwargs", {})),
    ):
        return original(*args, **kwargs)


@patch(hotswap, "hotswap_adapter_from_state_dict", "model", "state_dict", "adapter_name", "config")
def hotswap_adapter_from_state_dict(original: Method, *args: Any, **kwargs: Any) -> Any:
    """Swap an adapter as PEFT does. For SFA adapters, see `swap`."""
    given = arguments_of(original, args, kwargs)
    config = given.get("config")
    if not isinstance(config, SFAConfig):
        return original(*args, **kwargs)
    if not isinstance(config, RecordedConfig):
        raise ValueError(
            "config does not describe the adapter in `state_dict`: use the `peft_config` of the model that it is "
            "from, or SFAConfig.from_pretrained."
        )
    return swap(given["model"], given["state_dict"], given["adapter_name"], config)


# No more fields, since PEFT compares the config with that of the active adapter, which may not be the swapped one.
hotswap.CONFIG_KEYS_TO_CHECK[PeftType[NAME]] = ["peft_type"]

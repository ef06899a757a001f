"""Optimizers of adapters: groups with the measured rates, and a warning of one with replaced parameters."""

from __future__ import annotations

import gc
import math
import warnings
from collections.abc import Iterable
from typing import Any

from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor, nn
from torch.optim import Optimizer

from ..config import is_int
from ..layers.adapted import EXTERNAL_KINDS, SFALayer, sfa_layers
from ..planning.plan import Planner
from ..ticket.selection import count_elements

# The rate of internal values at a density of 1, and the largest that was measured. The effect of values of one size on
# an output grows with the root of their number, and the best rates at 0.5 % and 2 % differ by 2.
INTERNAL_RATE, MAX_INTERNAL_RATE = 7e-3, 0.1


def parameter_groups(
    model: nn.Module,
    *,
    internal: float | None = None,
    external: float = 1e-2,
    head: float = 2e-3,
    weight_decay: float = 0.0,
) -> list[dict[str, Any]]:
    """The trainable parameters of a model with SFA adapters, as groups for AdamW with a learning rate for each kind.

    The defaults are those that measured best in semantic segmentation; docs/choosing.md has those of other tasks. Call
    it after `search_ticket`, which gives the adapter new parameters.

    Args:
        model (`nn.Module`): A model with at least one SFA adapter that is trained, also wrapped or injected.
        internal (`float`, *optional*, defaults to `None`):
            The learning rate of the values of the ticket. None means ``7e-3 / sqrt(density)`` with the density of the
            ticket, at most 0.1: 5e-2 at 2 %, 7e-2 at 1 %.
        external (`float`, defaults to 1e-2): The learning rate of external adapters.
        head (`float`, defaults to 2e-3):
            The learning rate of heads (`modules_to_save`), and of whatever else is trained whole.
        weight_decay (`float`, defaults to 0.0): The weight decay of every group.

    Returns:
        A group for each kind that the model has, with `params`, `lr`, `weight_decay` and `name`: `head`, `external` or
        `internal`. Every trainable parameter is in exactly one of them.

    Raises:
        TypeError: If the model has no SFA adapter.
        ValueError: If a rate is not a number >= 0, or no adapter is trained.

    Example:

        >>> optimizer = torch.optim.AdamW(parameter_groups(model))
        >>> trainer = Trainer(model, args, train_dataset=rows, optimizers=(optimizer, None))
    """
    given = {"external": external, "head": head, "weight_decay": weight_decay}
    if internal is not None:
        given["internal"] = internal
    for argument, rate in given.items():
        if not (is_int(rate) or isinstance(rate, float)) or not math.isfinite(rate) or rate < 0:
            raise ValueError(f"{argument}={rate!r} must be a number >= 0.")
    layers = [layer for _, layer in sfa_layers(model)]
    if not layers:
        raise TypeError(f"{type(model).__name__} has no SFA adapter: call get_peft_model(base, SFAConfig(...)) first.")
    values = internal_values(model)
    external_adapters = (a for layer in layers for kind in EXTERNAL_KINDS for a in getattr(layer, kind).values())
    bottlenecks = {id(p) for adapter in external_adapters for p in adapter.parameters()}
    groups: dict[str, list[nn.Parameter]] = {"head": [], "external": [], "internal": []}
    for p in model.parameters():
        if p.requires_grad:
            groups["internal" if id(p) in values else "external" if id(p) in bottlenecks else "head"].append(p)
    if not groups["internal"] and not groups["external"]:
        raise ValueError("no SFA adapter of the model is trained: load it with is_trainable=True, or activate it.")
    internal = _internal_rate(model, layers) if internal is None else internal
    rates = {"internal": internal, "external": external, "head": head}
    return [
        {"params": parameters, "lr": rates[kind], "weight_decay": weight_decay, "name": kind}
        for kind, parameters in groups.items()
        if parameters
    ]


def _internal_rate(model: nn.Module, layers: Iterable[SFALayer]) -> float:
    """The default rate of internal values: that for the density of the trained tickets."""
    sizes: dict[str, int] = {}
    for layer in layers:
        for name in layer.adapter_names:
            delta = layer.internal_of(name)
            trained = sum(p.numel() for p in delta.parameters() if p.requires_grad) if delta else 0
            if trained:
                sizes[name] = sizes.get(name, 0) + trained
    # PEFT gives the base model the configs too.
    bases = (m for m in model.modules() if not isinstance(m, BaseTuner) and "peft_config" in vars(m))
    configs_of = ((m, vars(m)["peft_config"]) for m in bases)
    base, configs = next((m, configs) for m, configs in configs_of if sizes.keys() <= configs.keys())
    if not sizes:
        return INTERNAL_RATE  # no group has it
    total = sum(count_elements(Planner(base, configs[name]).candidates()) for name in sizes)
    return min(INTERNAL_RATE * math.sqrt(total / sum(sizes.values())), MAX_INTERNAL_RATE)


def internal_values(model: nn.Module) -> set[int]:
    """The values of all tickets in a model, by `id`."""
    deltas = (delta for _, layer in sfa_layers(model) for delta in layer.sfa_internal.values())
    return {id(p) for delta in deltas for p in delta.parameters()}


def holds_any(parameters: Iterable[Tensor]) -> Optimizer | None:
    """An optimizer in this process that has one of the parameters; None if there is none."""
    wanted = {id(p) for p in parameters}
    # With `type`, since `isinstance` on a lazy object of another library could import something.
    optimizers = (o for o in gc.get_objects() if issubclass(type(o), Optimizer))
    return next((o for o in optimizers if not wanted.isdisjoint(_trained_by(o))), None) if wanted else None


def _trained_by(optimizer: Any) -> set[int]:
    return {id(p) for group in getattr(optimizer, "param_groups", ()) for p in group["params"]}


def warn_of_replaced(before: Iterable[Tensor], after: Iterable[Tensor], adapter_name: str) -> None:
    """Warn if an optimizer has a parameter that the adapter had before and no longer has."""
    kept = {id(p) for p in after}
    optimizer = holds_any(p for p in before if id(p) not in kept)
    if optimizer is not None:
        warnings.warn(
            f"an optimizer ({type(optimizer).__name__}) was created before adapter {adapter_name!r} got another "
            f"ticket, and has parameters that the adapter no longer has, so it would not train the adapter. Create "
            f"the optimizer after search_ticket, install_ticket or loading.",
            stacklevel=3,
        )

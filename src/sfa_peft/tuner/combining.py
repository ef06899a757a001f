"""Combines adapters into one: sparse task arithmetic (Ilharco et al., "Editing Models with Task Arithmetic", 2023).

The new internal change is the weighted sum of the changes, on the union of the tickets. The hidden units of external
adapters are concatenated, so that the new width is the sum of the widths, and the new adapter computes exactly the
weighted sum of their outputs: ``sum_i w_i up_i(act(down_i(x)))``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from numbers import Real
from operator import attrgetter
from typing import Any

import torch
from torch import nn

from ..checkpoint.names import MODULE_PARALLEL
from ..config import SFAConfig
from ..layers.adapted import EXTERNAL_KINDS, Adapters, SFALayer, sfa_layers
from ..layers.bottleneck import ExternalAdapter
from ..layers.heads import Head
from ..planning.budget import External
from ..planning.plan import Plan, Planner, ticket_sizes
from ..recorded import RecordedConfig
from ..ticket.selection import Positions


def check_combinable(
    model: nn.Module, configs: dict[str, RecordedConfig], adapters: Sequence[str], weights: Any
) -> None:
    """Check that adapters can be combined.

    Raises:
        ValueError: If an adapter does not exist, the adapters' settings differ, two of them have the same head, or the
            numbers of adapters and weights differ.
    """
    if not adapters or len(adapters) != len(weights):
        raise ValueError(
            f"{len(adapters)} adapters and {len(weights)} weights: give at least one adapter, and as many weights."
        )
    for weight in weights:
        if not isinstance(weight, Real) or not math.isfinite(weight):
            raise ValueError(f"weights={list(weights)!r} must be finite numbers.")
    if len(set(adapters)) < len(adapters):
        raise ValueError(
            f"adapters={list(adapters)!r} names an adapter twice; name it once, with the sum of its weights."
        )
    for name in adapters:
        if name not in configs:
            raise ValueError(f"Adapter {name} does not exist")
    internal = [name for name in adapters if configs[name].ticket_sizes]
    external = [name for name in adapters if configs[name].external_widths]
    for field, read, names in (
        ("internal_granularity", attrgetter("granularity"), internal),
        ("external_activation", attrgetter("external_activation"), external),
        ("external_dropout", attrgetter("external_dropout"), external),
        ("external_conv", attrgetter("external_conv"), external),
    ):
        for name in names[1:]:
            values = [read(configs[n]) for n in (names[0], name)]
            if values[0] != values[1]:
                raise ValueError(
                    f"adapters {names[0]!r} and {name!r} cannot be combined: their {field} is {values[0]!r} and "
                    f"{values[1]!r}."
                )
    heads = [m for m in model.modules() if isinstance(m, Head)]
    shared = [head for head in heads if sum(name in head.modules_to_save for name in adapters) > 1]
    if shared:
        raise ValueError(
            "Cannot add weighted adapters if they target the same module with modules_to_save, but found "
            f"{len(shared)} such instance(s)."
        )
    if any(layer.merged for _, layer in sfa_layers(model)):
        raise ValueError("merged adapters cannot be combined; call unmerge_adapter first.")


def combined(
    model: nn.Module, configs: dict[str, RecordedConfig], adapters: Sequence[str]
) -> tuple[RecordedConfig, Plan]:
    """The config and the plan of the combined adapter: the union of the tickets, and the sums of the widths."""
    positions: Positions = {}
    for name, layer in sfa_layers(model):
        for adapter in adapters:
            if adapter in layer.sfa_internal:
                delta = layer.sfa_internal[adapter]
                for parameter in delta.changed:
                    union = positions.setdefault(name, {})
                    both = [t for t in (union.get(parameter), delta.positions(parameter)) if t is not None]
                    union[parameter] = torch.cat(both).unique()
    externals: dict[tuple[str, str], External] = {}
    for adapter in adapters:
        for recorded in Planner(model, configs[adapter]).recorded_externals(configs[adapter]).values():
            for external in recorded:
                key = (external.kind, external.module)
                same = externals.get(key, external)
                if same.reads != external.reads:
                    raise ValueError(
                        f"the adapters cannot be combined: their external adapters on {external.module!r} read the "
                        f"inputs of {same.reads!r} and {external.reads!r}."
                    )
                externals[key] = replace(same, width=external.width + (same.width if key in externals else 0))
    plan = Plan.of(positions, externals.values())
    inputs = {e.module: e.reads for e in plan.all_externals if e.place == MODULE_PARALLEL}
    heads = [head for name in adapters for head in configs[name].modules_to_save or ()]
    first_internal = next((configs[name] for name in adapters if configs[name].ticket_sizes), configs[adapters[0]])
    first_external = next((configs[name] for name in adapters if configs[name].external_widths), configs[adapters[0]])
    total = _parameters(model, plan, first_internal)
    config = replace(
        first_internal,
        modules_to_save=list(dict.fromkeys(heads)) or None,
        # The targets of all adapters. So no field of one adapter may exclude them.
        target_modules=set(plan.positions),
        target_heads=None,
        exclude_modules=None,
        layers_to_transform=None,
        layers_pattern=None,
        inference_mode=False,
        base_fingerprint=None,
        external_modules=inputs or first_internal.external_modules,
        external_activation=first_external.external_activation,
        external_dropout=first_external.external_dropout,
        external_conv=first_external.external_conv,
        external_scale=1.0,  # the scales are in the values
        external_share=plan.external_cost / total,
        external_widths=plan.external_widths,
        ticket_sizes=ticket_sizes(plan.positions),
        external_placement="uniform",
        external_width=None,
        internal_density=None,
        budget=total,
    )
    return config, plan


def _parameters(model: nn.Module, plan: Plan, config: SFAConfig) -> int:
    base = {name: layer.changeable for name, layer in sfa_layers(model)}
    internal = sum(
        len(indices) * config.granularity.size(getattr(base[module], name).shape)
        for module, parameters in plan.positions.items()
        for name, indices in parameters.items()
    )
    return internal + plan.external_cost


def fill(model: nn.Module, adapters: Sequence[str], weights: Sequence[float], adapter_name: str) -> None:
    """Fill in the values and heads of a combined adapter after its injection."""
    for _, layer in sfa_layers(model):
        _fill_internal(layer, adapters, weights, adapter_name)
        for bottlenecks in (getattr(layer, kind) for kind in EXTERNAL_KINDS):
            _fill_external(bottlenecks, adapters, weights, adapter_name)
    for module in model.modules():
        if isinstance(module, Head) and adapter_name in module.modules_to_save:
            (source,) = [name for name in adapters if name in module.modules_to_save]
            module.modules_to_save[adapter_name].load_state_dict(module.modules_to_save[source].state_dict())


@torch.no_grad()
def _fill_internal(layer: SFALayer, adapters: Sequence[str], weights: Sequence[float], adapter_name: str) -> None:
    if adapter_name not in layer.sfa_internal:
        return
    new = layer.sfa_internal[adapter_name]
    for parameter in new.changed:
        values, positions = new.values(parameter), new.positions(parameter).long()
        total = torch.zeros_like(values, dtype=torch.promote_types(values.dtype, torch.float32))
        for adapter, weight in zip(adapters, weights, strict=True):
            if adapter in layer.sfa_internal and parameter in layer.sfa_internal[adapter].changed:
                delta = layer.sfa_internal[adapter]
                at = torch.searchsorted(positions, delta.positions(parameter).long())
                total[at] += weight * delta.values(parameter).to(total.dtype)
        values.copy_(total)


@torch.no_grad()
def _fill_external(
    bottlenecks: Adapters[ExternalAdapter], adapters: Sequence[str], weights: Sequence[float], adapter_name: str
) -> None:
    if adapter_name not in bottlenecks:
        return
    new = bottlenecks[adapter_name]
    parts = [(bottlenecks[a], w) for a, w in zip(adapters, weights, strict=True) if a in bottlenecks]
    new.down.weight.copy_(torch.cat([part.down.weight for part, _ in parts]))
    new.down.bias.copy_(torch.cat([part.down.bias for part, _ in parts]))
    if new.conv is not None:
        new.conv.weight.copy_(torch.cat([part.conv.weight for part, _ in parts if part.conv is not None]))
    new.up.weight.copy_(torch.cat([weight * part.scale * part.up.weight for part, weight in parts], dim=1))

"""Checks that an adapter's config still describes the adapter."""

from __future__ import annotations

from peft.utils import ModulesToSaveWrapper
from torch import nn

from ..checkpoint.names import external_kind
from ..layers.adapted import sfa_layers
from ..layers.leaves import modules_outside
from ..planning.base import head_modules
from ..planning.plan import ticket_sizes
from ..recorded import RecordedConfig
from ..ticket.selection import Positions


def check_config(model: nn.Module, adapter_name: str, config: RecordedConfig, positions: Positions) -> None:
    """Check that an adapter's config is valid and describes the adapter, since fields can be set at any time.

    Raises:
        ValueError: If it is not valid or does not match. The message names the field.
    """
    type(config)(**config.to_dict())
    widths = {}
    expected = (config.external_activation, config.external_scale, config.external_conv)
    for name, layer in sfa_layers(model):
        if any(p.is_meta for p in layer.parameters_of(adapter_name)):
            raise ValueError(
                f"adapter {adapter_name!r} has no weights yet: it was created on the meta device, or with "
                f"low_cpu_mem_usage=True. Load its weights first."
            )
        for kind, external in layer.externals_of(adapter_name):
            widths[name, kind] = external.width
            if (external.activation, external.scale, external.kernel_size) != expected:
                raise ValueError(
                    f"the external adapters of {adapter_name!r} have external_activation={external.activation!r}, "
                    f"external_scale={external.scale} and external_conv={external.kernel_size}, but its config says "
                    f"{expected[0]!r}, {expected[1]} and {expected[2]}: restore the fields; they cannot change after "
                    f"an adapter is created."
                )
        if adapter_name in layer.sfa_internal:
            granularity = layer.sfa_internal[adapter_name].granularity
            if granularity != config.granularity:
                raise ValueError(
                    f"the ticket of {adapter_name!r} has granularity {granularity}, but its config says "
                    f"{config.granularity}: restore `internal_granularity`."
                )
    announced = {
        (module, external_kind(place)): width
        for place, modules in config.external_widths.items()
        for module, width in modules.items()
    }
    heads = {
        name
        for name, module in modules_outside(model)
        if isinstance(module, ModulesToSaveWrapper) and adapter_name in module.modules_to_save
    }
    for field_name, is_right in (
        ("ticket_sizes", config.ticket_sizes == ticket_sizes(positions)),
        ("external_widths", announced == widths),
        ("modules_to_save", heads == set(head_modules(model, config))),
    ):
        if not is_right:
            raise ValueError(
                f"SFAConfig.{field_name} of adapter {adapter_name!r} was changed after the adapter was created, and "
                f"no longer matches the adapter: restore the field."
            )

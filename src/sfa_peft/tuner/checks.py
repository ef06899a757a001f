"""Whether an adapter's config still says what the adapter is."""

from __future__ import annotations

from peft.utils import ModulesToSaveWrapper
from torch import nn

from ..config import SFAConfig
from ..layers.adapted import sfa_layers
from ..planning.base import head_modules
from ..planning.plan import ticket_sizes
from ..ticket.selection import Positions


def check_config(model: nn.Module, adapter_name: str, config: SFAConfig, positions: Positions) -> None:
    """Check that an adapter's config is valid, and says what the adapter is: fields can be set at any time.

    Raises:
        ValueError: If it does not. Names the field.
    """
    type(config)(**config.to_dict())
    widths = {}
    expected = (config.external_activation, config.external_scale)
    for name, layer in sfa_layers(model):
        if any(p.is_meta for p in layer.parameters_of(adapter_name)):
            raise ValueError(
                f"adapter {adapter_name!r} has no weights yet: it was made on the meta device, or with "
                f"low_cpu_mem_usage=True. Load its weights first."
            )
        for external, container in layer.externals_of(adapter_name):
            widths[name, container is not None] = external.width
            if (external.activation, external.scale) != expected:
                raise ValueError(
                    f"the external adapters of {adapter_name!r} have external_activation={external.activation!r} "
                    f"and external_scale={external.scale}, and its config says {expected[0]!r} and {expected[1]}: "
                    f"set the config back; these are fixed when an adapter is made."
                )
        if adapter_name in layer.sfa_internal:
            granularity = layer.sfa_internal[adapter_name].granularity
            if granularity != config.granularity:
                raise ValueError(
                    f"the ticket of {adapter_name!r} is of {granularity}, and its config says "
                    f"{config.granularity}: set `internal_granularity` back."
                )
    announced = {
        (module, place == "mlp_parallel"): width
        for place, modules in (config.external_widths or {}).items()
        for module, width in modules.items()
    }
    heads = {
        name
        for name, module in model.named_modules()
        if isinstance(module, ModulesToSaveWrapper) and adapter_name in module.modules_to_save
    }
    for field_name, is_right in (
        ("ticket_sizes", config.ticket_sizes == ticket_sizes(positions)),
        ("external_widths", announced == widths),
        ("modules_to_save", heads == set(head_modules(model, config))),
    ):
        if not is_right:
            raise ValueError(
                f"SFAConfig.{field_name} of adapter {adapter_name!r} was changed after the adapter was made, and "
                f"does not say what it is any more: set it back."
            )

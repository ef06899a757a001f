"""Installs a ticket in an adapter, and checks which adapters can get one."""

from __future__ import annotations

import copy
from dataclasses import replace

from peft import PeftModel
from torch import nn

from ..layers.adapted import sfa_layers
from ..ticket.ticket import Ticket, shapes_of
from ..tuner.model import SFAModel
from ..tuner.optimizers import warn_of_replaced
from ..tuner.rollback import Rollback


def install_ticket(model: nn.Module, ticket: Ticket, adapter_name: str | None = None) -> None:
    """Install a ticket in an SFA adapter: its positions, and the places and widths of its external adapters.

    As after a search, the new adapter does not change the model's outputs yet. The parameters are new, so create the
    optimizer afterwards. After an error or an interrupt, the model is as it was.

    Args:
        model (`nn.Module`): The model that `get_peft_model` returned for an `SFAConfig`.
        ticket (`Ticket`): A ticket for the same base model, from `TicketReport.ticket` or `Ticket.load`.
        adapter_name (`str`, *optional*, defaults to `None`): The adapter. None means the active one.

    Raises:
        TypeError: If `model` was not returned by `get_peft_model` for an `SFAConfig`.
        ValueError: If the ticket does not fit the model, the config or the budget, or the adapter has been trained.
    """
    tuner, adapter_name = searchable(model, adapter_name, replaces_externals=True)
    config = tuner.peft_config[adapter_name]
    shapes = shapes_of(tuner.candidates(adapter_name))
    if ticket.granularity != config.granularity:
        raise ValueError(
            f"the ticket has granularity {ticket.granularity}, but adapter {adapter_name!r} has "
            f"{config.granularity}; set `internal_granularity` as in the search."
        )
    for name in ticket.shapes.keys() | shapes.keys():
        if ticket.shapes.get(name) != shapes.get(name):
            raise ValueError(
                f"the ticket does not fit: {name!r} has shape {ticket.shapes.get(name)} in the ticket's model, but "
                f"{shapes.get(name)} among this adapter's candidates; use the same base model and `target_modules`."
            )
    places = {(p.place, p.module): p for p in tuner.places(adapter_name)}
    externals = []
    for place, modules in ticket.widths.items():
        for module, width in modules.items():
            if (place, module) not in places:
                raise ValueError(
                    f"the ticket has an external adapter at {place!r} of {module!r}, which this adapter's config does "
                    f"not allow; set `external_places` or `external_modules` as in the search."
                )
            externals.append(replace(places[place, module], width=width))
    if config.uses_budget:
        cost = ticket.size + sum(e.cost for e in externals)
        if cost > tuner.budget(adapter_name):
            raise ValueError(
                f"the ticket with its external adapters has {cost:,} parameters, but the budget of adapter "
                f"{adapter_name!r} is {tuner.budget(adapter_name):,}; raise `budget`."
            )
    before = tuner.parameters_of(adapter_name)
    with Rollback(tuner):
        tuner.install(adapter_name, ticket.positions, externals)
        warn_of_replaced(before, tuner.parameters_of(adapter_name), adapter_name)


def ticket_of(model: nn.Module, adapter_name: str | None = None) -> Ticket:
    """The ticket of an adapter, from a search, an installation, a file or `get_peft_model`. It is a copy on the CPU.

    Args:
        model (`nn.Module`):
            A model with an SFA adapter, from `get_peft_model` or `PeftModel.from_pretrained`.
        adapter_name (`str`, *optional*, defaults to `None`): The adapter. None means the active one.

    Returns:
        A `Ticket`, which can be saved, compared with another, or installed in another model. Its `criterion` is empty.

    Raises:
        TypeError: If `model` has no SFA adapters.
        ValueError: If there is no such adapter, or it is offloaded or on the meta device.
    """
    tuner, adapter_name = adapter_of(model, adapter_name)
    config = tuner.peft_config[adapter_name]
    installed, widths = tuner.positions(adapter_name), copy.deepcopy(config.external_widths)
    if any(p.is_meta for parameters in installed.values() for p in parameters.values()):
        raise ValueError(
            f"adapter {adapter_name!r} has no positions here: it is on the meta device, or offloaded by Accelerate. "
            f"Load its weights first."
        )
    # A copy on the CPU, so that the ticket does not depend on the device, and does not change with the model.
    positions = {m: {n: p.to("cpu", copy=True) for n, p in parameters.items()} for m, parameters in installed.items()}
    shapes = shapes_of(tuner.candidates(adapter_name))
    for module, layer in sfa_layers(tuner.model):  # the config may have changed and not include all of them any more
        for name in positions.get(module, ()):
            shapes.setdefault(f"{module}.{name}", tuple(getattr(layer.changeable, name).shape))
    return Ticket(positions, shapes, config.granularity, widths)


def searchable(model: nn.Module, adapter_name: str | None, replaces_externals: bool = False) -> tuple[SFAModel, str]:
    """The tuner and the name of an adapter, after a check that it can get a new ticket.

    Args:
        model: The model.
        adapter_name: The adapter. None means the active one.
        replaces_externals: Whether its external adapters will be replaced too.

    Raises:
        TypeError, ValueError: If the adapter cannot get a new ticket; see `search_ticket`.
    """
    tuner, adapter_name = adapter_of(model, adapter_name)
    config = tuner.peft_config[adapter_name]
    if not (
        config.external_placement == "auto" or (tuner.candidates(adapter_name) and tuner.ticket_size(adapter_name))
    ):
        raise ValueError(
            f"adapter {adapter_name!r} has no internal adapters (external_share=1, target_modules=[] or a density of "
            f"0) and no external_placement='auto', so there is nothing to search for."
        )
    for _, layer in sfa_layers(model):
        if layer.merged or layer.disable_adapters:
            state = "merged: unmerge_adapter()" if layer.merged else "disabled: leave disable_adapter()"
            raise ValueError(f"the model's adapters are {state} before the search.")
        if any(p.is_meta for p in layer.parameters_of(adapter_name)):
            raise ValueError(
                f"adapter {adapter_name!r} has no weights here: it was created with low_cpu_mem_usage=True or on the "
                f"meta device, or is offloaded by Accelerate. Load all weights before the search."
            )
        if adapter_name in layer.sfa_internal and any(p.any() for p in layer.sfa_internal[adapter_name].parameters()):
            raise ValueError(
                f"the internal values of adapter {adapter_name!r} are not zero any more, after a search with "
                f"rewind=False or a training; a new ticket would drop them. Search before that, or for a new adapter."
            )
        if (replaces_externals or config.external_placement == "auto") and layer.is_changed_by(adapter_name):
            raise ValueError(
                f"the external adapters of adapter {adapter_name!r} have been trained; a new placement would drop "
                f"them. Search before training, or for a new adapter."
            )
    return tuner, adapter_name


def adapter_of(model: nn.Module, adapter_name: str | None) -> tuple[SFAModel, str]:
    """The tuner and the name of an adapter. If `adapter_name` is None, it is the active adapter.

    Raises:
        TypeError: If `model` was not returned by `get_peft_model` for an `SFAConfig`.
        ValueError: If there is no such adapter.
    """
    tuner = _tuner_of(model)
    if adapter_name is None:
        active = tuner.active_adapters
        if len(active) != 1:
            raise ValueError(
                f"adapter_name=None, but {len(active)} adapters are active ({active}); give the name of one."
            )
        adapter_name = active[0]
    if adapter_name not in tuner.peft_config:
        raise ValueError(f"adapter_name={adapter_name!r} does not exist; the model has {sorted(tuner.peft_config)}.")
    return tuner, adapter_name


def _tuner_of(model: nn.Module) -> SFAModel:
    if hasattr(model, "module") and not isinstance(model, PeftModel):
        raise TypeError(
            f"a {type(model).__name__} is not an adapted model: search before the model is wrapped for distributed "
            f"training (before `accelerator.prepare(model)`). The search itself averages gradients over processes."
        )
    tuner = model.base_model if isinstance(model, PeftModel) else model
    if not isinstance(tuner, SFAModel):
        raise TypeError(
            f"expected the model that get_peft_model(model, SFAConfig(...)) returns, got {type(model).__name__}."
        )
    return tuner

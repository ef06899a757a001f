"""The ticket search: score the candidates, keep the best, rewind everything."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from ..config import SFAConfig
from ..layers.adapted import SFALayer, sfa_layers
from ..layers.leaves import base_layer_of
from ..layers.quantized import is_quantized
from ..ticket.criteria import Criterion, Score, as_criterion
from ..ticket.quotas import Quotas
from ..ticket.report import TicketReport
from ..ticket.selection import Positions, count_elements
from ..ticket.ticket import Ticket, shapes_of
from ..tuner.model import SFAModel
from ..tuner.optimizers import tell_left_behind
from .install import searchable
from .placement import Chosen, Placement
from .progress import SearchCheckpoint
from .rounds import Rounds
from .steps import Calls, Run, TicketSearchError, choosing, default_loss, endless, prepared, seeded
from .training import STATES, DenseTraining, Slot


def search_ticket(
    model: nn.Module,
    dataloader: Iterable[Any] | None = None,
    *,
    steps: int = 200,
    criterion: str | Criterion | Score = "lottery",
    rounds: int = 1,
    rewind_step: int = 0,
    quotas: Quotas | None = None,
    learning_rate: float = 5e-4,
    adapter_learning_rate: float = 2e-3,
    adapter_name: str | None = None,
    loss_fn: Callable[[nn.Module, Any], Tensor] | None = None,
    accelerator: Accelerator | None = None,
    optimizer_state: str = "device",
    checkpoint: str | Path | None = None,
    checkpoint_every: int = 50,
    seed: int = 0,
    progress: bool = True,
) -> TicketReport:
    """Find the ticket of an SFA adapter and install it.

    The candidate parameters (those of `target_modules`) are trained densely with Adam beside the external adapters and
    the heads, or only their gradients are taken, as the criterion needs. The criterion scores each position, the exact
    global top k are kept, and every parameter, buffer, `requires_grad` flag and training mode is put back to where it
    was, bit for bit. Then the ticket's values, all zero, take the place of the old ones: **create the optimizer after
    the search**, and wrap the model for distributed training after it.

    With `external_placement="auto"` (experimental: no gain was measured) wide external adapters are trained at every
    place meanwhile, their hidden units are scored, and the best that the budget pays for are kept, with the weights
    they began with; see `sfa_peft.search.placement`.

    With several processes, gradients are averaged over them, and all of them hold the ticket of the main process. The
    same model, data, seed and settings give the same ticket.

    Args:
        model: What `get_peft_model` returned.
        dataloader: Gives batches for `loss_fn`; begun again when it ends before `steps`. A `DataLoader` that
            Accelerate has not prepared is prepared here. None will do for criteria that need no data.
        steps: Training steps of each round, at least 1.
        criterion: A name in `sfa_peft.ticket.criteria.CRITERIA` (``lottery``, ``fisher``, ``gradient``, ``taylor``,
            ``movement``, ``credit``, ``magnitude``, ``random``), or a function from `Evidence` to scores, which must
            give the same scores each time it is called.
        rounds: Experimental: no gain was measured. How often to train and select; more than 1 for criteria that train.
            A round leaves to the next its survivors, fewer each time by the same factor, and only they are trained
            again (Frankle & Carbin, 2019).
        rewind_step: Experimental: no gain was measured. The step of the first round that everything is rewound to,
            between rounds and at the end (Frankle et al., "Linear Mode Connectivity and the Lottery Ticket
            Hypothesis", 2020). With 0 the model is the identity again; otherwise ticket, external adapters and heads
            start with their values of that step.
        quotas: Limits on how the ticket spreads over layers or types; by default the selection is global.
        learning_rate: Of the candidate parameters.
        adapter_learning_rate: Of the external adapters and the heads.
        adapter_name: The adapter to search for; the active one unless given.
        loss_fn: ``(model, batch) -> loss``; by default ``model(**batch).loss``.
        accelerator: Gives the precision to run in (with fp16 the search runs without autocast, since it has no
            gradient scaler). Unless given, no autocast. A model on the CPU is moved to the device that Accelerate
            chooses, any model with several processes or with an accelerator; one on a GPU stays there otherwise.
        optimizer_state: Where Adam's moments are kept; the original weights are in CPU memory always. ``device``:
            float32 beside the parameters. ``cpu``: in CPU memory. ``bf16``: on the device in half of the memory.
        checkpoint: A file to keep the progress in. If it is there, the search goes on from it, to the same ticket as
            without the stop; after the search it is removed. `dataloader` must give the same batches again.
        checkpoint_every: Steps between two writes.
        seed: Seeds the search's own random state; the global one is put back afterwards.
        progress: Whether to show a progress bar on the main process.

    Returns:
        Where the ticket went; `report.ticket` is the ticket itself, to be saved or given to another model.

    Raises:
        TypeError: If `model` is not what `get_peft_model` returned for an `SFAConfig`, or an argument is of another
            type.
        ValueError: If an argument is not valid, the adapter has no internal targets, or has been trained already.
        TicketSearchError: If the data gives no batch or no loss, or the loss is no longer finite.
    """
    tuner, adapter_name = searchable(model, adapter_name)
    rule = as_criterion(criterion)
    steps, rounds = _whole("steps", steps, 1), _whole("rounds", rounds, 1)
    checkpoint_every, seed = _whole("checkpoint_every", checkpoint_every, 1), _whole("seed", seed)
    rewind_step = _whole("rewind_step", rewind_step, 0)
    learning_rate = _rate("learning_rate", learning_rate)
    adapter_learning_rate = _rate("adapter_learning_rate", adapter_learning_rate)
    if not (quotas is None or isinstance(quotas, Quotas)):
        raise TypeError(f"quotas={quotas!r} must be a sfa_peft.Quotas, such as Quotas(per='layer', cap=0.5).")
    if not (dataloader is None or isinstance(dataloader, Iterable)):
        raise TypeError(f"dataloader={dataloader!r} must give batches: a DataLoader, or a list of batches.")
    if checkpoint is not None and Path(checkpoint).is_dir():
        raise ValueError(f"checkpoint={str(checkpoint)!r} is a folder; give the path of a file.")
    if optimizer_state not in STATES:
        raise ValueError(f"optimizer_state={optimizer_state!r} is not known; choose one of {STATES}.")
    if rounds > 1 and not rule.trains:
        raise ValueError(f"rounds={rounds}: {rule.name!r} does not train the candidates; every round would be alike.")
    if rewind_step >= steps:
        raise ValueError(f"rewind_step={rewind_step!r} must be an int in [0, {steps}), the steps of a round.")
    config = tuner.peft_config[adapter_name]
    places_externals = config.external_placement == "auto"
    candidates = tuner.candidates(adapter_name)
    shared = tuner.shared_parameters()
    for module, own in candidates.items():
        for p in own.values():
            if p.is_meta and is_quantized(base_layer_of(tuner.model.get_submodule(module))):
                raise ValueError(
                    f"{module!r} is quantized, and its weight cannot be trained or scored: search on the base model "
                    f"as it was before, and give this model the ticket with install_ticket."
                )
            if p.is_meta:
                raise ValueError(
                    f"{module!r} has no values here (meta device, or offloaded by Accelerate): search on a model that "
                    f"has all its weights."
                )
            if id(p) in shared and (rule.trains or rule.needs_data):
                raise ValueError(
                    f"{' and '.join(map(repr, shared[id(p)]))} are one shared parameter, and the criterion "
                    f"{rule.name!r} cannot tell which of them matters; exclude it, or use a data-free criterion."
                )
    if rounds > 1 and not candidates:
        raise ValueError(f"rounds={rounds}, but adapter {adapter_name!r} has no internal targets to choose from.")
    needs_data = rule.needs_data or places_externals
    if needs_data and dataloader is None:
        raise ValueError(f"dataloader=None, but the criterion {rule.name!r} or the placement needs data.")
    if rewind_step and not needs_data:
        raise ValueError(f"rewind_step={rewind_step}: nothing is trained for the criterion {rule.name!r}.")

    data = dataloader if needs_data else None
    # Not a new Accelerator: its precision would be fixed for the whole process, before the user says which.
    state = accelerator.state if accelerator is not None else PartialState()
    autocast = nullcontext if accelerator is None or accelerator.mixed_precision == "fp16" else accelerator.autocast
    several = state.num_processes > 1
    device = state.device
    if accelerator is None and not several:  # where the user has put it, if that is on an accelerator
        device = next((p.device for p in model.parameters() if p.device.type != "cpu"), device)
    model.to(device)
    size = tuner.ticket_size(adapter_name)
    if places_externals:  # what is left of the budget is known at the end
        size = min(tuner.budget(adapter_name), count_elements(candidates))
    selector = Rounds(
        candidates,
        config.granularity,
        size,
        rule,
        quotas,
        rounds,
        seed,
        finds_size=places_externals,
        agree=(lambda positions: _from_main_process(positions, device)) if several else lambda positions: positions,
    )
    replaced = tuner.parameters_of(adapter_name)
    with ExitStack() as stack:
        stack.enter_context(_rewound(tuner, adapter_name))
        stack.enter_context(seeded(seed, device))
        placement = stack.enter_context(Placement.probing(tuner, adapter_name)) if places_externals else None
        beside = _trained_beside(model, adapter_name)
        for p in (*(p for own in selector.candidates.values() for p in own.values()), *beside):
            p.requires_grad_(True)
        if several:
            for p in beside:  # heads and external adapters may have been made with another seed on each rank
                p.data.copy_(broadcast(p.data))
        probed = placement.statistics() if placement else {}
        others = [Slot(f"beside.{i}", p, adapter_learning_rate, probed.get(p, ())) for i, p in enumerate(beside)]
        training = DenseTraining([*selector.make_slots(learning_rate), *others], optimizer_state, seed)
        stack.callback(training.rewind, to_early=False)
        places = [name for name, layer in sfa_layers(tuner.model) if layer.externals_of(adapter_name)]
        names = dict.fromkeys((*candidates, *places))
        calls = Calls({name: tuner.model.get_submodule(name) for name in names})
        stack.callback(calls.remove)
        run = Run(model, training, state, device, autocast, loss_fn or default_loss, seed, calls)
        if data is not None:
            if checkpoint is not None:
                settings = _settings(config) | {
                    "criterion": rule.name,
                    "steps": steps,
                    "rounds": rounds,
                    "rewind_step": rewind_step,
                    "quotas": repr(quotas),
                    "learning_rate": learning_rate,
                    "adapter_learning_rate": adapter_learning_rate,
                    "optimizer_state": optimizer_state,
                    "seed": seed,
                    "model": training.fingerprint(),
                }
                run.resume(SearchCheckpoint(Path(checkpoint), settings))
            batches = endless(prepared(data, device), steps * rounds)
            run.through(batches, steps, rounds, selector, rewind_step, checkpoint_every, progress)
            if rule.needs_data and selector.slots and not training.has_evidence():
                raise TicketSearchError(
                    f"the criterion {rule.name!r} saw no change and no gradient in any candidate: the loss does not "
                    f"depend on the backbone."
                )
        chosen = None
        with choosing():
            never = calls.never(device) if needs_data else []
            selector.leave_out(never)
            _tell_idle([name for name in places if name in never])
            if placement:
                placement.score(training, broadcast if several else None, never)
                chosen = placement.select(tuner.external_allowance(adapter_name))
                left = tuner.budget(adapter_name) - chosen.cost
                positions = selector.choose(training, min(left, selector.total))
            else:
                positions = selector.choose(training, selector.size)
        early = selector.early_values(positions)
        # Probes are gone after the search; what they leave is in `chosen`.
        moved = [slot for slot in others if slot.begin is not slot.before and slot.parameter not in probed]
        early_beside = [(slot.parameter, slot.begin) for slot in moved]
    with seeded(seed, device):
        tuner.install(adapter_name, positions, chosen.externals if chosen else None)
    _begin(tuner, adapter_name, chosen, early, early_beside)
    tell_left_behind(replaced, tuner.parameters_of(adapter_name), adapter_name)
    if run.checkpoint is not None and state.is_main_process:
        run.checkpoint.remove()
    widths = copy.deepcopy(config.external_widths or {})
    found = Ticket(positions, shapes_of(candidates), config.granularity, widths, rule.name)
    return TicketReport(found, len(run.losses), tuple(run.losses))


def _tell_idle(places: Sequence[str]) -> None:
    if places:
        warnings.warn(
            f"the model never calls {list(places[:3])}{' and others' if len(places) > 3 else ''}: the external "
            f"adapters there do nothing. Leave these modules out (`exclude_modules`, `external_modules`).",
            stacklevel=3,
        )


def _begin(
    tuner: SFAModel,
    adapter_name: str,
    chosen: Chosen | None,
    early: Mapping[str, Tensor],
    early_beside: Iterable[tuple[nn.Parameter, Tensor]],
) -> None:
    """Give what was installed the values to begin with: a placement's, and those of the step that is rewound to."""
    if chosen:
        chosen.begin(tuner, adapter_name)
    layers = dict(sfa_layers(tuner.model))
    with torch.no_grad():
        for name, values in early.items():
            module, _, parameter = name.rpartition(".")
            layers[module].sfa_internal[adapter_name].values(parameter).copy_(values)
        for p, value in early_beside:
            p.copy_(value)


def _whole(name: str, value: int, least: int | None = None) -> int:
    is_whole = isinstance(value, Integral) and not isinstance(value, bool)
    if not is_whole or (least is not None and value < least):
        raise ValueError(f"{name}={value!r} must be an int{'' if least is None else f' of at least {least}'}.")
    return int(value)


def _rate(name: str, value: float) -> float:
    if not (isinstance(value, Real) and math.isfinite(value) and value > 0):
        raise ValueError(f"{name}={value!r} must be a finite number above 0.")
    return float(value)


# Fields that say nothing of what a search does.
OTHER_FIELDS = {
    "auto_mapping",
    "base_model_name_or_path",
    "external_widths",
    "inference_mode",
    "initial_ticket",
    "peft_type",
    "peft_version",
    "revision",
    "task_type",
    "ticket_seed",
    "ticket_sizes",
}


def _settings(config: SFAConfig) -> dict[str, Any]:
    """The config's part of what decides a search, as JSON gives it back."""
    fields = {name: value for name, value in config.to_dict().items() if name not in OTHER_FIELDS}
    return {
        name: sorted(value) if isinstance(value, set) else list(value) if isinstance(value, tuple) else value
        for name, value in fields.items()
    }


def _trained_beside(model: nn.Module, adapter_name: str) -> list[nn.Parameter]:
    """The adapter's external adapters and heads, which are trained beside the candidates."""
    found: list[nn.Parameter] = []
    for module in model.modules():
        if isinstance(module, SFALayer):
            found += [p for adapter, _ in module.externals_of(adapter_name) for p in adapter.parameters()]
        elif isinstance(module, ModulesToSaveWrapper) and adapter_name in module.modules_to_save:
            found += module.modules_to_save[adapter_name].parameters()
    return found


@contextmanager
def _rewound(tuner: SFAModel, adapter_name: str) -> Iterator[None]:
    """Freeze everything for a search, and put back at the end, whatever happens, all but the trained parameters.

    The adapter is the one active meanwhile, without its internal part. Put back are the active adapters, all buffers,
    gradients, `requires_grad` flags and training modes.
    """
    model, active = tuner.model, tuner.active_adapter
    state = [(p, p.grad, p.requires_grad) for p in model.parameters()]
    modes = [(module, module.training) for module in model.modules()]
    buffers = [(b, b.detach().clone()) for b in model.buffers()]
    try:
        tuner.set_adapter(adapter_name)
        for p, _, _ in state:
            p.grad = None
            p.requires_grad_(False)
        for _, layer in sfa_layers(model):
            layer.searching = True
        model.train()
        yield
    finally:
        tuner.set_adapter(active)
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)
        for p, grad, requires_grad in state:
            p.grad = grad
            p.requires_grad_(requires_grad)
        for module, training in modes:
            module.training = training
        for _, layer in sfa_layers(model):
            layer.searching = False


def _from_main_process(positions: Positions, device: torch.device) -> Positions:
    """Every process takes the main process's ticket: reductions may differ in the last bit between ranks."""
    shared: Positions = {}
    for module, own in positions.items():
        for name, chosen in own.items():
            length = broadcast(torch.tensor([len(chosen)], device=device))
            buffer = chosen.to(device)
            if len(buffer) != int(length):
                buffer = torch.zeros(int(length), dtype=chosen.dtype, device=device)
            shared.setdefault(module, {})[name] = broadcast(buffer).cpu()
    return shared

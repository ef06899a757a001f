"""The ticket search: scores the candidates, installs the best as the ticket, and restores the model."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
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
from ..tuner.optimizers import warn_of_replaced
from ..tuner.rollback import Rollback
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
    rewind: bool = True,
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
    """Search the ticket of an SFA adapter and install it.

    The search trains the candidate parameters (those of `target_modules`) densely with Adam, together with the
    external adapters and the heads. For a criterion that needs only gradients, the candidates are not changed. The
    criterion scores each position, and the exact global top k become the ticket. Every parameter and buffer of the
    base model, every `requires_grad` flag and training mode is restored bit for bit; with `rewind=True` also the
    external adapters and the heads. The values of the ticket are new parameters: **create the optimizer after the
    search**, and wrap the model for distributed training after it.

    With `external_placement="auto"` (experimental, no gain was measured), wide external adapters are trained at every
    place during the search. Their hidden units are scored, and the best ones within the budget are kept.

    With several processes, gradients are averaged over the processes, and all get the ticket of the main process. The
    same model, data, seed and settings give the same ticket.

    Args:
        model (`nn.Module`): The model that `get_peft_model` returned for an `SFAConfig`.
        dataloader (`Iterable`, *optional*, defaults to `None`):
            The batches for `loss_fn`. It is started again if it ends before the last step. A `DataLoader` that
            Accelerate has not prepared is prepared here. None is allowed for criteria that need no data.
        steps (`int`, defaults to 200): The training steps of each round, at least 1.
        criterion (`str`, `Criterion` or function, defaults to `"lottery"`):
            A name (`lottery`, `fisher`, `gradient`, `taylor`, `movement`, `credit`, `magnitude` or `random`), or a
            function that maps an `Evidence` to scores, see `sfa_peft.criterion`. It must return the same scores each
            time it is called.
        rounds (`int`, defaults to 1):
            The number of rounds of training and selection. Experimental, no gain was measured. More than 1 needs a
            criterion with dense training. Each round keeps a smaller set of survivors, reduced by the same factor, and
            the next round trains only these (Frankle & Carbin, "The Lottery Ticket Hypothesis", 2019).
        rewind (`bool`, defaults to `True`):
            Whether the external adapters and the heads start again with their values before the search, and the values
            of the ticket with zero, as a winning ticket does (Frankle & Carbin, 2019). The model then has the same
            outputs as before. With False the training goes on from the last step of the search, which gained 4 points
            of mean IoU with a large fresh head in a short training. Then `adapter_learning_rate` must suit the head:
            take the rate of its training. Rounds are rewound in any case.
        quotas (`Quotas`, *optional*, defaults to `None`):
            Limits on the part of the ticket that each layer or type of module gets. None selects globally.
        learning_rate (`float`, defaults to 5e-4): The learning rate of the candidate parameters.
        adapter_learning_rate (`float`, defaults to 2e-3):
            The learning rate of the external adapters and the heads. With 0 they are not trained.
        adapter_name (`str`, *optional*, defaults to `None`): The adapter. None means the active one.
        loss_fn (`Callable`, *optional*, defaults to `None`):
            ``(model, batch) -> loss``, a tensor of one element. None uses ``model(**batch).loss``.
        accelerator (`Accelerator`, *optional*, defaults to `None`):
            Its mixed precision is used, except fp16, since the search has no gradient scaler. Without it there is no
            autocast. The model is moved to the device that Accelerate chooses, unless there is one process, no
            accelerator is given, and the model is already on a GPU.
        optimizer_state (`str`, defaults to `"device"`):
            Where Adam's moments are kept. `device`: in float32 on the device of the parameters. `cpu`: in CPU memory.
            `bf16`: in bfloat16 on the device. The original weights are always kept in CPU memory.
        checkpoint (`str` or `Path`, *optional*, defaults to `None`):
            A file for the progress. If it exists, the search resumes from it, and finds the same ticket as without the
            interruption, if `dataloader` gives the same batches again. It is removed after the search.
        checkpoint_every (`int`, defaults to 50): The steps between two writes of `checkpoint`.
        seed (`int`, defaults to 0): The seed of the search. The global random state is restored afterwards.
        progress (`bool`, defaults to `True`): Whether the main process shows a progress bar.

    Returns:
        A `TicketReport`. Its attribute `ticket` can be saved or installed in another model.

    Raises:
        TypeError: If `model` was not returned by `get_peft_model` for an `SFAConfig`, or an argument has a wrong type.
        ValueError: If an argument is not valid, the adapter has no internal targets, or it has been trained already.
        TicketSearchError: If the data gives no batch or no loss, a loss is not finite, or nothing can be chosen.
    """
    tuner, adapter_name = searchable(model, adapter_name)
    rule = as_criterion(criterion)
    steps, rounds = _whole("steps", steps, 1), _whole("rounds", rounds, 1)
    checkpoint_every, seed = _whole("checkpoint_every", checkpoint_every, 1), _whole("seed", seed)
    if not isinstance(rewind, bool):
        raise TypeError(f"rewind={rewind!r} must be True or False.")
    learning_rate = _rate("learning_rate", learning_rate)
    adapter_learning_rate = _rate("adapter_learning_rate", adapter_learning_rate, may_be_0=True)
    if not (quotas is None or isinstance(quotas, Quotas)):
        raise TypeError(f"quotas={quotas!r} must be an sfa_peft.Quotas, such as Quotas(per='layer', cap=0.5).")
    if not (dataloader is None or isinstance(dataloader, Iterable)):
        raise TypeError(f"dataloader={dataloader!r} must give batches: a DataLoader, or a list of batches.")
    if checkpoint is not None and Path(checkpoint).is_dir():
        raise ValueError(f"checkpoint={str(checkpoint)!r} is a folder; give the path of a file.")
    if optimizer_state not in STATES:
        raise ValueError(f"optimizer_state={optimizer_state!r} is not known; choose one of {STATES}.")
    if rounds > 1 and not rule.trains:
        raise ValueError(
            f"rounds={rounds}: {rule.name!r} does not train the candidates, so every round would be the same; use 1."
        )
    config = tuner.peft_config[adapter_name]
    places_externals = config.external_placement == "auto"
    if places_externals and not adapter_learning_rate:
        raise ValueError("adapter_learning_rate=0, but external_placement='auto' chooses among trained adapters.")
    candidates = tuner.candidates(adapter_name)
    shared = tuner.shared_parameters()
    for module, parameters in candidates.items():
        for p in parameters.values():
            if p.is_meta and is_quantized(base_layer_of(tuner.model.get_submodule(module))):
                raise ValueError(
                    f"{module!r} is quantized, and its weight cannot be trained or scored: search on the base model "
                    f"before quantization, and install the ticket in this model with install_ticket."
                )
            if p.is_meta:
                raise ValueError(
                    f"{module!r} has no values here (meta device, or offloaded by Accelerate): search on a model that "
                    f"has all its weights."
                )
            if id(p) in shared and (rule.trains or rule.needs_data):
                raise ValueError(
                    f"{' and '.join(map(repr, shared[id(p)]))} are one shared parameter, and the criterion "
                    f"{rule.name!r} cannot score them separately; exclude it, or use a data-free criterion."
                )
    if rounds > 1 and not candidates:
        raise ValueError(f"rounds={rounds}, but adapter {adapter_name!r} has no internal targets to choose from.")
    needs_data = rule.needs_data or places_externals
    if needs_data and dataloader is None:
        raise ValueError(
            f"dataloader=None, but the criterion {rule.name!r} or the placement needs data; pass batches."
        )

    data = dataloader if needs_data else None
    # Not a new Accelerator, which would fix the precision for the whole process before the user chooses one.
    state = accelerator.state if accelerator is not None else PartialState()
    autocast = nullcontext if accelerator is None or accelerator.mixed_precision == "fp16" else accelerator.autocast
    several = state.num_processes > 1
    device = state.device
    if accelerator is None and not several:  # a model that the user has moved to a GPU stays there
        device = next((p.device for p in model.parameters() if p.device.type != "cpu"), device)
    model.to(device)
    size = tuner.ticket_size(adapter_name)
    if places_externals:  # the ticket's part of the budget is known at the end
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
    with Rollback(tuner) as rollback:
        with seeded(seed, device):
            _begin_search(tuner, adapter_name, rollback)
            placement = Placement.with_probes(tuner, adapter_name) if places_externals else None
            modules_beside = _trained_beside(model, adapter_name)
            beside = [p for module in modules_beside for p in module.parameters()]
            for p in (*(p for named in selector.candidates.values() for p in named.values()), *beside):
                p.requires_grad_(True)
            if several:
                for p in beside:  # heads and external adapters may have other initial values on each process
                    p.data.copy_(broadcast(p.data))
            probed = placement.statistics() if placement else {}
            others = [Slot(f"beside.{i}", p, adapter_learning_rate, probed.get(p, ())) for i, p in enumerate(beside)]
            training = DenseTraining([*selector.make_slots(learning_rate), *others], optimizer_state, seed)
            rollback.also(training.release)
            rollback.also(training.undo)
            places = [name for name, layer in sfa_layers(tuner.model) if layer.externals_of(adapter_name)]
            names = dict.fromkeys((*candidates, *places))
            calls = Calls({name: tuner.model.get_submodule(name) for name in names})
            rollback.also(calls.remove)
            run = Run(model, training, state, device, autocast, loss_fn or default_loss, seed, calls)
            if data is not None:
                if checkpoint is not None:
                    settings = _settings(config) | {
                        "criterion": rule.name,
                        "steps": steps,
                        "rounds": rounds,
                        "quotas": repr(quotas),
                        "learning_rate": learning_rate,
                        "adapter_learning_rate": adapter_learning_rate,
                        "optimizer_state": optimizer_state,
                        "seed": seed,
                        "model": training.fingerprint(),
                    }
                    run.resume(SearchCheckpoint(Path(checkpoint), settings))
                batches = endless(prepared(data, device), steps * rounds)
                run.run_steps(batches, steps, rounds, selector, checkpoint_every, progress)
                if rule.needs_data and selector.slots and not training.has_evidence():
                    raise TicketSearchError(
                        f"the criterion {rule.name!r} saw no change and no gradient in any candidate, so the loss "
                        f"does not depend on the backbone; check `loss_fn` and the model."
                    )
            chosen = None
            with choosing():
                never = calls.never(device) if needs_data else []
                selector.leave_out(never)
                _warn_of_idle([name for name in places if name in never])
                if placement:
                    placement.score(training, rewind, broadcast if several else None, never)
                    chosen = placement.select(tuner.external_allowance(adapter_name))
                    left = tuner.budget(adapter_name) - chosen.cost
                    positions = selector.choose(training, min(left, selector.total))
                else:
                    positions = selector.choose(training, selector.size)
            changes = {} if rewind else selector.changes(positions)
            # Without the probes, which are removed after the search; `chosen` has their values.
            stay = [slot for slot in others if slot.parameter not in probed]
            begin: list[tuple[Tensor, Tensor]]
            if rewind:  # the rollback does, but for a resumed search, which began with other values
                begin = [(slot.parameter, slot.start) for slot in stay if slot.start is not None]
            else:
                begin = [(slot.parameter, slot.value.to("cpu", copy=True)) for slot in stay]
                buffers = [b for module in modules_beside for b in module.buffers()]
                begin += [(b, (broadcast(b) if several else b).to("cpu", copy=True)) for b in buffers]
        rollback.restore()
        with seeded(seed, device):
            tuner.install(adapter_name, positions, chosen.externals if chosen else None)
        _begin(tuner, adapter_name, chosen, changes, begin)
        warn_of_replaced(replaced, tuner.parameters_of(adapter_name), adapter_name)
    if run.checkpoint is not None and state.is_main_process:
        run.checkpoint.remove()
    widths = copy.deepcopy(config.external_widths)
    found = Ticket(positions, shapes_of(candidates), config.granularity, widths, rule.name)
    return TicketReport(found, len(run.losses), tuple(run.losses))


def _warn_of_idle(places: Sequence[str]) -> None:
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
    changes: Mapping[str, Tensor],
    beside: Iterable[tuple[Tensor, Tensor]],
) -> None:
    """Set the values that the training begins with: of a placement, of the ticket, and of what is beside it."""
    if chosen:
        chosen.begin(tuner, adapter_name)
    layers = dict(sfa_layers(tuner.model))
    with torch.no_grad():
        for name, values in changes.items():
            module, _, parameter = name.rpartition(".")
            layers[module].sfa_internal[adapter_name].values(parameter).copy_(values)
        for p, value in beside:
            p.copy_(value)


def _whole(name: str, value: int, least: int | None = None) -> int:
    is_whole = isinstance(value, Integral) and not isinstance(value, bool)
    if not is_whole or (least is not None and value < least):
        raise ValueError(f"{name}={value!r} must be an int{'' if least is None else f' of at least {least}'}.")
    return int(value)


def _rate(name: str, value: float, may_be_0: bool = False) -> float:
    is_number = isinstance(value, Real) and math.isfinite(value)
    if not is_number or value < 0 or not (value or may_be_0):
        raise ValueError(f"{name}={value!r} must be a finite number {'of at least' if may_be_0 else 'above'} 0.")
    return float(value)


# Fields that do not affect a search.
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
    """The config fields that affect a search, with values that do not change in JSON."""
    fields = {name: value for name, value in config.to_dict().items() if name not in OTHER_FIELDS}
    return {
        name: sorted(value) if isinstance(value, set) else list(value) if isinstance(value, tuple) else value
        for name, value in fields.items()
    }


def _trained_beside(model: nn.Module, adapter_name: str) -> list[nn.Module]:
    """The adapter's external adapters and heads, which are trained beside the candidates."""
    found: list[nn.Module] = []
    for module in model.modules():
        if isinstance(module, SFALayer):
            found += [adapter for _, adapter in module.externals_of(adapter_name)]
        elif isinstance(module, ModulesToSaveWrapper) and adapter_name in module.modules_to_save:
            found.append(module.modules_to_save[adapter_name])
    return found


def _begin_search(tuner: SFAModel, adapter_name: str, rollback: Rollback) -> None:
    """Freeze all parameters for a search. Only this adapter is active, without its internal part.

    Args:
        tuner: The tuner.
        adapter_name: The adapter.
        rollback: It restores the state at the end, also the buffers, but not the values of trained parameters.
    """
    rollback.keep(tuner.model.buffers())
    tuner.set_adapter(adapter_name)
    for p in tuner.model.parameters():
        p.grad = None
        p.requires_grad_(False)
    for _, layer in sfa_layers(tuner.model):
        layer.searching = True
    tuner.model.train()


def _from_main_process(positions: Positions, device: torch.device) -> Positions:
    """The ticket of the main process, on all processes. Their scores may differ in the last bit."""
    shared: Positions = {}
    for module, named in positions.items():
        for name, chosen in named.items():
            length = broadcast(torch.tensor([len(chosen)], device=device))
            buffer = chosen.to(device)
            if len(buffer) != int(length):
                buffer = torch.zeros(int(length), dtype=chosen.dtype, device=device)
            shared.setdefault(module, {})[name] = broadcast(buffer).cpu()
    return shared

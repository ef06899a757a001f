"""The lottery-ticket search: train the candidates densely for a while, keep what moved most, rewind everything."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.data_loader import DataLoaderDispatcher, DataLoaderShard, prepare_data_loader
from accelerate.state import AcceleratorState
from accelerate.utils import broadcast, reduce, send_to_device
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from ..layer import SFALayer, sfa_layers
from . import criteria
from .report import Share, TicketReport
from .selection import Positions, choose

State = AcceleratorState | PartialState

CRITERIA = {"lottery": criteria.lottery}


class TicketSearchError(RuntimeError):
    """The search could not be finished. The model is as it was before it."""


def search_ticket(
    model: nn.Module,
    dataloader: Iterable[Any],
    *,
    steps: int = 200,
    criterion: str = "lottery",
    learning_rate: float = 5e-4,
    adapter_learning_rate: float = 1e-3,
    adapter_name: str | None = None,
    loss_fn: Callable[[nn.Module, Any], Tensor] | None = None,
    accelerator: Accelerator | None = None,
    seed: int = 0,
    progress: bool = True,
) -> TicketReport:
    """Find the ticket of an SFA adapter and install it.

    The candidate parameters (those of `target_modules`) are trained densely with AdamW beside the external adapters
    and the heads. Each position is scored by how far it moved, the exact global top k are kept, and every parameter,
    buffer, `requires_grad` flag and training mode is put back to where it was, bit for bit. Then the ticket's values,
    all zero, take the place of the old ones: **create the optimizer after the search**, and wrap the model for
    distributed training after it.

    With several processes, gradients are averaged over them, and all of them hold the ticket of the main process. The
    same model, data, seed and settings give the same ticket.

    Args:
        model: What `get_peft_model` returned.
        dataloader: Gives batches for `loss_fn`; begun again when it ends before `steps`. A `DataLoader` that
            Accelerate has not prepared is prepared here.
        steps: Training steps of the search, at least 1.
        criterion: ``lottery``: Ansell et al., 2022, see `sfa_peft.ticket.criteria`.
        learning_rate: Of the candidate parameters.
        adapter_learning_rate: Of the external adapters and the heads.
        adapter_name: The adapter to search for; the active one unless given.
        loss_fn: ``(model, batch) -> loss``; by default ``model(**batch).loss``.
        accelerator: Gives the precision to run in (with fp16 the search runs without autocast, since it has no
            gradient scaler). Unless given, no autocast. Processes and device are Accelerate's in both cases; the model
            is moved to the device.
        seed: Seeds the search's own random state; the global one is put back afterwards.
        progress: Whether to show a progress bar on the main process.

    Returns:
        Where the ticket went.

    Raises:
        TypeError: If `model` is not what `get_peft_model` returned for an `SFAConfig`.
        ValueError: If an argument is not valid, the adapter has no internal targets, or has been trained already.
        TicketSearchError: If the data gives no batch or no loss, or the loss is no longer finite.
    """
    tuner = _tuner_of(model)
    if adapter_name is None:
        active = tuner.active_adapters
        if len(active) != 1:
            raise ValueError(
                f"adapter_name: {len(active)} adapters are active ({active}); name the one to search for."
            )
        adapter_name = active[0]
    if adapter_name not in tuner.peft_config:
        raise ValueError(f"adapter_name={adapter_name!r} does not exist; the model has {sorted(tuner.peft_config)}.")
    if criterion not in CRITERIA:
        raise ValueError(f"criterion={criterion!r} is not known; choose one of {sorted(CRITERIA)}.")
    if not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps={steps!r} must be an int of at least 1.")
    for name, rate in (("learning_rate", learning_rate), ("adapter_learning_rate", adapter_learning_rate)):
        if not (math.isfinite(rate) and rate > 0):
            raise ValueError(f"{name}={rate!r} must be a finite number above 0.")
    candidates = tuner.candidates(adapter_name)
    size = tuner.ticket_size(adapter_name)
    if not candidates or not size:
        raise ValueError(
            f"adapter {adapter_name!r} has no internal adapters (external_share=1, target_modules=[] or a density of "
            f"0), so there is no ticket to search for."
        )
    for _, layer in sfa_layers(model):
        if layer.merged or layer.disable_adapters:
            state = "merged: unmerge_adapter()" if layer.merged else "disabled: leave disable_adapter()"
            raise ValueError(f"the model's adapters are {state} before the search.")
        if any(p.is_meta for p in layer.parameters_of(adapter_name)):
            raise ValueError(
                f"adapter {adapter_name!r} has no weights yet (low_cpu_mem_usage=True); make it without that option."
            )
        if adapter_name in layer.sfa_internal and any(p.any() for p in layer.sfa_internal[adapter_name].parameters()):
            raise ValueError(
                f"the internal values of adapter {adapter_name!r} are not zero any more; a new ticket would drop "
                f"them. Search before training, or for a new adapter."
            )

    # Not a new Accelerator: its precision would be fixed for the whole process, before the user says which.
    state = accelerator.state if accelerator is not None else PartialState()
    autocast = nullcontext if accelerator is None or accelerator.mixed_precision == "fp16" else accelerator.autocast
    loader = _prepared(dataloader, state)
    model.to(state.device)
    granularity = tuner.peft_config[adapter_name].internal_granularity
    dense = [p for own in candidates.values() for p in own.values()]
    others = _trained_beside(model, adapter_name)
    with _rewound(tuner, adapter_name, [*dense, *others]) as before, _seeded(seed, state.device):
        if state.num_processes > 1:
            for p in others:  # heads and external adapters may have been made with another seed on each rank
                p.data.copy_(broadcast(p.data))
        # In half precision a small step would be rounded away: the optimizer works on float32 copies there.
        trained = {p: p if p.dtype == torch.float32 else p.detach().float() for p in (*dense, *others)}
        groups = [(dense, learning_rate), (others, adapter_learning_rate)]
        optimizer = torch.optim.AdamW(
            [{"params": [trained[p] for p in params], "lr": rate} for params, rate in groups if params],
            weight_decay=0.0,
        )
        losses = _train(model, trained, optimizer, loader, steps, loss_fn or _default_loss, state, autocast, progress)
        if all(torch.equal(trained[p], before[id(p)].float()) for p in dense):
            raise TicketSearchError("no candidate was moved by training: the loss does not depend on the backbone.")
        score_of = CRITERIA[criterion]
        try:
            positions = choose(candidates, lambda _, p: score_of(before[id(p)], trained[p]), granularity, size)
        except ValueError as error:
            raise TicketSearchError(f"the search diverged: {error}. Lower `learning_rate`.") from error
        if state.num_processes > 1:
            positions = _from_main_process(positions, state.device)
    tuner.install_ticket(adapter_name, positions)

    def elements(p: Tensor, chosen: Tensor) -> int:
        return len(chosen) * (p[0].numel() if granularity == "row" else 1)

    shares = tuple(
        Share(f"{module}.{name}", elements(p, positions[module][name]), p.numel())
        for module, own in candidates.items()
        for name, p in own.items()
    )
    return TicketReport(shares, criterion, granularity, steps, tuple(losses))


def _tuner_of(model: nn.Module) -> Any:
    if hasattr(model, "module") and not hasattr(model, "install_ticket"):
        raise TypeError(
            f"search_ticket got a {type(model).__name__}: search before the model is wrapped for distributed training "
            f"(before `accelerator.prepare(model)`); the search averages gradients over processes itself."
        )
    tuner = model if hasattr(model, "install_ticket") else getattr(model, "base_model", None)
    if not hasattr(tuner, "install_ticket"):
        raise TypeError(
            f"search_ticket needs the model that get_peft_model(model, SFAConfig(...)) returns, got "
            f"{type(model).__name__}."
        )
    return tuner


def _prepared(dataloader: Iterable[Any], state: State) -> Iterable[Any]:
    ready = isinstance(dataloader, DataLoaderShard | DataLoaderDispatcher)
    if isinstance(dataloader, DataLoader) and not ready:
        # Not accelerator.prepare: the caller's accelerator should not remember a loader that it was not given.
        return prepare_data_loader(dataloader, state.device, put_on_device=True)
    return dataloader


def _trained_beside(model: nn.Module, adapter_name: str) -> list[nn.Parameter]:
    """The adapter's external adapters and heads, which are trained beside the candidates."""
    found: list[nn.Parameter] = []
    for module in model.modules():
        if isinstance(module, SFALayer):
            for adapters in (module.sfa_external, module.sfa_parallel):
                if adapter_name in adapters:
                    found += adapters[adapter_name].parameters()
        elif isinstance(module, ModulesToSaveWrapper) and adapter_name in module.modules_to_save:
            found += module.modules_to_save[adapter_name].parameters()
    return found


@contextmanager
def _rewound(tuner: Any, adapter_name: str, trained: list[nn.Parameter]) -> Iterator[dict[int, Tensor]]:
    """Open `trained` and nothing else for training, and put everything back at the end, whatever happens.

    The adapter is the one active meanwhile, without its internal part. Put back are the active adapters, the trained
    parameters, all buffers, gradients, `requires_grad` flags and training modes. Gives the copies of the trained
    parameters by their id.
    """
    model, active = tuner.model, tuner.active_adapter
    state = [(p, p.grad, p.requires_grad) for p in model.parameters()]
    modes = [(module, module.training) for module in model.modules()]
    copies = [(t, t.detach().clone()) for t in (*trained, *model.buffers())]
    try:
        tuner.set_adapter(adapter_name)
        for p, _, _ in state:
            p.grad = None
            p.requires_grad_(False)
        for p in trained:
            p.requires_grad_(True)
        for _, layer in sfa_layers(model):
            layer.searching = True
        model.train()
        yield {id(tensor): copy for tensor, copy in copies}
    finally:
        tuner.set_adapter(active)
        with torch.no_grad():
            for tensor, copy in copies:
                tensor.copy_(copy)
        for p, grad, requires_grad in state:
            p.grad = grad
            p.requires_grad_(requires_grad)
        for module, training in modes:
            module.training = training
        for _, layer in sfa_layers(model):
            layer.searching = False


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """A random state of the search's own, also for the order in which a DataLoader shuffles."""
    devices = [device] if device.type != "cpu" else []
    with torch.random.fork_rng(devices=devices, device_type=device.type if devices else "cuda"):
        torch.manual_seed(seed)
        yield


def _endless(loader: Iterable[Any], steps: int) -> Iterator[Any]:
    seen = 0
    while True:
        before = seen
        for batch in loader:
            seen += 1
            yield batch
        if seen == 0:
            raise TicketSearchError("dataloader gave no batch; is its dataset empty, or its drop_last set?")
        if seen == before:
            raise TicketSearchError(
                f"dataloader gave {seen} batches and cannot be begun again, but steps={steps}; pass a DataLoader or a "
                f"list, or lower `steps` to {seen}."
            )


def _default_loss(model: nn.Module, batch: Any) -> Tensor:
    if not isinstance(batch, Mapping):
        raise TicketSearchError(
            f"dataloader gave a batch of type {type(batch).__name__}; model(**batch) needs a dict. Pass `loss_fn` for "
            f"other batches."
        )
    loss = getattr(model(**batch), "loss", None)
    if loss is None:
        raise TicketSearchError(
            f"the model gave no loss for a batch with {sorted(batch)}; add the labels to the batches, or pass "
            f"`loss_fn`."
        )
    return loss


def _train(
    model: nn.Module,
    trained: dict[nn.Parameter, Tensor],
    optimizer: torch.optim.Optimizer,
    loader: Iterable[Any],
    steps: int,
    loss_fn: Callable[[nn.Module, Any], Tensor],
    state: State,
    autocast: Callable[[], AbstractContextManager[Any]],
    progress: bool,
) -> list[float]:
    """Train the model's parameters, the keys of `trained`; the optimizer works on its values."""
    losses: list[float] = []
    batches = _endless(loader, steps)
    bar = tqdm(range(steps), desc="ticket search", disable=not (progress and state.is_main_process))
    for step in bar:
        batch = send_to_device(next(batches), state.device)
        with autocast():
            loss = loss_fn(model, batch)
        if not (isinstance(loss, Tensor) and loss.numel() == 1 and loss.requires_grad):
            raise TicketSearchError("loss_fn must return a tensor of one element with a gradient.")
        mean = reduce(loss.detach().float(), reduction="mean").item()
        if not math.isfinite(mean):
            raise TicketSearchError(
                f"the loss was {mean} at step {step} of the search; the model is as it was before. Lower "
                f"`learning_rate`, or check the data."
            )
        loss.backward()
        for p, target in trained.items():
            grad = p.grad
            if state.num_processes > 1:
                grad = reduce(torch.zeros_like(p) if grad is None else grad, reduction="mean")
            p.grad = None
            target.grad = None if grad is None else grad.to(target.dtype)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            for p, target in trained.items():
                if p is not target:
                    p.copy_(target)
        losses.append(mean)
        bar.set_postfix(loss=f"{mean:.3f}")
    return losses


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

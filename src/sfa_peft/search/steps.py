"""The steps of a search: batches, losses, updates, and where it is."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

import torch
from accelerate.data_loader import DataLoaderDispatcher, DataLoaderShard, prepare_data_loader
from accelerate.utils import reduce, send_to_device
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from ..ticket.selection import NotFiniteError
from .progress import Progress, SearchCheckpoint
from .rounds import Rounds
from .training import DenseTraining


class State(Protocol):
    """What a search reads of Accelerate's `PartialState` or `AcceleratorState`; the library has no types."""

    num_processes: int
    is_main_process: bool
    device: torch.device


# Steps between two looks at the losses on an accelerator: each look waits for all that is queued there.
READ_EVERY = 10


class TicketSearchError(RuntimeError):
    """The search could not be finished. The model is as it was before it."""


class Calls:
    """Which modules of a model are called: an adapter acts where its module is called, and nowhere else.

    A model can read a module's weight and never call it, as timm's Swinv2 does with its ``qkv``.

    Args:
        modules: The modules, by name.
    """

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self.names = list(modules)
        self.called: set[str] = set()
        self.handles = [
            module.register_forward_hook(lambda module, args, output, name=name: self.called.add(name))
            for name, module in modules.items()
        ]

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()

    def state(self) -> Tensor:
        """One number for each module, 1 if it was called."""
        return torch.tensor([name in self.called for name in self.names], dtype=torch.int32)

    def load_state(self, state: Tensor) -> None:
        self.called |= {name for name, called in zip(self.names, state.tolist(), strict=True) if called}

    def never(self, device: torch.device) -> list[str]:
        """The modules that were called on no process."""
        called = reduce(self.state().to(device), reduction="sum").tolist()
        return [name for name, count in zip(self.names, called, strict=True) if not count]


class Run:
    """The steps of one search, and where it is.

    Attributes:
        losses: The loss of each step done, the mean over all processes.
        calls: Which modules with adapters, or that the ticket may choose from, the model calls.
        checkpoint: Where the progress is kept, if it is.
    """

    def __init__(
        self,
        model: nn.Module,
        training: DenseTraining,
        state: State,
        device: torch.device,
        autocast: Callable[[], AbstractContextManager[Any]],
        loss_fn: Callable[[nn.Module, Any], Tensor],
        seed: int,
        calls: Calls,
    ) -> None:
        self.model, self.training, self.state, self.device = model, training, state, device
        self.autocast, self.loss_fn, self.seed = autocast, loss_fn, seed
        self.calls = calls
        self.losses: list[float] = []
        self._unread: list[Tensor] = []
        # Processes must learn of each other's failures at once, or they wait for each other.
        self._read_every = READ_EVERY if device.type != "cpu" and state.num_processes == 1 else 1
        self.checkpoint: SearchCheckpoint | None = None

    def resume(self, checkpoint: SearchCheckpoint) -> None:
        """Go on from the progress in a file, if there is any, and keep later progress there."""
        self.checkpoint = checkpoint
        progress = checkpoint.load()
        if progress is None:
            return
        self.losses = progress.losses
        self.training.load_state_dict(progress.tensors)
        self.calls.load_state(progress.tensors["called"])
        with torch.no_grad():
            for name, buffer in self._buffers():
                buffer.copy_(progress.tensors[f"buffer:{name}"])

    def _buffers(self) -> list[tuple[str, Tensor]]:
        """All buffers but the positions of tickets, which play no part in a search."""
        return [(name, b) for name, b in self.model.named_buffers() if ".sfa_internal." not in name]

    def _save(self) -> None:
        if self.checkpoint is not None and self.state.is_main_process:
            buffers = {f"buffer:{name}": buffer for name, buffer in self._buffers()}
            self.checkpoint.save(
                Progress(self.losses, self.training.state_dict() | buffers | {"called": self.calls.state()})
            )

    def through(
        self,
        batches: Iterator[Any],
        steps: int,
        rounds: int,
        selector: Rounds,
        rewind_step: int,
        checkpoint_every: int,
        progress: bool,
    ) -> None:
        """All steps that are left of all rounds."""
        start, total = len(self.losses), steps * rounds
        for _ in range(start):
            next(batches)
        # Several processes average their gradients first, so they cannot use them inside backward.
        updating = self.training.inside_backward() if self.state.num_processes == 1 else nullcontext()
        with (
            updating,
            tqdm(
                range(start, total),
                initial=start,
                total=total,
                desc="ticket search",
                disable=not (progress and self.state.is_main_process),
            ) as bar,
        ):
            for step in bar:
                if step and step % steps == 0:
                    with choosing():
                        selector.leave_out(self.calls.never(self.device))
                        selector.end(step // steps, self.training)
                self._step(step, batches)
                is_due = (step + 1) % checkpoint_every == 0
                if is_due or (step + 1) % steps == 0 or len(self._unread) >= self._read_every:
                    self._read_losses()
                    bar.set_postfix(loss=f"{self.losses[-1]:.3f}")
                if step + 1 == rewind_step:
                    self.training.remember()
                if is_due:
                    self._save()

    def _step(self, step: int, batches: Iterator[Any]) -> None:
        several = self.state.num_processes > 1
        outcome: Tensor | Exception
        data_stream = torch.get_rng_state()
        try:
            batch = send_to_device(next(batches), self.device)
            # The model draws from a stream of its own for each step, so that the data's stream does not depend on it,
            # and a search that goes on from a file sees the same batches and drops out the same units.
            data_stream = torch.get_rng_state()
            torch.manual_seed((self.seed * 1_000_003 + step) % (1 << 63))
            with self.autocast():
                loss = self.loss_fn(self.model, batch)
            if not (isinstance(loss, Tensor) and loss.numel() == 1 and loss.requires_grad):
                raise TicketSearchError("loss_fn must return a tensor of one element with a gradient.")
            outcome = loss
        except Exception as error:
            if not several:
                raise
            outcome = error  # the other processes wait for this one's loss: they get a NaN
        if isinstance(outcome, Tensor):
            value = outcome.detach().float()
        else:
            value = torch.tensor(float("nan"), device=self.device)
        self._unread.append(reduce(value, reduction="mean"))
        if isinstance(outcome, Exception):
            raise outcome
        if several:  # before gradients are exchanged, which the one that failed takes no part in
            self._read_losses()
        outcome.backward()
        if several:
            for slot in self.training.slots:
                p = slot.parameter
                p.grad = reduce(torch.zeros_like(p) if p.grad is None else p.grad, reduction="mean")
                self.training.update(slot)
        torch.set_rng_state(data_stream)

    def _read_losses(self) -> None:
        """Take the losses of the last steps over from the device.

        Raises:
            TicketSearchError: If one is not finite.
        """
        losses = torch.stack(self._unread).tolist() if self._unread else []
        self._unread.clear()
        for loss in losses:
            if not math.isfinite(loss):
                where = " on a process" if self.state.num_processes > 1 else ""
                raise TicketSearchError(
                    f"the loss was {loss} at step {len(self.losses)} of the search{where}; the model is as it was "
                    f"before. Lower `learning_rate`, or check the data."
                )
            self.losses.append(loss)


@contextmanager
def choosing() -> Iterator[None]:
    """Say that the search has failed where nothing can be chosen."""
    try:
        yield
    except NotFiniteError as error:
        raise TicketSearchError(f"the search diverged: {error}. Lower `learning_rate`.") from error
    except ValueError as error:
        raise TicketSearchError(f"the search gave no ticket: {error}") from error


def prepared(dataloader: Iterable[Any], device: torch.device) -> Iterable[Any]:
    ready = isinstance(dataloader, DataLoaderShard | DataLoaderDispatcher)
    if isinstance(dataloader, DataLoader) and not ready:
        # Not accelerator.prepare: the caller's accelerator should not remember a loader that it was not given.
        dataloader = prepare_data_loader(dataloader, device, put_on_device=True)
    return dataloader


def endless(loader: Iterable[Any], steps: int) -> Iterator[Any]:
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


def default_loss(model: nn.Module, batch: Any) -> Tensor:
    if not isinstance(batch, Mapping):
        raise TicketSearchError(
            f"dataloader gave a batch of type {type(batch).__name__}; model(**batch) needs a dict. Pass `loss_fn` for "
            f"other batches."
        )
    loss: Tensor | None = getattr(model(**batch), "loss", None)
    if loss is None:
        raise TicketSearchError(
            f"the model gave no loss for a batch with {sorted(batch)}; add the labels to the batches, or pass "
            f"`loss_fn`."
        )
    return loss


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """A random state of the search's own, also for the order in which a DataLoader shuffles."""
    devices = [device] if device.type != "cpu" else []
    with torch.random.fork_rng(devices=devices, device_type=device.type if devices else "cuda"):
        torch.manual_seed(seed)
        yield

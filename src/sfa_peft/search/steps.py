"""The training steps of a search: batches, losses, updates and progress."""

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
    """The attributes that a search reads from Accelerate's `PartialState` or `AcceleratorState`, which are untyped."""

    num_processes: int
    is_main_process: bool
    device: torch.device


# Steps between two reads of the losses on an accelerator, since each read waits for all queued work.
READ_EVERY = 10


class TicketSearchError(RuntimeError):
    """A ticket search failed. The model has been restored to its state before the search."""


class Calls:
    """Records which modules a model calls, since an adapter only has an effect in a module that is called.

    A model can read a module's weight without a call, as timm's Swinv2 does with its ``qkv``.

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
        """An int32 tensor with 1 for each called module, otherwise 0."""
        return torch.tensor([name in self.called for name in self.names], dtype=torch.int32)

    def load_state(self, state: Tensor) -> None:
        self.called |= {name for name, called in zip(self.names, state.tolist(), strict=True) if called}

    def never(self, device: torch.device) -> list[str]:
        """The modules that no process has called."""
        called = reduce(self.state().to(device), reduction="sum").tolist()
        return [name for name, count in zip(self.names, called, strict=True) if not count]


class Run:
    """Runs the steps of a search.

    Attributes:
        losses: The loss of each completed step, averaged over all processes.
        calls: Records which adapted modules and candidates the model calls.
        checkpoint: The file for the progress, or None.
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
        # Several processes read at every step: without news of a failure they would wait for the failed process.
        self._read_every = READ_EVERY if device.type != "cpu" and state.num_processes == 1 else 1
        self.checkpoint: SearchCheckpoint | None = None

    def resume(self, checkpoint: SearchCheckpoint) -> None:
        """Resume from the progress in a file, if it exists, and save later progress there.

        Raises:
            CheckpointError: If the file is damaged.
        """
        self.checkpoint = checkpoint
        progress = checkpoint.load()
        if progress is None:
            return
        self.losses = progress.losses
        try:
            self.training.load_state_dict(progress.tensors)
            self.calls.load_state(progress.tensors["called"])
            with torch.no_grad():
                for name, buffer in self._buffers():
                    buffer.copy_(progress.tensors[f"buffer:{name}"])
        except (LookupError, TypeError, ValueError, RuntimeError) as error:
            raise checkpoint.damaged(f"{type(error).__name__}: {error}") from error

    def _buffers(self) -> list[tuple[str, Tensor]]:
        """All buffers except the positions of tickets, which a search does not use."""
        return [(name, b) for name, b in self.model.named_buffers() if ".sfa_internal." not in name]

    def _save(self) -> None:
        if self.checkpoint is not None and self.state.is_main_process:
            buffers = {f"buffer:{name}": buffer for name, buffer in self._buffers()}
            self.checkpoint.save(
                Progress(self.losses, self.training.state_dict() | buffers | {"called": self.calls.state()})
            )

    def run_steps(
        self,
        batches: Iterator[Any],
        steps: int,
        rounds: int,
        selector: Rounds,
        checkpoint_every: int,
        progress: bool,
    ) -> None:
        """Run all remaining steps of all rounds."""
        start, total = len(self.losses), steps * rounds
        for _ in range(start):
            next(batches)
        # Several processes average their gradients after backward, so they cannot update inside backward.
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
                if is_due:
                    self._save()

    def _step(self, step: int, batches: Iterator[Any]) -> None:
        several = self.state.num_processes > 1
        outcome: Tensor | Exception
        data_stream = torch.get_rng_state()
        try:
            batch = send_to_device(next(batches), self.device)
            # The model has a separate random stream for each step. So the random numbers of the data do not depend on
            # the model, and a resumed search sees the same batches and drops the same units.
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
            outcome = error  # the other processes wait for this loss, and get a NaN
        if isinstance(outcome, Tensor):
            value = outcome.detach().float()
        else:
            value = torch.tensor(float("nan"), device=self.device)
        self._unread.append(reduce(value, reduction="mean"))
        if isinstance(outcome, Exception):
            raise outcome
        if several:  # before the gradients are exchanged, in which a failed process does not take part
            self._read_losses()
        outcome.backward()
        if several:
            for slot in self.training.slots:
                p = slot.parameter
                p.grad = reduce(torch.zeros_like(p) if p.grad is None else p.grad, reduction="mean")
                self.training.update(slot)
        torch.set_rng_state(data_stream)

    def _read_losses(self) -> None:
        """Read the losses of the last steps from the device.

        Raises:
            TicketSearchError: If a loss is not finite.
        """
        losses = torch.stack(self._unread).tolist() if self._unread else []
        self._unread.clear()
        for loss in losses:
            if not math.isfinite(loss):
                where = " on a process" if self.state.num_processes > 1 else ""
                raise TicketSearchError(
                    f"the loss was {loss} at step {len(self.losses)} of the search{where}; the model has been "
                    f"restored. Lower `learning_rate`, or check the data."
                )
            self.losses.append(loss)


@contextmanager
def choosing() -> Iterator[None]:
    """Turn an error of the selection into a `TicketSearchError`."""
    try:
        yield
    except NotFiniteError as error:
        raise TicketSearchError(f"the search diverged: {error} Lower `learning_rate`.") from error
    except ValueError as error:
        raise TicketSearchError(f"the search gave no ticket: {error}") from error


def prepared(dataloader: Iterable[Any], device: torch.device) -> Iterable[Any]:
    ready = isinstance(dataloader, DataLoaderShard | DataLoaderDispatcher)
    if isinstance(dataloader, DataLoader) and not ready:
        # Not accelerator.prepare, which would register the loader with the caller's accelerator.
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
            raise TicketSearchError(
                "dataloader gave no batch: its dataset is empty, or smaller than a batch with drop_last=True."
            )
        if seen == before:
            raise TicketSearchError(
                f"dataloader gave {seen} batches and cannot be started again, but {steps} steps are needed; pass a "
                f"DataLoader or a list, or use at most {seen} steps."
            )


def default_loss(model: nn.Module, batch: Any) -> Tensor:
    if not isinstance(batch, Mapping):
        raise TicketSearchError(
            f"dataloader gave a batch of type {type(batch).__name__}, but model(**batch) needs a dict. Pass `loss_fn` "
            f"for other batches."
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
    """Use a separate random state in the search, also for the shuffling of a DataLoader, and restore it at the end."""
    devices = [device] if device.type != "cpu" else []
    with torch.random.fork_rng(devices=devices, device_type=device.type if devices else "cuda"):
        torch.manual_seed(seed)
        yield

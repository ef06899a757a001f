"""Checkpoints of a run that is under way: whole or not there, checked before they are read, and only data.

A checkpoint is a folder with tensors as safetensors and the rest as JSON, so that reading it runs no code.
Accelerate's `save_state` writes pickles, which may run code when they are read, and its `load_state` passes over
random states that are damaged.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from .errors import FlagError
from .folder import CHECKPOINTS, TICKET, checkpoints_in, sync, write_text

TRAINED = "trained.safetensors"
OPTIMIZER = "optimizer.safetensors"
STATE = "state.json"
RANDOM = "random_{}.json"  # of each process
DIGESTS = "digests.json"  # written last
NEEDED = (TRAINED, OPTIMIZER, STATE, RANDOM.format(0))
UNFINISHED = "unfinished_"
LEFTOVER = re.compile(f"{UNFINISHED}(old_)?(step_)?[0-9]+")


class DamagedCheckpointError(FlagError):
    """A checkpoint that is incomplete or damaged; the message names the file."""


@dataclass
class Progress:
    """Where a run is, and what it has measured; kept in its checkpoints.

    Attributes:
        step: Optimizer steps done.
        seconds: Spent training.
        recent: Losses since the last point of their curve.
        series: For each curve, its points (step, value).
        scores: For each evaluated step, the scores.
    """

    step: int = 0
    seconds: float = 0.0
    recent: list[Tensor | float] = field(default_factory=list)
    series: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    scores: dict[int, dict[str, Any]] = field(default_factory=dict)

    def add(self, name: str, value: float) -> None:
        self.series.setdefault(name, []).append((self.step, value))

    def take_recent(self) -> float:
        """The mean of the recent losses, which are forgotten."""
        mean = sum(map(float, self.recent)) / len(self.recent)
        self.recent.clear()
        return mean

    def state_dict(self) -> dict[str, Any]:
        """As JSON can hold it, with the names of steps for the steps."""
        return {**vars(self), "recent": [float(loss) for loss in self.recent]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step, self.seconds, self.recent = state["step"], state["seconds"], state["recent"]
        self.series = {name: [(step, value) for step, value in points] for name, points in state["series"].items()}
        self.scores = {int(step): scores for step, scores in state["scores"].items()}


@dataclass
class Training:
    """What training changes; a checkpoint holds all of it.

    Attributes:
        model: Its trained parameters, and its buffers.
        optimizer: Its moments and learning rates.
        schedule: Where it is.
        progress: What the run has measured.
    """

    model: nn.Module
    optimizer: Optimizer
    schedule: LRScheduler
    progress: Progress


class Checkpoints:
    """Writes, checks and finds the checkpoints of a run.

    Args:
        run: Where the run writes.
        accelerator: Says which process this is, and has the scale of float16 gradients.
        limit: How many to keep; 0 or None for all.
    """

    def __init__(self, run: Path, accelerator: Accelerator, limit: int | None) -> None:
        self.run, self.folder, self.accelerator, self.limit = run, run / CHECKPOINTS, accelerator, limit
        self.training: Training | None = None

    def find(self, wanted: str) -> Path | None:
        """The checkpoint to go on from.

        Args:
            wanted: ``latest``, or a checkpoint's folder.

        Returns:
            The folder; None if the latest is wanted and there is none yet. If the latest is damaged it is the one
            before, from which the run comes to the same end, and a warning.

        Raises:
            FileNotFoundError: If a certain one is wanted and is not there.
            FlagError: If that one is damaged, or all are.
        """
        if wanted == "latest":
            return self._latest()
        folder = Path(wanted)
        if not ((folder / TRAINED).is_file() or (folder / DIGESTS).is_file()):
            raise FileNotFoundError(f"--resume_from_checkpoint {wanted!r} is no checkpoint of a run; try `latest`")
        try:
            check(folder)
        except DamagedCheckpointError as error:
            others = ", ".join(other.name for other in checkpoints_in(folder.parent) if other != folder) or "none"
            raise FlagError(
                f"--resume_from_checkpoint: {error}; go on from another one (there is {others} beside it), or begin "
                f"anew"
            ) from error
        return folder

    def _latest(self) -> Path | None:
        damaged: list[str] = []
        for folder in reversed(checkpoints_in(self.folder)):
            try:
                check(folder)
            except DamagedCheckpointError as error:
                damaged.append(str(error))
                continue
            if damaged:
                self.accelerator.print(
                    f"warning: {'; '.join(damaged)}; the run goes on from the older {folder.name}, which is whole, "
                    f"and comes to the same end"
                )
            return folder
        if damaged:
            raise FlagError(
                f"--resume_from_checkpoint latest: {'; '.join(damaged)}; there is no other one, so begin anew with "
                f"--overwrite instead of --resume_from_checkpoint"
            )
        return None

    def save(self, step: int) -> None:
        """Write a checkpoint under another name first: a kill leaves it whole or not there."""
        target, unfinished = self.folder / f"step_{step}", self.folder / f"{UNFINISHED}{step}"
        is_main = self.accelerator.is_main_process
        if is_main:
            self._clean()
            unfinished.mkdir(parents=True)
        self.accelerator.wait_for_everyone()
        own = json.dumps(random_states(self.accelerator.device))
        write_text(unfinished / RANDOM.format(self.accelerator.process_index), own)
        if is_main:
            self._save_shared(unfinished)
        self.accelerator.wait_for_everyone()
        if is_main:
            write_text(unfinished / DIGESTS, json.dumps({p.name: digest(p) for p in sorted(unfinished.iterdir())}))
            self._retire([target] if target.exists() else [])
            unfinished.rename(target)
            sync(self.folder)
            # Never the one that was just written: those with a higher number may be damaged.
            others = [other for other in checkpoints_in(self.folder) if other != target]
            self._retire(others[: len(others) - (self.limit - 1)] if self.limit else [])
            self._clean()
        self.accelerator.wait_for_everyone()

    def _save_shared(self, folder: Path) -> None:
        """What all processes have alike."""
        training, scaler = self._training(), self.accelerator.scaler
        tensors, rates = optimizer_state(training.optimizer)
        save_file(_changing(self.accelerator.unwrap_model(training.model)), folder / TRAINED)
        save_file(tensors, folder / OPTIMIZER)
        if (self.run / TICKET).is_file():
            shutil.copy(self.run / TICKET, folder / TICKET)
        for name in (TRAINED, OPTIMIZER, TICKET):
            if (folder / name).is_file():
                sync(folder / name)
        state = {
            "processes": self.accelerator.num_processes,
            "progress": training.progress.state_dict(),
            "schedule": training.schedule.state_dict(),
            "rates": rates,
            "scaler": None if scaler is None else scaler.state_dict(),
        }
        write_text(folder / STATE, json.dumps(state))

    def load(self, folder: Path) -> None:
        """Put everything to where it was.

        Raises:
            FlagError: If the checkpoint is of another model, method or budget.
        """
        try:
            self._load(folder)
        except (LookupError, TypeError, ValueError, SafetensorError) as error:
            if isinstance(error, FlagError):
                raise
            raise FlagError(f"{folder} holds something else than a checkpoint of this version: {error!r}") from error

    def _load(self, folder: Path) -> None:
        training, scaler = self._training(), self.accelerator.scaler
        state = json.loads((folder / STATE).read_text(encoding="utf-8"))
        saved, own = load_file(folder / TRAINED), _changing(self.accelerator.unwrap_model(training.model))
        if saved.keys() != own.keys() or any(saved[name].shape != own[name].shape for name in own):
            raise FlagError(
                f"{folder} is a checkpoint of another model, method or budget; give the flags that the run was "
                f"started with"
            )
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(saved[name])
        load_optimizer_state(training.optimizer, load_file(folder / OPTIMIZER), state["rates"])
        training.schedule.load_state_dict(state["schedule"])
        training.progress.load_state_dict(state["progress"])
        if scaler is not None and state["scaler"]:
            scaler.load_state_dict(state["scaler"])
        if state["processes"] != self.accelerator.num_processes:
            self.accelerator.print(
                f"warning: the run had {state['processes']} processes and has {self.accelerator.num_processes} now: "
                f"it goes on with other batches and random numbers, and comes to another end"
            )
        path = folder / RANDOM.format(self.accelerator.process_index)
        if path.is_file():
            set_random_states(json.loads(path.read_text(encoding="utf-8")), self.accelerator.device)

    def _training(self) -> Training:
        assert self.training is not None, "`fit` says what is to be saved"
        return self.training

    def _retire(self, folders: list[Path]) -> None:
        # Renamed, then removed: a kill must not leave half a checkpoint under its name.
        for folder in folders:
            folder.rename(self.folder / f"{UNFINISHED}old_{folder.name}")

    def _clean(self) -> None:
        for path in self.folder.glob(f"{UNFINISHED}*"):
            if LEFTOVER.fullmatch(path.name) and path.is_dir():
                shutil.rmtree(path)


def check(folder: Path) -> None:
    """Check that a checkpoint is what was written.

    Raises:
        DamagedCheckpointError: If a file is missing, or is not as it was written.
    """
    try:
        digests = json.loads((folder / DIGESTS).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DamagedCheckpointError(f"{folder} is incomplete, or of an earlier version: no {DIGESTS}") from None
    except (ValueError, RecursionError) as error:
        raise DamagedCheckpointError(f"{folder / DIGESTS} is damaged ({error})") from error
    if not isinstance(digests, dict) or not digests.keys() >= set(NEEDED):
        raise DamagedCheckpointError(f"{folder / DIGESTS} is damaged (it does not name every file)")
    for name, expected in digests.items():
        path = folder / Path(name).name
        if not path.is_file():
            raise DamagedCheckpointError(f"{path} is missing")
        if digest(path) != expected:
            raise DamagedCheckpointError(f"{path} is damaged (it is not as it was written)")


def digest(path: Path) -> str:
    """The SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def optimizer_state(optimizer: Optimizer) -> tuple[dict[str, Tensor], list[float]]:
    """The tensors of an optimizer, by the number of the parameter and what they are; and the rates of its groups."""
    state = optimizer.state_dict()
    tensors = {f"{i}.{name}": tensor.contiguous() for i, own in state["state"].items() for name, tensor in own.items()}
    return tensors, [float(group["lr"]) for group in state["param_groups"]]


def load_optimizer_state(optimizer: Optimizer, tensors: dict[str, Tensor], rates: list[float]) -> None:
    """Put an optimizer to where it was; all that is not in its state is as the flags say.

    Raises:
        ValueError: If it is the state of another one.
    """
    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        i, name = key.split(".", 1)
        state.setdefault(int(i), {})[name] = tensor
    groups = optimizer.state_dict()["param_groups"]
    for group, rate in zip(groups, rates, strict=True):
        group["lr"] = rate
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def random_states(device: torch.device) -> dict[str, Any]:
    """The states of all random numbers that this process draws, as JSON can hold them."""
    version, words, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state()
    states = {
        "python": [version, words, gauss],
        "numpy": [kind, keys.tolist(), position, has_gauss, cached],
        "torch": _hex(torch.get_rng_state()),
    }
    if device.type != "cpu":
        states["device"] = _hex(torch.get_device_module(device).get_rng_state())
    return states


def set_random_states(states: dict[str, Any], device: torch.device) -> None:
    """Go on with the random numbers after those that `random_states` was called after."""
    version, words, gauss = states["python"]
    random.setstate((version, tuple(words), gauss))
    kind, keys, *rest = states["numpy"]
    np.random.set_state((kind, np.array(keys, np.uint32), *rest))
    torch.set_rng_state(_from_hex(states["torch"]))
    if device.type != "cpu" and "device" in states:
        torch.get_device_module(device).set_rng_state(_from_hex(states["device"]))


def _hex(state: Tensor) -> str:
    return state.numpy().tobytes().hex()


def _from_hex(state: str) -> Tensor:
    return torch.frombuffer(bytearray.fromhex(state), dtype=torch.uint8)


def _changing(model: nn.Module) -> dict[str, Tensor]:
    """What training changes: trained parameters, and buffers."""
    trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    return trained | dict(model.named_buffers())

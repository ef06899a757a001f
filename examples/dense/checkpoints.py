"""Checkpoints of a run that is under way: whole or not there, and only as large as what is trained."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .folder import CHECKPOINTS

TRAINED = "trained.safetensors"
UNFINISHED = "unfinished_"


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
        return {**vars(self), "recent": [float(loss) for loss in self.recent]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, name, value)


class Checkpoints:
    """Writes and finds the checkpoints of a run.

    A checkpoint is `Accelerator.save_state`'s, with the trained tensors and buffers in the place of the whole model.

    Args:
        folder: Where the run writes.
        accelerator: Has the optimizer, and the objects registered for checkpointing.
        limit: How many to keep; None for all.
    """

    def __init__(self, folder: Path, accelerator: Accelerator, limit: int | None) -> None:
        self.folder, self.accelerator, self.limit = folder / CHECKPOINTS, accelerator, limit
        accelerator.register_save_state_pre_hook(self._save_trained)
        accelerator.register_load_state_pre_hook(self._load_trained)

    def find(self, wanted: str) -> Path | None:
        """The checkpoint to go on from.

        Args:
            wanted: ``latest``, or a checkpoint's folder.

        Returns:
            The folder; None if the latest is wanted and there is none yet.

        Raises:
            FileNotFoundError: If a certain one is wanted and is not there.
        """
        if wanted == "latest":
            return max(self._whole(), key=_step_of, default=None)
        if not (Path(wanted) / TRAINED).is_file():
            raise FileNotFoundError(f"--resume_from_checkpoint {wanted!r} is no checkpoint of a run; try `latest`")
        return Path(wanted)

    def save(self, step: int) -> None:
        """Write a checkpoint under another name first: a kill leaves it whole or not there."""
        target, unfinished = self.folder / f"step_{step}", self.folder / f"{UNFINISHED}{step}"
        if self.accelerator.is_main_process:
            self._clean()
        self.accelerator.wait_for_everyone()
        self.accelerator.save_state(str(unfinished))
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            self._retire([target] if target.exists() else [])
            unfinished.rename(target)
            self._retire(sorted(self._whole(), key=_step_of)[: -self.limit] if self.limit else [])
            self._clean()
        self.accelerator.wait_for_everyone()

    def _retire(self, folders: list[Path]) -> None:
        # Renamed, then removed: a kill must not leave half a checkpoint under its name.
        for folder in folders:
            folder.rename(self.folder / f"{UNFINISHED}old_{folder.name}")

    def _clean(self) -> None:
        for folder in self.folder.glob(f"{UNFINISHED}*"):
            shutil.rmtree(folder)

    def load(self, checkpoint: Path) -> None:
        """Put everything that `accelerator` has prepared and registered to where it was."""
        self.accelerator.load_state(str(checkpoint))

    def _whole(self) -> Iterator[Path]:
        return self.folder.glob("step_*")

    def _save_trained(self, models: list[nn.Module], weights: list[Any], folder: str) -> None:
        if self.accelerator.is_main_process:
            (model,) = models
            save_file(_changing(self.accelerator.unwrap_model(model)), Path(folder) / TRAINED)
        weights.clear()  # Accelerate would save the frozen backbone as well

    def _load_trained(self, models: list[nn.Module], folder: str) -> None:
        model = self.accelerator.unwrap_model(models.pop())
        saved, own = load_file(Path(folder) / TRAINED), _changing(model)
        if saved.keys() != own.keys() or any(saved[name].shape != own[name].shape for name in own):
            raise ValueError(
                f"{folder!r} is a checkpoint of another model, method or budget; give the flags that the run was "
                f"started with"
            )
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(saved[name])


def _changing(model: nn.Module) -> dict[str, Tensor]:
    """What training changes: trained parameters, and buffers."""
    trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    return trained | dict(model.named_buffers())


def _step_of(folder: Path) -> int:
    return int(re.fullmatch(r"step_(\d+)", folder.name).group(1))

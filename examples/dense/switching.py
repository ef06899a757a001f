"""Several tasks on one backbone in memory: each run's adapter and head, switched at every question."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from peft.utils import ModulesToSaveWrapper
from PIL import Image
from torch import Tensor, nn

import sfa_peft  # noqa: F401 - importing registers SFA with PEFT

from .augmentation import finished, to_tensors
from .errors import FlagError
from .folder import MEASURED, RESULTS, read_json
from .inference import ADAPTER, read_task
from .methods import Dense
from .samples import Array, Sample
from .task import Task, predictions


@dataclass(frozen=True, eq=False)
class Trained:
    """What a run of an example has left: a task, and an SFA adapter for it.

    Attributes:
        folder: With the adapter in it.
        task: With the flags of the run.
        model: The Hub id or folder of the backbone, or of the dense checkpoint.
        results: The scores.
    """

    folder: Path
    task: Task
    model: str
    results: Mapping[str, Any]

    @classmethod
    def load(cls, folder: Path, tasks: Mapping[str, type[Task]]) -> Trained:
        """Read a run's folder.

        Args:
            folder: The run's output folder.
            tasks: The tasks that are known, by the names of their classes.

        Raises:
            FlagError: If it is none, damaged or not of SFA, or the run did not come to its end.
        """
        task, described = read_task(folder, tasks)
        remedy = "train it again with --overwrite, or leave it out"
        try:
            results = read_json(folder / RESULTS, MEASURED, remedy)
        except FileNotFoundError as error:
            raise FlagError(f"{folder} is not the folder of a finished run: {RESULTS} is missing") from error
        if not (folder / ADAPTER).is_file() or results["method"] not in ("sfa", "adaptformer"):
            raise FlagError(f"{folder} was trained with --method {results['method']}, and has no SFA adapter")
        for moment in ("before", "after"):
            if not isinstance(results[moment].get(task.headline, ""), float | int | None):
                raise FlagError(f"{folder / RESULTS} is damaged (it has no {task.headline!r} {moment}); {remedy}")
        return cls(folder, task, described["model"], results)


class Shared(nn.Module):
    """Stands in a task's model where its backbone was, and asks the one backbone, in the form that the task needs.

    Args:
        backbone: The backbone. It is no submodule here, so that it has one name, and each adapter is on it once.
        options: Fields of its config that this task's head depends on, as they are in the task's own backbone.
    """

    def __init__(self, backbone: nn.Module, options: Mapping[str, Any]) -> None:
        super().__init__()
        self._backbone = (backbone,)
        self.options, self.config = dict(options), backbone.config
        self.channels = backbone.channels

    def forward(self, pixel_values: Tensor, **kwargs: Any) -> Any:
        for name, value in self.options.items():
            setattr(self.config, name, value)
        return self._backbone[0](pixel_values, **kwargs)

    def forward_with_filtered_kwargs(self, pixel_values: Tensor, **kwargs: Any) -> Any:
        return self(pixel_values)


class MultiTask(nn.Module):
    """The models of several tasks around one backbone.

    Attributes:
        backbone: The one backbone.
        tasks: For each run, the task's model, without a backbone of its own.
        key_mappings: For each run, what PEFT needs to find an adapter's modules here.
    """

    def __init__(self, runs: Sequence[Trained], device: torch.device) -> None:
        super().__init__()
        models: list[Dense] = []
        for trained in runs:
            try:
                models.append(trained.task.build(trained.model, device))
            except FlagError as error:
                raise FlagError(f"the model that {trained.folder} was trained on cannot be loaded: {error}") from error
        backbones = [dense.model.get_submodule(dense.backbone) for dense in models]
        self.backbone = backbones[0]
        fields = {field for trained in runs for field in trained.task.backbone_options()}
        self.tasks, self.key_mappings = nn.ModuleList(), []
        for place, (dense, own) in enumerate(zip(models, backbones, strict=True)):
            options = {field: getattr(own.config, field) for field in fields if hasattr(own.config, field)}
            parent, _, child = dense.backbone.rpartition(".")
            setattr(dense.model.get_submodule(parent), child, Shared(self.backbone, options))
            self.tasks.append(dense.model)
            path = dense.backbone.replace(".", r"\.")
            self.key_mappings.append({rf"^{path}\.": "backbone.", "^": f"tasks.{place}."})


class Switchboard:
    """Answers several tasks for an image with one backbone in memory, by switching adapters.

    Args:
        runs: Trained on one and the same backbone.
        device: Where to answer.

    Raises:
        FlagError: If the runs were trained on several models.
    """

    def __init__(self, runs: Sequence[Trained], device: torch.device) -> None:
        self.device = device
        if len({trained.model for trained in runs}) > 1:
            on = ", ".join(f"{trained.folder} on {trained.model}" for trained in runs)
            raise FlagError(f"--runs: they share no backbone; train them with the same --model or --backbone: {on}")
        base = MultiTask(runs, device)
        # Not the folders' names: not every name of a folder can be one of an adapter, and two may have the same.
        self.adapters = {trained: f"run_{place}" for place, trained in enumerate(runs)}
        self.tasks = dict(zip(runs, base.tasks, strict=True))
        model: PeftModel | None = None
        for trained, adapter, mapping in zip(runs, self.adapters.values(), base.key_mappings, strict=True):
            try:
                if model is None:
                    model = PeftModel.from_pretrained(base, str(trained.folder), adapter, key_mapping=mapping)
                else:
                    model.load_adapter(str(trained.folder), adapter, key_mapping=mapping)
            except (OSError, ValueError) as error:
                raise FlagError(f"the adapter in {trained.folder} cannot be loaded: {error}") from error
        self.model = model
        self.model.to(device).eval()
        for module in self.model.modules():
            if isinstance(module, ModulesToSaveWrapper):
                module.original_module = nn.Identity()  # the head of before the training, which is not asked

    def predict(self, trained: Trained, image: Image.Image) -> Any:
        """A run's prediction for an image, at its own size."""
        task, sample = trained.task, Sample(image)
        self.model.set_adapter(self.adapters[trained])
        pixels = finished(to_tensors(sample, task.size))["image"][None].to(self.device)
        return predictions(task, self.tasks[trained], pixels, [sample])[0]

    def paint(self, trained: Trained, image: Image.Image) -> Array:
        """A picture (height, width, 3) of it."""
        return trained.task.paint(np.asarray(image), self.predict(trained, image))

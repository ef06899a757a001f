"""Several tasks on one backbone in memory: each run's adapter and head, switched at every question."""

from __future__ import annotations

import json
from argparse import Namespace
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
from .methods import Dense
from .run import RESULTS, RUN
from .samples import Array, Classes, FlagError, Sample
from .task import Task, predictions


@dataclass(frozen=True)
class Trained:
    """What a run of an example has left: a task, and an SFA adapter for it.

    Attributes:
        folder: With the adapter in it; its name is the adapter's.
        task: With the flags of the run.
        model: The Hub id or folder of the backbone, or of the dense checkpoint.
        results: The scores.
    """

    folder: Path
    task: Task
    model: str
    results: Mapping[str, Any]

    @property
    def name(self) -> str:
        return self.folder.name

    @classmethod
    def load(cls, folder: Path, tasks: Mapping[str, type[Task]]) -> Trained:
        """Read a run's folder.

        Args:
            folder: The run's output folder.
            tasks: The tasks that are known, by the names of their classes.

        Raises:
            FlagError: If it is none, or not of SFA, or the run did not come to its end.
        """
        try:
            described = json.loads((folder / RUN).read_text())
            results = json.loads((folder / RESULTS).read_text())
        except FileNotFoundError as error:
            missing = Path(error.filename).name
            raise FlagError(f"{folder} is not the folder of a finished run: {missing} is missing") from error
        if not (folder / "adapter_config.json").is_file() or results["method"] not in ("sfa", "adaptformer"):
            raise FlagError(f"{folder} was trained with --method {results['method']}, and has no SFA adapter")
        names = {int(i): name for i, name in described["id2label"].items()}
        task = tasks[described["task"]](Namespace(**described["args"]), Classes(names) if names else None)
        return cls(folder, task, described["model"], results)


class Shared(nn.Module):
    """Stands in a task's model where its backbone was, and asks the one backbone, in the form that the task needs.

    Args:
        backbone: The backbone. It is no submodule here, so that it has one name, and each adapter is on it once.
        options: Fields of its config that this task's head depends on.
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
        tasks: By the run's name, the task's model, without a backbone of its own.
        key_mappings: By the run's name, what PEFT needs to find an adapter's modules here.
    """

    def __init__(self, runs: Sequence[Trained], device: torch.device) -> None:
        super().__init__()
        models: list[Dense] = [trained.task.build(trained.model, device) for trained in runs]
        self.backbone = models[0].model.get_submodule(models[0].backbone)
        # What one head does not set, another may have changed.
        own = [trained.task.backbone_options() for trained in runs]
        defaults = {name: getattr(self.backbone.config, name) for options in own for name in options}
        self.tasks, self.key_mappings = nn.ModuleDict(), {}
        for trained, dense in zip(runs, models, strict=True):
            options = defaults | trained.task.backbone_options()
            parent, _, child = dense.backbone.rpartition(".")
            setattr(dense.model.get_submodule(parent), child, Shared(self.backbone, options))
            self.tasks[trained.name] = dense.model
            path = dense.backbone.replace(".", r"\.")
            self.key_mappings[trained.name] = {rf"^{path}\.": "backbone.", "^": f"tasks.{trained.name}."}


class Switchboard:
    """Answers several tasks for an image with one backbone in memory, by switching adapters.

    Args:
        runs: Trained on one and the same backbone.
        device: Where to answer.
        keeps_base: Keep the untrained heads as well, so that the base model can be asked.

    Raises:
        FlagError: If the runs were trained on several models, or two have one name.
    """

    def __init__(self, runs: Sequence[Trained], device: torch.device, keeps_base: bool = True) -> None:
        self.runs = {trained.name: trained for trained in runs}
        self.device = device
        if len(self.runs) < len(runs):
            raise FlagError(f"the folders of the runs must have different names: {[str(t.folder) for t in runs]}")
        models = sorted({trained.model for trained in runs})
        if len(models) > 1:
            raise FlagError(f"the runs were trained on several models, and share no backbone: {models}")
        base = MultiTask(runs, device)
        first, *others = runs
        self.model = PeftModel.from_pretrained(
            base, str(first.folder), first.name, key_mapping=base.key_mappings[first.name]
        )
        for trained in others:
            self.model.load_adapter(str(trained.folder), trained.name, key_mapping=base.key_mappings[trained.name])
        self.model.to(device).eval()
        if not keeps_base:
            for module in self.model.modules():
                if isinstance(module, ModulesToSaveWrapper):
                    module.original_module = nn.Identity()

    def predict(self, name: str, image: Image.Image, adapted: bool = True) -> Any:
        """One task's prediction for an image, at its own size; with `adapted` False the base model's."""
        task, sample = self.runs[name].task, Sample(image)
        self.model.set_adapter(name)
        pixels = finished(to_tensors(sample, task.size))["image"][None].to(self.device)
        model = self.model.get_base_model().tasks[name]
        if adapted:
            return predictions(task, model, pixels, [sample])[0]
        with self.model.disable_adapter():
            return predictions(task, model, pixels, [sample])[0]

    def paint(self, name: str, image: Image.Image, adapted: bool = True) -> Array:
        """A picture (height, width, 3) of it."""
        return self.runs[name].task.paint(np.asarray(image), self.predict(name, image, adapted))

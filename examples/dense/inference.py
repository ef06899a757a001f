"""A run's model as it was trained, by whatever method, and its predictions for images of any size."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError
from peft import PeftConfig, PeftModel
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

import sfa_peft  # noqa: F401 - importing registers SFA with PEFT

from .arguments import parse
from .augmentation import finished, to_tensors
from .errors import FlagError
from .folder import DESCRIBED, RUN, read_json
from .methods import Dense, is_head
from .samples import Classes, Sample
from .task import Task, predictions
from .windows import Box, places

ADAPTER, HEAD, WHOLE = "adapter_config.json", "head.safetensors", "model.safetensors"
MUCH_LARGER = 1.5  # from this factor on, an image is cut into windows


def folder_of(run: str) -> Path:
    """A run's folder, or what an example has pushed to the Hub, downloaded.

    Raises:
        FlagError: If it is neither.
    """
    if Path(run).is_dir():
        return Path(run)
    try:
        return Path(snapshot_download(run, allow_patterns=[RUN, ADAPTER, "*.safetensors"]))
    except (RepositoryNotFoundError, HFValidationError, HfHubHTTPError, OSError) as error:
        told = str(error).strip().splitlines()[0]
        raise FlagError(f"--run {run} is neither a folder nor a repository on the Hub: {told}") from error


def read_task(folder: Path, tasks: Mapping[str, type[Task]]) -> tuple[Task, dict[str, Any]]:
    """The task of a run with its flags and classes, and what else its `run.json` tells.

    Raises:
        FlagError: If there is none, or it is damaged.
    """
    remedy = "train it again with --overwrite, or leave it out"
    try:
        described = read_json(folder / RUN, DESCRIBED, remedy)
    except FileNotFoundError as error:
        raise FlagError(
            f"{folder} is not the folder of a finished run: {RUN} is missing. The examples write it, and push it with "
            f"an adapter (--push_to_hub)"
        ) from error
    kind = tasks.get(described["task"])
    if kind is None:
        raise FlagError(f"{folder} is a run of {described['task']!r}, which is none of {', '.join(tasks)}")
    try:
        names = {int(i): str(name) for i, name in described["id2label"].items()}
    except ValueError as error:
        raise FlagError(f"{folder / RUN} is damaged (a class has no number: {error}); {remedy}") from error
    args = vars(parse(kind, [])) | described["args"]  # an earlier version may have had fewer flags
    return kind(Namespace(**args), Classes(names) if names else None), described


def load_model(folder: Path, task: Task, model: str, device: torch.device) -> nn.Module:
    """The model that a run has trained, in eval mode.

    Args:
        folder: With what the run has saved: an adapter, a head beside it or alone, or a whole model.
        task: Of the run.
        model: The Hub id or folder that the run began with.
        device: Where it is to be.

    Raises:
        FlagError: If something is missing, or does not fit.
    """
    dense = task.build(model, device)
    loaded = dense.model
    try:
        for name in (HEAD, WHOLE):
            if (folder / name).is_file():
                load_head(dense, folder / name, is_whole=name == WHOLE)
        if (folder / ADAPTER).is_file():
            adapter = PeftConfig.from_pretrained(str(folder))
            if not adapter.modules_to_save and not (folder / HEAD).is_file():
                raise FlagError(f"{folder} holds an adapter without a head ({ADAPTER}), and no {HEAD} beside it")
            loaded = PeftModel.from_pretrained(loaded, str(folder))
        elif not any((folder / name).is_file() for name in (HEAD, WHOLE)):
            raise FlagError(f"{folder} holds nothing that was trained: neither {ADAPTER} nor {HEAD} nor {WHOLE}")
    except FlagError:
        raise
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise FlagError(f"what was trained in {folder} cannot be loaded: {error}") from error
    return loaded.to(device).eval()


def load_head(dense: Dense, path: Path, is_whole: bool = False) -> None:
    """Give a model a head that was saved alone, or all of its weights.

    Raises:
        FlagError: If they do not fit.
    """
    try:
        found = dense.model.load_state_dict(load_file(path), strict=False)
    except (RuntimeError, SafetensorError) as error:
        raise FlagError(f"{path} cannot be loaded: {str(error).splitlines()[0]}") from error
    missing = [key for key in found.missing_keys if is_whole or is_head(key, dense.heads)]
    if found.unexpected_keys or missing:
        raise FlagError(f"{path} does not fit the model (first: {(found.unexpected_keys or missing)[0]})")


class Predictor:
    """Answers for images of any size.

    Args:
        task: With the flags of the run.
        model: Its model.
        device: Where it is.
        window: Height and width of the windows that larger images are cut into; None for never. A model has learned
            how large things are in its training images: a much larger image, made as small, shows them too small.
        batch_size: How many windows at a time.
    """

    def __init__(
        self, task: Task, model: nn.Module, device: torch.device, window: tuple[int, int] | None, batch_size: int = 4
    ) -> None:
        self.task, self.model, self.device, self.window, self.batch_size = task, model, device, window, batch_size

    def windows(self, image: Image.Image) -> list[Box]:
        """The windows of an image, as PIL's boxes; the whole image if it is not much larger than a window."""
        width, height = image.size
        if self.window is None or (height <= MUCH_LARGER * self.window[0] and width <= MUCH_LARGER * self.window[1]):
            return [(0, 0, width, height)]
        high, wide = min(self.window[0], height), min(self.window[1], width)
        return [(x, y, x + wide, y + high) for y in places(height, high) for x in places(width, wide)]

    def __call__(self, image: Image.Image) -> Any:
        """The prediction for an image, at its own size."""
        boxes, found = self.windows(image), []
        for first in range(0, len(boxes), self.batch_size):
            samples = [Sample(image.crop(box)) for box in boxes[first : first + self.batch_size]]
            pixels = torch.stack([finished(to_tensors(sample, self.task.size))["image"] for sample in samples])
            found += predictions(self.task, self.model, pixels.to(self.device), samples)
        return found[0] if len(boxes) == 1 else self.task.join(boxes, found, (image.height, image.width))

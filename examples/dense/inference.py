"""What was trained, of a run by whatever method or as an adapter that stands alone, and its predictions for images."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError
from peft import PeftConfig, PeftModel
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import BaseImageProcessor

from sfa_peft import load_dense

from .arguments import parse
from .errors import FlagError
from .folder import DESCRIBED, RUN, read_json
from .methods import Dense, is_head
from .samples import IGNORE_INDEX, Classes, Sample
from .scenes import make_scene
from .task import Task, predictions
from .windows import Box, places

ADAPTER, HEAD, WHOLE = "adapter_config.json", "head.safetensors", "model.safetensors"
BASE, PROCESSOR = "base_config.json", "preprocessor_config.json"
MUCH_LARGER = 1.5  # from this factor on, an image is cut into windows


@dataclass
class Loaded:
    """What was trained, ready to be asked.

    Attributes:
        name: The folder or repository, as it was given.
        folder: Where its files are.
        model: The model, in eval mode; a `PeftModel` where it has an adapter.
        task: What it answers; None if that is none of the examples' tasks.
        processor: Makes its input of an image; None if none was saved with it.
        window: Height and width that the training images had before they were resized; None if that is not known.
        told: What a person should know, each a sentence.
    """

    name: str
    folder: Path
    model: nn.Module
    task: Task | None
    processor: BaseImageProcessor | None
    window: tuple[int, int] | None = None
    told: list[str] = field(default_factory=list)

    def asked(self) -> tuple[Task, BaseImageProcessor]:
        """The task and the image processor of a model that is to be asked.

        Raises:
            FlagError: If its files do not say them.
        """
        if self.task is None:
            base = self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model
            raise FlagError(f"{self.name} is an adapter for {type(base).__name__}, whose outputs no task here reads")
        if self.processor is None:
            raise FlagError(
                f"{self.name} has no {PROCESSOR}, so nothing says how its images are made: load it with load_dense, "
                f"call describe_adapter(model, processor=...), and save it again"
            )
        return self.task, self.processor


def load(name: str, tasks: Mapping[str, type[Task]], device: torch.device, base: str | None = None) -> Loaded:
    """Load what was trained: an adapter that stands alone by its files, all else by the `run.json` of its run.

    Args:
        name: A folder, or a repository on the Hub.
        tasks: The tasks that are known, by the names of their classes.
        device: Where the model is to be.
        base: The model that the training began with. None means the one that the files name.

    Raises:
        FlagError: If something is missing, damaged, or does not fit.
    """
    folder = folder_of(name)
    if (folder / ADAPTER).is_file() and not any((folder / file).is_file() for file in (BASE, RUN)):
        raise FlagError(
            f"{name} has neither {BASE} nor {RUN}, so nothing says which model the adapter is for. If it is one of "
            f"SFA, load it on its base with PeftModel.from_pretrained, and save it again with sfa_peft 0.2 or later"
        )
    run, window = None, None
    if (folder / RUN).is_file() or not (folder / BASE).is_file():
        run, described = read_task(folder, tasks)
        height, width = described.get("photo_size") or (0, 0)
        window = (int(height), int(width)) if height and width else None
        if not (folder / BASE).is_file():
            model = load_model(folder, run, base or described["model"], device)
            return Loaded(name, folder, model, run, run.processor(), window)
    try:
        dense = load_dense(str(folder), base=base)
    except (OSError, ValueError) as error:
        raise FlagError(f"the adapter in {name} cannot be loaded: {error}") from error
    processor = dense.processor or (run.processor() if run else None)
    loaded = Loaded(name, folder, dense.model.to(device), None, processor, window)
    loaded.task = task_for(loaded, dense.model.get_base_model(), dense.id2label, tasks, run)
    return loaded


def task_for(
    loaded: Loaded, base: nn.Module, id2label: Mapping[int, str], tasks: Mapping[str, type[Task]], run: Task | None
) -> Task | None:
    """The task that reads what a base model gives, with what the adapter's files say of it; None if there is none."""
    kind = next((task for task in tasks.values() if type(base).__name__.endswith(task.answers_for)), None)
    if kind is None:
        return None
    if len(id2label) > IGNORE_INDEX:
        raise FlagError(f"{loaded.name} has {len(id2label)} classes, and a mask takes {IGNORE_INDEX} at most")
    args = parse(kind, [])
    if loaded.processor is not None:
        args.image_size = tuple(pixels_of(loaded.processor, [make_scene(0)["image"]]).shape[-2:])
    if "max_depth" in args:
        said = getattr(base.config, "max_depth", None)
        if isinstance(said, int | float) and said > 0:
            args.max_depth = float(said)
        elif run is not None:
            args.max_depth = run.args.max_depth
        else:
            loaded.told.append(
                f"nothing in {loaded.name} says how far its depth reaches: colours and files end at "
                f"{args.max_depth:g} m"
            )
    return kind(args, Classes(id2label, of_model=True) if id2label else None)


def pixels_of(processor: BaseImageProcessor, images: Sequence[Image.Image]) -> Tensor:
    """Images of one size as a model takes them (batch, 3, height, width)."""
    # One at a time: together, some processors would pad them.
    return torch.cat([processor(image, return_tensors="pt")["pixel_values"] for image in images])


def folder_of(name: str) -> Path:
    """A folder, or what is in a repository on the Hub, downloaded.

    Raises:
        FlagError: If it is neither.
    """
    if Path(name).is_dir():
        return Path(name)
    try:
        return Path(snapshot_download(name, allow_patterns=[RUN, "*_config.json", "*.safetensors"]))
    except (RepositoryNotFoundError, HFValidationError, HfHubHTTPError, OSError) as error:
        told = str(error).strip().splitlines()[0]
        raise FlagError(f"{name} is neither a folder nor a repository on the Hub: {told}") from error


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
            f"{folder} is neither an adapter that stands alone nor the folder of a finished run: it has no "
            f"{BASE} and no {RUN}"
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
        loaded: The model.
        device: Where it is.
        window: Height and width of the windows that larger images are cut into; None for never. A model has learned
            how large things are in its training images: a much larger image, made as small, shows them too small.
        batch_size: How many windows at a time.

    Raises:
        FlagError: If nothing says how to ask the model.
    """

    def __init__(
        self, loaded: Loaded, device: torch.device, window: tuple[int, int] | None = None, batch_size: int = 4
    ) -> None:
        self.task, self.processor = loaded.asked()
        self.model, self.device, self.window, self.batch_size = loaded.model, device, window, batch_size

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
            parts = [image.crop(box) for box in boxes[first : first + self.batch_size]]
            pixels = pixels_of(self.processor, parts).to(self.device)
            found += predictions(self.task, self.model, pixels, [Sample(part) for part in parts])
        return found[0] if len(boxes) == 1 else self.task.join(boxes, found, (image.height, image.width))

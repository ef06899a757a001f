"""What a dense task is: the data it reads, its model, its loss, its metric and its picture."""

from __future__ import annotations

import argparse
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import BaseImageProcessor, PretrainedConfig

from .data import Rows, check_kinds, load_splits
from .errors import FlagError
from .methods import Dense, Rates
from .metrics import InMemoryMetric
from .models import heads_of, load_backbone, load_config, patch_multiple, use_fast_attention
from .samples import Array, Census, Classes, Note, Sample
from .windows import Box

NAMED = 6  # so many classes are named in a sentence


class Task(ABC):
    """A dense task. `training.run` does the rest, the same for all.

    Attributes:
        name: For people.
        columns: What each column that is needed is called by default.
        optional_columns: The same of columns that may be missing.
        headline: The score that a run is judged by, of those that the metric gives.
        backbone_path: Where the backbone is in the model.
        answers_for: Endings of the names of classes in transformers whose outputs `predict` reads.
        dense_config: The config class of whole checkpoints of the task; others are backbones, and get a fresh head.
        embedded_backbone: What the embedded backbone is, ``swin`` or ``dinov2``.
        defaults: Values of common flags, where the task's own are better.
        rates: Learning rates of methods, where the task's own are better.
        lower_is_better: Whether the headline is an error.
        score_words: What the headline is, in words.
        legend_is_scale: Whether the colours of the legend go over into each other.
        cuts_images: Whether a large image may be cut into windows; if so, `join` joins their predictions.
        args: The flags.
        classes: The classes; None if the task has none.
    """

    name: ClassVar[str]
    columns: ClassVar[Mapping[str, str]]
    optional_columns: ClassVar[Mapping[str, str]] = {}
    headline: ClassVar[str]
    backbone_path: ClassVar[str]
    answers_for: ClassVar[tuple[str, ...]]
    dense_config: ClassVar[type[PretrainedConfig]]
    embedded_backbone: ClassVar[str] = "swin"
    defaults: ClassVar[Mapping[str, Any]] = {}
    rates: ClassVar[Mapping[str, Rates]] = {}
    lower_is_better: ClassVar[bool] = False
    score_words: ClassVar[str]
    legend_is_scale: ClassVar[bool] = False
    cuts_images: ClassVar[bool] = True

    def __init__(self, args: argparse.Namespace, classes: Classes | None = None) -> None:
        self.args, self.classes = args, classes

    @classmethod
    @abstractmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        """Add the task's own flags."""

    @classmethod
    def load_classes(cls, args: argparse.Namespace, rows: Rows) -> Classes | None:
        """The classes of a dataset, for tasks that have any."""
        return None

    @classmethod
    def load(cls, args: argparse.Namespace) -> tuple[Self, Rows, Rows]:
        """The task with the classes of its dataset, and the rows for training and for validation.

        Raises:
            DataError: If the dataset cannot be used.
        """
        roles = {role: getattr(args, f"{role}_column") for role in {**cls.columns, **cls.optional_columns}}
        train, validation = load_splits(args, roles, cls.columns)
        for rows in (train, validation):
            check_kinds(args, rows, roles)
        return cls(args, cls.load_classes(args, train)), train, validation

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of what the model sees."""
        height, width = self.args.image_size
        return height, width

    @property
    def column(self) -> dict[str, str]:
        """What each column is called."""
        return {role: getattr(self.args, f"{role}_column") for role in {**self.columns, **self.optional_columns}}

    @property
    def id2label(self) -> dict[int, str]:
        return self.classes.id2label if self.classes else {}

    @property
    def labels(self) -> dict[str, Any]:
        """The classes as a transformers config takes them."""
        return {"id2label": self.id2label, "label2id": {name: i for i, name in self.id2label.items()}}

    def build(self, name_or_path: str, device: torch.device) -> Dense:
        """The model: a whole checkpoint with a head for these classes, or a backbone with a fresh one.

        Raises:
            FlagError: If the checkpoint is neither, or cannot work at this image size.
        """
        config = load_config(name_or_path)
        is_whole = isinstance(config, self.dense_config)
        try:
            if is_whole:
                model = self.load_whole(name_or_path)
            else:
                model = self.fresh(load_backbone(name_or_path, config, **self.backbone_options()))
        except (OSError, SafetensorError) as error:
            raise FlagError(f"--model {name_or_path!r}: its weights cannot be read: {error}") from error
        backbone = model.get_submodule(self.backbone_path)
        multiple = patch_multiple(backbone)
        if any(side % multiple for side in self.size):
            raise FlagError(f"--image_size {self.size[0]} {self.size[1]}: this model needs multiples of {multiple}")
        use_fast_attention(model, backbone, device)
        return Dense(model.to(device), self.backbone_path, heads_of(model, self.backbone_path))

    def backbone_options(self) -> dict[str, Any]:
        """Fields of the backbone's config that the head depends on."""
        return {"reshape_hidden_states": True}

    @abstractmethod
    def processor(self) -> BaseImageProcessor:
        """What makes the model's input of an image, for programs that have the adapter alone; see `normalised`."""

    @abstractmethod
    def load_whole(self, name_or_path: str) -> nn.Module:
        """A whole checkpoint, with fresh classifiers if its classes are others."""

    @abstractmethod
    def fresh(self, backbone: nn.Module) -> nn.Module:
        """A backbone with a fresh head."""

    @abstractmethod
    def read(self, row: Mapping[str, Any], note: Note) -> Sample:
        """Read a row; tell `note` what was left out of it.

        Raises:
            BadSampleError: If it cannot be used.
        """

    def counting(self, sample: Sample) -> float:
        """Of what is annotated in a sample, the part that counts."""
        return 1.0

    def doubts(self, census: Census) -> list[str]:
        """What makes it doubtful that a split's annotations are what the flags say, for people."""
        found = []
        if 2 * census.usable < census.rows:
            found.append(f"{census.rows - census.usable} of {census.rows} rows cannot be used")
        absent = [name for i, name in self.id2label.items() if not census.classes[i]]
        if absent and census.usable:
            names = ", ".join(absent[:NAMED]) + (", ..." if len(absent) > NAMED else "")
            found.append(
                f"of {len(self.id2label)} classes, {len(absent)} in none of the {census.usable} rows that were read "
                f"({names}): is --id2label that of this dataset?"
            )
        return found

    @abstractmethod
    def batch(self, tensors: Sequence[dict[str, Tensor]]) -> dict[str, Any]:
        """Samples for training as the model's arguments, and what else the loss needs."""

    def loss(self, model: nn.Module, batch: dict[str, Any]) -> Tensor:
        """The training loss; the model's own unless the task has another."""
        return model(**batch).loss

    @abstractmethod
    def predict(self, model: nn.Module, images: Tensor, sizes: Sequence[tuple[int, int]]) -> list[Any]:
        """Predictions for images (batch, 3, height, width), each at its own size, in the form of `truth`."""

    def join(self, boxes: Sequence[Box], found: Sequence[Any], size: tuple[int, int]) -> Any:
        """One prediction of the predictions for windows of an image (height, width)."""
        raise NotImplementedError(f"{self.name} does not cut images")

    @abstractmethod
    def truth(self, sample: Sample) -> Any:
        """What a prediction should be."""

    @abstractmethod
    def metric(self) -> InMemoryMetric:
        """The metric of predictions."""

    @abstractmethod
    def paint(self, image: Array, annotation: Any) -> Array:
        """A picture (height, width, 3) of a prediction or of the truth, over its image."""

    @abstractmethod
    def paint_errors(self, image: Array, truth: Any, found: Any) -> Array:
        """A picture (height, width, 3) of where a prediction is wrong."""

    def by_class(self, scores: Mapping[str, Any]) -> dict[str, Any]:
        """Scores with those that are one for each class as a dict from its name."""
        names = self.id2label.values()
        return {
            key: dict(zip(names, value, strict=True)) if isinstance(value, list) else value
            for key, value in scores.items()
        }

    def legend(self) -> dict[str, tuple[float, float, float]]:
        """The colours in the pictures."""
        return {}

    def error_legend(self) -> dict[str, tuple[float, float, float]]:
        """The colours in the pictures of errors."""
        return {}


@torch.no_grad()
def predictions(task: Task, model: nn.Module, images: Tensor, samples: Sequence[Sample]) -> list[Any]:
    """What a model predicts in eval mode; the mode is put back."""
    was_training = model.training
    model.eval()
    try:
        return task.predict(model, images, [sample.size for sample in samples])
    finally:
        model.train(was_training)

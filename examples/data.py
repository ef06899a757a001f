"""Loads segmentation datasets in the Hub's usual columns and turns them into batches."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from PIL import Image
from torch import Tensor

from models import IGNORE_INDEX
from scenes import CLASSES, make_scenes

IGNORED_NAMES = {"unlabelled", "unlabeled", "void", "ignore", "ignored"}
MEAN = np.array([0.485, 0.456, 0.406], dtype=np.float32)
STD = np.array([0.229, 0.224, 0.225], dtype=np.float32)


class Segmentation:
    """A dataset of images and label maps, resized once, and its classes.

    Attributes:
        train, validation: `datasets.Dataset`s with `image` and `label`, and `full_label` for validation.
        id2label: The classes that count, numbered from 0.
    """

    def __init__(
        self, splits: Mapping[str, datasets.Dataset], id2label: Mapping[int, str], size: tuple[int, int]
    ) -> None:
        kept = [i for i in sorted(id2label) if id2label[i].lower() not in IGNORED_NAMES]
        self.id2label = {new: id2label[old] for new, old in enumerate(kept)}
        self._table = np.full(256, IGNORE_INDEX, dtype=np.uint8)
        self._table[kept] = np.arange(len(kept))
        self.size = size
        self.train = self._resized(splits["train"], keep_full=False)
        self.validation = self._resized(splits["validation"], keep_full=True)

    def _resized(self, split: datasets.Dataset, keep_full: bool) -> datasets.Dataset:
        height, width = self.size

        def resize(example: dict[str, Any]) -> dict[str, Any]:
            label = Image.fromarray(self._table[np.asarray(example["label"].convert("L"))])
            resized = {
                "image": example["image"].convert("RGB").resize((width, height), Image.Resampling.BILINEAR),
                "label": label.resize((width, height), Image.Resampling.NEAREST),
            }
            return resized | ({"full_label": label} if keep_full else {})

        columns = ["image", "label", *(["full_label"] if keep_full else [])]
        return split.map(
            resize,
            remove_columns=[c for c in split.column_names if c not in columns],
            features=datasets.Features({c: datasets.Image() for c in columns}),
            desc="resizing",
        )

    def train_batch(self, examples: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Collate for training: random flips and crops with scale, drawn from torch's random state."""
        images, labels = zip(*(_augment(e["image"], e["label"]) for e in examples), strict=True)
        return {"pixel_values": _pixels(images), "labels": _labels(labels)}

    def eval_batch(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Collate for evaluation: no augmentation, and the labels at full size as a list."""
        full = [np.asarray(e["full_label"]) for e in examples]
        return {"pixel_values": _pixels([e["image"] for e in examples]), "full_labels": full}


def _augment(image: Image.Image, label: Image.Image) -> tuple[Image.Image, Image.Image]:
    flip, scale, left, top = torch.rand(4).tolist()
    if flip < 0.5:
        image, label = (i.transpose(Image.Transpose.FLIP_LEFT_RIGHT) for i in (image, label))
    kept = 1 - 0.4 * scale
    width, height = image.size
    x, y = left * (1 - kept) * width, top * (1 - kept) * height
    box = (x, y, x + kept * width, y + kept * height)
    return (
        image.resize(image.size, Image.Resampling.BILINEAR, box=box),
        label.resize(label.size, Image.Resampling.NEAREST, box=box),
    )


def _pixels(images: Any) -> Tensor:
    arrays = np.stack([(np.asarray(i, dtype=np.float32) / 255 - MEAN) / STD for i in images])
    return torch.from_numpy(arrays).permute(0, 3, 1, 2).contiguous()


def _labels(labels: Any) -> Tensor:
    return torch.from_numpy(np.stack([np.asarray(label) for label in labels])).long()


def load_segmentation(name: str | None, size: tuple[int, int], seed: int = 0) -> Segmentation:
    """Load a dataset with the columns `image` and `label` and the splits `train` and `validation`.

    Args:
        name: A Hub id, a folder of parquet files, or None for the embedded scenes.
        size: Height and width that images and label maps are resized to.
        seed: Of the embedded scenes.

    Raises:
        ValueError: If a split, a column or the class names are missing; says which.
    """
    if name is None:
        splits = {
            "train": make_scenes(400, seed=2 * seed, style="day"),
            "validation": make_scenes(80, seed=2 * seed + 1, style="day"),
        }
        return Segmentation(splits, dict(enumerate(CLASSES)), size)
    splits = datasets.load_dataset(name)
    missing = {"train", "validation"} - splits.keys()
    if missing:
        raise ValueError(f"dataset {name!r} has no split {sorted(missing)[0]!r}; it has {sorted(splits)}")
    for split in splits.values():
        for column in ("image", "label"):
            if column not in split.column_names:
                raise ValueError(f"dataset {name!r} has no column {column!r}; it has {split.column_names}")
    return Segmentation(splits, load_id2label(name), size)


def load_id2label(name: str) -> dict[int, str]:
    """Read `id2label.json` from the dataset's folder or Hub repository."""
    path = Path(name) / "id2label.json"
    if not path.exists() and not Path(name).is_dir():
        with suppress(EntryNotFoundError):
            path = Path(hf_hub_download(name, "id2label.json", repo_type="dataset"))
    if not path.exists():
        raise ValueError(f'dataset {name!r} has no id2label.json, which names its classes: {{"0": "sky", ...}}')
    return {int(i): label for i, label in json.loads(path.read_text()).items()}

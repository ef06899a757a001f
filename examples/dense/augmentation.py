"""From samples to tensors of one size, and random changes of image, masks, boxes and depth together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .samples import Array, Sample, boxes_of

MEAN = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
STD = torch.tensor([0.229, 0.224, 0.225])[:, None, None]
CROP = (0.36, 1.0)  # the part of the image that a crop keeps
COLOUR = (0.8, 1.2)
LEAST_VISIBLE = 0.1  # an object of which less than this part is left by a crop is gone

Tensors = dict[str, Tensor]


def to_tensors(sample: Sample, size: tuple[int, int]) -> Tensors:
    """A sample resized to a height and width, whatever its own proportions.

    Returns:
        `image` (3, height, width) in [0, 1]; and what the sample has of `label` (1, height, width), `depth`
        (1, height, width), `masks` (n, height, width), `boxes` (n, 4) and `classes` (n,), without crowds.
    """
    height, width = size
    image = sample.image.resize((width, height), Image.Resampling.BILINEAR)
    tensors = {"image": torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).float() / 255}
    if sample.label is not None:
        tensors["label"] = torch.from_numpy(_nearest(sample.label, size))[None].float()
    if sample.depth is not None:
        tensors["depth"] = torch.from_numpy(_nearest(sample.depth, size))[None]
    if sample.classes is not None:
        single = ~sample.crowd if sample.crowd is not None else np.ones(len(sample.classes), bool)
        tensors["classes"] = torch.from_numpy(sample.classes[single])
        if sample.masks is not None:
            tensors["masks"] = torch.from_numpy(_nearest(sample.masks[single], size)).float()
        else:
            scale = np.array([width / sample.size[1], height / sample.size[0]] * 2, np.float32)
            tensors["boxes"] = torch.from_numpy(sample.boxes[single] * scale)
    return tensors


def _nearest(array: Array, size: tuple[int, int]) -> Array:
    rows, columns = (
        ((np.arange(new) + 0.5) * old / new).astype(np.int64) for new, old in zip(size, array.shape[-2:], strict=True)
    )
    return array[..., rows[:, None], columns]


class Augmentation:
    """Random crops with zoom, flips, brightness, contrast and saturation, the same for the same seed.

    Depth is divided by the zoom: a camera that shows things larger has them nearer (Eigen et al., 2014).

    Args:
        size: Height and width of the tensors.
    """

    def __init__(self, size: tuple[int, int]) -> None:
        import kornia.augmentation as K

        self.size = size
        ratio = size[1] / size[0]
        self.changes = [
            K.RandomResizedCrop(size, scale=CROP, ratio=(ratio, ratio)),
            K.RandomHorizontalFlip(),
            K.RandomBrightness(COLOUR),
            K.RandomContrast(COLOUR),
            K.RandomSaturation(COLOUR),
        ]
        self._sequential = K.AugmentationSequential
        self._of_kinds: dict[tuple[str, ...], Any] = {}

    def __call__(self, tensors: Tensors, seed: Sequence[int]) -> Tensors:
        """Change what `to_tensors` made; objects that are cropped away are left out."""
        kinds = {"image": "input", "label": "mask", "depth": "mask", "masks": "mask", "boxes": "bbox_xyxy"}
        names = [n for n in kinds if n in tensors and (n not in ("masks", "boxes") or len(tensors[n]))]
        change = self._change(tuple(kinds[n] for n in names))
        with torch.random.fork_rng(devices=[]):
            # Not torch.manual_seed, which keeps a note for CUDA of each call.
            torch.default_generator.manual_seed(int(np.random.SeedSequence(seed).generate_state(1, np.uint64)[0] >> 1))
            changed = change(*(tensors[n][None] for n in names))
        changed = changed if isinstance(changed, list | tuple) else [changed]
        result = tensors | {name: value[0] for name, value in zip(names, changed, strict=True)}
        result["image"] = result["image"].clamp(0, 1)
        if "depth" in result:
            zoom = change.transform_matrix[0, :2, :2].det().abs().sqrt()
            result["depth"] = result["depth"] / zoom
        return self._visible(result)

    def _change(self, kinds: tuple[str, ...]) -> Any:
        if kinds not in self._of_kinds:
            self._of_kinds[kinds] = self._sequential(*self.changes, data_keys=list(kinds))
        return self._of_kinds[kinds]

    def _visible(self, changed: Tensors) -> Tensors:
        if "masks" in changed:
            kept = changed["masks"].flatten(1).any(1)
            return changed | {name: changed[name][kept] for name in ("masks", "classes")}
        if "boxes" in changed:
            height, width = self.size
            boxes = changed["boxes"]
            inside = boxes.clamp(min=0).minimum(torch.tensor([width, height, width, height], dtype=boxes.dtype))
            kept = (_areas(inside) > LEAST_VISIBLE * _areas(boxes)) & (inside[:, 2:] - inside[:, :2] > 1).all(1)
            return changed | {"boxes": inside[kept], "classes": changed["classes"][kept]}
        return changed


def _areas(boxes: Tensor) -> Tensor:
    return (boxes[:, 2:] - boxes[:, :2]).prod(1)


def normalised(size: tuple[int, int]) -> dict[str, Any]:
    """What an image processor of transformers needs to do with an image what `to_tensors` and `finished` do."""
    return {
        "size": {"height": size[0], "width": size[1]},
        "resample": Image.Resampling.BILINEAR,
        "do_normalize": True,
        "image_mean": MEAN.flatten().tolist(),
        "image_std": STD.flatten().tolist(),
    }


def finished(tensors: Tensors) -> Tensors:
    """The tensors as models take them: a normalised image, boolean masks with their boxes, integer labels."""
    result = tensors | {"image": (tensors["image"] - MEAN) / STD}
    if "label" in tensors:
        result["label"] = tensors["label"][0].round().long()
    if "depth" in tensors:
        result["depth"] = tensors["depth"][0]
    if "masks" in tensors:
        masks = tensors["masks"] > 0.5
        kept = masks.flatten(1).any(1)  # small things vanish when an image is made smaller
        result |= {"masks": masks[kept], "classes": tensors["classes"][kept]}
        result["boxes"] = torch.from_numpy(boxes_of(result["masks"].numpy()))
    return result

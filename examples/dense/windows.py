"""Large images in windows: where these lie, and how their predictions become one of the whole image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from pycocotools import mask as rle

from .samples import Array

Box = tuple[int, int, int, int]  # left, top, right, bottom, as PIL has it

OVERLAP = 0.25  # of two windows that lie beside each other
LEAST_SCORE = 0.05  # objects with a lower one are not worth being joined
SAME = 0.5  # two objects of a class that overlap by more are one


def places(length: int, window: int) -> list[int]:
    """Where windows begin along a side: evenly, the first and the last at its ends, and overlapping enough."""
    step = max(1, int(window * (1 - OVERLAP)))
    count = 1 + -(-(length - window) // step)
    return np.linspace(0, length - window, count).round().astype(int).tolist()


def join_maps(boxes: Sequence[Box], maps: Sequence[Array], size: tuple[int, int]) -> Array:
    """One map of the maps of windows: each pixel is of the window that it lies deepest in."""
    joined, depth = np.zeros(size, maps[0].dtype), np.zeros(size, np.int32)
    for (x1, y1, x2, y2), own in zip(boxes, maps, strict=True):
        # How far a pixel is from the nearest edge of the window; the edge of the image itself is none.
        across = np.minimum(_from(x1, x2, 0, left=True), _from(x1, x2, size[1], left=False))
        down = np.minimum(_from(y1, y2, 0, left=True), _from(y1, y2, size[0], left=False))
        inside = np.minimum(down[:, None], across[None])
        better = inside > depth[y1:y2, x1:x2]
        joined[y1:y2, x1:x2][better] = own[better]
        depth[y1:y2, x1:x2][better] = inside[better]
    return joined


def _from(begin: int, end: int, edge: int, left: bool) -> Array:
    """The distances of pixels from one end of a window; far, where that is the image's edge."""
    if edge == (begin if left else end):
        return np.full(end - begin, 1 << 30, np.int32)
    steps = np.arange(1, end - begin + 1, dtype=np.int32)
    return steps if left else steps[::-1]


def join_objects(boxes: Sequence[Box], found: Sequence[Mapping[str, Any]], size: tuple[int, int]) -> dict[str, Any]:
    """The objects of all windows, each once: of two of a class that are one, the surer.

    An object that is larger than the overlap of windows may stay cut in two.
    """
    objects: list[dict[str, Any]] = []
    for window, (box, own) in enumerate(zip(boxes, found, strict=True)):
        for i in np.flatnonzero(np.asarray(own["scores"]) >= LEAST_SCORE):
            one = {
                "window": window,
                "scores": own["scores"][i],
                "labels": own["labels"][i],
                "boxes": own["boxes"][i] + np.array([box[0], box[1]] * 2, np.float32),
            }
            if "masks" in own:
                whole = np.zeros(size, np.uint8, order="F")
                whole[box[1] : box[3], box[0] : box[2]] = rle.decode(own["masks"][i])
                one["masks"] = rle.encode(whole)
            objects.append(one)
    kept: list[dict[str, Any]] = []
    for one in sorted(objects, key=lambda one: -one["scores"]):
        others = [k for k in kept if k["labels"] == one["labels"] and k["window"] != one["window"]]
        if not others or max(_overlaps(one, others)) <= SAME:
            kept.append(one)
    joined = {
        "scores": np.array([one["scores"] for one in kept], np.float32),
        "labels": np.array([one["labels"] for one in kept], np.int64),
        "boxes": np.array([one["boxes"] for one in kept], np.float32).reshape(-1, 4),
    }
    return joined | {"masks": [one["masks"] for one in kept]} if "masks" in found[0] else joined


def _overlaps(one: Mapping[str, Any], others: Sequence[Mapping[str, Any]]) -> list[float]:
    """How much of an object lies in each of the others, which may be the whole of what this is a part of."""
    shapes = [other.get("masks", _xywh(other)) for other in others]
    own = [one.get("masks", _xywh(one))]
    # To pycocotools, what lies in a crowd is measured by its own area alone.
    shares = rle.iou(
        own if "masks" in one else np.array(own), shapes if "masks" in one else np.array(shapes), [1] * len(others)
    )
    return np.asarray(shares)[0].tolist()


def _xywh(one: Mapping[str, Any]) -> list[float]:
    x1, y1, x2, y2 = (float(v) for v in one["boxes"])
    return [x1, y1, x2 - x1, y2 - y1]

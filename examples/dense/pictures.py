"""Pictures that a person can judge a model by."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from PIL import Image, ImageDraw

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from pycocotools import mask as rle

from .samples import IGNORE_INDEX, Array

Colour = tuple[float, float, float]

OPACITY = 0.6
BEST = [0, 4, 2, 6, 8, 10, 12, 14, 16, 18, 1, 5, 3, 7, 9, 11]  # of the colour map, the most different first
SHOWN = 0.3  # objects with a lower score are left out of pictures
LARGEST_ERROR = 0.5  # of depth, relative; larger ones look the same
WRONG_PIXELS: dict[str, Colour] = {"wrong class": (0.86, 0.15, 0.15), "does not count": (0.1, 0.1, 0.1)}
WRONG_OBJECTS: dict[str, Colour] = {"found": (0.1, 0.65, 0.2), "missed": (0.9, 0.1, 0.1), "not there": (1.0, 0.6, 0.0)}
RELATIVE_ERRORS: dict[str, Colour] = {
    f"{part:.0%} off{' or more' if part == LARGEST_ERROR else ''}": tuple(
        map(float, plt.get_cmap("viridis")(part / LARGEST_ERROR)[:3])
    )
    for part in (0.0, 0.25, LARGEST_ERROR)
}
LEAST_SIDE = 320  # small images are enlarged for pictures, so that boxes and names can be read


def palette(count: int) -> list[Colour]:
    """Colours for so many classes, as red, green and blue in [0, 1]; they repeat after sixteen."""
    colours = plt.get_cmap("tab20")(np.linspace(0, 1, 20))[BEST, :3]
    return [tuple(map(float, colours[i % len(colours)])) for i in range(count)]


def paint_labels(image: Array, label: Array, colours: Sequence[Colour]) -> Array:
    """A map of classes over its image; what is ignored is dark."""
    table = np.zeros((256, 3), np.float32)
    table[: len(colours)] = np.array(colours) * 255
    shown = table[np.where(label == IGNORE_INDEX, 255, label)]
    return (OPACITY * shown + (1 - OPACITY) * image).astype(np.uint8)


def paint_objects(
    image: Array, objects: Mapping[str, Any], names: Mapping[int, str], colours: Sequence[Colour]
) -> Array:
    """Boxes over their image, with names and scores, and masks if there are any."""
    scores = np.asarray(objects.get("scores", np.ones(len(objects["labels"]))))
    order = [i for i in np.argsort(scores) if scores[i] >= SHOWN]
    scale = max(1, round(LEAST_SIDE / max(image.shape[:2])))
    picture = image.repeat(scale, 0).repeat(scale, 1).astype(np.float32)
    for i in order:
        if "masks" in objects:
            colour = np.array(colours[int(objects["labels"][i])]) * 255
            inside = rle.decode(objects["masks"][i]).astype(bool).repeat(scale, 0).repeat(scale, 1)
            picture[inside] = OPACITY * colour + (1 - OPACITY) * picture[inside]
    drawn = Image.fromarray(picture.astype(np.uint8))
    draw = ImageDraw.Draw(drawn)
    for i in order:
        label = int(objects["labels"][i])
        colour = tuple(int(255 * c) for c in colours[label])
        x1, y1, x2, y2 = (float(v) * scale for v in objects["boxes"][i])
        draw.rectangle((x1, y1, max(x2 - 1, x1), max(y2 - 1, y1)), outline=colour, width=2)
        text = names[label] + (f" {scores[i]:.2f}" if "scores" in objects else "")
        draw.text((x1 + 3, y1 + 1), text, fill=(255, 255, 255), stroke_width=1, stroke_fill=(0, 0, 0))
    return np.asarray(drawn)


def paint_wrong_pixels(image: Array, wrong: Array, ignored: Array) -> Array:
    """Where a map of classes is wrong, over its image in grey."""
    grey = np.repeat(image.mean(2, keepdims=True), 3, 2) * 0.7 + 70
    for where, name in ((wrong, "wrong class"), (ignored, "does not count")):
        grey[where] = 0.25 * grey[where] + 0.75 * 255 * np.array(WRONG_PIXELS[name])
    return grey.clip(0, 255).astype(np.uint8)


def paint_wrong_objects(image: Array, truth: Mapping[str, Any], found: Mapping[str, Any]) -> Array:
    """Boxes of objects that were found, missed, and found where there is none of their class."""
    sure = np.flatnonzero(np.asarray(found["scores"]) >= SHOWN)
    order = sure[np.argsort(-np.asarray(found["scores"])[sure])]
    left = dict(enumerate(np.asarray(truth["boxes"], float)))
    boxes: list[tuple[Array, str]] = []
    for i in order:
        own = np.asarray(found["boxes"][i], float)
        same = [k for k in left if truth["labels"][k] == found["labels"][i] and _iou(left[k], own) >= 0.5]
        if same:
            boxes.append((left.pop(max(same, key=lambda k: _iou(left[k], own))), "found"))
        else:
            boxes.append((own, "not there"))
    boxes += [(box, "missed") for box in left.values()]
    scale = max(1, round(LEAST_SIDE / max(image.shape[:2])))
    drawn = Image.fromarray(image.repeat(scale, 0).repeat(scale, 1))
    draw = ImageDraw.Draw(drawn)
    for box, name in boxes:
        x1, y1, x2, y2 = (float(v) * scale for v in box)
        colour = tuple(int(255 * c) for c in WRONG_OBJECTS[name])
        draw.rectangle((x1, y1, max(x2 - 1, x1), max(y2 - 1, y1)), outline=colour, width=3)
    return np.asarray(drawn)


def _iou(a: Array, b: Array) -> float:
    sides = np.clip(np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2]), 0, None)
    both = sides.prod()
    return float(both / max((a[2:] - a[:2]).prod() + (b[2:] - b[:2]).prod() - both, 1e-9))


def paint_relative_errors(truth: Array, found: Array, counts: Array) -> Array:
    """How far a depth map is from the truth, relative to that; black where it is unknown."""
    error = np.where(counts, np.abs(found - truth) / np.maximum(truth, 1e-9), 0)
    shown = plt.get_cmap("viridis")(np.clip(error / LARGEST_ERROR, 0, 1))[..., :3]
    return (np.where(counts[..., None], shown, 0) * 255).astype(np.uint8)


def depth_colours(max_depth: float) -> dict[str, Colour]:
    """What the colours of `paint_depth` mean."""
    depths = max_depth * np.array([0.01, 0.03, 0.1, 0.3, 1])
    painted = paint_depth(depths[None], max_depth)[0] / 255
    return {f"{depth:g} m": tuple(map(float, colour)) for depth, colour in zip(depths, painted, strict=True)}


def paint_depth(depth: Array, max_depth: float) -> Array:
    """A depth map, near is bright; unknown is black. The scale is logarithmic, as depth errors are judged."""
    near = np.log(np.maximum(depth, 1e-3))
    low, high = np.log(max_depth / 100), np.log(max_depth)
    shown = plt.get_cmap("magma_r")(np.clip((near - low) / (high - low), 0, 1))[..., :3]
    return (np.where((depth > 0)[..., None], shown, 0) * 255).astype(np.uint8)


def save_grid(path: Path, columns: Mapping[str, Sequence[Array]], legend: Mapping[str, Colour], title: str) -> None:
    """Draw one row of pictures for each image, with a title above each column."""
    with plt.rc_context({"text.parse_math": False}):  # a name may have a dollar in it
        _save_grid(path, columns, legend, title)


def _save_grid(path: Path, columns: Mapping[str, Sequence[Array]], legend: Mapping[str, Colour], title: str) -> None:
    rows, wide = len(next(iter(columns.values()))), len(columns)
    figure, axes = plt.subplots(rows, wide, figsize=(3.2 * wide, 2.45 * rows + 1.2), squeeze=False)
    for place, (name, pictures) in enumerate(columns.items()):
        axes[0][place].set_title(name)
        for row, picture in enumerate(pictures):
            axes[row][place].imshow(picture, interpolation="nearest")
    for axis in axes.flat:
        axis.axis("off")
    figure.suptitle(title)
    _add_legend(figure, legend, 3 * wide)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def save_sheet(path: Path, pictures: Mapping[str, Array], legend: Mapping[str, Colour]) -> None:
    """Draw small pictures in rows, each with its name, as on a photographer's contact sheet."""
    wide = min(4, len(pictures))
    rows = -(-len(pictures) // wide)
    with plt.rc_context({"text.parse_math": False}):
        figure, axes = plt.subplots(rows, wide, figsize=(3.2 * wide, 2.6 * rows + 0.6), squeeze=False)
        for axis, (name, picture) in zip(axes.flat, pictures.items(), strict=False):
            axis.imshow(smaller(picture), interpolation="nearest")
            axis.set_title(shortened(name, 32), fontsize=8)
        for axis in axes.flat:
            axis.axis("off")
        _add_legend(figure, legend, 3 * wide)
        figure.savefig(path, dpi=110)
        plt.close(figure)


def smaller(picture: Array, side: int = 480) -> Array:
    """A picture for a page or a sheet."""
    small = Image.fromarray(picture)
    small.thumbnail((side, side))
    return np.asarray(small)


def _add_legend(figure: Figure, legend: Mapping[str, Colour], wide: int) -> None:
    """Colours with their names below all pictures, and the pictures drawn so that these have room."""
    patches = [Patch(color=colour, label=shortened(name)) for name, colour in legend.items()]
    columns = max(1, min(len(patches), wide - 1))
    if patches:
        figure.legend(handles=patches, loc="lower center", ncol=columns, frameon=False)
    lines, height = -(-len(patches) // columns), figure.get_size_inches()[1]
    figure.tight_layout(rect=(0, min(0.5, (0.1 + 0.22 * lines) / height), 1, 1))


def shortened(name: str, most: int = 24) -> str:
    """A name that leaves room for others."""
    return name if len(name) <= most else f"{name[: most - 1]}\N{HORIZONTAL ELLIPSIS}"


def draw_curves(title: str, curves: Mapping[str, Sequence[tuple[int, float]]]) -> bytes:
    """A PNG of curves over the steps.

    Args:
        title: What they show.
        curves: The points of each by its name; one alone has no legend.
    """
    figure, axis = plt.subplots(figsize=(4.6, 3.2), layout="constrained")
    for place, (name, points) in enumerate(curves.items()):
        marker = "o" if len(points) < 30 else None
        axis.plot(*zip(*points, strict=True), marker=marker, markersize=3, label=name, lw=1 if place else 2)
    axis.set_title(title)
    axis.set_xlabel("step")
    axis.grid(alpha=0.3)
    if len(curves) > 1:
        axis.legend(frameon=False)
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=110)
    plt.close(figure)
    return drawn.getvalue()

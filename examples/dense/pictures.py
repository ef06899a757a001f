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
from matplotlib.patches import Patch
from pycocotools import mask as rle

from .samples import IGNORE_INDEX, Array

Colour = tuple[float, float, float]

OPACITY = 0.6
BEST = [0, 4, 2, 6, 8, 10, 12, 14, 16, 18, 1, 5, 3, 7, 9, 11]  # of the colour map, the most different first
SHOWN = 0.3  # objects with a lower score are left out of pictures
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


def depth_colours(max_depth: float) -> dict[str, Colour]:
    """What the colours of `paint_depth` mean."""
    depths = np.array([max_depth / 100, max_depth / 10, max_depth])
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
    patches = [Patch(color=colour, label=shortened(name)) for name, colour in legend.items()]
    if patches:
        figure.legend(handles=patches, loc="lower center", ncol=min(len(patches), 3 * wide - 1), frameon=False)
    figure.tight_layout(rect=(0, 0.02 + 0.25 / (2.45 * rows + 1.2), 1, 1))
    figure.savefig(path, dpi=110)
    plt.close(figure)


def shortened(name: str, most: int = 24) -> str:
    """A name that leaves room for others."""
    return name if len(name) <= most else f"{name[: most - 1]}\N{HORIZONTAL ELLIPSIS}"


def draw_curves(series: Mapping[str, Sequence[tuple[int, float]]]) -> bytes:
    """A PNG of curves over the steps, each on an axis of its own."""
    shown = {name: points for name, points in series.items() if points}
    figure, axes = plt.subplots(
        1, max(len(shown), 1), figsize=(4.6 * max(len(shown), 1), 3.2), squeeze=False, layout="constrained"
    )
    for axis, (name, points) in zip(axes[0], shown.items(), strict=False):
        axis.plot(*zip(*points, strict=True), marker="o" if len(points) < 30 else None, markersize=3)
        axis.set_title(name)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=110)
    plt.close(figure)
    return drawn.getvalue()

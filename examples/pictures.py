"""Pictures that a person can judge a model by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import numpy.typing as npt

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.colors import ListedColormap
from matplotlib.patches import Patch

LabelMap = npt.NDArray[np.uint8]


def save_segmentation(
    path: Path,
    images: Sequence[Any],
    columns: Mapping[str, Sequence[LabelMap]],
    id2label: Mapping[int, str],
    ignore_index: int,
    title: str,
) -> None:
    """Draw a row for each image: the image, then one label map for each of `columns`. Ignored pixels are black."""
    colours = plt.get_cmap("tab20")(np.linspace(0, 1, 20))[[0, 4, 2, 6, 8, 10, 12, 14, 16, 18, 1, 5, 3, 7, 9, 11]]
    table = np.vstack([colours[i % len(colours)] for i in range(len(id2label))] + [[0, 0, 0, 1]])
    palette = ListedColormap(table)
    rows, wide = len(images), 1 + len(columns)
    figure, axes = plt.subplots(rows, wide, figsize=(3.2 * wide, 2.45 * rows + 1.2), squeeze=False)
    for row, image in enumerate(images):
        axes[row][0].imshow(image)
        for column, (name, maps) in enumerate(columns.items(), start=1):
            shown = np.where(maps[row] == ignore_index, len(id2label), maps[row])
            axes[row][column].imshow(shown, cmap=palette, vmin=0, vmax=len(id2label), interpolation="nearest")
            if row == 0:
                axes[row][column].set_title(name)
    axes[0][0].set_title("image")
    for axis in axes.flat:
        axis.axis("off")
    figure.suptitle(title)
    patches = [Patch(color=table[i], label=name) for i, name in id2label.items()]
    figure.legend(handles=patches, loc="lower center", ncol=min(len(patches), 3 * wide - 1), frameon=False)
    figure.tight_layout(rect=(0, 0.02 + 0.25 / (2.45 * rows + 1.2), 1, 1))
    figure.savefig(path, dpi=110)
    plt.close(figure)

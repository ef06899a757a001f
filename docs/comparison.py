"""Draws docs/comparison.png: images, truth, and what each method of a compared run makes of them.

python examples/semantic_segmentation.py --steps 220 --search_steps 60 --compare lora full --output_dir out/compare
python docs/comparison.py out/compare
"""

import argparse
import sys
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

from dense.folder import COMPARED, PICTURES, RESULTS, read_json
from dense.report import LAST, METHOD_NAMES

METHODS = ("lora", "sfa", "full")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="The folder of a run of SFA with --compare lora full.")
    parser.add_argument("--images", type=int, nargs="+", default=(0, 1), help="Which of the report's images.")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("comparison.png"))
    args = parser.parse_args()
    folders = {method: args.run if method == "sfa" else args.run / COMPARED / method for method in METHODS}
    pictures = {method: np.load(folder / PICTURES / LAST) for method, folder in folders.items()}
    columns = {"image": ("sfa", "image"), "truth": ("sfa", "truth")}
    for method, folder in folders.items():
        score = read_json(folder / RESULTS, {"after": dict}, "Train again.")["after"]["mean_iou"]
        columns[f"{METHOD_NAMES[method]}, {100 * score:.1f}"] = method, "found"
    figure, axes = plt.subplots(
        len(args.images), len(columns), figsize=(2.3 * len(columns), 1.85 * len(args.images)), layout="constrained"
    )
    for row, image in zip(np.atleast_2d(axes), args.images, strict=True):
        for axis, (method, kind) in zip(row, columns.values(), strict=True):
            axis.imshow(pictures[method][f"{kind}_{image}"])
            axis.axis("off")
    for axis, title in zip(np.atleast_2d(axes)[0], columns, strict=True):
        axis.set_title(title, fontsize=10)
    figure.savefig(args.out, dpi=80)


if __name__ == "__main__":
    main()

"""Predict with a trained model: a folder of images in, masks or boxes or depth out, with pictures to look at.

    python examples/predict.py --run out/demo --images photos/
    python examples/predict.py --run me/my-adapter --images photos/ --output_dir out/predicted

`--run` is the output folder of one of the training scripts, of any method, or any SFA adapter that stands alone: a
folder that `save_pretrained` wrote, or a repository on the Hub. Masks are PNGs with a palette, objects are a COCO
JSON, depth is 16-bit PNGs; `predictions.json` says what is what. Images much larger than those of the training are cut
into windows of their size.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import dense  # noqa: F401 - first: it says what is not installed

# isort: split
import numpy as np
from accelerate import PartialState
from PIL import Image
from pycocotools import mask as rle
from tqdm.auto import tqdm

from dense.errors import FlagError, told
from dense.folder import Products
from dense.inference import Predictor, load
from dense.limits import at_least_0, whole
from dense.pictures import SHOWN, palette, save_sheet
from dense.samples import FORMATS, MOST_PIXELS, Array, BadSampleError, printable, read_picture
from dense.task import Task
from depth_estimation import DepthEstimation
from multi_task import TASKS
from semantic_segmentation import SemanticSegmentation

PREDICTIONS, MASKS, DEPTH, OVERLAYS, SHEET = "predictions.json", "masks", "depth", "overlays", "contact_sheet.jpg"
SUFFIXES = {suffix for suffix, form in Image.registered_extensions().items() if form in FORMATS}
PRODUCTS = (PREDICTIONS, MASKS, DEPTH, OVERLAYS, SHEET)
ON_SHEET = 24
MOST = 0xFFFF
DEPTH_SCALES = (1000, 256, 100, 10, 1)  # what a metre is in a file: millimetres, as KITTI has it, and coarser


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--run", "--adapter", required=True, help="Folder of a finished run, or an adapter, or its Hub id."
    )
    parser.add_argument("--images", required=True, type=Path, help="A folder, with those in it, or one image.")
    parser.add_argument("--output_dir", "--output", type=Path, default=Path("out/predictions"))
    parser.add_argument("--overwrite", action="store_true", help="Replace what an earlier call has left there.")
    parser.add_argument("--model", "--base", help="Where the model is that the run began with. Default: where it was.")
    parser.add_argument(
        "--window",
        type=whole(0),
        nargs=2,
        metavar=("HEIGHT", "WIDTH"),
        help="Cut larger images into windows of this size. Default: that of the training images; 0 0 for never.",
    )
    parser.add_argument(
        "--score", type=at_least_0, default=SHOWN, help="Leave out objects below. Pictures show them from 0.3 on."
    )
    parser.add_argument("--batch_size", type=whole(1), default=4, help="Windows of an image at a time.")
    return parser.parse_args(arguments)


def images_in(path: Path) -> list[Path]:
    """The images of a folder and the folders in it, or the one image.

    Raises:
        FlagError: If there is none.
    """
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise FlagError(f"--images {path}: there is no such folder or file")
    found = sorted(file for file in path.rglob("*") if file.is_file() and file.suffix.lower() in SUFFIXES)
    if not found:
        raise FlagError(f"--images {path}: no image is in it ({', '.join(sorted(SUFFIXES))})")
    return found


def names_for(images: Sequence[Path], root: Path) -> dict[Path, Path]:
    """What the files of each image are called, without an ending; it is kept where two images differ only in it."""
    paths = {image: Path(image.name) if image == root else image.relative_to(root) for image in images}
    stems = Counter(path.with_suffix("") for path in paths.values())
    return {image: p.with_suffix("") if stems[p.with_suffix("")] == 1 else p for image, p in paths.items()}


class Labels:
    """Writes label maps: PNGs with a palette, whose values are the classes' numbers."""

    def __init__(self, task: Task) -> None:
        colours = palette(len(task.id2label))
        self.palette = [round(255 * part) for colour in colours for part in colour]
        self.described = {"id2label": task.id2label, "masks": f"{MASKS}/*.png, a class for each pixel"}

    def add(self, folder: Path, name: Path, file: str, size: tuple[int, int], found: Array) -> None:
        picture = Image.fromarray(found.astype(np.uint8))
        picture.putpalette(self.palette)
        save(picture, folder / MASKS / f"{name}.png")


class Depths:
    """Writes depth maps: PNGs of 16 bits."""

    def __init__(self, task: Task) -> None:
        self.most = task.args.max_depth
        self.scale = next((scale for scale in DEPTH_SCALES if scale * self.most <= MOST), MOST / self.most)
        self.described = {"depth": f"{DEPTH}/*.png, 16 bits", "depth_scale": self.scale}

    def add(self, folder: Path, name: Path, file: str, size: tuple[int, int], found: Array) -> None:
        # At least 1: where depth maps are read, 0 means unknown.
        values = np.clip(np.round(found.clip(0, self.most) * self.scale), 1, MOST).astype(np.uint16)
        save(Image.fromarray(values), folder / DEPTH / f"{name}.png")


class Objects:
    """Collects objects in COCO's form, with scores; masks are run lengths."""

    def __init__(self, task: Task) -> None:
        self.images: list[dict[str, Any]] = []
        self.annotations: list[dict[str, Any]] = []
        categories = [{"id": i + 1, "name": name} for i, name in task.id2label.items()]
        self.described = {"images": self.images, "annotations": self.annotations, "categories": categories}

    def add(self, folder: Path, name: Path, file: str, size: tuple[int, int], found: Mapping[str, Any]) -> None:
        number = len(self.images) + 1
        self.images.append({"id": number, "file_name": file, "height": size[0], "width": size[1]})
        for i, (x1, y1, x2, y2) in enumerate(np.asarray(found["boxes"], float).tolist()):
            box = [round(v, 2) for v in (x1, y1, x2 - x1, y2 - y1)]
            shape: dict[str, Any] = {"area": round(box[2] * box[3], 2)}
            if "masks" in found:
                mask = found["masks"][i]
                runs = {"size": list(mask["size"]), "counts": mask["counts"].decode()}
                shape = {"area": int(rle.area(mask)), "segmentation": runs}
            self.annotations.append(
                {
                    "id": len(self.annotations) + 1,
                    "image_id": number,
                    "category_id": int(found["labels"][i]) + 1,
                    "score": round(float(found["scores"][i]), 4),
                    "bbox": box,
                    "iscrowd": 0,
                    **shape,
                }
            )


def save(picture: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path)


def sure(found: Any, score: float) -> Any:
    """Of objects, those with this score or more; a map as it is."""
    if not isinstance(found, dict):
        return found
    kept = np.flatnonzero(np.asarray(found["scores"]) >= score)
    return {key: [value[i] for i in kept] if key == "masks" else value[kept] for key, value in found.items()}


def window_of(args: argparse.Namespace, task: Task, known: tuple[int, int] | None) -> tuple[int, int] | None:
    """The window that large images are cut into; None for never.

    Raises:
        FlagError: If a window is asked of a task that needs the whole image.
    """
    if args.window is not None and not task.cuts_images and any(args.window):
        raise FlagError(f"--window: {task.name} needs the whole image")
    height, width = args.window or known or (0, 0)
    return (height, width) if height and width and task.cuts_images else None


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Predict, write and draw; gives what is written to `predictions.json`."""
    args = parse_arguments(arguments)
    images = images_in(args.images)
    products = Products(args.output_dir, PRODUCTS, PREDICTIONS, "a prediction", args.overwrite)
    device = PartialState().device
    loaded = load(args.run, TASKS, device, args.model)
    task, _ = loaded.asked()
    window = window_of(args, task, loaded.window)
    predictor = Predictor(loaded, device, window, args.batch_size)
    for line in loaded.told:
        print(line)
    writer = {SemanticSegmentation: Labels, DepthEstimation: Depths}.get(type(task), Objects)(task)
    work = products.begin()
    names = names_for(images, args.images)
    sheet: dict[str, Array] = {}
    skipped: dict[str, str] = {}
    cut = 0
    for path in tqdm(images, desc="predicting"):
        file = path.name if path == args.images else str(path.relative_to(args.images))
        try:
            image = read_picture(path, longest_side=MOST_PIXELS)  # at its own size
        except BadSampleError as error:
            skipped[file] = str(error)
            tqdm.write(f"{printable(str(path))}: skipped: {printable(str(error))}")
            continue
        cut += len(predictor.windows(image)) > 1
        found = sure(predictor(image), args.score)
        writer.add(work, names[path], file, (image.height, image.width), found)
        painted = task.paint(np.asarray(image), found)
        save(Image.fromarray(painted), work / OVERLAYS / f"{names[path]}.jpg")
        if len(sheet) < ON_SHEET:
            sheet[printable(file)] = painted
    if not sheet:
        raise FlagError(f"--images {args.images}: none of the {len(images)} images can be used")
    save_sheet(work / SHEET, sheet, task.legend())
    numbers = {"task": task.name, "run": args.run, **writer.described, "skipped": skipped}
    products.put(numbers)
    if cut:
        print(f"{cut} of {len(images)} images were cut into windows of {window[0]} x {window[1]} pixels")
    left_out = f", {len(skipped)} skipped" if skipped else ""
    print(f"{len(images) - len(skipped)} images predicted{left_out}: look at {args.output_dir / SHEET}")
    return numbers


if __name__ == "__main__":
    with told(FlagError, OSError):
        main()

"""One annotated image, read from a dataset's row; what is wrong with a row is told by kind and file."""

from __future__ import annotations

import json
import math
import unicodedata
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps
from pycocotools import mask as rle

from .errors import DataError

IGNORE_INDEX = 255
LONGEST_NAME = 60
MOST_PIXELS = 50_000_000
LONGEST_SIDE = 1280
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
KNOWN = "PNG, JPEG, WebP, GIF, BMP and TIFF"
UNPRINTABLE = {"Cc", "Cs", "Zl", "Zp"}  # control characters, lone surrogates, ends of lines and paragraphs
IGNORED_NAMES = {"unlabelled", "unlabeled", "void", "ignore", "ignored"}
# Annotators round: what hangs over the image's edge by no more is cut off without a word.
SLACK = 1.0

Array = npt.NDArray[Any]
Note = Callable[..., None]  # note(kind, detail)


class BadSampleError(ValueError):
    """A row that cannot be used: what kind of problem it has, and, if it helps, which value."""

    def __init__(self, kind: str, detail: str = "") -> None:
        super().__init__(kind, detail)
        self.kind, self.detail = kind, detail

    def __str__(self) -> str:
        return f"{self.kind}: {self.detail}" if self.detail else self.kind


@dataclass
class Sample:
    """An image and its annotations, at the image's own size. What a task does not need is None.

    Attributes:
        image: RGB.
        label: Class ids (height, width), 255 where ignored.
        boxes: Corners ``x1, y1, x2, y2`` in pixels (n, 4).
        masks: Of the same objects, boolean (n, height, width).
        classes: Of the same objects, class ids (n,).
        crowd: Of the same objects, whether it is a group that a detector is not judged by (n,).
        areas: Of the same objects, in pixels (n,).
        depth: Metres (height, width), 0 where unknown.
    """

    image: Image.Image
    label: Array | None = None
    boxes: Array | None = None
    masks: Array | None = None
    classes: Array | None = None
    crowd: Array | None = None
    areas: Array | None = None
    depth: Array | None = None

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        return self.image.height, self.image.width


@dataclass
class Census:
    """What the rows that were read hold, for what no single one shows: a class that never comes, say.

    Attributes:
        rows: How many were read.
        usable: How many of them can be used.
        classes: In how many of these each class occurs.
        counting: The sum over them of the part of what is annotated that counts.
    """

    rows: int = 0
    usable: int = 0
    classes: Counter[int] = field(default_factory=Counter)
    counting: float = 0.0

    def add(self, sample: Sample, counting: float) -> None:
        """Count a row that can be used, and the part of it that counts."""
        self.usable += 1
        self.counting += counting
        if sample.label is not None:
            self.classes.update(np.flatnonzero(np.bincount(sample.label.ravel(), minlength=IGNORE_INDEX)).tolist())
        if sample.classes is not None:
            self.classes.update(set(sample.classes.tolist()))

    def merge(self, other: Census) -> None:
        self.rows += other.rows
        self.usable += other.usable
        self.classes.update(other.classes)
        self.counting += other.counting


@dataclass
class Problems:
    """What was wrong with the data: by kind, in which rows (each counts once), and which value it was.

    Attributes:
        found: For each kind, the rows and values.
        census: What the rows hold.
    """

    found: dict[str, dict[str, str]] = field(default_factory=dict)
    census: Census = field(default_factory=Census)

    def add(self, kind: str, where: str, detail: str = "") -> bool:
        """Remember a problem of a row; whether it is the first of its kind."""
        is_first = kind not in self.found
        self.found.setdefault(kind, {}).setdefault(where, detail)
        return is_first

    def merge(self, others: Iterable[Problems]) -> None:
        for other in others:
            self.census.merge(other.census)
            for kind, rows in other.found.items():
                own = self.found.setdefault(kind, {})
                own.update({where: detail for where, detail in rows.items() if where not in own})

    def lines(self) -> list[str]:
        """For each kind, in how many rows it came, and where first."""
        return [f"{len(rows)} x {kind} (first: {self.first(kind)})" for kind, rows in self.found.items()]

    def first(self, kind: str) -> str:
        where, detail = next(iter(self.found[kind].items()))
        return f"{where}: {detail}" if detail else where


class Classes:
    """The classes that count, numbered from 0 without gaps, and what a dataset calls them.

    Args:
        id2label: The dataset's ids and names. Names such as `unlabelled` or `void` are ignored, not classes.
        ignored: More such names, in lower case.
        colours: The dataset's ids by the colours of its label maps, if these show classes by colours.
        of_model: Whether they are a model's, where each name is a class.

    Attributes:
        id2label: The classes' names as they are shown: one line of text, not empty, not too long, each once.
    """

    def __init__(
        self,
        id2label: Mapping[int, str],
        ignored: Collection[str] = (),
        colours: Mapping[int, int] | None = None,
        of_model: bool = False,
    ) -> None:
        kept = [i for i in sorted(id2label) if of_model or id2label[i].lower() not in IGNORED_NAMES.union(ignored)]
        if not kept:
            raise DataError("there is no class: id2label is empty, or all its names mean that a pixel is ignored")
        self.id2label = shown_names([id2label[old] for old in kept])
        self.colours = dict(colours or {})
        self.new_ids = {old: new for new, old in enumerate(kept)}
        self.ignored = {i for i in id2label if i not in self.new_ids}
        self._ids_of_names = {id2label[old]: new for new, old in enumerate(kept)}

    def of_object(self, category: Any) -> int | None:
        """The class of an object by the dataset's id or name; None if there is none."""
        if isinstance(category, str):
            return self._ids_of_names.get(category)
        return self.new_ids.get(int(category)) if _is_number(category) else None

    def of_map(self, label: Array) -> Array:
        """A map of the dataset's ids as a map of classes, 255 where ignored.

        Raises:
            BadSampleError: If it has an id that is neither a class nor ignored.
            DataError: If there are more classes than such a map can tell.
        """
        if len(self.id2label) > IGNORE_INDEX:
            raise DataError(f"there are {len(self.id2label)} classes, and a label map takes {IGNORE_INDEX} at most")
        result = np.full(label.shape, IGNORE_INDEX, np.uint8)
        for i in np.unique(label).tolist():
            if i in self.new_ids:
                result[label == i] = self.new_ids[i]
            elif i not in self.ignored and i != IGNORE_INDEX:
                raise BadSampleError("label outside id2label", f"it has {i}")
        if (result == IGNORE_INDEX).all():
            raise BadSampleError("label map without a class: every pixel is ignored")
        return result


def printable(text: str) -> str:
    """A text without what would break a line, command a terminal or cannot be encoded."""
    return "".join("\N{REPLACEMENT CHARACTER}" if unicodedata.category(c) in UNPRINTABLE else c for c in text)


def shown_names(names: Sequence[str]) -> dict[int, str]:
    """Names of classes as people and files can take them, by their numbers; a dataset may call them anything."""
    shown: dict[int, str] = {}
    for i, name in enumerate(names):
        text = printable(name).strip() or f"class {i}"
        if len(text) > LONGEST_NAME:
            text = f"{text[: LONGEST_NAME - 1]}\N{HORIZONTAL ELLIPSIS}"
        if text in shown.values():
            text = f"{text[: LONGEST_NAME - 10]} ({i})"
        shown[i] = text
    return shown


def read_image(value: Any) -> Image.Image:
    """An image of any mode as RGB. 16-bit grey is scaled to 8 bits; transparency is dropped.

    Raises:
        BadSampleError: If it is damaged, or its values have no known range.
    """
    return _as_rgb(open_picture(value, "image"))


def read_picture(path: str | Path, most_pixels: int = MOST_PIXELS, longest_side: int = LONGEST_SIDE) -> Image.Image:
    """An image from someone unknown, as RGB, shrunk to what a screen can show; of an animation the first picture.

    Args:
        path: The file, in one of `FORMATS`.
        most_pixels: Larger ones are refused, by what the file's header says, before a pixel is decoded.
        longest_side: Of what is returned. A prediction is as large, and may take many times its memory.

    Raises:
        BadSampleError: If it is too large, of another format or damaged.
    """
    name = Path(path).name
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit here is lower
            image = Image.open(path, formats=FORMATS)
    except Image.DecompressionBombError:
        raise BadSampleError("image of too many pixels", f"{name!r}; {most_pixels:,} are allowed") from None
    except FileNotFoundError:
        raise BadSampleError("image that cannot be read", f"there is no {name!r}") from None
    except Exception:  # decoders raise whatever they trip over in a damaged file
        raise BadSampleError("image that cannot be read", f"{name!r} is damaged, or none of {KNOWN}") from None
    with image:
        width, height = image.size
        if width * height > most_pixels:
            large = f"{name!r} has {width:,} x {height:,}, and {most_pixels:,} are allowed"
            raise BadSampleError("image of too many pixels", large)
        if not width * height:
            raise BadSampleError("image without a pixel", repr(name))
        try:
            image.load()
            picture = _as_rgb(ImageOps.exif_transpose(image))
        except BadSampleError:
            raise
        except Exception as error:
            raise BadSampleError("image that cannot be read", f"{name!r} is damaged ({error})") from error
    picture.thumbnail((longest_side, longest_side))
    return picture


def _as_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        grey = np.asarray(image)
        if grey.min() < 0 or grey.max() > 0xFFFF:
            raise BadSampleError("image of 32-bit integers outside 0..65535")
        image = Image.fromarray((grey / 257).astype(np.uint8))
    elif image.mode == "F":
        grey = np.asarray(image)
        if not np.isfinite(grey).all() or grey.min() < 0 or grey.max() > 255:
            raise BadSampleError("image of floats outside 0..255")
        image = Image.fromarray((grey * (255 if grey.max() <= 1 else 1)).astype(np.uint8))
    return image.convert("RGB")


def read_label(value: Any, size: tuple[int, int], colours: Mapping[int, int] | None = None) -> Array:
    """A map of class ids (height, width); of an image with a palette, the indices.

    Args:
        value: The map's image.
        size: Of the image that it annotates.
        colours: The ids by their colours, red first in 24 bits, if the map shows classes by colours.

    Raises:
        BadSampleError: If it is damaged, has colours, or another size than the image.
    """
    label = np.asarray(open_picture(value, "label map"))
    if colours:
        label = _ids_of_colours(label, colours)
    elif label.ndim == 3 and (label == label[..., :1]).all():
        label = label[..., 0]
    if label.ndim != 2:
        raise BadSampleError("label map with colours instead of class ids")
    _check_size("label map", label, size)
    return label.astype(np.int64)


def draw_label(objects: Mapping[str, Any], classes: Classes, size: tuple[int, int], note: Note) -> Array:
    """A map of classes (height, width) of objects with masks: the smaller of two is in front, the rest is class 0.

    Args:
        objects: Lists of each object's `category`, its name, and `segmentation`, polygons or run lengths.
        classes: The classes, of whose ids the dataset's 0 is for what no object covers.
        size: Of the image.
        note: Told of each object that is left out: without a mask, or of a category that is no class.

    Raises:
        BadSampleError: If a mask is damaged, or every pixel is ignored.
        DataError: If there are more classes than a map can tell.
    """
    if len(classes.id2label) > IGNORE_INDEX:
        raise DataError(f"there are {len(classes.id2label)} classes, and a label map takes {IGNORE_INDEX} at most")
    shapes, numbers = [], []
    for category, text in zip(objects["category"], objects["segmentation"], strict=True):
        shape, number = json.loads(text), classes.of_object(category)
        if not shape:
            note("object without a mask")
        elif number is None and not _is_ignored(category, classes):
            note("category outside id2label", f"it has {category!r}")
        else:
            shapes.append(shape)
            numbers.append(IGNORE_INDEX if number is None else number)
    masks = _drawn(shapes, size)
    label = np.full(size, classes.new_ids.get(0, IGNORE_INDEX), np.uint8)
    for i in np.argsort(-masks.sum((1, 2)), kind="stable"):
        label[masks[i]] = numbers[i]
    if (label == IGNORE_INDEX).all():
        raise BadSampleError("label map without a class: every pixel is ignored")
    return label


def _ids_of_colours(label: Array, colours: Mapping[int, int]) -> Array:
    parts = np.repeat(label[..., None], 3, 2) if label.ndim == 2 else label[..., :3]
    r, g, b = np.moveaxis(parts.astype(np.int64), 2, 0)
    found, places = np.unique((r << 16) | (g << 8) | b, return_inverse=True)
    for colour in found.tolist():
        if colour not in colours:
            raise BadSampleError("label map with a colour that is no class", f"it has #{colour:06x}")
    return np.array([colours[colour] for colour in found.tolist()])[places.reshape(label.shape[:2])]


def read_depth(value: Any, size: tuple[int, int], scale: float, note: Note) -> Array:
    """A depth map in metres, 0 where unknown.

    Args:
        value: An image of one channel, or numbers (height, width); 0 is unknown.
        size: Of the image.
        scale: What a metre is in the map, such as 1000 for millimetres.
        note: Told of values that are not finite or negative; they are unknown then.

    Raises:
        BadSampleError: If it is damaged, of another size, or has no known pixel.
    """
    raw = open_picture(value, "depth map") if isinstance(value, Mapping | str | Image.Image) else value
    if raw is None:
        raise BadSampleError("depth map missing")
    try:
        depth = np.asarray(raw, dtype=np.float32)
    except (TypeError, ValueError) as error:
        raise BadSampleError("depth map that is no rectangle of numbers", str(error)) from error
    if depth.ndim != 2:
        raise BadSampleError("depth map that is not of one channel")
    _check_size("depth map", depth, size)
    sound = np.isfinite(depth) & (depth >= 0)
    if not sound.all():
        note("depth not finite or negative")
    depth = np.where(sound, depth / np.float32(scale), np.float32(0))
    if not depth.any():
        raise BadSampleError("depth map without a known pixel")
    return depth


def read_objects(
    value: Any, classes: Classes, size: tuple[int, int], keys: Mapping[str, str], corners: bool, note: Note
) -> dict[str, Array]:
    """The boxes of an image with their classes, areas, crowd flags and places in the row.

    Args:
        value: The row's objects: a dict of lists, or a list of dicts.
        classes: The classes.
        size: Of the image.
        keys: What the dataset calls `bbox` and `category`.
        corners: Whether a box is ``x1, y1, x2, y2``; otherwise ``x, y, width, height``.
        note: Told of each object that is left out: a box outside the image, without area, or a category that is no
            class.

    Returns:
        `boxes` (corners), `classes`, `areas`, `crowd`, and `index`, the objects' places in the row.

    Raises:
        BadSampleError: If the lists do not fit together, or all objects of the row had to be left out.
        DataError: If there are no such lists.
    """
    given = _as_lists(value)
    for role, key in keys.items():
        if given and key not in given:
            raise DataError(f"objects have no {key!r}: they have {sorted(given)}. Name it with --{role}_key")
    boxes, categories = given.get(keys["bbox"]), given.get(keys["category"])
    count = 0 if not boxes else len(boxes)
    if count and (categories is None or len(categories) != count):
        raise BadSampleError("objects with another number of boxes than of categories")
    height, width = size
    limits = np.array([width, height, width, height], dtype=np.float64)
    found: dict[str, list[Any]] = {"boxes": [], "classes": [], "areas": [], "crowd": [], "index": []}
    for i in range(count):
        box = np.asarray(boxes[i], dtype=np.float64)
        if box.shape != (4,) or not np.isfinite(box).all():
            note("box that is not four finite numbers")
            continue
        if not corners:
            box[2:] += box[:2]
        inside = np.clip(box, 0, limits)
        area = float(np.prod(inside[2:] - inside[:2]))
        if not (box[2:] > box[:2]).all():
            note("box without area", str(box.tolist()))
            continue
        if not (inside[2:] > inside[:2]).all():
            note("box outside the image", str(box.tolist()))
            continue
        number = classes.of_object(categories[i])
        if number is None:
            if not _is_ignored(categories[i], classes):
                note("category outside id2label", f"it has {categories[i]!r}")
            continue
        if np.abs(inside - box).max() > SLACK:
            note("box beyond the image's edge, cut off")
        given_area = given["area"][i] if len(given.get("area") or ()) == count else None
        found["boxes"].append(inside)
        found["classes"].append(number)
        found["areas"].append(float(given_area) if given_area else area)
        found["crowd"].append(bool(given["iscrowd"][i]) if len(given.get("iscrowd") or ()) == count else False)
        found["index"].append(i)
    if count and not found["boxes"]:
        raise BadSampleError("no usable object")
    return {
        "boxes": np.array(found["boxes"], np.float32).reshape(-1, 4),
        "classes": np.array(found["classes"], np.int64),
        "areas": np.array(found["areas"], np.float32),
        "crowd": np.array(found["crowd"], bool),
        "index": np.array(found["index"], np.int64),
    }


def read_masks(
    row: Mapping[str, Any], columns: Mapping[str, str], objects: dict[str, Array], size: tuple[int, int]
) -> Array:
    """The masks of objects (n, height, width): from their polygons or run lengths, or from a map of their ids.

    Raises:
        BadSampleError: If the row has neither, or they are damaged.
    """
    given = _as_lists(row.get(columns["objects"]))
    shapes = given.get("segmentation")
    if shapes is not None:
        return _drawn([shapes[i] for i in objects["index"]], size)
    if row.get(columns["instances"]) is None:
        raise BadSampleError("no masks: neither `segmentation` among the objects nor a map of instances")
    ids = read_label(row[columns["instances"]], size)
    named = given.get("id")
    own = objects["index"] + 1 if named is None else np.array([named[i] for i in objects["index"]], np.int64)
    return ids[None] == own[:, None, None]


def read_painted_objects(value: Any, classes: Classes, size: tuple[int, int], note: Note) -> dict[str, Array]:
    """Masks and classes of an image whose red channel is the class of each pixel, and whose green one its object.

    It is the form that transformers' own instance segmentation example reads.

    Args:
        value: The image.
        classes: The classes; other ids are left out, and told of unless they are ignored.
        size: Of the image that it annotates.
        note: Told of what is left out.

    Raises:
        BadSampleError: If it is damaged, has no colours, or another size.
    """
    painted = np.asarray(open_picture(value, "annotation"))
    if painted.ndim != 3 or painted.shape[2] < 2:
        raise BadSampleError("annotation without a red channel of classes and a green one of objects")
    _check_size("annotation", painted, size)
    keys = painted[..., 0].astype(np.int64) * 256 + painted[..., 1]
    masks, numbers = [], []
    for key in np.unique(keys).tolist():
        category = key // 256
        number = classes.of_object(category)
        if number is not None:
            masks.append(keys == key)
            numbers.append(number)
        elif category not in classes.ignored and category != IGNORE_INDEX:
            note("category outside id2label", f"it has {category}")
    return {
        "masks": np.array(masks, bool).reshape(-1, *size),
        "classes": np.array(numbers, np.int64),
        "crowd": np.zeros(len(numbers), bool),
    }


def boxes_of(masks: Array) -> Array:
    """The corners of the boxes around masks (n, height, width), none of which is empty."""
    boxes = []
    for mask in masks:
        rows, columns = np.nonzero(mask.any(1))[0], np.nonzero(mask.any(0))[0]
        boxes.append([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])
    return np.array(boxes, np.float32).reshape(-1, 4)


def encoded(mask: Array) -> dict[str, Any]:
    """A mask as pycocotools' run lengths."""
    return rle.encode(np.asfortranarray(mask, dtype=np.uint8))


def _drawn(shapes: Sequence[Any], size: tuple[int, int]) -> Array:
    height, width = size
    masks = np.zeros((len(shapes), height, width), bool)
    for mask, shape in zip(masks, shapes, strict=True):
        try:
            shape = json.loads(shape) if isinstance(shape, str) else shape
            if isinstance(shape, Mapping):
                runs = dict(shape)
                if isinstance(runs["counts"], list):
                    runs = rle.frPyObjects(runs, height, width)
                if list(runs["size"]) != [height, width]:
                    raise BadSampleError("mask of another size than the image")
            else:
                polygons = [shape] if shape and np.isscalar(shape[0]) else shape
                runs = rle.merge(rle.frPyObjects([list(map(float, p)) for p in polygons], height, width))
            mask[:] = rle.decode(runs)
        except BadSampleError:
            raise
        except Exception as error:  # pycocotools raises whatever it trips over
            raise BadSampleError("mask that cannot be decoded", repr(error)) from error
    return masks


def open_picture(value: Any, what: str) -> Image.Image:
    """An image of a row as it is.

    Raises:
        BadSampleError: If it is missing or damaged; names it as `what`.
    """
    if value is None:
        raise BadSampleError(f"{what} missing")
    if not isinstance(value, Mapping | str | Image.Image):
        raise BadSampleError(f"{what} expected, and something else is there", repr(value)[:80])
    try:
        image = datasets.Image().decode_example(value)
        image.load()
    except Exception as error:  # decoders raise whatever they trip over in a damaged file
        raise BadSampleError(f"{what} that cannot be read", repr(error)) from error
    return image


def _check_size(what: str, array: Array, size: tuple[int, int]) -> None:
    if array.shape[:2] != size:
        shape = f"{array.shape[1]} x {array.shape[0]} instead of {size[1]} x {size[0]}"
        raise BadSampleError(f"{what} of another size than the image", shape)


def _as_lists(objects: Any) -> Mapping[str, Any]:
    if isinstance(objects, Mapping):
        return objects
    if not objects:
        return {}
    if not (isinstance(objects, Sequence) and all(isinstance(one, Mapping) for one in objects)):
        raise BadSampleError("objects expected, and something else is there", repr(objects)[:80])
    return {key: [one.get(key) for one in objects] for key in objects[0]}


def _is_ignored(category: Any, classes: Classes) -> bool:
    if isinstance(category, str):
        return category.lower() in IGNORED_NAMES
    return _is_number(category) and int(category) in classes.ignored


def _is_number(category: Any) -> bool:
    return category is not None and math.isfinite(category)

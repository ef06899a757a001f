"""Folders of pictures and annotations as people have them, found by looking, as rows in the columns of the Hub.

Three kinds: images with masks or depth maps of the same names, COCO's JSON, and YOLO's text files; each with folders
for its splits or without. Other folders are left to `datasets`.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import yaml
from PIL import Image
from pycocotools import mask as rle

from .errors import DataError
from .samples import FORMATS, IGNORED_NAMES, printable

SUFFIXES = {suffix for suffix, form in Image.registered_extensions().items() if form in FORMATS}
SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev", "eval"),
    "test": ("test", "testing"),
}
IMAGES = ("images", "image", "imgs", "img", "jpegimages", "photos", "rgb")
MASKS = ("masks", "mask", "labels", "label", "annotations", "annotation", "annot", "segmentationclass", "gt")
DEPTHS = ("depth", "depths", "depth_maps", "depth_map")
TEXTS = ("labels", "label", "annotations")
ENDINGS = re.compile(
    r"[_-](mask|masks|label|labels|labelids|gtfine_labelids|gt|seg|segmentation|l|depth|leftimg8bit|image|img|rgb)$"
)
BACKGROUND = "background"
METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
OTHER_JSON = ("captions", "person_keypoints", "panoptic", "stuff", "image_info", "id2label", "label2id", "metadata")
YAMLS = ("data.yaml", "data.yml", "dataset.yaml", "dataset.yml")
LISTS = ("classes.txt", "class_names.txt", "names.txt", "obj.names", "labels.txt")
COLOURS = ("class_dict.csv", "labelmap.txt")  # names with red, green and blue, of CamVid's kind and of CVAT

OBJECTS = {
    "bbox": datasets.List(datasets.List(datasets.Value("float64"))),
    "category": datasets.List(datasets.Value("string")),
    "iscrowd": datasets.List(datasets.Value("bool")),
}
SHAPES = {"segmentation": datasets.List(datasets.Value("string"))}  # JSON: polygons and run lengths are of two types


@dataclass
class Layout:
    """What a folder holds.

    Attributes:
        kind: What it was taken for.
        splits: For each split its rows; that of a folder without any is called "".
        features: Of the rows.
        names: The classes, by the numbers or names that rows have.
        colours: The classes' numbers by the colours of masks, red first in 24 bits.
        told: What a person should know, each a sentence.
    """

    kind: str
    splits: dict[str, list[dict[str, Any]]]
    features: datasets.Features
    names: dict[int, str] = field(default_factory=dict)
    colours: dict[int, int] = field(default_factory=dict)
    told: list[str] = field(default_factory=list)


def look(folder: Path, columns: Mapping[str, str]) -> Layout | None:
    """What a folder holds for the columns (by role) that a task reads; None if it is for `datasets` to say.

    Raises:
        DataError: If it is of a known kind, and cannot be used: names the file and says what to do.
    """
    if not folder.is_dir() or any(
        (part / name).is_file() for part in (folder, *_folders(folder)) for name in METADATA
    ):
        return None
    if "objects" in columns:
        found = _coco(folder, columns) or _yolo(folder, columns)
        if found is None and list(_pairs(folder, MASKS, SUFFIXES)):
            raise DataError(
                f"{folder} has images and masks, which say no single objects: semantic_segmentation.py reads them"
            )
        return found
    if "label" in columns:
        return _maps(folder, columns, "label", MASKS) or _drawn(folder, columns)
    found = _maps(folder, columns, "depth", DEPTHS)
    if found is None and (list(_coco_files(folder)) or list(_pairs(folder, TEXTS, {".txt"}))):
        raise DataError(
            f"{folder} has objects (COCO's JSON or YOLO's text files) and no depth maps: object_detection.py, "
            f"instance_segmentation.py and semantic_segmentation.py read them"
        )
    return found


# Images with a map each


def _maps(folder: Path, columns: Mapping[str, str], role: str, kinds: Sequence[str]) -> Layout | None:
    splits, told = {}, []
    for split, images, maps in _pairs(folder, kinds, SUFFIXES):
        rows, lines = _matched(images, maps, SUFFIXES)
        told += lines
        splits[split] = [{columns["image"]: _file(i), columns[role]: _file(m)} for i, m in rows if m is not None]
    if not splits:
        return None
    features = datasets.Features({columns[name]: datasets.Image(decode=False) for name in ("image", role)})
    names, colours = _named(folder)
    return Layout(
        f"images with {'depth maps' if role == 'depth' else 'masks'}", splits, features, names, colours, told
    )


def _pairs(folder: Path, kinds: Sequence[str], suffixes: Collection[str]) -> Iterator[tuple[str, Path, Path]]:
    """For each split of a folder, where its images are and where their annotations; these may lie beside them."""
    images, others = _child(folder, IMAGES), _child(folder, kinds)
    if images and others:
        parts = [(split, _child(images, own), _child(others, own)) for split, own in SPLITS.items()]
        inner = [(split, i, o) for split, i, o in parts if i and o and _has(o, suffixes)]
        if inner:
            yield from inner
        elif _has(others, suffixes):
            yield "", images, others
        return
    found = False
    for split, own in SPLITS.items():
        part = _child(folder, own)
        if part is None:
            continue
        images, others = _child(part, IMAGES), _child(part, kinds)
        beside = _child(folder, [f"{part.name.lower()}{dash}{kind}" for kind in kinds for dash in ("_", "-", "")])
        if images and others and _has(others, suffixes):
            yield split, images, others
        elif beside and _has(beside, suffixes):
            yield split, part, beside
        elif _are_together(part, suffixes):
            yield split, part, part
        else:
            continue
        found = True
    if not found and _are_together(folder, suffixes):
        yield "", folder, folder


def _are_together(folder: Path, suffixes: Collection[str]) -> bool:
    """Whether images and what annotates them lie in one folder: of the same name, with another ending."""
    files = [path for path in folder.iterdir() if path.is_file()]
    images = {_key(path) for path in files if _is_image(path) and not _is_map(path)}
    return any(
        path.suffix.lower() in suffixes and (_is_map(path) or path.suffix == ".txt") and _key(path) in images
        for path in files
    )


def _matched(
    images: Path, others: Path, suffixes: Collection[str]
) -> tuple[list[tuple[Path, Path | None]], list[str]]:
    """Each image with what annotates it, by their names; and what is left over, for people.

    Raises:
        DataError: If no name fits another.
    """
    together = images == others
    pictures = _by_name((p for p in images.rglob("*") if _is_image(p) and not (together and _is_map(p))), images)
    annotations = _by_name(
        (
            p
            for p in others.rglob("*")
            if p.suffix.lower() in suffixes and p.is_file() and (not together or _is_map(p) or p.suffix == ".txt")
        ),
        others,
    )
    if not pictures.keys() & annotations.keys():
        first = [printable(next((p.name for p in own.values()), "none")) for own in (pictures, annotations)]
        raise DataError(
            f"no file in {others} has the name of an image in {images} ({first[1]} and {first[0]}, for example): call "
            f"an annotation as its image is called"
        )
    told = []
    lonely = [path for name, path in annotations.items() if name not in pictures]
    if lonely:
        told.append(f"{len(lonely)} annotations in {others} have no image, such as {printable(lonely[0].name)}")
    bare = [path for name, path in pictures.items() if name not in annotations]
    if bare:
        how = "images without objects" if ".txt" in suffixes else "left out"
        told.append(f"{len(bare)} images in {images} have no annotation ({how}), such as {printable(bare[0].name)}")
    return [(path, annotations.get(name)) for name, path in pictures.items()], told


def _by_name(paths: Iterator[Path], root: Path) -> dict[tuple[str, str], Path]:
    found: dict[tuple[str, str], Path] = {}
    for path in sorted(paths):
        name = (str(path.relative_to(root).parent), _key(path))
        if name in found:
            raise DataError(f"{found[name]} and {path} have one name, so that nothing says which is meant: remove one")
        found[name] = path
    return found


def _drawn(folder: Path, columns: Mapping[str, str]) -> Layout | None:
    """Objects in the place of masks, for `draw_label`; what none of them covers is the first class."""
    objects = {"image": columns["image"], "objects": columns["label"], "instances": ""}
    found = _coco(folder, objects) or _yolo(folder, objects)
    if found is None:
        return None
    names = list(found.names.values())
    rest = next((name for name in names if name.lower() in {BACKGROUND, *IGNORED_NAMES}), BACKGROUND)
    found.names = dict(enumerate([rest, *(name for name in names if name != rest)]))
    is_ignored = rest.lower() in IGNORED_NAMES
    found.told.append(
        f"the objects are drawn as masks, smaller ones over larger ones; what none covers is {rest!r}"
        + (", which is ignored" if is_ignored else "; to ignore it, call class 0 'unlabelled' with --id2label")
    )
    return found


# COCO's JSON


def _coco_files(folder: Path) -> Iterator[tuple[str, Path, dict[str, Any]]]:
    """The JSON files of COCO's form in a folder, with their splits."""
    for path in (p for part in (folder, *_folders(folder)) for p in sorted(part.glob("*.json"))):
        if path.stem.startswith(OTHER_JSON):
            continue
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path} is no JSON: {error}") from error
        if isinstance(content, dict) and {"images", "annotations"} & content.keys():
            yield _split_of(path, folder), path, content


def _split_of(path: Path, folder: Path) -> str:
    words = [*re.findall("[a-z]+", path.stem.lower()), *([] if path.parent == folder else [path.parent.name.lower()])]
    return next((split for split, own in SPLITS.items() if set(own) & set(words)), "")


def _coco(folder: Path, columns: Mapping[str, str]) -> Layout | None:
    splits: dict[str, list[dict[str, Any]]] = {}
    names: dict[int, str] = {}
    told: list[str] = []
    needs_masks = "instances" in columns
    for split, path, content in _coco_files(folder):
        if split == "test" and not content.get("annotations"):
            continue  # of a challenge, whose answers are kept
        if split in splits:
            raise DataError(f"{path} is a second JSON of split {split or 'all'!r} in {folder}: leave one there")
        categories = _categories(path, content)
        if split == "train" or not names:
            names = dict(enumerate(categories.values()))
        splits[split] = _coco_rows(folder, split, path, content, categories, columns, needs_masks, told)
    if not splits:
        return None
    objects = OBJECTS | SHAPES if needs_masks else OBJECTS
    features = datasets.Features({columns["image"]: datasets.Image(decode=False), columns["objects"]: objects})
    return Layout("COCO JSON", splits, features, names, told=told)


def _categories(path: Path, content: Mapping[str, Any]) -> dict[int, str]:
    """The names of a file's categories by their ids.

    Raises:
        DataError: If there are none, or there is nothing in the file that can be used.
    """
    for name in ("images", "annotations", "categories"):
        if not isinstance(content.get(name), list) or not content[name]:
            raise DataError(f"{path} has no {name}: COCO's JSON has a list of them that is not empty")
    try:
        categories = {int(one["id"]): str(one["name"]) for one in content["categories"]}
        used = {one["category_id"] for one in content["annotations"]}
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path} has a category or annotation without its fields: {error!r}") from error
    # Roboflow writes a category of all the others in front of them, which no object has.
    above = {one.get("supercategory") for one in content["categories"]}
    return {i: name for i, name in categories.items() if i in used or i != 0 or name not in above}


def _coco_rows(
    folder: Path,
    split: str,
    path: Path,
    content: Mapping[str, Any],
    categories: Mapping[int, str],
    columns: Mapping[str, str],
    needs_masks: bool,
    told: list[str],
) -> list[dict[str, Any]]:
    own = SPLITS.get(split, ())
    near = [part for part in _folders(folder) if re.sub("[0-9]", "", part.name.lower()) in own]
    roots = [path.parent, folder, *near, *[p / n for p in (path.parent, folder, *near) for n in ("images", *own)]]
    roots += [folder / "images" / part.name for part in _folders(folder / "images")]
    objects: dict[Any, dict[str, list[Any]]] = {}
    rows, missing, strange = [], [], 0
    try:
        for one in content["images"]:
            name = Path(str(one["file_name"]))
            file = next((root / n for n in (name, Path(name.name)) for root in roots if (root / n).is_file()), None)
            if file is None:
                missing.append(str(name))
                continue
            shape = SHAPES if needs_masks else {}
            objects[one["id"]] = {key: [] for key in (*OBJECTS, *shape)}
            rows.append({columns["image"]: _file(file), columns["objects"]: objects[one["id"]]})
        ids = {one["id"] for one in content["images"]}
        for one in content["annotations"]:
            strange += one["image_id"] not in ids
            if one["image_id"] in objects:
                _add_object(objects[one["image_id"]], one, categories)
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path} has an image or annotation without its fields: {error!r}") from error
    if not rows:
        raise DataError(f"{path} names {len(missing)} images, and none of them is there ({missing[0]!r}, for example)")
    if missing:
        told.append(f"{path} names {len(missing)} images that are not there, such as {printable(missing[0])}")
    if strange:
        told.append(f"{path} has {strange} annotations of no image in it")
    if needs_masks and not any(one.get("segmentation") for one in content["annotations"]):
        raise DataError(f"{path} has boxes and no masks (`segmentation`): object_detection.py reads it")
    return rows


def _add_object(objects: dict[str, list[Any]], one: Mapping[str, Any], categories: Mapping[int, str]) -> None:
    shape, box = one.get("segmentation"), one.get("bbox")
    if not box and isinstance(shape, list) and shape:
        points = [v for part in shape for v in part] if isinstance(shape[0], list) else shape
        xs, ys = points[::2], points[1::2]
        box = [min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)]
    elif not box and isinstance(shape, dict):
        runs = shape if isinstance(shape["counts"], str) else rle.frPyObjects(shape, *shape["size"])
        box = rle.toBbox(runs).tolist()
    number = one["category_id"]
    objects["bbox"].append([float(v) for v in box or ()])
    objects["category"].append(categories.get(number, f"category_id {number}"))
    objects["iscrowd"].append(bool(one.get("iscrowd", 0)))
    if "segmentation" in objects:
        objects["segmentation"].append(json.dumps(shape))


# YOLO's text files


def _yolo(folder: Path, columns: Mapping[str, str]) -> Layout | None:
    names, told, needs_masks = _yolo_names(folder), [], "instances" in columns
    splits: dict[str, list[dict[str, Any]]] = {}
    bad: list[str] = []
    for split, images, texts in _pairs(folder, TEXTS, {".txt"}):
        pairs, lines = _matched(images, texts, {".txt"})
        told += lines
        splits[split] = [
            {columns["image"]: _file(image), columns["objects"]: _yolo_objects(image, text, needs_masks, bad)}
            for image, text in pairs
        ]
    if not splits:
        return None
    every = [row[columns["objects"]] for rows in splits.values() for row in rows]
    numbers = {number for objects in every for number in objects["category"]}
    if not numbers:
        raise DataError(f"{folder}: no text file has an object in it; a line is `class x y width height`")
    if not names:
        names = {i: f"class {i}" for i in range(max(numbers) + 1)}
        told.append(f"{folder} has neither data.yaml nor classes.txt: classes have numbers for names")
    for objects in every:
        objects["category"] = [names.get(number, f"class number {number}") for number in objects["category"]]
    if needs_masks and not any(shape for objects in every for shape in objects["segmentation"] if shape != "[]"):
        raise DataError(f"{folder}: the text files have boxes and no polygons: object_detection.py reads them")
    if bad:
        told.append(f"{len(bad)} lines cannot be read, such as {bad[0]}")
    objects_of = OBJECTS | SHAPES if needs_masks else OBJECTS
    features = datasets.Features({columns["image"]: datasets.Image(decode=False), columns["objects"]: objects_of})
    return Layout("YOLO text files", splits, features, names, told=told)


def _yolo_objects(image: Path, text: Path | None, needs_masks: bool, bad: list[str]) -> dict[str, list[Any]]:
    objects: dict[str, list[Any]] = {key: [] for key in (*OBJECTS, *(SHAPES if needs_masks else ()))}
    lines = [] if text is None else text.read_text(encoding="utf-8", errors="replace").splitlines()
    if not any(lines):
        return objects
    try:
        with Image.open(image, formats=FORMATS) as opened:
            width, height = opened.size
            if opened.getexif().get(0x0112, 1) >= 5:  # it lies on its side, and is turned when it is read
                width, height = height, width
    except Exception:  # whatever a decoder trips over; that the image is bad is told where it is read
        return objects
    for place, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            number, *values = line.split()
            points = [float(v) for v in values]
            category = int(float(number))
            if len(points) not in (4, 5) and (len(points) < 6 or len(points) % 2):
                raise ValueError
        except ValueError:
            bad.append(f"line {place} of {text}: {printable(line[:60])!r}")
            continue
        polygon = [v * side for v, side in zip(points, [width, height] * len(points), strict=False)]
        if len(points) > 5:
            xs, ys = polygon[::2], polygon[1::2]
            box = [min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)]
        else:  # a fifth is how sure a detector was
            x, y, w, h = polygon[:4]
            box, polygon = [x - w / 2, y - h / 2, w, h], []
        objects["bbox"].append(box)
        objects["category"].append(category)
        objects["iscrowd"].append(False)
        if needs_masks:
            objects["segmentation"].append(json.dumps([polygon] if polygon else []))
    return objects


def _yolo_names(folder: Path) -> dict[int, str]:
    for path in (part / name for part in (folder, folder.parent) for name in YAMLS):
        if path.is_file() and (path.parent == folder or folder.name.lower() in sum(SPLITS.values(), ())):
            try:
                names = (yaml.safe_load(path.read_text(encoding="utf-8")) or {}).get("names")
                pairs = names.items() if isinstance(names, dict) else enumerate(names)
                return {int(i): str(name) for i, name in pairs}
            except (yaml.YAMLError, AttributeError, TypeError, ValueError) as error:
                raise DataError(f"{path} has no list `names` of classes: {error}") from error
    return _named(folder)[0]


# Names of classes


def _named(folder: Path) -> tuple[dict[int, str], dict[int, int]]:
    """Names of classes that a text file in the folder gives, and their colours if it does."""
    for name in COLOURS:
        if (folder / name).is_file():
            return _colours(folder / name)
    for name in LISTS:
        if (folder / name).is_file():
            lines = (folder / name).read_text(encoding="utf-8", errors="replace").splitlines()
            return dict(enumerate(line.strip() for line in lines if line.strip())), {}
    return {}, {}


def _colours(path: Path) -> tuple[dict[int, str], dict[int, int]]:
    text = path.read_text(encoding="utf-8", errors="replace")
    try:
        if path.suffix == ".csv":
            rows = [[v.strip() for v in row] for row in csv.reader(text.splitlines()) if row]
            entries = [(name, [int(v) for v in rgb[:3]]) for name, *rgb in rows if rgb and rgb[0].isdigit()]
        else:  # name:red,green,blue:parts:actions
            rows = [line.split(":") for line in text.splitlines() if line.strip() and not line.startswith("#")]
            entries = [(row[0], [int(v) for v in row[1].split(",")]) for row in rows]
        colours = {(r << 16) | (g << 8) | b: i for i, (_, (r, g, b)) in enumerate(entries)}
    except (IndexError, ValueError) as error:
        raise DataError(f"{path} must have a name and three numbers from 0 to 255 in each line: {error}") from error
    return {i: name for i, (name, _) in enumerate(entries)}, colours


# Files


def _file(path: Path) -> dict[str, Any]:
    return {"path": str(path), "bytes": None}


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES and path.is_file()


def _is_map(path: Path) -> bool:
    return bool(re.search(r"[_-](mask|masks|label|labels|gt|seg|segmentation|l|depth)$", path.stem.lower()))


def _key(path: Path) -> str:
    return ENDINGS.sub("", path.stem.lower())


def _child(folder: Path, names: Collection[str]) -> Path | None:
    found = {part.name.lower(): part for part in _folders(folder)}
    return next((found[name] for name in names if name in found), None)


def _folders(folder: Path) -> list[Path]:
    return sorted(part for part in folder.iterdir() if part.is_dir()) if folder.is_dir() else []


def _has(folder: Path, suffixes: Collection[str]) -> bool:
    return any(path.suffix.lower() in suffixes for path in folder.rglob("*"))

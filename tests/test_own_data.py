"""Folders of pictures and annotations as people have them, which `--dataset folder` alone is to read."""

import json
from argparse import Namespace

import numpy as np
import pytest
from accelerate import Accelerator
from PIL import Image
from pycocotools import mask as rle

from dense.arguments import parse
from dense.errors import DataError
from dense.loading import look_through
from depth_estimation import DepthEstimation
from instance_segmentation import InstanceSegmentation
from object_detection import ObjectDetection
from semantic_segmentation import SemanticSegmentation

SIZE = (30, 20)  # width and height


def loaded(task, folder, *arguments):
    """The task, both splits, and what was told of them."""
    args = parse(task, ["--dataset", str(folder), "--num_workers", "0", *map(str, arguments)])
    found, train, validation = task.load(args)
    return Namespace(task=found, train=train, validation=validation, told=" | ".join(train.told + validation.told))


def samples(found, rows):
    return [found.task.read(row, lambda *told: None) for row in rows]


def problems(found, rows):
    return " | ".join(look_through(found.task, rows, Accelerator()).lines())


def picture(path, value=0, mode="RGB", size=SIZE):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, value).save(path)


def mask(path, inside=1, outside=0, size=SIZE):
    path.parent.mkdir(parents=True, exist_ok=True)
    label = np.full(size[::-1], outside, np.uint8)
    label[5:15, 5:25] = inside
    Image.fromarray(label).save(path)


def pairs(images, masks, count=5, ending="", **values):
    for i in range(count):
        picture(images / f"{i}.jpg", i)
        mask(masks / f"{i}{ending}.png", **values)


# Images with masks


@pytest.mark.parametrize(
    "places",
    [
        {"train": ("train/images", "train/masks"), "validation": ("val/images", "val/masks")},
        {"train": ("images/train", "masks/train"), "validation": ("images/valid", "masks/valid")},
        {"train": ("train", "train_labels"), "validation": ("val", "val_labels")},
        {"train": ("Training/Images", "Training/GT"), "validation": ("Validation/Images", "Validation/GT")},
    ],
)
def test_images_and_masks_are_found_with_their_splits(tmp_path, places):
    for split, (images, masks) in places.items():
        pairs(tmp_path / images, tmp_path / masks, 4 if split == "train" else 2)
    found = loaded(SemanticSegmentation, tmp_path)
    assert (len(found.train), len(found.validation)) == (4, 2)
    assert "images with masks (train 4, validation 2)" in found.told
    assert found.task.id2label == {0: "background", 1: "foreground"}
    assert {0, 1} == set(np.unique(samples(found, found.train)[0].label))


@pytest.mark.parametrize("places", [("images", "masks", ""), ("imgs", "labels", "_L"), (".", ".", "_mask")])
def test_without_splits_a_fifth_is_drawn_by_the_seed_and_told(tmp_path, places):
    images, masks, ending = places
    pairs(tmp_path / images, tmp_path / masks, 10, ending)
    first, again, other = (loaded(SemanticSegmentation, tmp_path, "--data_seed", s) for s in (0, 0, 1))
    paths = [{row["image"]["path"] for row in one.validation} for one in (first, again, other)]
    assert paths[0] == paths[1] != paths[2]
    assert (len(first.train), len(first.validation)) == (8, 2)
    assert "no validation split: 2 of 10 rows, drawn by --data_seed 0, are kept for it" in first.told
    assert not paths[0] & {row["image"]["path"] for row in first.train}


def test_classes_are_those_of_a_text_file_and_colours_those_of_a_table(tmp_path):
    pairs(tmp_path / "images", tmp_path / "masks", inside=2)
    (tmp_path / "classes.txt").write_text("sky\nroad\ncar\n")
    assert loaded(SemanticSegmentation, tmp_path).task.id2label == {0: "sky", 1: "road", 2: "car"}
    (tmp_path / "classes.txt").unlink()
    assert loaded(SemanticSegmentation, tmp_path).task.id2label == {0: "class 0", 1: "class 2"}
    for i in range(5):
        painted = Image.new("RGB", SIZE, (128, 64, 128))
        painted.paste((0, 0, 142), (3, 3, 9, 9))
        painted.save(tmp_path / "masks" / f"{i}.png")
    found = loaded(SemanticSegmentation, tmp_path)
    assert found.task.id2label == {0: "#00008e", 1: "#804080"}
    assert "2 colours, and each is a class" in found.told
    (tmp_path / "class_dict.csv").write_text("name,r,g,b\nroad,128,64,128\ncar,0,0,142\n")
    found = loaded(SemanticSegmentation, tmp_path)
    assert found.task.id2label == {0: "road", 1: "car"}
    label = samples(found, found.train)[0].label
    assert label[0, 0] == 0
    assert label[5, 5] == 1
    Image.new("RGB", SIZE, (1, 2, 3)).save(tmp_path / "masks" / "0.png")
    every = problems(found, found.train) + problems(found, found.validation)
    assert "a colour that is no class (first: " in every
    assert "it has #010203" in every


def test_a_palette_counts_by_its_indices_and_a_jpeg_is_no_mask(tmp_path):
    pairs(tmp_path / "images", tmp_path / "masks")
    for path in (tmp_path / "masks").iterdir():
        indexed = Image.open(path).convert("P")
        indexed.putpalette([9, 9, 9, 200, 100, 0])
        indexed.save(path)
    assert loaded(SemanticSegmentation, tmp_path).task.id2label == {0: "background", 1: "foreground"}
    for path in (tmp_path / "masks").iterdir():
        Image.fromarray(np.random.default_rng(0).integers(0, 255, (20, 30, 3), np.uint8)).save(path)
    with pytest.raises(DataError, match=r"more than 64 values \(in .*\.jpg.*save masks as PNG"):
        loaded(SemanticSegmentation, tmp_path)


def test_what_is_wrong_with_files_is_told_with_their_names(tmp_path):
    pairs(tmp_path / "images", tmp_path / "masks", 9)
    picture(tmp_path / "images" / "bare.jpg")
    mask(tmp_path / "masks" / "lonely.png")
    mask(tmp_path / "masks" / "1.png", size=(40, 20))
    mask(tmp_path / "masks" / "2.png", inside=7)
    (tmp_path / "images" / "3.jpg").write_bytes(b"broken")
    (tmp_path / "classes.txt").write_text("background\ncat\n")
    found = loaded(SemanticSegmentation, tmp_path)
    assert "have no image, such as lonely.png" in found.told
    assert "have no annotation (left out), such as bare.jpg" in found.told
    every = problems(found, found.train) + problems(found, found.validation)
    assert "1 x label map of another size than the image (first: " in every
    assert "1.jpg (row" in every
    assert "40 x 20 instead of 30 x 20" in every
    assert "label outside id2label (first: " in every
    assert "it has 7" in every
    assert "image that cannot be read" in every


def test_names_that_do_not_fit_and_names_that_are_there_twice(tmp_path):
    pairs(tmp_path / "images", tmp_path / "masks")
    picture(tmp_path / "images" / "0.png")
    with pytest.raises(DataError, match=r"0\.jpg and .*0\.png have one name"):
        loaded(SemanticSegmentation, tmp_path)
    for path in (tmp_path / "masks").iterdir():
        path.rename(path.with_name(f"other{path.name}"))
    (tmp_path / "images" / "0.png").unlink()
    with pytest.raises(DataError, match=r"no file in .*masks has the name of an image in .*images"):
        loaded(SemanticSegmentation, tmp_path)


def test_depth_maps_are_found_as_masks_are(tmp_path):
    for i in range(5):
        picture(tmp_path / "rgb" / f"{i}.png")
        (tmp_path / "depth").mkdir(exist_ok=True)
        Image.fromarray(np.full((20, 30), 1500, np.uint16)).save(tmp_path / "depth" / f"{i}.png")
    found = loaded(DepthEstimation, tmp_path, "--depth_scale", 1000)
    assert samples(found, found.validation)[0].depth.max() == 1.5


# COCO's JSON


def coco(count=3, first=0, **more):
    whole = rle.encode(np.asfortranarray(np.eye(20, 30, dtype=np.uint8)))
    runs = {"size": whole["size"], "counts": whole["counts"].decode()}
    polygon = [[2, 2, 12, 2, 12, 10, 2, 10]]
    shapes = [{"bbox": [2, 2, 10, 8], "segmentation": polygon}, {"bbox": [0, 0, 20, 20], "segmentation": runs}]
    return {
        "images": [{"id": first + i, "file_name": f"{i}.jpg", "width": 30, "height": 20} for i in range(count)],
        "annotations": [
            {"id": 2 * i + j, "image_id": first + i, "category_id": 7, "iscrowd": 0, **shape}
            for i in range(count)
            for j, shape in enumerate(shapes)
        ],
        "categories": [
            {"id": 0, "name": "cells", "supercategory": "none"},
            {"id": 7, "name": "rbc", "supercategory": "cells"},
        ],
    } | more


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def coco_folder(root, place, count, content):
    """Two splits with images and the same annotations, as Roboflow or as COCO lays them out."""
    for split, own in (("train", "train"), ("valid", "val")):
        folder = root / (split if place == "roboflow" else f"{own}2017")
        for i in range(count):
            picture(folder / f"{i}.jpg")
        at = folder / "_annotations.coco.json"
        write(at if place == "roboflow" else root / "annotations" / f"instances_{own}2017.json", content)


@pytest.mark.parametrize("place", ["roboflow", "coco"])
def test_coco_json_beside_the_images_and_in_annotations(tmp_path, place):
    coco_folder(tmp_path, place, 3, coco())
    for task in (ObjectDetection, InstanceSegmentation):
        found = loaded(task, tmp_path)
        assert found.task.id2label == {0: "rbc"}
        assert "COCO JSON (train 3, validation 3)" in found.told
        sample = samples(found, found.train)[0]
        assert sample.classes.tolist() == [0, 0]
    assert sample.masks.sum((1, 2)).tolist() == [80, 20]
    with pytest.raises(DataError, match=r"semantic_segmentation\.py read them"):
        loaded(DepthEstimation, tmp_path)


SQUARE, STRIPE = [[2, 2, 12, 2, 12, 10, 2, 10]], [[0, 4, 30, 4, 30, 6, 0, 6]]


def scene(**more):
    """A large crowd of cars as run lengths, a square car in it, a stripe of road that is smaller, and nothing."""
    crowd = rle.encode(np.asfortranarray(np.ones((20, 30), np.uint8)))
    runs = {"size": crowd["size"], "counts": crowd["counts"].decode()}
    shapes = [("car", SQUARE, 0), ("road", STRIPE, 0), ("car", runs, 1)]
    ids = {"car": 3, "road": 8}
    return {
        "images": [{"id": i, "file_name": f"{i}.jpg", "width": 30, "height": 20} for i in range(4)],
        "annotations": [
            {"id": 3 * i + j, "image_id": i, "category_id": ids[name], "segmentation": shape, "iscrowd": crowd}
            for i in range(3)
            for j, (name, shape, crowd) in enumerate(shapes[: i + 1])
        ],
        "categories": [{"id": number, "name": name} for name, number in ids.items()],
    } | more


@pytest.mark.parametrize("place", ["roboflow", "coco"])
def test_coco_objects_are_drawn_as_masks_the_smaller_in_front(tmp_path, place):
    coco_folder(tmp_path, place, 4, scene())
    found = loaded(SemanticSegmentation, tmp_path)
    assert found.task.id2label == {0: "background", 1: "car", 2: "road"}
    assert "COCO JSON (train 4, validation 4)" in found.told
    assert "what none covers is 'background'; to ignore it, call class 0 'unlabelled' with --id2label" in found.told
    one, two, three, none = (sample.label for sample in samples(found, found.train))
    assert np.bincount(one.ravel(), minlength=3).tolist() == [600 - 80, 80, 0]
    assert np.bincount(two.ravel(), minlength=3).tolist() == [600 - 60 - 80 + 20, 60, 60]
    assert (two[4:6] == 2).all()  # 60 pixels are fewer than 80, whatever comes first in the file
    assert np.bincount(three.ravel(), minlength=3).tolist() == [0, 540, 60]
    assert not none.any()
    write(tmp_path / "names.json", {"0": "unlabelled", "1": "car", "2": "road"})
    found = loaded(SemanticSegmentation, tmp_path, "--id2label", tmp_path / "names.json")
    assert found.task.id2label == {0: "car", 1: "road"}
    assert sorted(np.unique(found.task.read(found.train[1], print).label)) == [0, 1, 255]
    assert "label map without a class: every pixel is ignored" in problems(found, found.train)
    with pytest.raises(DataError, match="--reduce_labels is for masks"):
        loaded(SemanticSegmentation, tmp_path, "--reduce_labels")


def test_what_objects_cannot_be_drawn_is_told(tmp_path):
    for i in range(4):
        picture(tmp_path / "images" / f"{i}.jpg")
    odd = scene(categories=[{"id": 3, "name": "car"}, {"id": 8, "name": "Void"}])
    odd["annotations"].append({"id": 99, "image_id": 3, "category_id": 9, "segmentation": SQUARE})
    odd["annotations"].append({"id": 98, "image_id": 3, "category_id": 3, "bbox": [0, 0, 5, 5]})
    odd["annotations"].append({"id": 97, "image_id": 3, "category_id": 3, "segmentation": SQUARE})
    write(tmp_path / "annotations.json", odd)
    found = loaded(SemanticSegmentation, tmp_path)
    assert found.task.id2label == {0: "car"}
    assert "what none covers is 'Void', which is ignored" in found.told
    every = problems(found, found.train) + problems(found, found.validation)
    assert "category outside id2label (first: " in every
    assert "object without a mask (first: " in every
    for one in odd["annotations"]:
        one.update(bbox=[0, 0, 5, 5], segmentation=[])
    write(tmp_path / "annotations.json", odd)
    with pytest.raises(DataError, match=r"boxes and no masks \(`segmentation`\): object_detection\.py reads it"):
        loaded(SemanticSegmentation, tmp_path)


def test_damaged_coco_json_is_named(tmp_path):
    for i in range(3):
        picture(tmp_path / "images" / f"{i}.jpg")
    path = tmp_path / "annotations.json"
    for content, message in (
        (coco(annotations=[]), r"annotations\.json has no annotations"),
        (coco(images=[]), r"annotations\.json has no images"),
        (coco(images=[{"id": 1, "file_name": "nowhere.jpg"}]), r"none of them is there \('nowhere\.jpg'"),
        (coco(annotations=[{"image_id": 1}]), "without its fields: KeyError"),
    ):
        write(path, content)
        with pytest.raises(DataError, match=message):
            loaded(ObjectDetection, tmp_path)
    path.write_text("{")
    with pytest.raises(DataError, match=r"annotations\.json is no JSON"):
        loaded(ObjectDetection, tmp_path)
    odd = coco(5)
    odd["annotations"][0] |= {"category_id": 9}
    odd["annotations"][2] |= {"bbox": [50, 50, 5, 5]}
    odd["annotations"].append({"id": 99, "image_id": 77, "category_id": 7, "bbox": [0, 0, 1, 1]})
    write(path, odd)
    found = loaded(ObjectDetection, tmp_path)
    assert "names 2 images that are not there, such as 3.jpg" in found.told
    assert "has 1 annotations of no image" in found.told
    every = problems(found, found.train) + problems(found, found.validation)
    assert "category outside id2label (first: " in every
    assert "it has 'category_id 9'" in every
    assert "box outside the image (first: " in every


# YOLO's text files


def yolo(folder, text="0 0.5 0.5 0.4 0.5\n1 0.2 0.2 0.1 0.1\n", names=True):
    for split in ("train", "val"):
        for i in range(3):
            picture(folder / "images" / split / f"{i}.jpg")
            path = folder / "labels" / split / f"{i}.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
    if names:
        (folder / "data.yaml").write_text("names:\n  0: helmet\n  1: glove\n")


def test_yolo_boxes_and_polygons(tmp_path):
    yolo(tmp_path)
    (tmp_path / "labels" / "train" / "2.txt").unlink()
    found = loaded(ObjectDetection, tmp_path)
    assert found.task.id2label == {0: "helmet", 1: "glove"}
    assert "1 images in" in found.told
    first, *_, bare = samples(found, found.train)
    assert np.allclose(first.boxes[0], [9, 5, 21, 15])
    assert not len(bare.boxes)
    with pytest.raises(DataError, match="boxes and no polygons"):
        loaded(InstanceSegmentation, tmp_path)
    yolo(tmp_path / "shapes", "1 0.1 0.1 0.6 0.1 0.6 0.6 0.1 0.6\n", names=False)
    found = loaded(InstanceSegmentation, tmp_path / "shapes")
    assert "classes have numbers for names" in found.told
    sample = samples(found, found.train)[0]
    assert found.task.id2label[sample.classes[0]] == "class 1"
    assert sample.masks.sum() == 150
    found = loaded(SemanticSegmentation, tmp_path / "shapes")
    assert found.task.id2label == {0: "background", 1: "class 0", 2: "class 1"}
    assert np.bincount(samples(found, found.train)[0].label.ravel()).tolist() == [450, 0, 150]


def test_lines_and_classes_that_yolo_files_should_not_have(tmp_path):
    yolo(tmp_path, "0 0.5 0.5 0.4 0.5\n5 0.5 0.5 0.4 0.5\n0 0.5 what 0.4 0.5\n0 9 9 0.1 0.1\n")
    found = loaded(ObjectDetection, tmp_path)
    assert "6 lines cannot be read, such as line 3 of " in found.told
    every = problems(found, found.train)
    assert "category outside id2label" in every
    assert "it has 'class number 5'" in every
    assert "box outside the image" in every
    yolo(tmp_path, "")
    with pytest.raises(DataError, match="no text file has an object in it"):
        loaded(ObjectDetection, tmp_path)

"""How the examples read datasets: the Hub's columns, bad input, augmentation, the order of draws."""

import io
import json
import re
import warnings
import zlib
from argparse import Namespace

import datasets
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import get_peft_model
from PIL import Image
from pycocotools import mask as rle

import tiny
from sfa_peft import SFAConfig, search_ticket

from dense.arguments import parse
from dense.augmentation import Augmentation, finished, to_tensors
from dense.checkpoints import Progress
from dense.data import load_splits
from dense.diagram import block_of, cell_of, diagram_of
from dense.errors import DataError
from dense.loading import Draws, TrainBatches, check_all, eval_batches
from dense.pictures import (
    RELATIVE_ERRORS,
    WRONG_OBJECTS,
    paint_objects,
    paint_relative_errors,
    paint_wrong_objects,
    paint_wrong_pixels,
    palette,
    save_grid,
)
from dense.report import Report
from dense.samples import (
    BadSampleError,
    Classes,
    Problems,
    Sample,
    boxes_of,
    read_depth,
    read_image,
    read_label,
    read_masks,
    read_objects,
    read_picture,
)
from dense.scenes import CLASSES, THINGS, make_scenes
from depth_estimation import DepthEstimation
from instance_segmentation import InstanceSegmentation
from object_detection import ObjectDetection
from semantic_segmentation import SemanticSegmentation

TASKS = (SemanticSegmentation, InstanceSegmentation, ObjectDetection, DepthEstimation)


def stored(image, form="PNG"):
    """An image as a dataset has it before it is decoded."""
    buffer = io.BytesIO()
    image.save(buffer, format=form)
    return {"bytes": buffer.getvalue(), "path": "some.png"}


class Notes(list):
    """Collects what a reader leaves out."""

    def __call__(self, kind, detail=""):
        self.append(kind)


# Images


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "I;16", "I"])
@pytest.mark.parametrize("size", [(1, 1), (5, 1), (1, 7), (33, 21)])
def test_images_of_any_mode_and_size(mode, size):
    if mode in ("I;16", "I"):
        values = np.full(size[::-1], 0x8080, np.uint16 if mode == "I;16" else np.int32)
        image = Image.fromarray(values)
    else:
        image = Image.new("RGB", size, (128, 128, 128)).convert(mode)
    found = read_image(stored(image, {"CMYK": "TIFF", "I": "TIFF", "YCbCr": "JPEG"}.get(mode, "PNG")))
    assert (found.mode, found.size) == ("RGB", size)
    if mode in ("I;16", "I", "L", "RGB", "RGBA"):
        assert np.asarray(found).max() == np.asarray(found).min() == 128
    tensors = finished(to_tensors(Sample(found), (32, 48)))
    assert tensors["image"].shape == (3, 32, 48)
    assert tensors["image"].isfinite().all()


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (None, "image missing"),
        ({"bytes": b"no image", "path": None}, "image that cannot be read"),
        ({"bytes": stored(Image.new("RGB", (40, 40)))["bytes"][:60], "path": None}, "image that cannot be read"),
        ({"bytes": None, "path": "/nowhere.png"}, "image that cannot be read"),
        (stored(Image.fromarray(np.full((4, 4), 1 << 20, np.int32)), "TIFF"), "image of 32-bit integers outside"),
        (stored(Image.fromarray(np.full((4, 4), np.nan, np.float32)), "TIFF"), "image of floats outside"),
    ],
)
def test_an_image_that_cannot_be_used_says_why(value, kind):
    with pytest.raises(BadSampleError, match=kind):
        read_image(value)


def bomb(form, side=13_000):
    """A small file of an image with very many pixels."""
    buffer = io.BytesIO()
    image = Image.new("1" if form in ("PNG", "TIFF") else "L", (side, side))
    more = {"save_all": True, "append_images": [image.resize((9, 9))]} if form == "GIF" else {}
    image.save(buffer, format=form, compression="tiff_deflate", **more)
    return buffer.getvalue()


@pytest.mark.parametrize("form", ["PNG", "GIF", "TIFF"])
def test_a_picture_of_too_many_pixels_is_refused_by_its_header(tmp_path, form, monkeypatch):
    path = tmp_path / f"bomb.{form.lower()}"
    path.write_bytes(bomb(form))
    assert path.stat().st_size < 3e6
    monkeypatch.setattr(Image.Image, "load", None)  # nothing is decoded
    with pytest.raises(BadSampleError, match=r"of too many pixels: 'bomb\.\w+' has 13,000 x 13,000, and 50,000,000"):
        read_picture(path)


def test_a_picture_of_more_pixels_than_pillow_takes_is_refused(tmp_path):
    sizes = b"IHDR" + (100_000).to_bytes(4, "big") * 2 + b"\x08\x02\0\0\0"
    chunks = [part + zlib.crc32(part).to_bytes(4, "big") for part in (sizes, b"IDAT" + zlib.compress(bytes(9)))]
    whole = b"".join((len(chunk) - 8).to_bytes(4, "big") + chunk for chunk in chunks)
    (tmp_path / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + whole)
    with pytest.raises(BadSampleError, match=r"image of too many pixels: 'bomb\.png'"):
        read_picture(tmp_path / "bomb.png")


@pytest.mark.parametrize(
    ("mode", "form"), [("CMYK", "JPEG"), ("I;16", "PNG"), ("P", "PNG"), ("LA", "PNG"), ("RGB", "WEBP"), ("1", "BMP")]
)
def test_pictures_of_any_mode_are_read_and_shrunk_to_a_screen(tmp_path, mode, form):
    Image.new(mode, (2600, 40)).save(tmp_path / "picture", format=form)
    image = read_picture(tmp_path / "picture")
    assert (image.mode, image.size) == ("RGB", (1280, 20))


def test_of_an_animation_the_first_picture_is_taken(tmp_path):
    colours = ("red", "lime")
    for form in ("GIF", "WEBP", "PNG"):
        first, second = (Image.new("RGB", (8, 8), colour) for colour in colours)
        first.save(tmp_path / "moving", format=form, save_all=True, append_images=[second], lossless=True)
        assert read_picture(tmp_path / "moving").getpixel((4, 4))[0] > 200


@pytest.mark.parametrize("content", ["text", "svg", "truncated", "empty", "postscript", "no pixel", "changed"])
def test_a_picture_that_cannot_be_read_is_named_and_its_folder_is_not(tmp_path, content):
    whole = stored(Image.effect_noise((64, 64), 50))["bytes"]
    contents = {
        "text": b"plain text",
        "svg": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        "truncated": whole[: len(whole) // 2],
        "empty": b"",
        "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n",
        "no pixel": whole[:16] + bytes(8) + whole[24:],
        "changed": whole[:200] + bytes(100) + whole[300:],
    }
    (tmp_path / "<b>.png").write_bytes(contents[content])
    with pytest.raises(BadSampleError, match=r"'<b>\.png'") as raised:
        read_picture(tmp_path / "<b>.png")
    assert str(tmp_path) not in str(raised.value)
    assert "\n" not in str(raised.value)


def test_an_image_that_lies_on_its_side_is_turned(tmp_path):
    image = Image.new("RGB", (6, 4))
    exif = image.getexif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", exif=exif)
    assert read_image({"bytes": buffer.getvalue(), "path": None}).size == (4, 6)
    (tmp_path / "turned.jpg").write_bytes(buffer.getvalue())
    assert read_picture(tmp_path / "turned.jpg").size == (4, 6)


# Label maps


def test_label_maps_of_palettes_and_of_equal_channels():
    ids = np.array([[0, 1], [2, 255]], np.uint8)
    palette = Image.fromarray(ids, mode="P")
    palette.putpalette([i for i in range(256) for _ in range(3)][::-1])
    for image in (Image.fromarray(ids), palette, Image.fromarray(np.repeat(ids[..., None], 3, 2))):
        assert np.array_equal(read_label(stored(image), (2, 2)), ids)
    with pytest.raises(BadSampleError, match="colours"):
        read_label(stored(Image.fromarray(np.dstack([ids, ids, ids + 1]))), (2, 2))
    with pytest.raises(BadSampleError, match="another size"):
        read_label(stored(Image.fromarray(ids)), (3, 2))


def test_classes_leave_out_what_is_ignored_and_refuse_what_is_unknown():
    classes = Classes({0: "sky", 4: "Void", 7: "road"})
    assert classes.id2label == {0: "sky", 1: "road"}
    assert classes.of_map(np.array([[0, 4], [7, 255]])).tolist() == [[0, 255], [1, 255]]
    with pytest.raises(BadSampleError, match="outside id2label") as error:
        classes.of_map(np.array([[0, 5]]))
    assert error.value.detail == "it has 5"
    with pytest.raises(BadSampleError, match="every pixel is ignored"):
        classes.of_map(np.array([[4, 255]]))
    with pytest.raises(DataError, match="no class"):
        Classes({0: "unlabelled"})


HOSTILE = [
    *(r"$\foo$", "$", "\ud800", "![](http://x/y.png)", "<script>alert(1)</script>", "<img src=http://x/y.png>"),
    *("long " * 999, "", " ", "_x", "a\x1b[31m\nb", "{{ 7 * 7 }}"),
]


def test_names_of_classes_are_shown_as_one_short_line_of_text_each():
    classes = Classes(dict(enumerate([*HOSTILE, *HOSTILE])))
    shown = list(classes.id2label.values())
    assert len(set(shown)) == len(shown) == 2 * len(HOSTILE)
    for name in shown:
        assert name.encode("utf-8")
        assert 0 < len(name) <= 60
        assert not set(name) & {"\n", "\x1b", "\ud800"}
    assert Classes(classes.id2label).id2label == classes.id2label  # those that a run has recorded
    assert classes.of_object("_x") == len(HOSTILE) + HOSTILE.index("_x")  # rows have the dataset's own names
    assert Classes({0: "sky", 1: "straße \u3000日本"}).id2label == {0: "sky", 1: "straße \u3000日本"}


def test_pictures_take_any_name_as_text(tmp_path):
    names = Classes(dict(enumerate(HOSTILE))).id2label
    image = np.zeros((40, 60, 3), np.uint8)
    legend = dict(zip(names.values(), palette(len(names)), strict=True))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save_grid(tmp_path / "grid.png", {"image": [image], r"$\foo$": [image]}, legend, r"$\title$ $")
    count = len(names)
    objects = {"labels": np.arange(count), "boxes": np.tile([1, 1, 20, 20], (count, 1)), "scores": np.ones(count)}
    assert paint_objects(image, objects, names, palette(count)).any()


def test_reduced_labels_begin_at_one():
    args = parse(SemanticSegmentation, ["--reduce_labels"])
    task = SemanticSegmentation(args, Classes({0: "wall", 1: "floor"}))
    label = Image.fromarray(np.array([[0, 1], [2, 255]], np.uint8))
    sample = task.read({"image": stored(Image.new("RGB", (2, 2))), "label": stored(label)}, Notes())
    assert sample.label.tolist() == [[255, 0], [1, 255]]


# Objects

KEYS = {"bbox": "bbox", "category": "category"}


def objects_of(boxes, categories=None, corners=False, **more):
    notes = Notes()
    value = {"bbox": boxes, "category": [0] * len(boxes) if categories is None else categories, **more}
    return read_objects(value, Classes({0: "cell", 1: "void"}), (100, 200), KEYS, corners, notes), notes


def test_boxes_are_cut_off_and_useless_ones_left_out():
    found, notes = objects_of(
        [[10, 10, 20, 30], [190, 90, 50, 50], [300, 10, 5, 5], [5, 5, 0, 9], [0, 0, float("nan"), 4], [-0.5, 0, 10, 9]]
    )
    assert found["boxes"].tolist() == [[10, 10, 30, 40], [190, 90, 200, 100], [0, 0, 9.5, 9]]
    assert found["index"].tolist() == [0, 1, 5]
    assert sorted(notes) == sorted(
        [
            "box beyond the image's edge, cut off",
            "box outside the image",
            "box without area",
            "box that is not four finite numbers",
        ]
    )
    assert objects_of([[10, 10, 30, 40]], corners=True)[0]["boxes"].tolist() == [[10, 10, 30, 40]]


def test_categories_by_number_and_by_name():
    found, notes = objects_of([[0, 0, 9, 9]] * 5, [0, "cell", 1, 9, "ghost"], iscrowd=[0, 1, 0, 0, 0])
    assert found["classes"].tolist() == [0, 0]
    assert found["crowd"].tolist() == [False, True]
    assert notes == ["category outside id2label"] * 2  # 1 is void: ignored without a word
    as_list = [{"bbox": [0, 0, 9, 9], "category": 0, "area": 50.0}]
    listed = read_objects(as_list, Classes({0: "cell"}), (100, 200), KEYS, False, notes)
    assert listed["areas"].tolist() == [50]


def test_a_category_that_is_no_number_is_no_class():
    found, notes = objects_of([[0, 0, 9, 9]] * 3, [0.0, float("nan"), None])
    assert found["classes"].tolist() == [0]
    assert notes == ["category outside id2label"] * 2


def test_objects_under_other_keys_are_told():
    with pytest.raises(DataError, match=r"no 'bbox': they have \['boxes', 'category'\].*--bbox_key"):
        read_objects({"boxes": [[0, 0, 9, 9]], "category": [0]}, Classes({0: "a"}), (9, 9), KEYS, False, Notes())


def test_more_classes_than_a_label_map_can_tell():
    with pytest.raises(DataError, match="300 classes"):
        Classes({i: str(i) for i in range(300)}).of_map(np.zeros((2, 2), np.int64))


def test_a_depth_map_that_is_no_rectangle():
    with pytest.raises(BadSampleError, match="no rectangle"):
        read_depth([[1.0, 2.0], [3.0]], (2, 2), 1.0, Notes())


@pytest.mark.parametrize("streaming", [False, True])
def test_pictures_are_of_the_next_rows_where_some_are_bad(folder, tmp_path, streaming):
    spoiled(folder, tmp_path, "image", lambda i: {"bytes": b"broken", "path": f"{i}.jpg"}, at=(0, 1))
    args = flags(DepthEstimation, "--dataset", tmp_path, *(["--streaming"] if streaming else []))
    task, train, _ = DepthEstimation.load(args)
    report = Report(task, tmp_path, train, Accelerator(), Progress(), {}, {}, "")
    report.read_samples()
    assert report.samples


def test_images_without_objects_are_examples_and_those_without_a_usable_one_are_not():
    assert objects_of([])[0]["boxes"].shape == (0, 4)
    assert read_objects(None, Classes({0: "a"}), (9, 9), KEYS, False, Notes())["classes"].shape == (0,)
    with pytest.raises(BadSampleError, match="no usable object"):
        objects_of([[300, 300, 5, 5]])
    with pytest.raises(BadSampleError, match="another number"):
        objects_of([[0, 0, 5, 5]], [0, 0])


def test_masks_of_polygons_run_lengths_and_maps_of_ids():
    mask = np.zeros((100, 200), np.uint8)
    mask[10:40, 10:30] = 1
    runs = rle.encode(np.asfortranarray(mask))
    uncompressed = {"size": [100, 200], "counts": [10 * 100 + 10] + [30, 70] * 19 + [30, 170 * 100 + 60]}
    polygon = [10, 10, 30, 10, 30, 40, 10, 40]
    columns = {"objects": "objects", "instances": "instances"}
    objects, _ = objects_of([[10, 10, 20, 30]])
    for shape in (runs, uncompressed, polygon, [polygon]):
        found = read_masks({"objects": {"segmentation": [shape]}}, columns, objects, (100, 200))
        assert (found[0] == mask).mean() > 0.99
    ids = stored(Image.fromarray(5 * mask))
    assert np.array_equal(
        read_masks({"objects": {"id": [5]}, "instances": ids}, columns, objects, (100, 200))[0], mask
    )
    with pytest.raises(BadSampleError, match="no masks"):
        read_masks({"objects": {"id": [5]}}, columns, objects, (100, 200))
    for broken in ([1, 2, 3], {"size": [9, 9], "counts": runs["counts"]}, {"counts": 7}):
        with pytest.raises(BadSampleError, match="mask"):
            read_masks({"objects": {"segmentation": [broken]}}, columns, objects, (100, 200))


# Pictures of errors, and of the ticket


def test_objects_are_found_missed_or_not_there():
    image = np.full((60, 90, 3), 128, np.uint8)
    truth = {"labels": np.array([0, 1]), "boxes": np.array([[5, 5, 25, 25], [60, 5, 80, 25]], np.float32)}
    found = {
        "labels": np.array([0, 0, 1]),
        "boxes": np.array([[6, 5, 25, 25], [60, 5, 80, 25], [5, 35, 25, 55]], np.float32),
        "scores": np.array([0.9, 0.8, 0.1]),
    }
    picture = paint_wrong_objects(image, truth, found)
    shown = {name for name, c in WRONG_OBJECTS.items() if (picture == [int(255 * v) for v in c]).all(-1).any()}
    assert "found" in shown
    assert "missed" in shown  # drawn over the box of another class at its place, which is not there
    alone = paint_wrong_objects(image, truth | {"labels": np.array([0, 5])}, found)
    assert alone.shape == picture.shape


def test_pixels_and_depths_that_are_wrong_are_seen():
    image = np.full((4, 6, 3), 100, np.uint8)
    wrong, ignored = np.zeros((4, 6), bool), np.zeros((4, 6), bool)
    wrong[0], ignored[3] = True, True
    picture = paint_wrong_pixels(image, wrong, ignored).astype(int)
    assert (picture[0, :, 0] > picture[0, :, 1] + 100).all()
    assert (picture[1:3] == picture[1:3, :, :1]).all()
    assert picture[3].max() < picture[1].min()
    truth = np.array([[1.0, 1.0, 0.0]])
    depth = paint_relative_errors(truth, np.array([[1.0, 9.0, 5.0]]), truth > 0)
    ends = [[int(255 * v) for v in c] for c in (next(iter(RELATIVE_ERRORS.values())), [*RELATIVE_ERRORS.values()][-1])]
    assert depth[0].tolist() == [*ends, [0, 0, 0]]


def test_the_ticket_is_a_table_of_blocks_and_modules():
    model = get_peft_model(tiny.swin(), SFAConfig(budget=0.1, modules_to_save=["decode_head"]))
    diagram = diagram_of(search_ticket(model, [tiny.batch()], steps=1).ticket)
    blocks = [name for name, _, _ in diagram.rows]
    assert blocks[0] == "stage 1, block 1"
    assert len(blocks) == len(set(blocks))
    assert diagram.columns[:4] == ["q", "k", "v", "out"]
    assert all(cell is None or cell.words for _, cells, _ in diagram.rows for cell in cells)
    assert [cell_of(density, 0.1).level for density in (0, 0.01, 0.1, 0.3, 0.5)] == [0, 1, 2, 3, 4]
    assert block_of("encoder.layer.11.mlp.fc1") == "block 12"
    assert block_of("backbone.embeddings.norm") == "outside of blocks"


# Depth


def test_depth_of_images_and_of_numbers():
    metres = np.array([[1.5, 0.0], [3.0, 60.0]], np.float32)
    notes = Notes()
    assert np.array_equal(read_depth(metres.tolist(), (2, 2), 1.0, notes), metres)
    millimetres = stored(Image.fromarray((1000 * metres).astype(np.uint16)))
    assert np.allclose(read_depth(millimetres, (2, 2), 1000.0, notes), metres)
    assert np.array_equal(read_depth(stored(Image.fromarray(metres), "TIFF"), (2, 2), 1.0, notes), metres)
    assert not notes
    odd = read_depth([[np.nan, -1.0], [np.inf, 2.0]], (2, 2), 1.0, notes)
    assert odd.tolist() == [[0, 0], [0, 2]]
    assert notes == ["depth not finite or negative"]
    for value, kind in (
        ([[0.0, np.nan]], "without a known pixel"),
        (None, "missing"),
        ([[1.0]], "another size"),
        (np.ones((1, 2, 3)), "one channel"),
        ({"bytes": b"x", "path": None}, "cannot be read"),
    ):
        with pytest.raises(BadSampleError, match=kind):
            read_depth(value, (1, 2), 1.0, Notes())


# Augmentation


SIZE = (80, 112)


def rectangles(seed):
    """Bright rectangles of known depth as a sample with masks, and as one with boxes, both resized."""
    rng = np.random.default_rng(seed)
    image, label = np.zeros((*SIZE, 3), np.uint8), np.zeros(SIZE, np.uint8)
    depth, masks = np.full(SIZE, 50, np.float32), []
    for row, column in ((0, 0), (0, 1), (1, 0), (1, 1)):
        top, left = (int(v) for v in np.array([40 * row, 56 * column]) + rng.integers(0, 12, 2))
        height, width = (int(v) for v in rng.integers(10, 26, 2))
        mask = np.zeros(SIZE, bool)
        mask[top : top + height, left : left + width] = True
        masks.append(mask)
        number = len(masks)
        image[mask], label[mask], depth[mask] = 60 * number, number, 10 * number
    masks = np.array(masks)
    more = {"label": label, "depth": depth, "classes": np.arange(4)}
    image = Image.fromarray(image)
    return (
        to_tensors(Sample(image, masks=masks, **more), SIZE),
        to_tensors(Sample(image, boxes=boxes_of(masks), **more), SIZE),
    )


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10_000), st.integers(0, 10_000))
def test_image_masks_boxes_and_depth_change_together(scene, seed):
    with_masks, with_boxes = rectangles(scene)
    augment = Augmentation(SIZE)
    augment.changes = augment.changes[:2]  # colours would hide which rectangle is which
    a, b = finished(augment(with_masks, (seed,))), finished(augment(with_boxes, (seed,)))
    assert torch.equal(a["image"], b["image"])
    masks = dict(zip(a["classes"].tolist(), a["masks"], strict=True))
    for category, mask in masks.items():
        assert (a["label"][mask] == category + 1).all()
        depth = a["depth"][mask]
        assert torch.allclose(depth, depth[0])
    far = a["depth"][a["label"] == 0]
    assert torch.allclose(far, far[0])
    for category, box in zip(b["classes"].tolist(), b["boxes"], strict=True):
        assert (box[2:] > box[:2]).all()
        own = a["boxes"][a["classes"].tolist().index(category)]
        assert (box - own).abs().max() < 2  # a pixel of resampling
    gone = set(masks) - set(b["classes"].tolist())
    assert all(masks[category].sum() < 0.2 * with_masks["masks"][category].sum() * 2.8 for category in gone)


def test_depth_is_divided_by_the_zoom():
    size = (40, 60)
    sample = Sample(Image.new("RGB", (60, 40)), depth=np.full((40, 60), 8.0, np.float32))
    tensors = to_tensors(sample, size)
    columns = np.tile(np.linspace(0, 1, 60), (40, 1))
    tensors["image"] = torch.from_numpy(columns).float().expand(3, 40, 60).clone()
    for seed in range(20):
        augment = Augmentation(size)
        augment.changes = augment.changes[:2]  # the crop and the flip
        changed = augment(tensors, (seed,))
        depth = changed["depth"].unique()
        assert len(depth) == 1
        span = changed["image"].max() - changed["image"].min()  # the part of the width that the crop shows
        assert depth.item() / 8 == pytest.approx(span.item(), abs=0.05)
        assert 0.55 < depth.item() / 8 <= 1.001


def test_augmentation_depends_on_its_seed_alone():
    tensors, _ = rectangles(3)
    augment = Augmentation(SIZE)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first, again, other = (augment(tensors, seed)["image"] for seed in ((1, 2), (1, 2), (1, 3)))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), before)


# The order of draws


@settings(deadline=None)
@given(st.integers(1, 30), st.integers(1, 7), st.integers(1, 3), st.integers(0, 20))
def test_every_process_draws_its_part_and_every_row_comes_once_an_epoch(count, batch, world, start):
    stop = start + 2 * count
    ranks = [list(Draws(count, batch, 5, rank, world, 0, stop)) for rank in range(world)]
    in_order = [draw for step in zip(*ranks, strict=True) for own in step for draw in own]
    assert [number for _, number in in_order] == list(range(len(in_order)))
    epochs = [[row for row, _ in in_order[at : at + count]] for at in range(0, len(in_order) - count, count)]
    assert all(sorted(epoch) == list(range(count)) for epoch in epochs)
    later = list(Draws(count, batch, 5, 0, world, start, stop))
    assert later == ranks[0][start:]  # a resumed run draws what is left


# Datasets


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A dataset with every column, as a folder, with a few rows that cannot be used."""
    root = tmp_path_factory.mktemp("scenes")
    rows = make_scenes(12, seed=1)
    rows.to_parquet(root / "train.parquet")
    rows.select(range(4)).to_parquet(root / "validation.parquet")
    (root / "id2label.json").write_text(json.dumps(dict(enumerate(CLASSES))))
    return root


def flags(task, *arguments):
    return parse(task, ["--image_size", "48", "64", "--batch_size", "2", "--num_workers", "0", *map(str, arguments)])


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("task_class", TASKS)
def test_batches_of_every_task_whole_and_streamed(folder, task_class, streaming):
    args = flags(task_class, "--dataset", folder, *(["--streaming"] if streaming else []))
    task, train, validation = task_class.load(args)
    batches = iter(TrainBatches(task, train, Accelerator(), seed=0))
    seen = [next(batches) for _ in range(8)]  # more than an epoch
    assert all(batch["pixel_values"].shape == (2, 3, 48, 64) for batch in seen)
    again = iter(TrainBatches(task, train, Accelerator(), seed=0, start=3))
    assert torch.equal(next(again)["pixel_values"], seen[3]["pixel_values"])
    samples = [s for _, own in eval_batches(task, validation, Accelerator(), Problems()) for s in own]
    assert len(samples) == 4


def test_workers_change_nothing(folder):
    task, train, _ = ObjectDetection.load(flags(ObjectDetection, "--dataset", folder))
    alone = [next(it) for it in [iter(TrainBatches(task, train, Accelerator(), seed=3))] for _ in range(4)]
    task.args.num_workers = 2
    helped = [next(it) for it in [iter(TrainBatches(task, train, Accelerator(), seed=3))] for _ in range(4)]
    for a, b in zip(alone, helped, strict=True):
        assert torch.equal(a["pixel_values"], b["pixel_values"])
        assert all(torch.equal(x["boxes"], y["boxes"]) for x, y in zip(a["labels"], b["labels"], strict=True))


def spoiled(folder, target, column, values, at=(2, 5)):
    """The dataset with a column replaced in some rows of both splits; `values` makes it of the row's number."""
    for split in ("train", "validation"):
        rows = datasets.load_dataset("parquet", data_files=str(folder / f"{split}.parquet"), split="train")
        for name in ("image", "label", "instances"):
            rows = rows.cast_column(name, datasets.Image(decode=False))
        new = [values(i) if i in at else old for i, old in enumerate(rows[column])]
        rows = rows.remove_columns(column).add_column(column, new)
        if column == "image":
            rows = rows.cast_column("image", datasets.Image())
        rows.to_parquet(target / f"{split}.parquet")
    (target / "id2label.json").write_text((folder / "id2label.json").read_text())


@pytest.mark.parametrize("streaming", [False, True])
def test_rows_that_cannot_be_used_are_skipped_counted_and_told_once(folder, tmp_path, capsys, streaming):
    spoiled(folder, tmp_path, "image", lambda i: {"bytes": b"broken", "path": f"{i}.jpg"})
    args = flags(DepthEstimation, "--dataset", tmp_path, *(["--streaming"] if streaming else []))
    task, train, validation = DepthEstimation.load(args)
    batches = TrainBatches(task, train, Accelerator(), seed=0)
    for _ in zip(range(14), batches, strict=False):
        pass
    (line,) = batches.problems.lines()
    assert re.match(r"2 x image that cannot be read \(first: [25].jpg", line)
    problems = Problems()
    assert sum(len(own) for _, own in eval_batches(task, validation, Accelerator(), problems)) == 3
    assert len(problems.found["image that cannot be read"]) == 1
    told = capsys.readouterr().out
    assert told.count("skipped image that cannot be read (") == 2  # once for each split


def test_everything_is_read_first_where_bad_data_is_an_error(folder, tmp_path):
    nothing = {"id": [1], "bbox": [[0.0, 0.0, 0.0, 5.0]], "category": [0], "area": [3]}
    spoiled(folder, tmp_path, "objects", lambda i: nothing)
    task, train, _ = ObjectDetection.load(flags(ObjectDetection, "--dataset", tmp_path))
    with pytest.raises(DataError, match=r"2 x box without area \(first: row 2 of train.*2 x no usable object"):
        check_all(task, train, Accelerator())
    good, _, fine = ObjectDetection.load(flags(ObjectDetection, "--dataset", folder))
    check_all(good, fine, Accelerator())


def test_a_split_without_a_usable_row_says_so(folder, tmp_path):
    spoiled(folder, tmp_path, "image", lambda i: {"bytes": b"broken", "path": None}, at=range(99))
    for streaming in ([], ["--streaming"]):
        task, train, _ = DepthEstimation.load(flags(DepthEstimation, "--dataset", tmp_path, *streaming))
        with pytest.raises(DataError, match="can be used"):
            next(iter(TrainBatches(task, train, Accelerator(), seed=0)))


def test_a_batch_without_a_labelled_pixel_has_no_loss():
    model = torch.nn.Conv2d(3, 4, 1)

    def forward(pixel_values, labels=None):
        logits = model(pixel_values)
        loss = None if labels is None else torch.nn.functional.cross_entropy(logits, labels, ignore_index=255)
        return Namespace(logits=logits, loss=loss, predicted_depth=logits[:, 0])

    images, nothing = torch.randn(2, 3, 4, 4), torch.full((2, 4, 4), 255)
    for task_class, batch in (
        (SemanticSegmentation, {"pixel_values": images, "labels": nothing}),
        (DepthEstimation, {"pixel_values": images, "depth": torch.zeros(2, 4, 4)}),
    ):
        loss = task_class(flags(task_class), None).loss(forward, batch)
        loss.backward()
        assert loss.item() == 0


@pytest.mark.parametrize(
    ("task_class", "arguments", "message"),
    [
        (
            SemanticSegmentation,
            ["--dataset", "{folder}", "--validation_split", "test"],
            r"split 'test'.*Should be one of.*--validation_split",
        ),
        (
            SemanticSegmentation,
            ["--dataset", "{folder}", "--label_column", "mask"],
            r"no column 'mask'.*--label_column",
        ),
        (SemanticSegmentation, ["--dataset", "/nowhere"], "neither a folder nor a dataset on the Hub"),
        (SemanticSegmentation, ["--dataset", "{folder}", "--id2label", "nothing.json"], "--id2label 'nothing.json'"),
        (ObjectDetection, ["--dataset", "{folder}", "--objects_column", "label"], "id2label.json"),
    ],
)
def test_a_dataset_without_what_it_needs_is_named(folder, tmp_path, task_class, arguments, message):
    given = [argument.format(folder=folder) for argument in arguments]
    if task_class is ObjectDetection:  # without names of classes
        for split in ("train", "validation"):
            make_scenes(2).to_parquet(tmp_path / f"{split}.parquet")
        given[1] = str(tmp_path)
    with pytest.raises(DataError, match=message):
        task_class.load(flags(task_class, *given))


# Data that is not what the flags say


def masks_of(folder, values):
    """A dataset of label maps with a thing in the middle: the values are those of background and thing."""
    label = np.full((20, 30), values[0], np.uint8)
    label[5:15, 5:25] = values[1]
    rows = {"image": [Image.new("RGB", (30, 20))] * 4, "label": [Image.fromarray(label)] * 4}
    kinds = datasets.Features({"image": datasets.Image(), "label": datasets.Image()})
    for split in ("train", "validation"):
        datasets.Dataset.from_dict(rows, features=kinds).to_parquet(folder / f"{split}.parquet")


def doubts_of(args, task_class=SemanticSegmentation):
    """What is doubtful in the validation split."""
    task, _, validation = task_class.load(args)
    problems = Problems()
    for _ in eval_batches(task, validation, Accelerator(), problems):
        pass
    return task.doubts(problems.census)


def test_masks_of_0_and_255_are_mapped_and_in_a_stream_doubted(tmp_path):
    masks_of(tmp_path, (0, 255))
    names = tmp_path / "id2label.json"
    names.write_text('{"0": "background", "1": "person"}')
    task, train, _ = SemanticSegmentation.load(flags(SemanticSegmentation, "--dataset", tmp_path))
    assert train.told == ["the label maps hold 0 and 255: 0 is 'background', 255 is 'person'"]
    assert set(task.read(train[0], Notes()).label.ravel().tolist()) == {0, 1}
    args = flags(SemanticSegmentation, "--dataset", tmp_path, "--streaming")
    absent, ignored = doubts_of(args)
    assert absent.startswith("of 2 classes, 1 in none of the 4 rows that were read (person): is --id2label that of")
    assert re.match(
        r"33% of the pixels are ignored, those labelled 255: if that is a class, name it in --id2l", ignored
    )
    names.write_text('{"0": "background", "255": "person"}')
    assert doubts_of(args) == []
    names.unlink()
    task, _, _ = SemanticSegmentation.load(flags(SemanticSegmentation, "--dataset", tmp_path))
    assert task.id2label == {0: "background", 1: "foreground"}


def test_what_mostly_does_not_count_is_doubted(tmp_path, folder):
    masks_of(tmp_path, (0, 1))
    (tmp_path / "id2label.json").write_text('{"0": "void", "1": "person"}')
    (ignored,) = doubts_of(flags(SemanticSegmentation, "--dataset", tmp_path))
    assert ignored.startswith("67% of the pixels are ignored, those labelled 0 or 255")
    masks_of(tmp_path, (0, 1))
    (tmp_path / "id2label.json").write_text('{"0": "person"}')
    (ignored,) = doubts_of(flags(SemanticSegmentation, "--dataset", tmp_path, "--reduce_labels"))
    assert ignored.startswith("67% of the pixels are ignored, those labelled 0 or 255")
    assert doubts_of(flags(DepthEstimation, "--dataset", folder), DepthEstimation) == []
    (beyond,) = doubts_of(flags(DepthEstimation, "--dataset", folder, "--max_depth", "4"), DepthEstimation)
    assert re.match(
        r"\d\d% of the known depth is outside 0.001 to 4 m, which are --max_depth: is --depth_scale", beyond
    )


def test_rows_and_classes_that_do_not_fit_are_doubted(folder, tmp_path):
    names = tmp_path / "names.json"
    names.write_text(json.dumps({0: "car", 99: "spaceship"}))
    found = doubts_of(flags(ObjectDetection, "--dataset", folder, "--id2label", names), ObjectDetection)
    assert re.match(r"of 2 classes, 1 in none of the \d rows that were read \(spaceship\)", found[-1])
    masks_of(tmp_path, (0, 7))
    names.write_text('{"0": "background", "1": "person"}')
    (all_bad,) = doubts_of(flags(SemanticSegmentation, "--dataset", tmp_path, "--id2label", names))
    assert all_bad == "4 of 4 rows cannot be used"


@pytest.fixture
def pictures_and_masks(tmp_path):
    """A folder as people have it: for each split one of images and one of masks."""
    for split in ("train", "validation"):
        for kind, picture in (("images", Image.new("RGB", (30, 20))), ("masks", Image.new("L", (30, 20), 1))):
            (tmp_path / split / kind).mkdir(parents=True)
            for i in range(2):
                picture.save(tmp_path / split / kind / f"{i}.png")
    (tmp_path / "names.json").write_text('{"0": "background", "1": "person"}')
    return tmp_path


def test_folders_of_images_and_masks_are_paired_by_their_names(pictures_and_masks):
    args = flags(
        SemanticSegmentation, "--dataset", pictures_and_masks, "--id2label", pictures_and_masks / "names.json"
    )
    task, train, validation = SemanticSegmentation.load(args)
    assert len(train) == len(validation) == 2
    assert (task.read(train[0], Notes()).label == 1).all()
    assert f"{pictures_and_masks}: images with masks (train 2, validation 2)" in train.told


def test_a_metadata_file_says_which_files_belong_together(pictures_and_masks):
    line = '{"image_file_name": "images/1.png", "label_file_name": "masks/0.png"}'
    for split in ("train", "validation"):
        (pictures_and_masks / split / "metadata.jsonl").write_text(f"{line}\n")
    names = pictures_and_masks / "names.json"
    _, train, _ = SemanticSegmentation.load(
        flags(SemanticSegmentation, "--dataset", pictures_and_masks, "--id2label", names)
    )
    assert len(train) == 1


@pytest.mark.parametrize("task_class", TASKS)
def test_a_column_of_another_kind_is_named_before_anything_is_read(task_class, folder, tmp_path):
    role = "instances" if task_class is InstanceSegmentation else list(task_class.columns)[-1]
    for split in ("train", "validation"):
        rows = make_scenes(2)
        rows.add_column("number", [1] * len(rows)).to_parquet(tmp_path / f"{split}.parquet")
    (tmp_path / "id2label.json").write_text((folder / "id2label.json").read_text())
    args = flags(task_class, "--dataset", tmp_path, f"--{role}_column", "number")
    with pytest.raises(DataError, match=f"column 'number' .* holds one number for each row.*--{role}_column"):
        task_class.load(args)


def objects_in(value):
    keys = {"bbox": "bbox", "category": "category"}
    return read_objects(value, Classes({0: "car"}), (9, 9), keys, False, Notes())


@pytest.mark.parametrize(
    ("read", "kind"),
    [
        (lambda: read_image(5), "image expected, and something else is there"),
        (lambda: read_label([1, 2], (1, 2)), "label map expected, and something else is there"),
        (lambda: objects_in([1, 2]), "objects expected, and something else is there"),
        (lambda: objects_in(7), "objects expected, and something else is there"),
    ],
)
def test_values_of_another_kind_say_what_was_expected(read, kind):
    with pytest.raises(BadSampleError, match=kind):
        read()


def test_classes_come_from_a_file_the_features_or_beside_the_data(folder, tmp_path):
    task, _, _ = ObjectDetection.load(flags(ObjectDetection, "--dataset", folder))
    assert list(task.id2label.values()) == list(THINGS)
    task, _, _ = SemanticSegmentation.load(flags(SemanticSegmentation, "--dataset", folder))
    assert list(task.id2label.values()) == list(CLASSES)
    (tmp_path / "names.json").write_text(json.dumps({"0": "a", "1": "void", "5": "b"}))
    own = flags(SemanticSegmentation, "--dataset", folder, "--id2label", tmp_path / "names.json")
    assert SemanticSegmentation.load(own)[0].id2label == {0: "a", 1: "b"}
    (tmp_path / "names.json").write_text('["a", "b"]')
    with pytest.raises(DataError, match="must map ids to names"):
        SemanticSegmentation.load(own)


def test_classes_that_are_not_on_the_hub(hub, folder):
    with pytest.raises(DataError, match="neither a file nor on the Hub"):
        SemanticSegmentation.load(
            flags(SemanticSegmentation, "--dataset", folder, "--id2label", "someone/labels/ade20k.json")
        )


def test_samples_can_be_limited(folder):
    args = flags(DepthEstimation, "--dataset", folder, "--max_train_samples", 3, "--max_eval_samples", 2)
    _, train, validation = DepthEstimation.load(args)
    assert (len(train), len(validation)) == (3, 2)
    embedded, _ = load_splits(flags(DepthEstimation, "--max_train_samples", 2), {"image": "image"}, ("image",))
    assert len(embedded) == 2


def test_painted_objects_as_transformers_has_them(tmp_path):
    painted = np.zeros((12, 16, 3), np.uint8)
    painted[2:6, 2:6] = (1, 1, 0)  # red the class, green the object
    painted[2:6, 8:14] = (1, 2, 0)
    painted[8:, 8:] = (3, 1, 0)
    rows = {"image": [Image.new("RGB", (16, 12))] * 2, "annotation": [Image.fromarray(painted)] * 2}
    features = datasets.Features({"image": datasets.Image(), "annotation": datasets.Image()})
    for split in ("train", "validation"):
        datasets.Dataset.from_dict(rows, features).to_parquet(tmp_path / f"{split}.parquet")
    (tmp_path / "label2id.json").write_text(json.dumps({"background": 0, "person": 1, "car": 3}))
    task, train, _ = InstanceSegmentation.load(flags(InstanceSegmentation, "--dataset", tmp_path))
    assert task.id2label == {0: "person", 1: "car"}
    notes = Notes()
    sample = task.read(train[0], notes)
    assert sample.classes.tolist() == [0, 0, 1]
    assert boxes_of(sample.masks).tolist() == [[2, 2, 6, 6], [8, 2, 14, 6], [8, 8, 16, 12]]
    assert not notes
    wrong = {"image": stored(Image.new("RGB", (16, 12))), "annotation": stored(Image.new("L", (16, 12)))}
    with pytest.raises(BadSampleError, match="without a red channel"):
        task.read(wrong, notes)
    with pytest.raises(DataError, match="neither a column 'objects' nor 'x'; it has"):
        InstanceSegmentation.load(flags(InstanceSegmentation, "--dataset", tmp_path, "--annotation_column", "x"))

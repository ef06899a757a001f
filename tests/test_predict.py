"""`examples/predict.py`: a folder of images in, masks, boxes and depth out."""

import itertools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from huggingface_hub import HfApi
from PIL import Image
from pycocotools import mask as rle
from pycocotools.coco import COCO
from transformers import Dinov2Model, SwinForImageClassification

import tiny

import predict
from dense.errors import FlagError
from dense.run import run
from dense.scenes import CLASSES, make_scene
from dense.windows import join_maps, join_objects, places
from depth_estimation import DepthEstimation
from object_detection import ObjectDetection
from semantic_segmentation import SemanticSegmentation


@pytest.fixture(autouse=True)
def _no_accelerator_is_left():
    yield
    forget()


def forget():
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Runs of several tasks and methods, and a folder of photos, one of which is none."""
    root = tmp_path_factory.mktemp("predict")
    torch.manual_seed(0)
    SwinForImageClassification(tiny.swin_config(image_size=64, patch_size=4)).save_pretrained(root / "swin")
    Dinov2Model(tiny.dinov2_config(num_hidden_layers=4, reshape_hidden_states=False)).save_pretrained(root / "dinov2")
    common = [
        *("--steps", "1", "--search_steps", "1", "--batch_size", "2", "--image_size", "48", "64", "--budget", "0.1"),
        *("--num_workers", "0", "--log_with", "none", "--max_train_samples", "4", "--max_eval_samples", "2"),
    ]
    for name, task, model, own in (
        ("labels", SemanticSegmentation, "swin", ["--head", "linear"]),
        ("lora", SemanticSegmentation, "swin", ["--head", "linear", "--method", "lora"]),
        ("upernet", SemanticSegmentation, "swin", ["--head_channels", "8"]),
        ("boxes", ObjectDetection, "dinov2", ["--head_channels", "32", "--queries", "10", "--method", "head"]),
        ("depth", DepthEstimation, "dinov2", ["--head_channels", "8", "--method", "full"]),
    ):
        run(task, [*common, *own, "--model", str(root / model), "--output_dir", str(root / name)])
        forget()
    (root / "photos" / "more").mkdir(parents=True)
    for i, name in enumerate(("a.png", "b.png", "b.jpg", "more/a.png")):
        make_scene(i)["image"].save(root / "photos" / name)
    (root / "photos" / "broken.png").write_bytes(b"no image")
    return root


def arguments(folder, name, output, *own):
    images = ["--images", str(folder / "photos")]
    return ["--run", str(folder / name), *images, "--output_dir", str(output), *own]


def test_masks_have_classes_for_values_and_every_image_is_drawn(folder, tmp_path, capsys):
    out = tmp_path / "out"
    numbers = predict.main(arguments(folder, "labels", out))
    masks = {str(path.relative_to(out / "masks")) for path in (out / "masks").rglob("*.png")}
    assert masks == {"a.png", "b.png.png", "b.jpg.png", "more/a.png"}
    with Image.open(out / "masks" / "a.png") as mask:
        assert mask.mode == "P"
        assert mask.size == (128, 96)
        assert np.asarray(mask).max() < len(CLASSES)
    assert len(list((out / "overlays").rglob("*.jpg"))) == 4
    assert (out / "contact_sheet.jpg").stat().st_size > 10_000
    assert list(numbers["skipped"]) == ["broken.png"]
    assert json.loads((out / "predictions.json").read_text())["id2label"]["0"] == CLASSES[0]
    assert "4 images predicted, 1 skipped" in capsys.readouterr().out
    with pytest.raises(FlagError, match="a prediction is there; replace it with --overwrite"):
        predict.main(arguments(folder, "labels", out))
    (out / "notes.txt").write_text("of mine")
    predict.main(arguments(folder, "labels", out, "--overwrite", "--images", str(folder / "photos" / "a.png")))
    assert [path.name for path in (out / "masks").iterdir()] == ["a.png"]
    assert (out / "notes.txt").exists()
    assert not (out / "unfinished_predictions").exists()


def test_a_head_that_lies_beside_an_adapter_is_loaded_and_missed(folder, tmp_path):
    predict.main(arguments(folder, "lora", tmp_path / "lora"))
    assert (tmp_path / "lora" / "masks" / "a.png").is_file()
    shutil.copytree(folder / "lora", tmp_path / "headless")
    (tmp_path / "headless" / "head.safetensors").unlink()
    with pytest.raises(FlagError, match=r"headless holds an adapter without a head .*, and no head\.safetensors"):
        predict.main([*arguments(folder, "lora", tmp_path / "other"), "--run", str(tmp_path / "headless")])


def test_boxes_are_a_coco_json_that_pycocotools_reads(folder, tmp_path):
    numbers = predict.main(arguments(folder, "boxes", tmp_path, "--score", "0"))
    found = COCO(tmp_path / "predictions.json")
    assert [image["file_name"] for image in found.loadImgs(found.getImgIds())] == sorted(
        ["a.png", "b.jpg", "b.png", "more/a.png"]
    )
    assert len(numbers["annotations"]) > 4
    assert all(0 <= one["score"] <= 1 and len(one["bbox"]) == 4 for one in numbers["annotations"])


def test_depth_is_16_bit_images_with_their_scale(folder, tmp_path):
    numbers = predict.main(arguments(folder, "depth", tmp_path))
    with Image.open(tmp_path / "depth" / "a.png") as depth:
        assert depth.mode.startswith("I")
        assert (np.asarray(depth) > 0).all()
        assert np.asarray(depth).max() <= 80 * numbers["depth_scale"]
    with pytest.raises(FlagError, match="depth estimation needs the whole image"):
        predict.main(arguments(folder, "depth", tmp_path / "x", "--window", "48", "48"))


def test_large_images_are_cut_into_windows_of_the_training_images_size(folder, tmp_path, capsys):
    photos = tmp_path / "photos"
    photos.mkdir()
    scene = make_scene(0)["image"]
    large = Image.new("RGB", (2 * scene.width, scene.height))
    large.paste(scene, (0, 0))
    large.paste(scene, (scene.width, 0))
    large.save(photos / "large.png")
    scene.save(photos / "small.png")
    for task in ("labels", "boxes"):
        predict.main([*arguments(folder, task, tmp_path / task, "--score", "0"), "--images", str(photos)])
        assert "1 of 2 images were cut into windows of 96 x 128 pixels" in capsys.readouterr().out
    label, own = (np.asarray(Image.open(tmp_path / "labels" / "masks" / f"{n}.png")) for n in ("large", "small"))
    # Far from the middle, where one window decides. Nearer to it two are averaged, so a pixel may turn.
    for large, small in ((label[:, :100], own[:, :100]), (label[:, -100:], own[:, -100:])):
        assert (large == small).mean() > 0.99
    assert np.array_equal(label[:, :64], own[:, :64])
    assert np.array_equal(label[:, -64:], own[:, -64:])


def test_what_a_run_pushes_is_enough_to_predict(folder, tmp_path, hub, monkeypatch):
    flags = json.loads((folder / "labels" / "run.json").read_text())["args"]
    names = ("steps", "search_steps", "budget", "num_workers", "log_with", "max_train_samples", "max_eval_samples")
    given = [part for name in names for part in (f"--{name}", str(flags[name]))]
    given += ["--image_size", "48", "64", "--head", "linear", "--model", str(folder / "swin")]
    run(SemanticSegmentation, [*given, "--output_dir", str(tmp_path / "run"), "--push_to_hub", "me/adapter"])
    forget()
    pushed = json.loads(Path(HfApi().hf_hub_download("me/adapter", "run.json")).read_text())
    assert not {"output_dir", "dataset", "id2label"} & pushed["args"].keys()
    for source, out in (("me/adapter", "hub"), (str(tmp_path / "run"), "own")):
        predict.main(["--run", source, "--images", str(folder / "photos"), "--output_dir", str(tmp_path / out)])
    assert (tmp_path / "hub" / "masks" / "a.png").read_bytes() == (tmp_path / "own" / "masks" / "a.png").read_bytes()


def test_a_run_that_stands_alone_needs_its_record_for_windows_only(folder, tmp_path, capsys):
    shutil.copytree(folder / "upernet", tmp_path / "alone")
    (tmp_path / "alone" / "run.json").unlink()
    large = tmp_path / "large.png"
    make_scene(0)["image"].resize((256, 192)).save(large)
    cut = "1 of 1 images were cut into windows of 96 x 128 pixels"
    for name, images in (("run", folder / "photos" / "a.png"), ("run_large", large)):
        given = ["--images", str(images), "--output_dir", str(tmp_path / name)]
        predict.main(["--run", str(folder / "upernet"), *given])
    assert cut in capsys.readouterr().out
    for name, images, own in (("a", folder / "photos" / "a.png", []), ("large", large, ["--window", "96", "128"])):
        given = ["--images", str(images), "--output_dir", str(tmp_path / name), *own]
        predict.main(["--run", str(tmp_path / "alone"), *given])
    assert cut in capsys.readouterr().out
    for one, other, file in (("run", "a", "a.png"), ("run_large", "large", "large.png")):
        own, same = ((tmp_path / name / "masks" / file).read_bytes() for name in (one, other))
        assert own == same


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--images", "/nowhere"], "there is no such folder or file"),
        (["--images", "{folder}/swin"], "no image is in it"),
        (["--images", "{folder}/photos/broken.png"], "none of the 1 images can be used"),
        (["--run", "{folder}/swin"], "neither an adapter that stands alone nor the folder of a finished run"),
        (["--run", "me/nothing"], "neither a folder nor a repository on the Hub"),
        (["--model", "{folder}/dinov2"], "cannot be loaded|does not fit"),
    ],
)
def test_what_cannot_be_predicted_ends_with_a_sentence(folder, tmp_path, hub, changes, message):
    own = [change.format(folder=folder) for change in changes]
    with pytest.raises(FlagError, match=message):
        predict.main(arguments(folder, "labels", tmp_path / "out", *own))
    assert not (tmp_path / "out" / "predictions.json").exists()


# Windows


@pytest.mark.parametrize(("length", "window"), [(100, 100), (101, 100), (400, 100), (1000, 96)])
def test_windows_reach_both_ends_and_overlap(length, window):
    found = places(length, window)
    assert found[0] == 0
    assert found[-1] == length - window
    assert all(b - a <= 0.76 * window for a, b in itertools.pairwise(found))


def test_each_pixel_is_of_the_window_that_it_lies_deepest_in():
    boxes = [(0, 0, 10, 4), (6, 0, 16, 4)]
    maps = [np.full((4, 10), 1, np.uint8), np.full((4, 10), 2, np.uint8)]
    assert join_maps(boxes, maps, (4, 16)).tolist() == [[1] * 8 + [2] * 8] * 4


def test_an_object_that_two_windows_show_is_one():
    boxes = [(0, 0, 10, 10), (5, 0, 15, 10)]

    def found(*own):
        masks = [np.zeros((10, 10), np.uint8) for _ in own]
        for (x1, y1, x2, y2, *_), mask in zip(own, masks, strict=True):
            mask[y1:y2, x1:x2] = 1
        return {
            "boxes": np.array([one[:4] for one in own], np.float32),
            "scores": np.array([one[4] for one in own], np.float32),
            "labels": np.array([one[5] for one in own]),
            "masks": [rle.encode(np.asfortranarray(mask)) for mask in masks],
        }

    # One object seen whole on the left and in part on the right, another class at its place, one seen once.
    left = found((5, 2, 9, 6, 0.9, 0), (5, 2, 9, 6, 0.5, 1))
    right = found((0, 2, 3, 6, 0.8, 0), (6, 6, 9, 9, 0.7, 0))
    for kind in ("masks", "boxes"):
        if kind == "boxes":
            left.pop("masks")
            right.pop("masks")
        joined = join_objects(boxes, [left, right], (10, 15))
        assert joined["boxes"].tolist() == [[5, 2, 9, 6], [11, 6, 14, 9], [5, 2, 9, 6]]
        assert joined["labels"].tolist() == [0, 0, 1]
        if kind == "masks":
            assert rle.decode(joined["masks"][1])[6:9, 11:14].all()

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import scenes
import torch
from data import load_segmentation
from methods import lora_config
from metrics import MeanIoU
from models import LinearHead, build_model, feature_levels
from peft import get_peft_model

import tiny

EXAMPLES = Path(__file__).parent.parent / "examples"


def test_scenes_are_the_same_for_the_same_seed_and_consistent():
    first, again, other = scenes.make_scene(3), scenes.make_scene(3), scenes.make_scene(4)
    assert first["objects"] == again["objects"]
    assert np.array_equal(first["image"], again["image"])
    assert not np.array_equal(first["image"], other["image"])
    for seed in range(20):
        scene = scenes.make_scene(seed)
        label, instances = np.asarray(scene["label"]), np.asarray(scene["instances"])
        assert scene["image"].size == (scenes.WIDTH, scenes.HEIGHT)
        assert label.max() < len(scenes.CLASSES)
        assert np.isfinite(scene["depth_map"]).all()
        assert (scene["depth_map"] > 0).all()
        objects = scene["objects"]
        assert sorted(set(instances[instances > 0].tolist())) == objects["id"]
        for i, box, category, area in zip(*(objects[k] for k in ("id", "bbox", "category", "area")), strict=True):
            mask = instances == i
            rows, columns = np.nonzero(mask)
            assert box == [columns.min(), rows.min(), np.ptp(columns) + 1, np.ptp(rows) + 1]
            assert area == mask.sum()
            assert set(label[mask].tolist()) == {scenes.CLASSES.index(scenes.THINGS[category])}


def test_scenes_are_a_dataset_in_the_hubs_columns():
    dataset = scenes.make_scenes(3, seed=1, style="dusk")
    assert dataset.column_names == ["image", "label", "instances", "depth_map", "objects"]
    assert dataset[0]["image"].mode == "RGB"
    assert np.asarray(dataset[0]["depth_map"]).shape == (scenes.HEIGHT, scenes.WIDTH)
    with pytest.raises(ValueError, match="style='night'"):
        scenes.make_scenes(1, style="night")


def test_every_class_occurs_and_hides_others():
    labels = np.stack([np.asarray(scenes.make_scene(seed)["label"]) for seed in range(30)])
    assert set(np.unique(labels)) == set(range(len(scenes.CLASSES)))


def test_mean_iou_on_a_case_counted_by_hand():
    truth = np.array([[0, 0, 1, 1], [2, 2, 255, 1]])
    guess = np.array([[0, 1, 1, 1], [2, 0, 0, 1]])
    metric = MeanIoU(num_labels=4)
    metric.add(prediction=guess, reference=truth)
    result = metric.compute()
    assert result["per_class_iou"][:3] == [1 / 3, 3 / 4, 1 / 2]
    assert np.isnan(result["per_class_iou"][3])
    assert result["mean_iou"] == pytest.approx((1 / 3 + 3 / 4 + 1 / 2) / 3)
    assert result["pixel_accuracy"] == pytest.approx(5 / 7)


def test_mean_iou_adds_up_over_batches_and_starts_anew():
    rng = np.random.default_rng(0)
    truth, guess = rng.integers(0, 3, (4, 5, 6)), rng.integers(0, 3, (4, 5, 6))
    whole = MeanIoU(3).compute(predictions=guess, references=truth)
    metric = MeanIoU(3)
    for i in range(4):
        metric.add_batch(predictions=guess[i : i + 1], references=truth[i : i + 1])
    assert metric.compute() == whole
    assert np.isnan(metric.compute()["mean_iou"])
    with pytest.raises(ValueError, match=r"labels 0..3 outside 0..2"):
        metric.add(prediction=truth[0], reference=np.where(truth[0] == 0, 3, 0))
    with pytest.raises(ValueError, match="differ"):
        metric.add(prediction=truth[0][:2], reference=truth[0])


def test_the_linear_head_is_one_linear_layer_on_all_levels():
    head = LinearHead([3, 5], num_labels=2)
    features = [torch.randn(1, 3, 4, 4), torch.randn(1, 5, 4, 4)]
    weight = torch.cat([c.weight[:, :, 0, 0] for c in head.classifiers], dim=1)
    bias = sum(c.bias for c in head.classifiers)
    expected = torch.einsum("oc,bchw->bohw", weight, torch.cat(features, 1)) + bias[:, None, None]
    assert torch.allclose(head(features), expected, atol=1e-5)


def test_feature_levels():
    assert feature_levels(tiny.swin_config()) == ["stage1", "stage2"]
    assert feature_levels(tiny.dinov2_config(num_hidden_layers=12)) == ["stage3", "stage6", "stage9", "stage12"]


@pytest.mark.parametrize("budget", [50, 500, 1000, 1817])
def test_lora_gets_as_close_to_the_budget_as_ranks_allow(budget):
    model = get_peft_model(tiny.swin(), lora_config(tiny.swin(), budget))
    trained = sum(p.numel() for n, p in model.named_parameters() if ".lora_" in n)
    assert budget - 80 < trained <= budget  # one more rank of the widest layer costs 80


def test_a_dataset_without_what_it_needs_is_named(tmp_path):
    scenes.make_scenes(2).remove_columns("label").to_parquet(tmp_path / "train.parquet")
    with pytest.raises(ValueError, match="no split 'validation'"):
        load_segmentation(str(tmp_path), (96, 128))
    scenes.make_scenes(2).remove_columns("label").to_parquet(tmp_path / "validation.parquet")
    with pytest.raises(ValueError, match="no column 'label'"):
        load_segmentation(str(tmp_path), (96, 128))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A tiny Swin classifier's checkpoint, a tiny DINOv2's, and a dataset of scenes, as folders."""
    from transformers import Dinov2Model, SwinForImageClassification

    root = tmp_path_factory.mktemp("inputs")
    SwinForImageClassification(tiny.swin_config(image_size=64, patch_size=4)).save_pretrained(root / "swin")
    Dinov2Model(tiny.dinov2_config(num_hidden_layers=4, reshape_hidden_states=False)).save_pretrained(root / "dinov2")
    (root / "data").mkdir()
    for split, count in (("train", 12), ("validation", 4)):
        scenes.make_scenes(count, seed=count).to_parquet(root / "data" / f"{split}.parquet")
    names = {str(i): name for i, name in enumerate(scenes.CLASSES)} | {"8": "unlabelled"}
    (root / "data" / "id2label.json").write_text(json.dumps(names))
    return root


def run_example(folders, output, *arguments, launch=()):
    return subprocess.run(
        [sys.executable, *launch, str(EXAMPLES / "semantic_segmentation.py"), "--output_dir", str(output), *arguments],
        capture_output=True,
        text=True,
        timeout=280,
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(folders / "cache")},
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "method", "head"),
    [("swin", "sfa", "linear"), ("dinov2", "sfa", "upernet"), ("swin", "lora", "linear"), ("swin", "full", "linear")],
)
def test_the_segmentation_example(folders, tmp_path, model, method, head):
    done = run_example(
        folders,
        tmp_path,
        *("--model", str(folders / model), "--dataset", str(folders / "data"), "--method", method, "--head", head),
        *("--steps", "3", "--search_steps", "2", "--batch_size", "2", "--image_size", "48", "64", "--budget", "0.1"),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads((tmp_path / "results.json").read_text())
    assert 0 <= results["mean_iou"] <= 1
    assert list(results["per_class_iou"]) == [name for name in scenes.CLASSES if name != "ball"]  # one is ignored
    assert (tmp_path / "predictions.png").stat().st_size > 10_000
    if method == "sfa":
        assert "module type" in done.stdout
        assert "reloaded into a fresh base model" in done.stdout
        assert results["trained_backbone_parameters"] == int(0.1 * results["backbone_parameters"])
        assert {"external", "internal values", "positions", "head"} <= results["bytes"].keys()


@pytest.mark.slow
def test_the_segmentation_example_on_two_processes(folders, tmp_path):
    done = run_example(
        folders,
        tmp_path,
        *("--model", str(folders / "swin"), "--dataset", str(folders / "data"), "--head", "linear"),
        *("--steps", "2", "--search_steps", "2", "--batch_size", "2", "--image_size", "48", "64", "--budget", "0.1"),
        launch=("-m", "accelerate.commands.launch", "--cpu", "--num_processes=2", "--num_machines=1",
                "--mixed_precision=no", "--dynamo_backend=no"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "reloaded into a fresh base model" in done.stdout


def test_a_dense_checkpoint_is_loaded_whole(tmp_path):
    tiny.swin().save_pretrained(tmp_path)
    model = build_model(str(tmp_path), dict(enumerate("abc")))
    assert torch.equal(tiny.output(model), tiny.output(tiny.swin()))

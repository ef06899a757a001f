"""The example scripts as people run them, on tiny checkpoints and a folder of scenes."""

import copy
import json
import multiprocessing
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from peft import LoraConfig, PeftModel, ShiraConfig
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    BertConfig,
    Dinov2Backbone,
    Dinov2Model,
    DPTForDepthEstimation,
    SwinForImageClassification,
)

import tiny
from sfa_peft import SFAConfig, describe_adapter, load_dense

import dense.run
from dense import nano_backbone
from dense.arguments import parse
from dense.augmentation import finished, to_tensors
from dense.checkpoints import Checkpoints, Progress, Training, check
from dense.errors import DataError, FlagError
from dense.folder import CHECKPOINTS, RunFolder, write_json
from dense.methods import METHODS, Dense, adapt, is_head, lora_config, shira_config, trained_backbone_parameters
from dense.models import LinearHead, default_size, feature_levels, heads_of
from dense.run import run
from dense.samples import Classes, Sample
from dense.scenes import CLASSES, HEIGHT, THINGS, WIDTH, make_scene, make_scenes
from dense.training import falling
from depth_estimation import DepthEstimation
from instance_segmentation import InstanceSegmentation
from object_detection import ObjectDetection
from semantic_segmentation import SemanticSegmentation

EXAMPLES = Path(__file__).parent.parent / "examples"
CPU = torch.device("cpu")


# Embedded data


def test_scenes_are_the_same_for_the_same_seed_and_consistent():
    first, again, other = make_scene(3), make_scene(3), make_scene(4)
    assert first["objects"] == again["objects"]
    assert np.array_equal(first["image"], again["image"])
    assert not np.array_equal(first["image"], other["image"])
    for seed in range(20):
        scene = make_scene(seed)
        label, instances = np.asarray(scene["label"]), np.asarray(scene["instances"])
        assert scene["image"].size == (WIDTH, HEIGHT)
        assert label.max() < len(CLASSES)
        assert np.isfinite(scene["depth_map"]).all()
        assert (scene["depth_map"] > 0).all()
        objects = scene["objects"]
        assert sorted(set(instances[instances > 0].tolist())) == objects["id"]
        for i, box, category, area in zip(*(objects[k] for k in ("id", "bbox", "category", "area")), strict=True):
            mask = instances == i
            rows, columns = np.nonzero(mask)
            assert box == [columns.min(), rows.min(), np.ptp(columns) + 1, np.ptp(rows) + 1]
            assert area == mask.sum()
            assert set(label[mask].tolist()) == {CLASSES.index(THINGS[category])}


def test_scenes_are_a_dataset_in_the_hubs_columns():
    dataset = make_scenes(3, seed=1, style="dusk")
    assert dataset.column_names == ["image", "label", "instances", "depth_map", "objects"]
    assert dataset[0]["image"].mode == "RGB"
    assert np.asarray(dataset[0]["depth_map"]).shape == (HEIGHT, WIDTH)
    with pytest.raises(ValueError, match="style='night'"):
        make_scenes(1, style="night")


def test_every_class_occurs_and_hides_others():
    labels = np.stack([np.asarray(make_scene(seed)["label"]) for seed in range(30)])
    assert set(np.unique(labels)) == set(range(len(CLASSES)))


@pytest.mark.parametrize("kind", nano_backbone.KINDS)
def test_nano_backbones_are_pretrained_once(kind, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = nano_backbone.pretrained_nano_backbone(PartialState(), kind, (48, 64), scenes=4, steps=2)
    assert AutoConfig.from_pretrained(folder).model_type == kind
    written = (Path(folder) / "config.json").stat().st_mtime_ns
    assert nano_backbone.pretrained_nano_backbone(PartialState(), kind, (48, 64), scenes=4, steps=2) == folder
    assert (Path(folder) / "config.json").stat().st_mtime_ns == written


# Models and methods


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


PATHS = {
    tiny.swin: "backbone",
    tiny.dpt_on_dinov2: "backbone",
    tiny.mask2former_on_swin: "model.pixel_level_module.encoder",
    tiny.rf_detr: "model.backbone.backbone",
}


@pytest.mark.parametrize("make", PATHS)
def test_heads_are_everything_outside_the_backbone(make):
    model = make()
    heads = heads_of(model, PATHS[make])
    for name, _ in model.named_parameters():
        assert name.startswith(f"{PATHS[make]}.") != is_head(name, heads), name


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("make", PATHS)
def test_every_method_trains_the_heads_and_as_much_of_the_backbone_as_the_budget_says(make, method):
    model = make()
    dense = Dense(model, PATHS[make], heads_of(model, PATHS[make]))
    whole, widest = dense.backbone_parameters, max(m.in_features + m.out_features for m in dense.linears().values())
    head_size = sum(p.numel() for n, p in model.named_parameters() if is_head(n, dense.heads))
    adapted = adapt(dense, method, budget=0.1)
    trained = trained_backbone_parameters(adapted, dense.heads)
    expected = {"full": whole, "head": 0}.get(method, int(0.1 * whole))
    assert expected - 3 * widest < trained <= expected
    if method == "sfa":
        assert trained == expected
    own = {n: p for n, p in adapted.named_parameters() if p.requires_grad and is_head(n, dense.heads)}
    assert sum(p.numel() for p in own.values()) == head_size


@pytest.mark.parametrize("budget", [50, 500, 1000, 1817])
def test_lora_and_shira_get_as_close_to_a_budget_as_ranks_allow(budget):
    model = tiny.swin()
    dense = Dense(model, "backbone", ["decode_head"])
    costs = {name: m.in_features + m.out_features for name, m in dense.linears().items()}
    lora: LoraConfig = lora_config(dense, budget)
    total = sum(lora.rank_pattern.get(name, lora.r) * costs[name] for name in lora.target_modules)
    assert budget - max(costs.values()) < total <= budget
    shira: ShiraConfig = shira_config(dense, budget)
    total = sum(shira.r * costs[name] for name in shira.target_modules)
    assert budget / 2 < total <= budget


def test_a_budget_that_pays_for_nothing_is_refused():
    dense = Dense(tiny.swin(), "backbone", ["decode_head"])
    for make in (lora_config, shira_config):
        with pytest.raises(ValueError, match="does not pay for"):
            make(dense, 3)


def test_whole_checkpoints_keep_what_fits(tmp_path):
    tiny.swin().save_pretrained(tmp_path)
    flags = parse(SemanticSegmentation, ["--image_size", "32", "32"])
    same = SemanticSegmentation(flags, Classes(dict(enumerate("abc")))).build(str(tmp_path), CPU)
    assert tiny.same_state(tiny.state(same.model), tiny.state(tiny.swin()))
    other = SemanticSegmentation(flags, Classes(dict(enumerate("abcde")))).build(str(tmp_path), CPU)
    assert tiny.output(other.model).shape[1] == 5
    with pytest.raises(FlagError, match="--image_size 31 32: this model needs multiples of 2"):
        SemanticSegmentation(parse(SemanticSegmentation, ["--image_size", "31", "32"]), Classes({0: "a"})).build(
            str(tmp_path), CPU
        )


# Runs


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A tiny Swin classifier's checkpoint, a tiny DINOv2's, and a dataset of scenes, as folders."""
    root = tmp_path_factory.mktemp("inputs")
    torch.manual_seed(0)
    SwinForImageClassification(tiny.swin_config(image_size=64, patch_size=4)).save_pretrained(root / "swin")
    deep = {"depths": [1, 1, 1], "num_heads": [1, 1, 1], "out_features": ["stage3"]}
    SwinForImageClassification(tiny.swin_config(image_size=64, **deep)).save_pretrained(root / "swin3")
    Dinov2Model(tiny.dinov2_config(num_hidden_layers=4, reshape_hidden_states=False)).save_pretrained(root / "dinov2")
    (root / "data").mkdir()
    for split, count in (("train", 12), ("validation", 4)):
        make_scenes(count, seed=count).to_parquet(root / "data" / f"{split}.parquet")
    names = {str(i): name for i, name in enumerate(CLASSES)} | {"8": "unlabelled"}
    (root / "data" / "id2label.json").write_text(json.dumps(names))
    return root


@pytest.fixture(autouse=True)
def _no_accelerator_is_left():
    yield
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


SMALL = {
    SemanticSegmentation: ("swin", ["--head", "linear"]),
    InstanceSegmentation: ("swin3", ["--head_channels", "32", "--queries", "5", "--encoder_layers", "1"]),
    ObjectDetection: ("dinov2", ["--head_channels", "32", "--queries", "10", "--query_groups", "2"]),
    DepthEstimation: ("dinov2", ["--head_channels", "16"]),
}


def flags_of(folders, task, output, *arguments, model=None):
    backbone, own = SMALL[task]
    return [
        *("--model", str(folders / (model or backbone)), "--dataset", str(folders / "data")),
        *("--output_dir", str(output), "--steps", "4", "--search_steps", "2", "--batch_size", "2"),
        *("--image_size", "48", "64", "--budget", "0.1", "--num_workers", "0", "--log_with", "none"),
        *own,
        *arguments,
    ]


@pytest.mark.slow
@pytest.mark.parametrize("task", SMALL)
def test_every_task_trains_saves_loads_draws_and_reports(folders, tmp_path, task, capsys):
    arguments = ["--log_with", "tensorboard", "--eval_steps", "2", "--logging_steps", "1", "--seed", "3"]
    results = run(task, flags_of(folders, task, tmp_path, *arguments))
    assert results == json.loads((tmp_path / "results.json").read_text())
    assert results["trained_backbone_parameters"] == int(0.1 * results["backbone_parameters"])
    assert results["after"][task.headline] >= 0
    assert [step for step, _ in results["curves"]["loss"]] == [1, 2, 3, 4]
    assert {"external", "internal values", "positions", "head or whole model"} <= results["bytes"].keys()
    said = capsys.readouterr().out
    assert "reloaded into a fresh base model: every tensor is the same" in said
    assert ("the adapter does not stand alone, README.md says why" in said) == ("linear" in SMALL[task][1])
    for step in (0, 2, 4):
        assert (tmp_path / "pictures" / f"step_{step:06d}.jpg").stat().st_size > 10_000
    page = (tmp_path / "report.html").read_text()
    # Four pictures of each validation image, three of evaluations, and the curves of loss and score.
    assert page.count("data:image/") == 4 * 4 + 3 + 2
    assert page.index("data:image/") < page.index(" has a ") < page.index("Curves")
    assert "The ticket on the backbone" in page
    assert "http:" not in page
    assert "https:" not in page
    assert list((tmp_path / "logs").rglob("events.out.tfevents.*"))

    described = json.loads((tmp_path / "run.json").read_text())
    names = {int(i): name for i, name in described["id2label"].items()}
    again = task(parse(task, flags_of(folders, task, tmp_path, "--seed", "3")), Classes(names) if names else None)
    loaded = PeftModel.from_pretrained(again.build(described["model"], CPU).model, tmp_path)
    assert isinstance(loaded.active_peft_config, SFAConfig)

    if "linear" in SMALL[task][1]:  # a head that transformers does not have
        assert "decode_head is LinearHead" in (tmp_path / "README.md").read_text()
        return
    assert f'load_dense("{tmp_path}")' in (tmp_path / "README.md").read_text()
    model, processor, id2label = load_dense(tmp_path)
    assert id2label == names
    image = make_scene(seed=5)["image"]
    own = finished(to_tensors(Sample(image), (48, 64)))["image"][None]
    assert torch.equal(processor(image, return_tensors="pt")["pixel_values"], own)
    loaded.set_attn_implementation("eager")
    model.set_attn_implementation("eager")
    assert torch.equal(tiny.output(model, own), tiny.output(loaded, own))


@pytest.mark.slow
@pytest.mark.parametrize("method", [m for m in METHODS if m != "sfa"])
@pytest.mark.parametrize("task", [ObjectDetection, SemanticSegmentation])
def test_peers_train_with_the_same_loop(folders, tmp_path, task, method):
    results = run(task, flags_of(folders, task, tmp_path, "--method", method, "--search_steps", "0"))
    saved = {path.stem for path in tmp_path.glob("*.safetensors")}
    expected = {"full": {"model"}, "head": {"head"}, "adaptformer": {"adapter_model"}}
    assert saved == expected.get(method, {"adapter_model", "head"})
    stands_alone = method == "adaptformer" and task is ObjectDetection  # the other has a linear head
    for name in ("base_config.json", "preprocessor_config.json"):
        assert (tmp_path / name).is_file() == (stands_alone or (method == "adaptformer" and name[0] == "p"))
    assert results["bytes"]["total"] > 0


@pytest.mark.slow
def test_dinov2_segments_and_gradients_are_accumulated_and_clipped(folders, tmp_path):
    arguments = ["--head", "upernet", "--head_channels", "16", "--gradient_accumulation_steps", "2"]
    more = ["--max_grad_norm", "0.5", "--mixed_precision", "bf16", "--streaming", "--eval_steps", "100"]
    results = run(
        SemanticSegmentation, flags_of(folders, SemanticSegmentation, tmp_path, *arguments, *more, model="dinov2")
    )
    assert 0 <= results["after"]["mean_iou"] <= 1
    assert list(results["after"]["per_class_iou"]) == [name for name in CLASSES if name != "ball"]  # one is ignored


@pytest.mark.slow
def test_bad_rows_are_in_the_results_and_the_report(folders, tmp_path):
    (tmp_path / "data").mkdir()
    scenes = make_scenes(6, seed=1)
    objects = list(scenes["objects"])
    objects[1] = objects[1] | {"category": [4] * len(objects[1]["category"])}
    odd = scenes.remove_columns("objects").add_column("objects", objects)
    for split in ("train", "validation"):
        odd.to_parquet(tmp_path / "data" / f"{split}.parquet")
    (tmp_path / "names.json").write_text(json.dumps(dict(enumerate(THINGS[:4]))))
    arguments = ["--dataset", str(tmp_path / "data"), "--id2label", str(tmp_path / "names.json")]
    results = run(ObjectDetection, flags_of(folders, ObjectDetection, tmp_path / "out", *arguments))
    assert results["left_out"]["validation"]["no usable object"] == 1
    assert results["left_out"]["train"]["category outside id2label"] >= 1
    assert "no usable object (first: row 1 of validation)" in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.slow
def test_what_is_doubtful_in_the_data_is_said_and_kept(folders, tmp_path, capsys):
    names = tmp_path / "names.json"
    names.write_text(json.dumps(dict(enumerate([*CLASSES, "spaceship"]))))
    results = run(
        SemanticSegmentation, flags_of(folders, SemanticSegmentation, tmp_path / "out", "--id2label", str(names))
    )
    told = capsys.readouterr().out
    for split in ("validation", "train"):
        (line,) = results["doubts"][split]
        assert re.match(r"of \d+ classes, .*spaceship\): is --id2label that of this dataset", line)
        assert f"{split}: {line.split(' in none')[0]}" in (tmp_path / "out" / "report.html").read_text()
        assert told.count(f"warning: {split}: of ") == 1
    assert told.index("warning: validation") < told.index("step 1: ")


AT_LEAST_1 = (
    *("steps", "batch_size", "eval_batch_size", "gradient_accumulation_steps", "logging_steps", "eval_steps"),
    *("shuffle_buffer", "max_train_samples", "max_eval_samples", "head_channels"),
)
AT_LEAST_0 = ("search_steps", "num_workers", "checkpoints_total_limit", "seed", "data_seed")


def test_flags_that_cannot_be_meant_are_refused(folders, tmp_path, capsys):
    for arguments, message in (
        (["--budget", "2"], "--budget must be a fraction"),
        (["--dataset", "\udcff"], r"--dataset '\udcff' is no text in UTF-8"),
        *(([f"--{name}", "0"], f"argument --{name}: must be at least 1, not 0") for name in AT_LEAST_1),
        *(([f"--{name}", "-1"], f"argument --{name}: must be at least") for name in (*AT_LEAST_1, *AT_LEAST_0)),
        (["--learning_rate", "-0.1"], "argument --learning_rate: must not be negative"),
        (["--head_learning_rate", "nan"], "argument --head_learning_rate: must be a finite number"),
        (["--max_grad_norm", "0"], "argument --max_grad_norm: must be above 0"),
        (["--seed", "4294967295"], "argument --seed: must be at most"),
        (["--steps", "many"], "argument --steps: must be a whole number, not 'many'"),
        (["--method", "full", "--push_to_hub", "me/x"], "--push_to_hub pushes adapters"),
        (["--bad_data", "error", "--streaming"], "choose one"),
    ):
        with pytest.raises(SystemExit):
            parse(SemanticSegmentation, arguments)
        assert message in capsys.readouterr().err
    BertConfig().save_pretrained(tmp_path / "bert")
    AutoConfig.from_pretrained(folders / "swin").save_pretrained(tmp_path / "empty")
    for task, arguments, message in (
        (
            SemanticSegmentation,
            ["--model", "no/model/here"],
            "'no/model/here' is neither a folder nor a model on the",
        ),
        (
            SemanticSegmentation,
            ["--model", "me/nothing"],
            "'me/nothing' is neither a folder nor a model on the",
        ),
        (SemanticSegmentation, ["--model", str(folders / "data")], "--model '.*data': the folder has no model"),
        (SemanticSegmentation, ["--model", str(tmp_path / "bert")], "--model: bert has no backbone in transformers"),
        (SemanticSegmentation, ["--model", str(tmp_path / "empty")], "--model '.*empty': its weights cannot be read"),
        (InstanceSegmentation, ["--model", str(folders / "swin")], "a pyramid of three stages"),
        (InstanceSegmentation, ["--head_channels", "40"], "must be a multiple of 32"),
    ):
        with pytest.raises(FlagError, match=message):
            run(task, flags_of(folders, task, tmp_path / "out", *arguments))
    for arguments, message in (
        (["--log_with", "clearml"], "--log_with clearml: no such tracker"),
        (["--checkpointing_steps", "often"], "'often' is neither a number"),
        (["--checkpointing_steps", "-5"], "--checkpointing_steps '-5' is neither a number"),
        (["--checkpointing_steps", "\u00b2"], "is neither a number"),
        (["--checkpointing_steps", "epoch", "--streaming"], "a stream has no known length"),
    ):
        with pytest.raises(FlagError, match=message):
            run(SemanticSegmentation, flags_of(folders, SemanticSegmentation, tmp_path / "out", *arguments))
    with pytest.raises(FileNotFoundError, match="is no checkpoint of a run; try `latest`"):
        run(SemanticSegmentation, flags_of(folders, SemanticSegmentation, tmp_path, "--resume_from_checkpoint", "x"))


# Resuming

RESUMABLE = ["--checkpointing_steps", "2", "--eval_steps", "3", "--logging_steps", "1", "--steps", "7"]


def child(task, arguments):
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - until the process ends
    run(task, arguments)


def in_a_process(task, arguments, kill_after=None):
    """Run an example in a process of its own, killed after so many seconds if it is not done; its exit code."""
    process = multiprocessing.get_context("fork").Process(target=child, args=(task, arguments))
    process.start()
    process.join(kill_after)
    if process.is_alive():
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    return process.exitcode


def trained(folder):
    return load_file(folder / "adapter_model.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("task", [InstanceSegmentation, ObjectDetection])
def test_a_run_that_is_killed_again_and_again_ends_with_the_same_weights(folders, tmp_path, task):
    """Dropout, random points of the loss, augmentation and the search: everything random must go on where it was."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    began = time.monotonic()
    assert in_a_process(task, flags_of(folders, task, whole, *RESUMABLE)) == 0
    seconds = time.monotonic() - began
    arguments = flags_of(folders, task, killed, *RESUMABLE, "--resume_from_checkpoint", "latest")
    moments, kills = random.Random(7), 0
    while in_a_process(task, arguments, None if kills == 6 else moments.uniform(0.1, 0.9) * seconds) != 0:
        kills += 1
        assert kills <= 6
    assert kills >= 1
    assert trained(whole).keys() == trained(killed).keys()
    for name, tensor in trained(whole).items():
        assert torch.equal(tensor, trained(killed)[name]), name
    one, other = (json.loads((folder / "results.json").read_text()) for folder in (whole, killed))
    for same in ("after", "before", "curves"):
        assert one[same] == other[same]
    assert {path.name for path in (killed / CHECKPOINTS).iterdir()} == {"step_6", "step_7"}


@pytest.mark.slow
def test_every_checkpoint_leads_to_the_same_end(folders, tmp_path):
    task = SemanticSegmentation
    keep = [*RESUMABLE, "--checkpoints_total_limit", "9", "--head", "upernet", "--head_channels", "8"]
    run(task, flags_of(folders, task, tmp_path, *keep))
    expected = trained(tmp_path)
    for step in (0, 2, 6):
        checkpoint = str(tmp_path / CHECKPOINTS / f"step_{step}")
        resumed = flags_of(folders, task, tmp_path, *keep, "--resume_from_checkpoint", checkpoint)
        with pytest.raises(FlagError, match="a finished run is there"):
            run(task, resumed)
        run(task, [*resumed, "--overwrite"])
        assert all(torch.equal(tensor, trained(tmp_path)[name]) for name, tensor in expected.items())
    other = tmp_path / "other"
    run(task, flags_of(folders, task, other, *keep, "--resume_from_checkpoint", checkpoint))
    assert all(torch.equal(tensor, trained(other)[name]) for name, tensor in expected.items())
    with pytest.raises(FlagError, match=r"--budget 0.2: the run in .* was started with 0.1; go on with that"):
        run(task, flags_of(folders, task, tmp_path, *keep, "--resume_from_checkpoint", checkpoint, "--budget", "0.2"))


@pytest.mark.slow
def test_checkpoints_hold_only_what_is_trained(folders, tmp_path):
    task = SemanticSegmentation
    run(task, flags_of(folders, task, tmp_path, *RESUMABLE, "--checkpointing_steps", "epoch", "--method", "lora"))
    assert {path.name for path in (tmp_path / CHECKPOINTS).iterdir()} == {"step_6", "step_7"}  # 12 rows, 2 a step
    names = load_file(tmp_path / CHECKPOINTS / "step_6" / "trained.safetensors").keys()
    assert not [n for n in names if ".backbone." in n and ".lora_" not in n and "relative_position" not in n]


def checkpoint_of_a_moment(folder, limit=2):
    """Checkpoints of a model that is never trained; what tells them apart is the step in their progress."""
    checkpoints = Checkpoints(folder, Accelerator(cpu=True), limit)
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (step + 1))
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    checkpoints.training = Training(model, optimizer, schedule, Progress())
    return checkpoints


def save_at(checkpoints, step):
    checkpoints.training.progress.step = step
    checkpoints.save(step)


def everything_random():
    return random.random(), np.random.randn(), torch.randn(1).item()


def test_a_checkpoint_brings_back_all_that_training_changes(tmp_path):
    checkpoints = checkpoint_of_a_moment(tmp_path)
    training = checkpoints.training
    training.schedule.step()
    training.progress.add("loss", 0.1)
    training.progress.scores[0] = {"iou": float("nan"), "per_class": [0.5]}
    np.random.randn()  # NumPy draws two at a time, and keeps the second
    save_at(checkpoints, 3)
    drawn = everything_random()
    before = [p.detach().clone() for p in training.model.parameters()]
    moments = {i: dict(own) for i, own in training.optimizer.state_dict()["state"].items()}
    other = checkpoint_of_a_moment(tmp_path)
    other.load(other.find("latest"))
    assert everything_random() == drawn
    assert all(torch.equal(p, q) for p, q in zip(other.training.model.parameters(), before, strict=True))
    for i, own in other.training.optimizer.state_dict()["state"].items():
        assert all(torch.equal(tensor, moments[i][name]) for name, tensor in own.items())
    assert other.training.optimizer.param_groups[0]["lr"] == training.optimizer.param_groups[0]["lr"] == 1e-3 / 2
    assert other.training.schedule.state_dict() == training.schedule.state_dict()
    assert other.training.progress.series == {"loss": [(0, 0.1)]}
    assert other.training.progress.step == 3
    assert np.isnan(other.training.progress.scores[0]["iou"])


def test_a_checkpoint_holds_no_pickle_and_reading_it_runs_no_code(tmp_path, monkeypatch):
    save_at(checkpoint_of_a_moment(tmp_path), 1)
    (step,) = (tmp_path / CHECKPOINTS).iterdir()
    names = {"trained.safetensors", "optimizer.safetensors", "state.json", "random_0.json", "digests.json"}
    assert {path.name for path in step.iterdir()} == names
    for name in ("custom_checkpoint_0.pkl", "optimizer.bin", "scheduler.bin", "random_states_0.pkl"):
        (step / name).write_bytes(pickle.dumps(print))  # of another, and never read
    monkeypatch.setattr(pickle, "Unpickler", None)
    monkeypatch.setattr(torch, "load", None)
    again = checkpoint_of_a_moment(tmp_path)
    again.load(again.find("latest"))


@pytest.mark.parametrize("name", ["trained.safetensors", "optimizer.safetensors", "state.json", "random_0.json"])
@pytest.mark.parametrize("harm", ["cut off", "changed", "removed"])
def test_a_damaged_checkpoint_is_never_resumed_silently(tmp_path, name, harm, capsys):
    checkpoints = checkpoint_of_a_moment(tmp_path)
    for step in (1, 2):
        save_at(checkpoints, step)
    path = tmp_path / CHECKPOINTS / "step_2" / name
    content = path.read_bytes()
    if harm == "removed":
        path.unlink()
    else:
        path.write_bytes(content[:-9] if harm == "cut off" else content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
    with pytest.raises(FlagError, match=rf"step_2/{name} is (damaged|missing).*there is step_1 beside it"):
        checkpoints.find(str(path.parent))
    assert checkpoints.find("latest") == tmp_path / CHECKPOINTS / "step_1"
    told = capsys.readouterr().out
    assert f"warning: {path} is" in told
    assert "goes on from the older step_1" in told
    shutil.rmtree(tmp_path / CHECKPOINTS / "step_1")
    with pytest.raises(FlagError, match=rf"latest: .*{name} is .*; there is no other one, so begin anew"):
        checkpoints.find("latest")


def test_a_damaged_checkpoint_never_outlives_a_whole_one(tmp_path):
    checkpoints = checkpoint_of_a_moment(tmp_path, limit=1)
    save_at(checkpoints, 9)
    (tmp_path / CHECKPOINTS / "step_9" / "state.json").write_text("{")
    save_at(checkpoints, 5)
    assert [path.name for path in (tmp_path / CHECKPOINTS).iterdir()] == ["step_5"]


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"trained.safetensors": "00"}', "[" * 100_000, "\ud800"])
def test_a_checkpoint_with_damaged_digests_is_none(tmp_path, content):
    checkpoints = checkpoint_of_a_moment(tmp_path)
    save_at(checkpoints, 1)
    path = tmp_path / CHECKPOINTS / "step_1" / "digests.json"
    path.write_bytes(content.encode("utf-8", "surrogatepass"))
    with pytest.raises(FlagError, match=r"step_1/digests.json is damaged"):
        check(path.parent)
    path.unlink()
    with pytest.raises(FlagError, match=r"step_1 is incomplete, or of an earlier version: no digests.json"):
        check(path.parent)


def test_what_others_have_put_beside_checkpoints_is_passed_over(tmp_path):
    checkpoints = checkpoint_of_a_moment(tmp_path, limit=1)
    for name in ("step_abc", "step_", "step_1_copy", "unfinished_notes", "unfinished_7"):
        (tmp_path / CHECKPOINTS / name).mkdir(parents=True)
    (tmp_path / CHECKPOINTS / "step_8").write_text("a file")
    (tmp_path / CHECKPOINTS / "unfinished_8").write_text("a file")
    assert checkpoints.find("latest") is None
    for step in (1, 2):
        save_at(checkpoints, step)
    assert checkpoints.find("latest").name == "step_2"
    left = {path.name for path in (tmp_path / CHECKPOINTS).iterdir()}
    assert left == {"step_abc", "step_", "step_1_copy", "unfinished_notes", "step_2", "step_8", "unfinished_8"}


def killable(monkeypatch):
    """What changes a folder is killed as soon as no acts are left."""
    left = SimpleNamespace(acts=10**6)

    def killed_at_last(act):
        def maybe(*arguments, **options):
            if not left.acts:
                raise KeyboardInterrupt
            left.acts -= 1
            return act(*arguments, **options)

        return maybe

    acts = (
        (shutil, "rmtree"),
        (Path, "rename"),
        (Path, "mkdir"),
        (os, "replace"),
        (os, "fsync"),
        (shutil, "copyfile"),
    )
    for owner, name in acts:
        monkeypatch.setattr(owner, name, killed_at_last(getattr(owner, name)))
    return left


def test_a_kill_while_a_run_begins_with_anothers_checkpoint_leaves_that_one_whole_or_none(tmp_path, monkeypatch):
    """In the place of an unfinished run, of whose checkpoints none may be left."""
    save_at(checkpoint_of_a_moment(tmp_path / "source"), 4)
    checkpoint = tmp_path / "source" / CHECKPOINTS / "step_4"
    left = killable(monkeypatch)
    for moment in range(60):
        left.acts = 10**6
        folder = RunFolder(tmp_path / str(moment))
        save_at(checkpoint_of_a_moment(folder.work), 9)
        left.acts = moment
        try:
            folder.begin({"new": "flags"}, checkpoint, goes_on=False)
        except KeyboardInterrupt:
            left.acts = 10**6
            folder.mend()
            assert not (folder.path / "discarded_run").exists()
            found = Checkpoints(folder.work, Accelerator(cpu=True), 1).find("latest")
            is_old = moment == 0
            assert found is None or found.name == ("step_9" if is_old else "step_4")
        else:
            break
    assert moment > 8
    check(folder.work / CHECKPOINTS / "step_4")


def test_a_kill_while_a_checkpoint_is_written_leaves_one_to_go_on_from(tmp_path, monkeypatch):
    """At every moment of it: the latest is the old one or the new one, whole."""
    left = killable(monkeypatch)
    seen = set()
    for moment in range(60):
        left.acts = 10**6
        checkpoints = checkpoint_of_a_moment(tmp_path / str(moment), limit=1)
        save_at(checkpoints, 1)
        left.acts = moment
        try:
            save_at(checkpoints, 2)
        except KeyboardInterrupt:
            left.acts = 10**6
            after = checkpoint_of_a_moment(tmp_path / str(moment), limit=1)
            after.load(after.find("latest"))
            seen.add(after.training.progress.step)
            save_at(after, 3)
            assert [path.name for path in after.folder.iterdir()] == ["step_3"]
        else:
            break
    else:
        pytest.fail("it never came to its end")
    assert seen == {1, 2}
    assert moment > 10


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "{}", '{"task": 3, "model": "", "id2label": {}, "args": {}}', "\xff"]
)
def test_a_damaged_record_of_a_run_ends_with_a_sentence(folders, tmp_path, content):
    flags = flags_of(folders, SemanticSegmentation, tmp_path)
    for where, more, message in (
        (tmp_path / "unfinished_run", ["--resume_from_checkpoint", "latest"], "delete this file, and the run goes on"),
        (tmp_path, ["--resume_from_checkpoint", "latest"], "run it again with --overwrite"),
        (tmp_path, [], "replace the run with --overwrite"),
    ):
        shutil.rmtree(tmp_path)
        where.mkdir(parents=True)
        (where / "run.json").write_bytes(content.encode("latin-1"))
        with pytest.raises(FlagError, match=rf"run\.json is damaged \(.*\); .*{message}"):
            run(SemanticSegmentation, [*flags, *more])


@pytest.mark.parametrize("fail", ["replace", "fsync"])
def test_the_record_of_a_run_is_written_whole_or_not_at_all(tmp_path, monkeypatch, fail):
    write_json(tmp_path / "run.json", {"old": 1})

    def killed(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, fail, killed)
    with pytest.raises(KeyboardInterrupt):
        write_json(tmp_path / "run.json", {"new": 2})
    assert json.loads((tmp_path / "run.json").read_text()) == {"old": 1}


def test_an_unfinished_run_that_is_begun_anew_leaves_nothing_to_go_on_with(tmp_path, monkeypatch):
    """Killed while it is removed: its checkpoints would be of other flags than the new run's."""
    folder = RunFolder(tmp_path)
    (folder.work / CHECKPOINTS / "step_2").mkdir(parents=True)

    def killed(path):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            folder.begin({}, None, goes_on=False)
    assert not folder.is_unfinished
    folder.mend()
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_random_states_of_a_run_are_checked_before_it_goes_on(folders, tmp_path, monkeypatch):
    """Accelerate would go on with other random numbers, and say nothing that is seen."""
    task, flags = InstanceSegmentation, [*RESUMABLE, "--resume_from_checkpoint", "latest"]
    run(task, flags_of(folders, task, tmp_path / "whole", *RESUMABLE))
    arguments = flags_of(folders, task, tmp_path / "stopped", *flags)
    run_stopped(monkeypatch, task, arguments, steps=2 + 5)
    checkpoints = tmp_path / "stopped" / "unfinished_run" / CHECKPOINTS
    path = checkpoints / "step_4" / "random_0.json"
    path.write_bytes(path.read_bytes()[:100])
    run(task, arguments)
    expected = trained(tmp_path / "whole")
    assert all(torch.equal(tensor, trained(tmp_path / "stopped")[name]) for name, tensor in expected.items())


@pytest.mark.slow
def test_a_damaged_ticket_search_is_named(folders, tmp_path, monkeypatch):
    task, latest = SemanticSegmentation, ["--resume_from_checkpoint", "latest"]
    arguments = flags_of(folders, task, tmp_path, *RESUMABLE, *latest, "--search_steps", "4")
    run_stopped(monkeypatch, task, arguments, steps=3)
    path = tmp_path / "unfinished_run" / "search.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(FlagError, match=r"the ticket search cannot go on: .*search\.safetensors' is damaged .*Delete"):
        run(task, arguments)
    path.unlink()
    run(task, arguments)


@pytest.mark.parametrize("flags", [[], ["--rewind"]])
def test_a_training_goes_on_from_the_search_or_starts_again(folders, tmp_path, flags):
    still = ["--learning_rate=0", "--internal_learning_rate=0"]
    run(SemanticSegmentation, flags_of(folders, SemanticSegmentation, tmp_path, *still, *flags))
    ups = [tensor for name, tensor in trained(tmp_path).items() if ".up." in name]
    assert ups
    assert any(up.any() for up in ups) is not bool(flags)


def test_a_search_trains_the_head_at_the_rate_of_the_training(folders, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr("dense.run.search_ticket", lambda *args, **given: seen.append(given) or stop())

    def stop():
        raise KeyboardInterrupt

    for flags, rate in ([], 2e-3), (["--head_learning_rate=3e-4"], 3e-4), (["--head_learning_rate=0"], 0.0):
        with pytest.raises(KeyboardInterrupt):
            run(SemanticSegmentation, flags_of(folders, SemanticSegmentation, tmp_path, *flags, "--overwrite"))
        assert seen.pop()["adapter_learning_rate"] == rate


# Longer, shorter and beside others


def in_epochs(flags, count):
    """The flags of a run with epochs in the place of steps."""
    place = flags.index("--steps")
    return [*flags[:place], *flags[place + 2 :], "--num_epochs", str(count)]


@pytest.mark.slow
def test_methods_are_compared_in_one_report_and_finished_runs_are_made_longer(folders, tmp_path, capsys):
    flags = flags_of(folders, SemanticSegmentation, tmp_path, "--eval_steps", "100", "--compare", "head", "sfa")
    run(SemanticSegmentation, in_epochs(flags, 1))
    own, head = (json.loads((tmp_path / f / "results.json").read_text()) for f in ("", "compared/head"))
    assert own["curves"]["mean_iou"][-1][0] == head["curves"]["mean_iou"][-1][0] == 6  # 12 rows, 2 a step
    assert (own["method"], head["method"]) == ("sfa", "head")
    page = (tmp_path / "report.html").read_text()
    for told in ("head alone", "the head alone has ", "The methods, under the same settings", "48 x 64"):
        assert told in page
    with pytest.raises(FlagError, match="a finished run is there"):
        run(SemanticSegmentation, in_epochs(flags, 2))
    run(SemanticSegmentation, [*in_epochs(flags, 2), "--resume_from_checkpoint", "latest"])
    longer, longer_head = (json.loads((tmp_path / f / "results.json").read_text()) for f in ("", "compared/head"))
    assert "goes on from step_6" in capsys.readouterr().out
    for before, after in ((own, longer), (head, longer_head)):
        assert [step for step, _ in after["curves"]["mean_iou"]] == [0, 6, 12]
        assert after["curves"]["mean_iou"][:2] == before["curves"]["mean_iou"]
    more = ["--resume_from_checkpoint", "latest", "--budget", "0.2"]
    with pytest.raises(FlagError, match=r"--budget 0\.2: the run in"):
        run(SemanticSegmentation, [*in_epochs(flags, 3), *more])


@pytest.mark.slow
def test_a_run_that_gets_no_better_stops_and_keeps_its_best_step(folders, tmp_path, capsys):
    still = ["--learning_rate", "0", "--internal_learning_rate", "0", "--head_learning_rate", "0"]
    flags = [*still, "--steps", "9", "--eval_steps", "1", "--early_stopping", "2", "--lr_scheduler", "cosine"]
    results = run(SemanticSegmentation, flags_of(folders, SemanticSegmentation, tmp_path, *flags))
    assert [step for step, _ in results["curves"]["mean_iou"]] == [0, 1, 2, 3]
    assert results["best"] == {"step": 1, "folder": "best"}
    told = capsys.readouterr().out
    assert "stopped: 2 evaluations were no better than that of step 1" in told
    assert f"the best was step 1 (mean_iou {results['after']['mean_iou']:.4f}): {tmp_path / 'best'}" in told
    assert {"run.json", "adapter_config.json", "adapter_model.safetensors"} <= set(os.listdir(tmp_path / "best"))


def test_learning_rates_rise_and_fall_as_the_schedule_says():
    for kind, half in (("polynomial", 0.5**0.9), ("cosine", 0.5), ("linear", 0.5), ("constant", 1.0)):
        part = falling(kind, 100)
        assert part(0) == pytest.approx(0.1, rel=0.02)
        assert part(50) == pytest.approx(half)
        assert part(100) == (1.0 if kind == "constant" else 0.0)


def test_by_default_images_are_as_large_as_the_models_processor_makes_them(tmp_path):
    config = tiny.dinov2_config(image_size=56, patch_size=14)
    config.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert default_size(str(tmp_path), config) == ((56, 56), "its config")
    for said, size in (
        ({"size": {"height": 60, "width": 90}}, (56, 84)),
        (
            {"size": {"shortest_edge": 256}, "crop_size": {"height": 224, "width": 224}, "do_center_crop": True},
            (224, 224),
        ),
        ({"size": {"shortest_edge": 100}}, (98, 98)),
    ):
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(said))
        assert default_size(str(tmp_path), config) == (size, "its image processor")


# What fails after the training


def test_what_cannot_stand_in_the_model_card_is_refused_before_the_training(folders, tmp_path, monkeypatch):
    def refuse(model, *, dataset, **options):
        raise ValueError(f"dataset={dataset!r} is no name")

    monkeypatch.setattr("dense.run.describe_adapter", refuse)
    with pytest.raises(FlagError, match=r"--dataset '.*/data', .* named in the model card, and dataset=.* is no name"):
        run(SemanticSegmentation, flags_of(folders, SemanticSegmentation, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_dataset_may_be_in_a_folder_of_any_name(folders, tmp_path):
    data = tmp_path / "a|b `c` $d$ ![](x)"
    shutil.copytree(folders / "data", data)
    run(SemanticSegmentation, flags_of(folders, SemanticSegmentation, tmp_path / "out", "--dataset", str(data)))
    assert (tmp_path / "out" / "README.md").is_file()


def failing(*arguments, **options):
    raise RuntimeError("no disk, no memory, a bug")


@pytest.mark.slow
def test_a_failure_in_what_is_told_does_not_end_a_run(folders, tmp_path, monkeypatch, capsys):
    described = iter((describe_adapter,))  # before the training, to check the flags
    monkeypatch.setattr("dense.run.describe_adapter", lambda *a, **o: next(described, failing)(*a, **o))
    monkeypatch.setattr("dense.report.save_grid", failing)
    monkeypatch.setattr("dense.report.draw_curves", failing)
    results = run(SemanticSegmentation, flags_of(folders, SemanticSegmentation, tmp_path))
    told = capsys.readouterr().out
    for what in ("the pictures", "the report", "the scores in the model card"):
        assert f"warning: {what} could not be written: RuntimeError('no disk, no memory, a bug')" in told
    assert json.loads((tmp_path / "results.json").read_text()) == results
    assert trained(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("what", ["evaluate", "Run._finish", "Run._check_reloaded", "write_json"])
def test_what_was_trained_is_saved_before_anything_can_fail(folders, tmp_path, monkeypatch, capsys, what):
    run(SemanticSegmentation, flags_of(folders, SemanticSegmentation, tmp_path / "whole"))
    fit = dense.run.fit

    def fit_then_fail(*arguments, **options):
        model = fit(*arguments, **options)
        monkeypatch.setattr(f"dense.run.{what}", failing)
        return model

    monkeypatch.setattr("dense.run.fit", fit_then_fail)
    with pytest.raises(RuntimeError, match="no disk"):
        run(SemanticSegmentation, flags_of(folders, SemanticSegmentation, tmp_path / "failed"))
    work = tmp_path / "failed" / "unfinished_run"
    assert f"what was trained is in {work}; keep a copy" in capsys.readouterr().out
    expected = trained(tmp_path / "whole")
    assert all(torch.equal(tensor, trained(work)[name]) for name, tensor in expected.items())


@pytest.mark.slow
def test_scores_that_are_not_finite_do_not_lose_a_run(folders, tmp_path, monkeypatch):
    by_class = SemanticSegmentation.by_class
    monkeypatch.setattr(SemanticSegmentation, "by_class", lambda self, s: by_class(self, s) | {"odd": float("inf")})
    results = run(SemanticSegmentation, flags_of(folders, SemanticSegmentation, tmp_path))
    assert results["after"]["odd"] is None


HOSTILE = [
    *(r"$\foo$", "$", "\ud800", "![](http://x/y.png)", "<script>alert(1)</script>", "<img src=//x/y.png>"),
    *("long " * 999, "", "a\x1b[31m\nb"),
]


@pytest.mark.slow
def test_classes_of_any_name_end_no_run_and_are_text_in_its_report(folders, tmp_path, capsys):
    names = tmp_path / "names.json"
    names.write_text(json.dumps(dict(enumerate(HOSTILE))))
    out = tmp_path / "out"
    run(SemanticSegmentation, flags_of(folders, SemanticSegmentation, out, "--id2label", str(names)))
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "&lt;script&gt;alert(1)" in page
    assert not re.search(r"<script|<img src=//|src=.http", page)
    assert "default-src 'none'; img-src data:" in page
    described = json.loads((out / "run.json").read_text())
    assert described["id2label"]["1"] == "$"
    told = capsys.readouterr().out
    assert "could not be written" not in told
    assert "\x1b[31m" not in told


@pytest.mark.slow
def test_a_terminal_without_unicode_ends_no_run(folders, tmp_path):
    (tmp_path / "names.json").write_text(json.dumps({i: f"\u5929{i}" for i in range(len(CLASSES) + 1)}))
    flags = flags_of(folders, SemanticSegmentation, tmp_path / "out", "--id2label", str(tmp_path / "names.json"))
    done = launch("semantic_segmentation.py", *flags, "--search_steps", "0", PYTHONIOENCODING="ascii")
    assert done.returncode == 0, done.stderr[-3000:]


# Several processes


def launch(script, *arguments, launcher=(), **environment):
    return subprocess.run(
        [sys.executable, *launcher, str(EXAMPLES / script), *arguments],
        capture_output=True,
        text=True,
        timeout=280,
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true"} | environment,
    )


TWO = ("-m", "torch.distributed.run", "--nproc_per_node=2")


@pytest.mark.slow
@pytest.mark.parametrize("task", [ObjectDetection, SemanticSegmentation])
def test_two_processes_share_the_work_and_can_be_resumed(folders, task, tmp_path):
    """The head of segmentation has batch norms, whose statistics each process takes from its own batches."""
    script, more = {
        ObjectDetection: ("object_detection.py", ()),
        SemanticSegmentation: ("semantic_segmentation.py", ("--head", "upernet", "--head_channels", "8")),
    }[task]
    arguments = flags_of(folders, task, tmp_path, *RESUMABLE, "--steps", "4", *more)
    done = launch(script, *arguments, launcher=TWO)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "every tensor is the same" in done.stdout
    assert "2 on cpu" in (tmp_path / "report.html").read_text()
    expected = trained(tmp_path)
    checkpoint = str(tmp_path / CHECKPOINTS / "step_2")
    done = launch(script, *arguments, "--resume_from_checkpoint", checkpoint, "--overwrite", launcher=TWO)
    assert done.returncode == 0, done.stderr[-3000:]
    assert all(torch.equal(tensor, trained(tmp_path)[name]) for name, tensor in expected.items())


@pytest.mark.slow
def test_two_processes_compare_methods_and_extend_all_of_them(folders, tmp_path):
    """Each method wraps its model for several processes anew; the one of full fine-tuning in a way of its own."""
    methods = ("lora", "full", "head")
    arguments = flags_of(folders, SemanticSegmentation, tmp_path, "--eval_steps", "100", "--compare", *methods)
    done = launch("semantic_segmentation.py", *arguments, "--steps", "2", launcher=TWO)
    assert done.returncode == 0, done.stderr[-3000:]
    places = [tmp_path, *(tmp_path / "compared" / method for method in methods)]
    for place, method in zip(places, ("sfa", *methods), strict=True):
        results = json.loads((place / "results.json").read_text())
        assert (results["method"], results["curves"]["mean_iou"][-1][0]) == (method, 2)
        assert "2 on cpu" in (place / "report.html").read_text()
    assert "full fine-tuning has" in (tmp_path / "report.html").read_text()
    again = (*arguments, "--steps", "3", "--resume_from_checkpoint", "latest")
    done = launch("semantic_segmentation.py", *again, launcher=TWO)
    assert done.returncode == 0, done.stderr[-3000:]
    for place in places:
        assert json.loads((place / "results.json").read_text())["curves"]["mean_iou"][-1][0] == 3


# Folders that have a run already


def files_of(folder):
    """What is in a folder, byte for byte."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def ended(folders, tmp_path_factory):
    """The folder of a finished run."""
    folder = tmp_path_factory.mktemp("ended")
    run(SemanticSegmentation, flags_of(folders, SemanticSegmentation, folder, "--search_steps", "0"))
    return folder


@pytest.fixture
def copied(ended, tmp_path):
    shutil.copytree(ended, tmp_path / "run")
    return tmp_path / "run"


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        ["--budget", "0.00001"],
        ["--model", "nowhere/at/all"],
        ["--model", "{folders}/data"],
        ["--dataset", "nowhere/at/all"],
        ["--id2label", "nowhere.json"],
        ["--image_size", "31", "33"],
        ["--log_with", "clearml"],
        ["--checkpointing_steps", "often"],
        ["--resume_from_checkpoint", "nowhere"],
        ["--id2label", "{folders}/one.json"],
        ["--id2label", "{folders}/one.json", "--bad_data", "error"],
    ],
)
def test_a_mistyped_run_leaves_the_result_that_it_would_replace(folders, ended, flags):
    (folders / "one.json").write_text(json.dumps({"0": CLASSES[0]}))
    before = files_of(ended)
    flags = [flag.format(folders=folders) for flag in flags]
    with pytest.raises((DataError, FlagError, OSError)):
        run(SemanticSegmentation, flags_of(folders, SemanticSegmentation, ended, "--overwrite", *flags))
    assert files_of(ended) == before


@pytest.mark.slow
def test_a_finished_run_is_replaced_only_where_a_flag_says_so(folders, ended):
    before = files_of(ended)
    for task, flags in ((SemanticSegmentation, ["--search_steps", "0"]), (DepthEstimation, [])):
        with pytest.raises(
            FlagError, match=r"a finished run is there \(SemanticSegmentation, --method sfa\); .*--over"
        ):
            run(task, flags_of(folders, task, ended, *flags))
    assert files_of(ended) == before


@pytest.mark.slow
def test_a_finished_run_that_is_to_go_on_has_nothing_left_to_do(folders, ended, capsys):
    before = files_of(ended)
    arguments = ["--search_steps", "0", "--resume_from_checkpoint", "latest"]
    flags = flags_of(folders, SemanticSegmentation, ended, *arguments)
    assert run(SemanticSegmentation, flags) == json.loads(before["results.json"])
    assert "nothing is left to do" in capsys.readouterr().out
    for more, message in ((["--budget", "0.2"], "--budget 0.2: .*with 0.1"), (["--push_to_hub", "me/x"], "hf upload")):
        with pytest.raises(FlagError, match=message):
            run(SemanticSegmentation, [*flags, *more])
    with pytest.raises(FlagError, match="is one of SemanticSegmentation"):
        run(DepthEstimation, flags_of(folders, DepthEstimation, ended, *arguments))
    assert files_of(ended) == before


def run_stopped(monkeypatch, task, flags, steps):
    """A run that is interrupted, as by Ctrl-C, after so many steps."""
    loss, calls = task.loss, iter(range(steps))

    def interrupted(self, *arguments):
        if next(calls, None) is None:
            raise KeyboardInterrupt
        return loss(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(task, "loss", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(task, flags)


@pytest.mark.slow
def test_the_old_result_stays_whole_until_the_new_one_is(folders, copied, monkeypatch):
    task, before = SemanticSegmentation, files_of(copied)
    (copied / "notes.txt").write_text("of mine")
    (copied / "adapter_notes.txt").write_text("of mine")
    again = flags_of(folders, task, copied, "--search_steps", "0", "--seed", "1")
    run_stopped(monkeypatch, task, [*again, "--overwrite"], steps=3)
    assert before.items() <= files_of(copied).items()
    base = task(parse(task, again), names_of(copied)).build(str(folders / "swin"), CPU).model
    PeftModel.from_pretrained(base, copied)
    with pytest.raises(FlagError, match="not ended; it left no checkpoint, begin anew with --overwrite"):
        run(task, again)
    run(task, [*again, "--overwrite"])
    assert json.loads((copied / "results.json").read_text())["seed"] == 1
    after = files_of(copied)
    assert after["adapter_model.safetensors"] != before["adapter_model.safetensors"]
    assert after.keys() >= {"notes.txt", "adapter_notes.txt"}
    assert not [name for name in after if "unfinished" in name or "complete" in name]


def names_of(folder):
    return Classes({int(i): name for i, name in json.loads((folder / "run.json").read_text())["id2label"].items()})


@pytest.mark.slow
def test_a_run_that_replaces_another_can_be_killed_and_go_on(folders, copied, tmp_path, monkeypatch):
    task, before = SemanticSegmentation, files_of(copied)
    run(task, flags_of(folders, task, tmp_path / "whole", *RESUMABLE))
    flags = flags_of(folders, task, copied, *RESUMABLE)
    latest = ["--resume_from_checkpoint", "latest"]
    run_stopped(monkeypatch, task, [*flags, "--overwrite", *latest], steps=5)
    assert before.items() <= files_of(copied).items()
    with pytest.raises(FlagError, match="go on with it by --resume_from_checkpoint latest, begin anew with --overwr"):
        run(task, flags)
    run(task, [*flags, *latest])
    assert trained(copied).keys() == trained(tmp_path / "whole").keys()
    assert all(torch.equal(tensor, trained(copied)[name]) for name, tensor in trained(tmp_path / "whole").items())


def test_a_kill_while_a_result_is_put_in_place_loses_nothing(tmp_path, monkeypatch):
    """At every moment of it: what is there is the old result, or becomes the new one at the next start."""
    step = iter(())

    def killed_at_last(act):
        def maybe(*arguments, **options):
            if next(step, None) is None:
                raise KeyboardInterrupt
            return act(*arguments, **options)

        return maybe

    for owner, name in ((shutil, "rmtree"), (Path, "unlink"), (Path, "rename"), (Path, "rmdir")):
        monkeypatch.setattr(owner, name, killed_at_last(getattr(owner, name)))
    old = dict.fromkeys(("run.json", "results.json", "pictures/old.jpg", "ticket.png"), b"old")
    new = dict.fromkeys(("run.json", "results.json", "pictures/new.jpg", "adapter_model.safetensors"), b"new")
    for moment in range(40):
        folder = RunFolder(tmp_path / str(moment))
        for where, files in ((folder.path, old), (folder.work, new)):
            for name, content in files.items():
                (where / name).parent.mkdir(parents=True, exist_ok=True)
                (where / name).write_bytes(content)
        step = iter(range(moment))
        try:
            folder.put_in_place()
        except KeyboardInterrupt:
            step = iter(range(99))
            RunFolder(folder.path).mend()
        else:
            assert moment > 5
            break
        assert files_of(folder.path) == new
    else:
        pytest.fail("it never came to its end")


def test_what_is_of_no_run_is_never_replaced(folders, tmp_path):
    (tmp_path / "README.md").write_text("of mine")
    with pytest.raises(FlagError, match=r"README\.md would be replaced, and is of no run; name another folder"):
        run(DepthEstimation, flags_of(folders, DepthEstimation, tmp_path, "--overwrite"))
    with pytest.raises(FlagError, match=r"README\.md is no folder"):
        run(DepthEstimation, flags_of(folders, DepthEstimation, tmp_path / "README.md"))
    assert files_of(tmp_path) == {"README.md": b"of mine"}


def test_by_default_each_task_and_method_has_a_folder():
    assert parse(SemanticSegmentation, []).output_dir == Path("out/semantic_segmentation-sfa")
    assert parse(DepthEstimation, ["--method", "lora"]).output_dir == Path("out/depth_estimation-lora")
    assert parse(DepthEstimation, ["--output_dir", "x"]).output_dir == Path("x")


def test_the_demo_can_be_run_again():
    (flags,) = re.findall(r"examples/semantic_segmentation.py (.*)", (EXAMPLES.parent / "Makefile").read_text())
    assert parse(SemanticSegmentation, flags.split()).overwrite


@pytest.mark.slow
def test_nothing_of_an_earlier_run_is_taken_for_a_later_ones(folders, tmp_path):
    """One folder for a run with an adapter and a ticket, and then for one that trains the head alone."""
    arguments = flags_of(folders, SemanticSegmentation, tmp_path, "--steps", "2", "--search_steps", "1")
    run(SemanticSegmentation, arguments)
    assert (tmp_path / "ticket.png").exists()
    (tmp_path / "notes.txt").write_text("of mine")
    later = run(SemanticSegmentation, [*arguments, "--method", "head", "--overwrite"])
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(("adapter", "ticket"))]
    assert later["bytes"].keys() == {"head or whole model", "names and rest", "total"}
    assert (tmp_path / "notes.txt").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "flags", "match"),
    [
        (ObjectDetection, ["--bbox_key", "boxes"], r"objects have no 'boxes': they have .*--bbox_key"),
        (ObjectDetection, ["--queries", "5000"], "--queries 5000"),
        (DepthEstimation, ["--depth_scale", "0.001"], r"is --depth_scale right\?"),
        (SemanticSegmentation, ["--method", "lora", "--external_share", "0.5"], "--external_share 0.5"),
        (SemanticSegmentation, ["--budget", "1e-6"], "--budget 1e-06"),
        (SemanticSegmentation, ["--last_blocks", "1"], "--last_blocks 1: the backbone is a swin, whose blocks"),
        (DepthEstimation, ["--last_blocks", "5"], "--last_blocks 5: the backbone has 4"),
        (DepthEstimation, ["--last_blocks", "1", "--method", "lora"], "--method lora .*--last_blocks 1: "),
    ],
)
def test_flags_that_do_not_fit_the_data_or_the_method_end_with_a_sentence(folders, task, flags, match, tmp_path):
    with pytest.raises((DataError, FlagError), match=match):
        run(task, flags_of(folders, task, tmp_path, "--steps", "2", "--search_steps", "0", *flags))


@pytest.mark.slow
def test_a_script_ends_with_a_sentence_where_its_flags_are_wrong(folders, tmp_path):
    done = launch("depth_estimation.py", "--dataset", "/nowhere", "--output_dir", str(tmp_path), "--model", "x")
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith("depth_estimation.py: --dataset '/nowhere' is neither")


def test_a_fresh_depth_head_learns_where_it_gives_no_depth_and_is_the_plain_head_otherwise():
    levels = [f"stage{i}" for i in range(1, 5)]
    config = tiny.dinov2_config(num_hidden_layers=4, out_features=levels, reshape_hidden_states=False)
    model = DepthEstimation(parse(DepthEstimation, ["--head_channels", "8"])).fresh(Dinov2Backbone(config))
    images = tiny.pixels()

    plain = DPTForDepthEstimation(model.config)
    plain.load_state_dict(model.state_dict())
    depth = model.eval()(images).predicted_depth
    assert depth.min() > 0
    assert torch.equal(depth, plain.eval()(images).predicted_depth)

    model = copy.deepcopy(model)  # as PEFT does with a head
    with torch.no_grad():
        model.head.head[-2].weight.zero_()
        model.head.head[-2].bias.fill_(-1.0)
    assert not model(images).predicted_depth.any()
    model.train()(images).predicted_depth.log().mean().backward()
    assert model.head.head[-2].bias.grad > 1

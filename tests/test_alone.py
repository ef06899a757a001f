"""The scripts that use what was trained, with adapters that no example has made: their own files are all there is."""

import json
import shutil

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from huggingface_hub import HfApi
from peft import LoraConfig, get_peft_model
from PIL import Image
from transformers import (
    DPTForDepthEstimation,
    DPTImageProcessorPil,
    SegformerImageProcessorPil,
    UperNetForSemanticSegmentation,
)

import tiny
from sfa_peft import SFAConfig, describe_adapter, load_dense

import export
import predict
from app import Adapters
from app import main as app
from dense.errors import FlagError
from dense.scenes import make_scene

CPU = torch.device("cpu")
LABELS = {0: "road", 1: "void", 2: "<b>sky"}
SIZE = {"height": 32, "width": 40}
MEAN = {"do_normalize": True, "image_mean": [0.1, 0.2, 0.3], "image_std": [0.3, 0.3, 0.3]}


@pytest.fixture(autouse=True)
def _no_accelerator_is_left():
    yield
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


def save(folder, base, processor):
    """An adapter as any program saves it, with what is in it changed."""
    heads = [head for head in ("decode_head", "neck", "head", "classifier") if hasattr(base, head)]
    config = SFAConfig(budget=0.1, external_conv=0, modules_to_save=heads, init_weights=False)
    model = get_peft_model(base, config)
    describe_adapter(model, dataset="scenes", processor=processor)
    model.save_pretrained(folder)
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Adapters for labels and for depth, and a photo."""
    root = tmp_path_factory.mktemp("alone")
    tiny.upernet(tiny.swin_config(), seed=3).save_pretrained(root / "upernet")
    tiny.dpt_on_dinov2().save_pretrained(root / "dpt")
    for name in ("labels", "other"):
        torch.manual_seed(0)
        base = UperNetForSemanticSegmentation.from_pretrained(root / "upernet", id2label=LABELS)
        save(root / name, base, SegformerImageProcessorPil(size=SIZE, **MEAN))
    depth = DPTForDepthEstimation.from_pretrained(root / "dpt")
    save(root / "depth", depth, DPTImageProcessorPil(size={"height": 28, "width": 28}))
    make_scene(1)["image"].save(root / "photo.png")
    return root


def predicted(folder, name, out, *own):
    return predict.main(["--run", str(name), "--images", str(folder / "photo.png"), "--output_dir", str(out), *own])


def expected_labels(folder, model, processor):
    with Image.open(folder / "photo.png") as image:
        outputs = model(**processor(image.convert("RGB"), return_tensors="pt"))
        size = [(image.height, image.width)]
    return processor.post_process_semantic_segmentation(outputs, size)[0].numpy()


@torch.no_grad()
def test_predict_takes_its_own_processor_and_classes(folder, tmp_path):
    numbers = predicted(folder, folder / "labels", tmp_path / "out")
    assert numbers["id2label"] == LABELS  # a class of a model is one, whatever it is called
    model, processor, _ = load_dense(str(folder / "labels"))
    with Image.open(tmp_path / "out" / "masks" / "photo.png") as mask:
        assert np.array_equal(np.asarray(mask), expected_labels(folder, model, processor))


def test_predict_from_the_hub_and_on_a_base_that_was_moved(folder, tmp_path, hub):
    model = load_dense(str(folder / "labels")).model
    with pytest.warns(UserWarning, match="a folder that others do not have"):
        model.push_to_hub("me/labels")
    assert "run.json" not in HfApi().list_repo_files("me/labels")
    (folder / "upernet").rename(folder / "moved")
    try:
        with pytest.raises(FlagError, match=r"the adapter in me/labels cannot be loaded: .*upernet"):
            predicted(folder, "me/labels", tmp_path / "hub")
        predicted(folder, "me/labels", tmp_path / "hub", "--model", str(folder / "moved"))
    finally:
        (folder / "moved").rename(folder / "upernet")
    predicted(folder, folder / "labels", tmp_path / "own")
    own, there = ((tmp_path / name / "masks" / "photo.png").read_bytes() for name in ("own", "hub"))
    assert own == there


def test_how_far_depth_reaches_is_read_or_told(folder, tmp_path, capsys):
    predicted(folder, folder / "depth", tmp_path / "untold")
    assert "nothing in" in (said := capsys.readouterr().out)
    assert "says how far its depth reaches: colours and files end at 80 m" in said
    shutil.copytree(folder / "depth", tmp_path / "depth")
    config = json.loads((tmp_path / "depth" / "base_config.json").read_text())
    (tmp_path / "depth" / "base_config.json").write_text(json.dumps(config | {"max_depth": 10}))
    assert predicted(folder, tmp_path / "depth", tmp_path / "told")["depth_scale"] == 1000
    assert "how far" not in capsys.readouterr().out


def without(folder, name, tmp_path, *files):
    shutil.copytree(folder / name, tmp_path / "without")
    for file in files:
        (tmp_path / "without" / file).unlink()
    return tmp_path / "without"


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("base_config.json", "has neither base_config.json nor run.json, .* save it again with sfa_peft 0.2 or later"),
        (
            "preprocessor_config.json",
            r"has no preprocessor_config.json, .* call describe_adapter\(model, processor=...\)",
        ),
        ("adapter_model.safetensors", "the adapter in .*without cannot be loaded"),
    ],
)
def test_what_does_not_stand_alone_says_what_to_do(folder, tmp_path, file, message):
    name = without(folder, "labels", tmp_path, file)
    for use in (lambda: predicted(folder, name, tmp_path / "out"), lambda: Adapters([str(name)], CPU)):
        with pytest.raises(FlagError, match=message):
            use()
    assert not (tmp_path / "out").exists()


def test_a_base_and_a_method_that_the_scripts_do_not_know(folder, tmp_path):
    base = tiny.vit()
    base.save_pretrained(tmp_path / "vit")
    get_peft_model(type(base).from_pretrained(tmp_path / "vit"), SFAConfig(budget=0.1)).save_pretrained(
        tmp_path / "sfa"
    )
    with pytest.raises(FlagError, match=r"an adapter for ViT.*, whose outputs no task here reads"):
        predicted(folder, tmp_path / "sfa", tmp_path / "out")
    base = UperNetForSemanticSegmentation.from_pretrained(folder / "upernet")
    get_peft_model(base, LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "lora")
    with pytest.raises(FlagError, match=r"has neither base_config\.json nor run\.json"):
        predicted(folder, tmp_path / "lora", tmp_path / "out")


# Exporting


def test_an_adapter_is_exported_by_its_name_alone(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "find_spec", lambda name: None)
    numbers = export.main(["--run", str(folder / "labels"), "--output_dir", str(tmp_path / "out"), "--repeats", "1"])
    assert numbers["image_size"] == [SIZE["height"], SIZE["width"]]
    assert numbers["difference"]["merged"] < 1e-5
    merged = UperNetForSemanticSegmentation.from_pretrained(tmp_path / "out" / "merged")
    assert torch.allclose(tiny.output(merged), tiny.output(load_dense(str(folder / "labels")).model), atol=1e-5)
    name = without(folder, "labels", tmp_path, "preprocessor_config.json")
    flags = ["--adapter", str(name), "--output_dir", str(tmp_path / "other"), "--repeats", "1"]
    with pytest.raises(FlagError, match="nothing says how large its images are: give --image_size"):
        export.main(flags)
    assert export.main([*flags, "--image_size", "64", "64"])["image_size"] == [64, 64]


# The page


@torch.no_grad()
def test_the_page_compares_with_the_base_and_holds_a_backbone_once(folder):
    names = [str(folder / name) for name in ("labels", "other", "depth")]
    adapters = Adapters(names, CPU)
    assert adapters.tasks == ["semantic segmentation", "depth estimation"]
    for name in names:
        before, adapted, wrong = adapters.answer(str(folder / "photo.png"), name)
        assert before.shape == adapted.shape == (96, 128, 3)
        assert not wrong
        assert not np.array_equal(before, adapted)
        assert adapters.before(name) == "Before the training"
        assert "% of the backbone trained" in adapters.words(name)
        assert '<table class="ticket">' in adapters.ticket(name)
    assert "&lt;b&gt;sky" in adapters.legend(names[0])
    assert "how far its depth reaches" in adapters.words(names[2])
    one, other = (dict(adapters.loaded[name].model.named_parameters()) for name in names[:2])
    frozen = [n for n in one if ".sfa_" not in n and ".modules_to_save." not in n]
    assert all(one[n].data_ptr() == other[n].data_ptr() for n in frozen)
    model, processor, _ = load_dense(names[1])
    predictor, image = adapters.predictors[names[1]], Image.open(folder / "photo.png").convert("RGB")
    assert np.array_equal(predictor(image), expected_labels(folder, model, processor))


def test_the_page_without_an_adapter_to_show(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FlagError, match=r"there are no adapters in out/multi_task yet: run multi_task.py first"):
        app([])
    with pytest.raises(FlagError, match="nowhere is neither a folder nor a repository on the Hub"):
        app(["--runs", "nowhere"])

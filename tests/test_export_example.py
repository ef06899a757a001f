"""`examples/export.py`, as the last step after a run."""

import json
import re
from pathlib import Path

import onnxruntime
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from transformers import Dinov2Model, SwinForImageClassification, UperNetForSemanticSegmentation

import tiny

import export
from dense.errors import FlagError
from dense.run import run
from dense.scenes import make_scenes
from depth_estimation import DepthEstimation
from semantic_segmentation import SemanticSegmentation

ROOT = Path(__file__).parent.parent
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.`:FutureWarning")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Runs of segmentation on Swin, with both heads, and of depth on DINOv2."""
    root = tmp_path_factory.mktemp("export")
    torch.manual_seed(0)
    SwinForImageClassification(tiny.swin_config(image_size=64, patch_size=4)).save_pretrained(root / "swin")
    Dinov2Model(tiny.dinov2_config(num_hidden_layers=4, reshape_hidden_states=False)).save_pretrained(root / "dinov2")
    (root / "data").mkdir()
    for split, count in (("train", 6), ("validation", 2)):
        make_scenes(count, seed=count).to_parquet(root / "data" / f"{split}.parquet")
    common = [
        *("--dataset", str(root / "data"), "--steps", "2", "--search_steps", "1", "--batch_size", "2"),
        *("--image_size", "48", "64", "--budget", "0.1", "--num_workers", "0", "--log_with", "none"),
        *("--head_channels", "8"),
    ]
    (root / "id2label.json").write_text(json.dumps({str(i): f"thing {i}" for i in range(9)}))
    for name, task, model, own in (
        ("upernet", SemanticSegmentation, "swin", ["--id2label", str(root / "id2label.json"), "--external_conv", "0"]),
        ("filters", SemanticSegmentation, "swin", ["--id2label", str(root / "id2label.json")]),
        ("linear", SemanticSegmentation, "swin", ["--id2label", str(root / "id2label.json"), "--head", "linear"]),
        ("depth", DepthEstimation, "dinov2", ["--external_conv", "0"]),
    ):
        run(task, [*common, *own, "--model", str(root / model), "--output_dir", str(root / name)])
        for state in (AcceleratorState, GradientState, PartialState):
            state._reset_state()
    return root


def arguments(folder, name, output, *own):
    return ["--run", str(folder / name), "--output_dir", str(output), "--repeats", "2", *own]


def test_a_run_becomes_a_plain_model_and_an_onnx_file(folder, tmp_path, capsys):
    numbers = export.main(arguments(folder, "upernet", tmp_path / "out", "--dynamic_batch"))
    assert numbers == json.loads((tmp_path / "out" / "export.json").read_text())
    assert 0 <= max(numbers["difference"].values()) < 1e-5
    assert list(numbers["milliseconds"]) == ["base", "adapter on its base", "merged", "merged, ONNX"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["export.json", "merged", "onnx"]
    model = UperNetForSemanticSegmentation.from_pretrained(tmp_path / "out" / "merged").eval()
    session = onnxruntime.InferenceSession(tmp_path / "out" / "onnx" / "model.onnx")
    x = tiny.pixels(3, 64)[:, :, :48]
    (logits,) = session.run(["logits"], {"pixel_values": x.numpy()})
    torch.testing.assert_close(torch.from_numpy(logits), tiny.output(model, x), atol=1e-4, rtol=1e-4)
    said = capsys.readouterr().out
    assert re.search(r"merged: largest relative difference from the adapted model \d", said)
    assert re.search(r"ONNX: largest relative difference from the adapted model \d", said)


def test_an_export_is_replaced_only_where_a_flag_says_so_and_the_new_one_is_right(folder, tmp_path):
    export.main(arguments(folder, "upernet", tmp_path))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(FlagError, match="an export is there; replace it with --overwrite"):
        export.main(arguments(folder, "upernet", tmp_path))
    with pytest.raises(FlagError, match=r"differs by .*, more than --tolerance 1e-30; it is in .*unfinished_export"):
        export.main(arguments(folder, "upernet", tmp_path, "--overwrite", "--tolerance", "1e-30"))
    assert {path: path.read_bytes() for path in before} == before
    export.main(arguments(folder, "upernet", tmp_path, "--overwrite"))
    (tmp_path / "export.json").unlink()
    with pytest.raises(FlagError, match="merged, onnx would be replaced, and is not of an export"):
        export.main(arguments(folder, "upernet", tmp_path, "--overwrite"))


def test_dinov2_is_widened_where_a_flag_says_so(folder, tmp_path, capsys):
    export.main(arguments(folder, "depth", tmp_path / "not"))
    assert re.search(r"no merged model was written: .*cannot be folded into it: .*--widen", capsys.readouterr().out)
    assert sorted(path.name for path in (tmp_path / "not").iterdir()) == ["export.json", "onnx"]
    export.main(arguments(folder, "depth", tmp_path, "--widen"))
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["backbone_config"]["mlp_ratio"] == 5


def test_a_run_with_filters_becomes_an_onnx_file(folder, tmp_path, capsys):
    numbers = export.main(arguments(folder, "filters", tmp_path, "--dynamic_batch"))
    assert 0 <= max(numbers["difference"].values()) < 1e-5
    assert sorted(path.name for path in tmp_path.iterdir()) == ["export.json", "onnx"]
    assert re.search(r"no merged model was written: .*filters.*--external_conv 0", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("nowhere", "nowhere is neither a folder nor a repository on the Hub"),
        ("linear", "its decode_head is a LinearHead, which is not of transformers"),
    ],
)
def test_a_run_that_cannot_be_exported_ends_with_a_sentence(folder, tmp_path, hub, name, match):
    with pytest.raises(FlagError, match=match):
        export.main(arguments(folder, name, tmp_path))
    assert not list(tmp_path.iterdir())


def test_the_command_after_the_demo_is_the_documented_one():
    (output,) = re.findall(r"--output_dir (\S+)", (ROOT / "Makefile").read_text())
    for page in (export.__doc__, *((ROOT / "docs" / name).read_text() for name in ("examples.md", "deploying.md"))):
        assert f"python examples/export.py --run {output} --output_dir {output}-export" in page

"""The `sfa-peft` command, as a shell would call it."""

import io
import json
import shutil
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import UperNetForSemanticSegmentation

import tiny
from sfa_peft import SFAConfig
from sfa_peft.checkpoint.reader import tensors_of
from sfa_peft.checkpoint.seal import read
from sfa_peft.cli import main


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base model and some adapters of it."""
    folder = tmp_path_factory.mktemp("cli")
    tiny.swin().save_pretrained(folder / "base")
    tiny.swin(seed=5).save_pretrained(folder / "other_base")
    for name, options in {
        "both": {},
        "random": {"initial_ticket": "random"},
        "internal": {"external_share": 0.0},
        "rows": {"internal_granularity": "row"},
        "scaled": {"external_scale": 0.5},
        "relu": {"external_activation": "relu"},
        "filters": {"external_conv": 3},
        "places": {"external_places": ["attention", "mlp_parallel"]},
        "heads": {"modules_to_save": ["decode_head"]},
        "adapted_head": {"target_heads": ["decode_head"], "modules_to_save": ["batch_norm", "classifier"]},
    }.items():
        base = UperNetForSemanticSegmentation.from_pretrained(folder / "base")
        model = get_peft_model(base, SFAConfig(**{"budget": 0.1, "external_conv": 0} | options))
        tiny.train(model).save_pretrained(folder / name)
    return folder


@pytest.fixture
def run(folder, capsys, monkeypatch):
    """Run a command in the folder; its exit code, output and errors."""

    def run(*args):
        monkeypatch.chdir(folder)
        capsys.readouterr()
        code = main([str(a) for a in args])
        out = capsys.readouterr()
        return code, json.loads(out.out) if "--json" in args else out.out, out.err

    return run


def test_inspect(run, folder):
    code, text, _ = run("inspect", "heads")
    assert code == 0
    for part in ("internal", "external", "positions", "heads", "layers.0.blocks.1", "mlp.fc1", "UperNetForSemantic"):
        assert part in text
    code, found, _ = run("inspect", "heads", "--json")
    assert code == 0
    tensors = load_file(folder / "heads" / "adapter_model.safetensors")
    assert found["bytes"]["total"] == (folder / "heads" / "adapter_model.safetensors").stat().st_size
    assert found["bytes"]["positions"] == len(tensors["base_model.model.sfa_internal.positions"])
    assert found["parameters"]["internal"] == found["ticket"]["size"]
    assert sum(layer["positions"] for layer in found["ticket"]["layers"].values()) == found["ticket"]["size"]
    assert found["heads"] == ["decode_head"]
    assert found["base_fingerprint"]["roots"] == ["backbone"]


def test_inspect_shows_what_an_adapted_head_takes(run, folder):
    code, found, _ = run("inspect", "adapted_head", "--json")
    assert code == 0
    layers = SFAConfig.from_pretrained(folder / "adapted_head").ticket_sizes
    expected = sum(size for name, size in layers.items() if name.startswith("decode_head."))
    assert found["adapted_heads"] == {"decode_head": {"parameters": expected, "bytes": 4 * expected}}
    assert "internal in decode_head" in run("inspect", "adapted_head")[1]


def test_inspect_of_what_is_on_the_hub(run, folder, hub):
    PeftModel.from_pretrained(tiny.swin(), folder / "both").push_to_hub("me/both", private=True)
    assert run("inspect", "me/both", "--json")[1]["ticket"] == run("inspect", "both", "--json")[1]["ticket"]
    assert run("inspect", "me/both", "--revision", "main")[0] == 0
    code, _, errors = run("inspect", "me/nothing")
    assert code == 2
    assert "me/nothing" in errors


def test_verify(run, folder):
    assert run("verify", "both", "--base", "base")[0] == 0
    assert run("verify", "both", "--base", "base", "--json")[1]["ok"] is True
    code, text, errors = run("verify", "both", "--base", "other_base")
    assert code == 1
    assert text == ""
    assert "trained on a base model that differs" in errors
    code, found, _ = run("verify", "both", "--base", "other_base", "--json")
    assert code == 1
    assert found["ok"] is False
    assert run("verify", "both")[0] == 0  # the base that the adapter names
    code, _, errors = run("verify", "both", "--base", "nowhere")
    assert code == 2
    assert "--base" in errors


def test_verify_of_a_damaged_adapter(run, folder, tmp_path):
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / file).write_bytes((folder / "both" / file).read_bytes())
    data = bytearray((tmp_path / "adapter_model.safetensors").read_bytes())
    data[-3] ^= 4
    (tmp_path / "adapter_model.safetensors").write_bytes(bytes(data))
    for command in (("inspect", tmp_path), ("verify", tmp_path, "--base", "base"), ("diff", "both", tmp_path)):
        code, _, errors = run(*command)
        assert code == 1
        assert "digest" in errors


def with_adapter(folder, name):
    """The outputs of the base with an adapter."""
    base = UperNetForSemanticSegmentation.from_pretrained(folder / "base")
    return tiny.output(PeftModel.from_pretrained(base, folder / name))


@pytest.mark.parametrize("name", ["internal", "both", "rows", "heads", "scaled"])
def test_merge_gives_the_same_outputs(run, folder, tmp_path, name):
    out = tmp_path / "out"
    code, found, _ = run("merge", name, "--base", "base", "--out", out, "--json")
    assert code == 0
    assert found == {"out": str(out), "external": None, "not_folded": {}}
    merged = UperNetForSemanticSegmentation.from_pretrained(out)
    assert torch.allclose(tiny.output(merged), with_adapter(folder, name), atol=1e-6)
    assert (merged.config.backbone_config.mlp_ratio > 4) == (name != "internal")
    assert run("merge", name, "--base", "base", "--out", out)[0] == 2  # it is not empty any more


@pytest.mark.parametrize(
    ("name", "options", "count"), [("relu", [], 4), ("filters", [], 4), ("places", [], 4), ("both", ["--no-widen"], 4)]
)
def test_merge_saves_beside_the_model_what_is_not_folded(run, folder, tmp_path, name, options, count):
    out = tmp_path / "out"
    code, text, errors = run("merge", name, "--base", "base", "--out", out, *options)
    assert (code, errors) == (0, "")
    assert f"external adapters on {count} modules are not in it, but in {out / 'external'}" in text
    merged = UperNetForSemanticSegmentation.from_pretrained(out)
    expected = with_adapter(folder, name)
    assert not torch.allclose(tiny.output(merged), expected, atol=1e-6)
    assert (merged.config.backbone_config.mlp_ratio > 4) == (name == "places")
    widths = SFAConfig.from_pretrained(out / "external").external_widths
    assert sum(len(modules) for modules in widths.values()) == count
    merged = PeftModel.from_pretrained(merged, out / "external")
    assert torch.allclose(tiny.output(merged), expected, atol=1e-6)


def test_merge_into_another_base_is_refused(run, tmp_path):
    code, _, errors = run("merge", "both", "--base", "other_base", "--out", tmp_path / "out")
    assert code == 1
    assert "trained on a base model that differs" in errors
    assert not (tmp_path / "out").exists()


def test_merge_of_a_head_with_other_classes(run, folder, tmp_path):
    base = UperNetForSemanticSegmentation.from_pretrained(folder / "base", num_labels=7, ignore_mismatched_sizes=True)
    config = SFAConfig(budget=0.1, external_conv=0, modules_to_save=["decode_head"], init_weights=False)
    model = get_peft_model(base, config)
    model.save_pretrained(tmp_path / "seven")
    assert run("merge", tmp_path / "seven", "--base", "base", "--out", tmp_path / "alone")[0] == 0
    (tmp_path / "seven" / "base_config.json").unlink()  # as of an earlier version
    code, _, errors = run("merge", tmp_path / "seven", "--base", "base", "--out", tmp_path / "out")
    assert code == 1
    assert "num_labels" in errors
    code, found, _ = run(
        "merge", tmp_path / "seven", "--base", "base", "--out", tmp_path / "out", "--num-labels", "7", "--json"
    )
    assert code == 0
    assert found["external"] is None
    merged = UperNetForSemanticSegmentation.from_pretrained(tmp_path / "out")
    assert torch.allclose(tiny.output(merged), tiny.output(model), atol=1e-6)


def test_with_other_classes_the_base_is_the_named_one_at_its_commit(run, folder, tmp_path, hub):
    base = UperNetForSemanticSegmentation.from_pretrained(folder / "base")
    base.push_to_hub("me/base")
    model = get_peft_model(UperNetForSemanticSegmentation.from_pretrained("me/base"), SFAConfig(budget=0.1))
    model.save_pretrained(tmp_path / "adapter")
    other = tiny.swin(seed=5)
    other.push_to_hub("me/base")  # its weights change after the training
    for labels in ((), ("--num-labels", "3")):
        assert run("verify", tmp_path / "adapter", *labels)[0] == 0
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": None}))
    for labels in ((), ("--num-labels", "3")):
        code, _, errors = run("verify", tmp_path / "adapter", *labels)
        assert code == 2
        assert "the adapter's config does not name its base model: give --base MODEL." in errors


def test_extract(run, folder, tmp_path):
    run("merge", "internal", "--base", "base", "--out", tmp_path / "tuned")
    code, found, _ = run("extract", "base", tmp_path / "tuned", "--out", tmp_path / "all", "--json")
    assert code == 0
    assert found["size"] == found["changed"] == run("inspect", "internal", "--json")[1]["ticket"]["size"]
    assert (found["left_out"], found["out"]) == ({}, str(tmp_path / "all"))
    assert torch.allclose(with_adapter(folder, tmp_path / "all"), with_adapter(folder, "internal"), atol=1e-6)
    assert run("verify", tmp_path / "all")[0] == 0  # with the base that it names
    code, text, _ = run("extract", "base", tmp_path / "tuned", "--out", tmp_path / "some", "--budget", "0.01")
    assert code == 0
    assert "changed weights; relative error 0." in text
    assert run("extract", "base", tmp_path / "tuned", "--out", tmp_path / "some")[0] == 2
    code, _, errors = run("extract", "base", "base", "--out", tmp_path / "same")
    assert code == 2
    assert "do not differ" in errors
    code, _, errors = run("extract", "base", "nowhere", "--out", tmp_path / "nothing")
    assert code == 2
    assert "FINETUNED 'nowhere' cannot be loaded" in errors


def test_extract_takes_heads_over(run, folder, tmp_path):
    run("merge", "heads", "--base", "base", "--no-widen", "--out", tmp_path / "tuned")
    arguments = ("extract", "base", tmp_path / "tuned", "--out", tmp_path / "out")
    code, _, errors = run(*arguments)
    assert code == 2
    assert "Name heads in `modules_to_save`" in errors
    assert run(*arguments, "--modules-to-save", "decode_head")[0] == 0
    expected = tiny.output(UperNetForSemanticSegmentation.from_pretrained(tmp_path / "tuned"))
    assert torch.allclose(with_adapter(folder, tmp_path / "out"), expected, atol=1e-6)


def test_diff(run):
    code, found, _ = run("diff", "both", "random", "--json")
    assert code == 1
    assert 0 < found["overlap"] < 0.5
    assert found["same_base"] is True
    code, found, _ = run("diff", "both", "both", "--json")
    assert code == 0
    assert found["overlap"] == 1
    code, found, _ = run("diff", "both", "scaled", "--json")
    assert code == 1
    assert "external_scale" in found["difference"]
    code, text, _ = run("diff", "both", "internal")
    assert code == 1
    assert "mlp_parallel" in text
    code, _, errors = run("diff", "both", "rows")
    assert code == 2
    assert "one has granularity element, the other row" in errors


def test_diff_names_what_differs_between_architectures(run, tmp_path):
    for name in ("0", "1"):
        base = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        config = SFAConfig(internal_density=0.5, target_modules=[name], external_modules=[])
        get_peft_model(base, config).save_pretrained(tmp_path / name)
    code, _, errors = run("diff", str(tmp_path / "1"), str(tmp_path / "0"))
    assert code == 2
    assert "in one '1.bias' has shape (4,), in the other it is not a candidate" in errors


def test_an_adapter_that_another_program_saved(run, folder, tmp_path):
    """Its shapes are not known, as it has no seal."""
    file = read(folder / "both" / "adapter_model.safetensors")
    tensors = tensors_of(SFAConfig.from_pretrained(folder / "both"), file)
    tensors = {key: tensor.clone() for key, tensor in tensors.items()}
    save_file(tensors, tmp_path / "adapter_model.safetensors", {"format": "pt"})
    config = json.loads((folder / "both" / "adapter_config.json").read_text())
    del config["weights_digest"]
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    code, found, _ = run("inspect", tmp_path, "--json")
    assert code == 0
    assert found["sealed"] is False
    assert found["ticket"] is None
    assert run("diff", "both", tmp_path)[0] == 2
    code, text, _ = run("verify", tmp_path, "--base", "base")
    assert code == 0
    assert "no seal" in text
    assert run("verify", tmp_path, "--base", "base", "--json")[1]["sealed"] is False


@pytest.mark.slow
def test_it_is_a_command():
    done = subprocess.run([sys.executable, "-m", "sfa_peft.cli", "--help"], capture_output=True, text=True)
    assert done.returncode == 0
    for name in ("inspect", "verify", "merge", "diff"):
        assert name in done.stdout
    done = subprocess.run([sys.executable, "-m", "sfa_peft.cli", "merge", "x"], capture_output=True, text=True)
    assert done.returncode == 2


# What a stranger's adapter can do: be refused


@pytest.fixture
def strange(folder, tmp_path):
    """A copy of an adapter with other fields in its config, and like those of earlier versions without the base's."""

    def strange(**fields):
        shutil.copytree(folder / "both", tmp_path / "strange")
        (tmp_path / "strange" / "base_config.json").unlink()
        file = tmp_path / "strange" / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | fields))
        return tmp_path / "strange"

    return strange


HOSTILE = "\x1b]0;owned\x07\x1b[2J\x9b31m\x7f\u202egnp\nadapter      fine\r\x00"


def assert_harmless(*outputs):
    for text in outputs:
        assert text.replace("\n", "").isprintable()


def test_text_from_a_file_gives_no_orders_to_the_terminal(run, strange):
    adapter = strange(
        base_model_name_or_path=HOSTILE, auto_mapping={"base_model_class": HOSTILE, "parent_library": HOSTILE}
    )
    code, text, errors = run("inspect", adapter)
    assert code == 0
    assert_harmless(text, errors)
    assert text.count("\nadapter ") == 0  # nor a line that looks like the command's own
    assert "\\x1b]0;owned\\x07" in text
    assert run("inspect", adapter, "--json")[1]["base_model"] == HOSTILE
    for command in (("verify", adapter), ("merge", adapter, "--out", "out"), ("diff", adapter, "both")):
        assert_harmless(*run(*command)[1:])
    assert_harmless(*run("inspect", f"no/{HOSTILE}")[1:])


def test_names_of_modules_give_no_orders_either(run, tmp_path):
    base = nn.Sequential()
    base.add_module("0", nn.ModuleDict({HOSTILE: nn.Linear(4, 4)}))
    config = SFAConfig(internal_density=0.5, target_modules="all-linear", external_modules=[])
    get_peft_model(base, config).save_pretrained(tmp_path)
    code, text, errors = run("inspect", tmp_path)
    assert (code, "\\x1b]0;owned" in text) == (0, True)
    assert_harmless(text, errors)
    assert_harmless(*run("diff", tmp_path, "both")[1:])


def test_a_stream_that_cannot_encode_a_name(folder, strange, monkeypatch):
    adapter = strange(base_model_name_or_path="modèle 漢字")
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    assert main(["inspect", str(adapter)]) == 0
    stream.flush()
    assert b"mod\\xe8le \\u6f22\\u5b57" in stream.buffer.getvalue()


@pytest.mark.parametrize(
    "mapping", [{"base_model_class": 5}, {"base_model_class": ["a"]}, {"base_model_class": {}}, 5, []]
)
def test_a_class_that_is_no_name_is_refused(run, strange, mapping):
    adapter = strange(auto_mapping=mapping)
    for command in (("inspect", adapter), ("verify", adapter), ("merge", adapter, "--out", "out")):
        code, text, errors = run(*command)
        assert (code, text) == (1, "")
        assert "auto_mapping" in errors


@pytest.mark.parametrize(
    "name",
    ["os", "logging", "pipeline", "PreTrainedModel", "AutoModel", "BertModel", "SwinConfig", "__name__", "\x1b", ""],
)
def test_a_class_that_is_not_the_bases_is_passed_over(run, strange, name):
    """The base's own config names it then. Nothing that the file names is imported from outside of transformers."""
    before = set(sys.modules)
    adapter = strange(auto_mapping={"base_model_class": name, "parent_library": "antigravity"})
    code, _, errors = run("verify", adapter, "--base", "base")
    assert (code, errors) == (0, "")
    assert "antigravity" not in set(sys.modules) - before


@pytest.mark.parametrize(
    "change",
    [
        {"architectures": ["os"]},
        {"architectures": 5},
        {"architectures": [5, ["a"], None]},
        {"architectures": ["\x1b[2J"], "model_type": "\x1b[2J"},
        {"model_type": 5},
        {"model_type": "bert", "architectures": ["BertModel"]},
        {"backbone_config": "\x1b[2J"},
        {"hidden_size": "a"},
        {"auto_map": {"AutoConfig": "code.Config", "AutoModel": "code.Model"}, "model_type": "unknown"},
    ],
)
def test_a_base_with_an_odd_config_is_refused(run, folder, strange, tmp_path, change):
    shutil.copytree(folder / "base", tmp_path / "base")
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    (tmp_path / "base" / "config.json").write_text(json.dumps(config | change))
    (tmp_path / "base" / "code.py").write_text("raise SystemExit('ran')")
    adapter = strange(auto_mapping={"base_model_class": "Nothing", "parent_library": "os"})
    code, text, errors = run("verify", adapter, "--base", tmp_path / "base")
    assert (code in (1, 2), text) == (True, "")
    assert errors.startswith("sfa-peft: ")
    assert_harmless(errors)


class Planted:
    ran = False

    def __reduce__(self):
        return setattr, (Planted, "ran", True)


@pytest.mark.parametrize("index", [False, True])
def test_a_base_that_is_a_pickle_is_not_loaded(run, folder, strange, tmp_path, index):
    shutil.copytree(folder / "base", tmp_path / "base")
    tensors = load_file(tmp_path / "base" / "model.safetensors")
    (tmp_path / "base" / "model.safetensors").unlink()
    name = "pytorch_model-00001-of-00001.bin" if index else "pytorch_model.bin"
    torch.save(tensors | {"planted": Planted()}, tmp_path / "base" / name)
    if index:
        described = {"metadata": {}, "weight_map": dict.fromkeys(tensors, name)}
        (tmp_path / "base" / "pytorch_model.bin.index.json").write_text(json.dumps(described))
    for command in (("verify", "both"), ("merge", "both", "--out", tmp_path / "out")):
        code, text, errors = run(*command, "--base", tmp_path / "base")
        assert (code, text) == (2, "")
        assert "save it with save_pretrained" in errors
    assert not Planted.ran
    assert not (tmp_path / "out").exists()


def test_an_adapter_of_another_method_is_refused(run, folder, tmp_path):
    get_peft_model(tiny.swin(), LoraConfig(target_modules=["fc1"])).save_pretrained(tmp_path)
    for command in (("inspect", tmp_path), ("verify", tmp_path, "--base", "base"), ("diff", tmp_path, "both")):
        code, text, errors = run(*command)
        assert (code, text) == (1, "")
        assert "adapter_config.json" in errors

"""Saves are whole: whenever a process is killed, whoever else saves, the old or the new adapter is there."""

import json
import os
import random
import signal
import time
import warnings
from itertools import count

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file

import tiny
from sfa_peft import BaseMismatchWarning, CheckpointError, SFAConfig
from sfa_peft.checkpoint import files
from sfa_peft.checkpoint.reader import tensors_of
from sfa_peft.checkpoint.seal import read

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def adapter(seed):
    """An adapter whose ticket, widths and values depend on the seed."""
    torch.manual_seed(seed)
    config = SFAConfig(
        budget=0.05 + 0.05 * seed,
        init_weights=False,
        initial_ticket="random",
        ticket_seed=seed,
        modules_to_save=["classifier"],
    )
    return get_peft_model(tiny.swin(), config)


@pytest.fixture(scope="module")
def pair():
    return adapter(0), adapter(1)


def child(work):
    """Run `work` in a process of its own, and give its number."""
    pid = os.fork()
    if pid:
        return pid
    try:
        warnings.simplefilter("ignore")
        work()
    finally:
        os._exit(0)


def which(folder, adapters):
    """The number of the adapter that the folder holds, whole."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*since a save was interrupted")
        loaded = get_peft_model_state_dict(PeftModel.from_pretrained(tiny.swin(), folder))
    return [tiny.same_state(loaded, get_peft_model_state_dict(a)) for a in adapters].index(True)


def test_a_kill_before_or_after_any_rename_leaves_one_adapter(tmp_path, pair, monkeypatch):
    old, new = pair
    steps = 0
    for step in range(100):
        folder = tmp_path / str(step)
        old.save_pretrained(folder)

        def save(step=step, folder=folder):
            replace, calls = os.replace, []

            def killed(source, target):
                if len(calls) == step // 2 and step % 2 == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                replace(source, target)
                if len(calls) == step // 2:
                    os.kill(os.getpid(), signal.SIGKILL)
                calls.append(target)

            files.os.replace = killed
            new.save_pretrained(folder)

        _, status = os.waitpid(child(save), 0)
        assert which(folder, pair) in (0, 1)
        steps += 1
        if not os.WIFSIGNALED(status):
            break
    assert steps > 2 * 4  # weights, config, card and picture
    assert which(folder, pair) == 1


@pytest.mark.slow
def test_kills_at_random_moments_leave_one_adapter(tmp_path, pair):
    for model in (*pair, pair[0]):  # their pictures are drawn now, which takes most of the time of a first save
        began = time.perf_counter()
        model.save_pretrained(tmp_path)
        one_save = time.perf_counter() - began

    def save_again_and_again(order):
        while True:
            for model in order:
                model.save_pretrained(tmp_path)

    seen = set()
    rng = random.Random(0)
    for kill in count():
        if kill >= 55 and (seen == {0, 1} or kill == 200):
            break
        order = rng.sample(pair, 2)
        pid = child(lambda order=order: save_again_and_again(order))
        # Longer if need be: a busy machine may not come to the end of one save.
        time.sleep(rng.uniform(0, 4 * one_save) * max(1, kill / 55))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        seen.add(which(tmp_path, pair))
    assert seen == {0, 1}
    pair[0].save_pretrained(tmp_path)
    assert {f.name for f in tmp_path.iterdir()} == {WEIGHTS, CONFIG, "base_config.json", "README.md", "ticket.png"}


def test_two_processes_that_save_to_one_folder_leave_one_adapter(tmp_path, pair):
    def save(model):
        for _ in range(15):
            model.save_pretrained(tmp_path)

    for pid in [child(lambda model=model: save(model)) for model in pair]:
        assert os.waitpid(pid, 0)[1] == 0
    assert which(tmp_path, pair) in (0, 1)
    assert not list(tmp_path.glob(".sfa*"))


def test_a_save_that_fails_changes_nothing(tmp_path, pair, monkeypatch):
    pair[0].save_pretrained(tmp_path)
    before = {f.name: f.read_bytes() for f in tmp_path.iterdir()}

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("sfa_peft.checkpoint.files.save_file", full)
    with pytest.raises(OSError, match="No space"):
        pair[1].save_pretrained(tmp_path)
    assert {f.name: f.read_bytes() for f in tmp_path.iterdir()} == before


def test_other_files_and_folders_stay(tmp_path, pair):
    (tmp_path / "optimizer.pt").write_text("mine")
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "log").write_text("mine")
    pair[0].save_pretrained(tmp_path)
    pair[1].save_pretrained(tmp_path)
    assert (tmp_path / "optimizer.pt").read_text() == (tmp_path / "runs" / "log").read_text() == "mine"


def test_an_interrupted_save_is_told_and_loads_what_the_weights_are(tmp_path, pair):
    for model, name in zip(pair, ("old", "new"), strict=True):
        model.save_pretrained(tmp_path / name)
    (tmp_path / "old" / WEIGHTS).write_bytes((tmp_path / "new" / WEIGHTS).read_bytes())
    with pytest.warns(UserWarning, match="since a save was interrupted"):
        loaded = PeftModel.from_pretrained(tiny.swin(), tmp_path / "old")
    assert tiny.same_state(get_peft_model_state_dict(loaded), get_peft_model_state_dict(pair[1]))


def refused(folder, match):
    base = tiny.swin()
    before = tiny.state(base)
    with pytest.raises(CheckpointError, match=match):
        PeftModel.from_pretrained(base, folder)
    assert tiny.same_state(tiny.state(base), before)


def test_one_flipped_bit_of_a_value_is_found(tmp_path, pair):
    pair[0].save_pretrained(tmp_path)
    data = bytearray((tmp_path / WEIGHTS).read_bytes())
    data[-1] ^= 1
    (tmp_path / WEIGHTS).write_bytes(bytes(data))
    refused(tmp_path, "digest")


def test_tensors_that_another_program_changed_are_found(tmp_path, pair):
    pair[0].save_pretrained(tmp_path)
    packed = load_file(tmp_path / WEIGHTS)
    tensors = tensors_of(SFAConfig.from_pretrained(tmp_path), read(tmp_path / WEIGHTS))
    next(t for n, t in tensors.items() if n.endswith("up.weight")).mul_(2)
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    save_file(tensors, tmp_path / WEIGHTS, metadata={"format": "pt"})
    refused(tmp_path, "weights_digest differs")
    config = json.loads((tmp_path / CONFIG).read_text())
    del config["weights_digest"]
    (tmp_path / CONFIG).write_text(json.dumps(config))
    PeftModel.from_pretrained(tiny.swin(), tmp_path)  # as the message says
    save_file(packed, tmp_path / WEIGHTS, metadata={"format": "pt"})
    refused(tmp_path, "without a seal")


@pytest.mark.parametrize(
    ("field", "value", "match"),
    [
        ("external_scale", 0.5, "external_scale"),
        ("external_activation", "relu", "external_activation"),
        ("modules_to_save", None, "modules_to_save"),
        ("ticket_sizes", {"a.weight": 2**60}, "ticket_sizes"),
        ("external_widths", {"mlp": {"a": 2**40}}, "external_widths"),
        ("format_version", 99, "format_version"),
        ("external_scale", "loud", "external_scale"),
        ("target_modules", {"a": 1}, "target_modules"),
        ("base_model_name_or_path", 3, "base_model_name_or_path"),
        ("peft_type", None, "damaged"),
        ("layers_pattern", 2**31, "layers_pattern"),
    ],
)
def test_a_changed_config_is_refused(tmp_path, pair, field, value, match):
    pair[0].save_pretrained(tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps(config | {field: value}))
    refused(tmp_path, match)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '"SFA"', "\x00\xff", "[" * 100_000])
def test_a_config_that_is_no_json_object_is_refused(tmp_path, pair, text):
    pair[0].save_pretrained(tmp_path)
    (tmp_path / CONFIG).write_text(text, encoding="latin-1")
    refused(tmp_path, "damaged")


def test_loading_into_an_adapter_that_is_there_is_checked_as_well(tmp_path):
    model = adapter(0)
    model.save_pretrained(tmp_path)
    before = tiny.state(model)
    model.load_adapter(tmp_path, "default")
    assert tiny.same_state(tiny.state(model), before)
    data = (tmp_path / WEIGHTS).read_bytes()
    (tmp_path / WEIGHTS).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(CheckpointError, match="digest"):
        model.load_adapter(tmp_path, "default")
    with pytest.raises(CheckpointError, match="digest"):
        PeftModel.from_pretrained(tiny.swin(), tmp_path, config=model.peft_config["default"])
    adapter(1).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="weights to be loaded differ in external_widths"):
        model.load_adapter(tmp_path, "default")
    assert tiny.same_state(tiny.state(model), before)


def test_a_failed_load_leaves_which_heads_are_active(tmp_path):
    model = adapter(0)
    model.add_adapter("b", SFAConfig(budget=0.05, init_weights=False, modules_to_save=["classifier"]))
    model.add_adapter("c", SFAConfig(budget=0.06, init_weights=False, modules_to_save=["classifier"]))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if ".modules_to_save." in name:
                p.normal_()
    model.set_adapter("c")
    expected, flags = tiny.output(model), [p.requires_grad for p in model.parameters()]
    adapter(1).save_pretrained(tmp_path)
    tensors = tensors_of(SFAConfig.from_pretrained(tmp_path), read(tmp_path / WEIGHTS))
    tensors = {name: t.clone() for name, t in tensors.items() if not name.endswith("classifier.weight")}
    save_file(tensors, tmp_path / WEIGHTS, metadata={"format": "pt"})
    config = json.loads((tmp_path / CONFIG).read_text()) | {"weights_digest": None}
    (tmp_path / CONFIG).write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="lacks"):
        model.load_adapter(tmp_path, "new")
    assert torch.equal(tiny.output(model), expected)
    assert [p.requires_grad for p in model.parameters()] == flags
    assert list(model.peft_config) == ["default", "b", "c"]


def test_a_head_may_hold_infinities(tmp_path):
    base = tiny.swin()
    base.decode_head.register_buffer("mask", torch.full((2,), float("-inf")))
    model = get_peft_model(base, SFAConfig(budget=0.05, modules_to_save=["decode_head"]))
    model.save_pretrained(tmp_path)
    again = tiny.swin()
    again.decode_head.register_buffer("mask", torch.zeros(2))
    loaded = PeftModel.from_pretrained(again, tmp_path)
    assert loaded.base_model.model.decode_head.modules_to_save["default"].mask.isinf().all()


def test_a_save_that_is_refused_leaves_no_folder_and_no_mode(tmp_path):
    model = adapter(0)
    with torch.no_grad():
        next(p for p in model.parameters() if p.requires_grad).view(-1)[0] = float("inf")
    with pytest.raises(ValueError, match="diverged"):
        model.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert model.peft_config["default"].inference_mode is False


def test_transformers_leaves_a_model_as_it_was_when_a_head_does_not_fit(tmp_path):
    torch.manual_seed(0)
    config = SFAConfig(budget=0.05, modules_to_save=["classifier"])
    get_peft_model(tiny.upernet(tiny.swin_config(), num_labels=5), config).save_pretrained(tmp_path)
    base = tiny.swin()
    before = tiny.state(base)
    with pytest.raises(CheckpointError, match="num_labels"):
        base.load_adapter(str(tmp_path))
    assert tiny.same_state(tiny.state(base), before)
    base.save_pretrained(tmp_path / "base")
    with pytest.raises(ValueError, match="adapter_state_dict"):
        base.load_adapter(peft_config=config)


def test_other_methods_of_peft_are_as_they_were(tmp_path):
    config = LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    model = get_peft_model(tiny.swin(), config)
    model.save_pretrained(tmp_path, safe_serialization=False)
    assert (tmp_path / "adapter_model.bin").exists()
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny.swin(), tmp_path)
    assert torch.equal(tiny.output(again), tiny.output(model))
    base = tiny.swin()
    base.load_adapter(str(tmp_path), "default", None, None, False)
    assert torch.equal(tiny.output(base), tiny.output(model))
    assert "sfa" not in (tmp_path / "README.md").read_text()
    with pytest.raises(ValueError, match="Can't find 'adapter_config"):
        PeftModel.from_pretrained(tiny.swin(), tmp_path / "nothing")


def test_fields_that_may_be_edited_may_be_edited(tmp_path, pair):
    pair[0].save_pretrained(tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps(config | {"base_model_name_or_path": "me/my-base"}))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        PeftModel.from_pretrained(tiny.swin(), tmp_path)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_a_base_that_was_cast_and_cast_back_is_the_same_base(tmp_path, pair, half):
    pair[0].save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", BaseMismatchWarning)
        PeftModel.from_pretrained(tiny.swin().to(half).float(), tmp_path)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("values_dtype", "bf16"),
        ("values_dtype", torch.float16),
        ("heads_dtype", "float64"),
        ("format_version", 3),
        ("external_scale", 3.0),
        ("external_activation", "relu"),
        ("internal_granularity", "row"),
        ("modules_to_save", ["bottleneck"]),
        ("modules_to_save", None),
        ("ticket_sizes", {}),
        ("external_widths", {}),
        ("budget", "lots"),
    ],
)
def test_a_config_that_is_not_the_adapters_is_not_saved(tmp_path, field, value):
    model = adapter(0)
    model.save_pretrained(tmp_path)
    before = {f.name: f.read_bytes() for f in tmp_path.iterdir()}
    setattr(model.peft_config["default"], field, value)
    with pytest.raises(ValueError, match=field):
        model.save_pretrained(tmp_path)
    assert {f.name: f.read_bytes() for f in tmp_path.iterdir()} == before


def test_a_training_that_diverged_does_not_replace_a_good_adapter(tmp_path):
    model = adapter(0)
    model.save_pretrained(tmp_path)
    before = {f.name: f.read_bytes() for f in tmp_path.iterdir()}
    with torch.no_grad():
        next(p for p in model.parameters() if p.requires_grad).view(-1)[0] = float("nan")
    with pytest.raises(ValueError, match="diverged"):
        model.save_pretrained(tmp_path)
    assert {f.name: f.read_bytes() for f in tmp_path.iterdir()} == before


def test_names_of_adapters_that_are_not_there_make_no_folder(tmp_path, pair):
    with pytest.raises(ValueError, match="nope"):
        pair[0].save_pretrained(tmp_path / "out", selected_adapters=["nope"])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", [b"---\n[broken\n---\n", b"\xff\xfe\x00"])
def test_a_card_that_cannot_be_read_is_kept_and_named(tmp_path, pair, content):
    (tmp_path / "README.md").write_bytes(content)
    with pytest.warns(UserWarning, match=r"README\.md is as it was"):
        pair[0].save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_bytes() == content
    SFAConfig.from_pretrained(tmp_path)


def test_weights_of_other_shapes_are_refused(tmp_path):
    def base(inside, outside):
        torch.manual_seed(0)
        return torch.nn.Sequential(
            torch.nn.Linear(12, inside), torch.nn.Linear(inside, outside, bias=False), torch.nn.Linear(outside, 12)
        )

    config = SFAConfig(internal_density=0.2, target_modules=["1"], external_modules=[])
    get_peft_model(base(8, 16), config).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"has shape \(8, 16\) in this model, and had \(16, 8\)"):
        PeftModel.from_pretrained(base(16, 8), tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("saved_as", [torch.float32, torch.bfloat16, torch.float16])
def test_a_cast_of_the_same_base_is_the_same_base(tmp_path, dtype, saved_as):
    base = tiny.swin()
    with torch.no_grad():
        for p in base.parameters():
            p.normal_()
    weights = tiny.state(base)
    get_peft_model(base.to(saved_as), SFAConfig(budget=0.1)).save_pretrained(tmp_path)
    again = tiny.swin()
    again.load_state_dict(weights)
    with warnings.catch_warnings():
        warnings.simplefilter("error", BaseMismatchWarning)
        PeftModel.from_pretrained(again.to(dtype), tmp_path)


def test_another_base_is_told(tmp_path, pair):
    pair[0].save_pretrained(tmp_path)
    with pytest.warns(BaseMismatchWarning, match=r"of \d+ parameters have other values, such as 'backbone\.swin"):
        PeftModel.from_pretrained(tiny.swin(seed=1), tmp_path)
    with pytest.warns(BaseMismatchWarning, match="other shapes"):
        PeftModel.from_pretrained(tiny.swin(window_size=2), tmp_path)
    base = tiny.swin(seed=1)
    before = tiny.state(base)
    with warnings.catch_warnings():
        warnings.simplefilter("error", BaseMismatchWarning)
        with pytest.raises(BaseMismatchWarning):
            PeftModel.from_pretrained(base, tmp_path)
    assert tiny.same_state(tiny.state(base), before)


def test_every_part_of_the_backbone_is_compared(tmp_path):
    for make, number in ((tiny.swin, 0), (tiny.vit, 1), (tiny.dpt_on_dinov2, 2)):
        get_peft_model(make(), SFAConfig(budget=0.1)).save_pretrained(tmp_path / str(number))
        parts = [
            name for name, _ in make().named_parameters() if "embeddings" in name or "norm" in name.split(".")[-2]
        ]
        assert any("patch_embeddings" in part for part in parts)
        for part in parts:
            if "backbone" not in part and number != 1:
                continue
            base = make()
            with torch.no_grad():
                base.get_parameter(part).add_(0.5)
            with pytest.warns(BaseMismatchWarning, match="other values"):
                PeftModel.from_pretrained(base, tmp_path / str(number))


def test_a_base_in_bfloat16_that_was_cast_to_float16_is_the_same_base(tmp_path):
    base = tiny.swin()
    with torch.no_grad():
        for i, p in enumerate(base.parameters()):
            p.normal_(std=10.0 ** -(i % 9))
    base.to(torch.bfloat16)
    weights = tiny.state(base)
    get_peft_model(base, SFAConfig(budget=0.1)).save_pretrained(tmp_path)
    for chain in ([torch.float16], [torch.float16, torch.float32], [torch.float32], [torch.float16, torch.bfloat16]):
        again = tiny.swin().to(torch.bfloat16)
        again.load_state_dict(weights)
        for dtype in chain:
            again.to(dtype)
        with warnings.catch_warnings():
            warnings.simplefilter("error", BaseMismatchWarning)
            PeftModel.from_pretrained(again, tmp_path)


def test_what_the_adapter_has_nothing_to_do_with_may_differ(tmp_path, pair):
    pair[0].save_pretrained(tmp_path)
    base = tiny.swin()
    torch.nn.init.normal_(base.decode_head.bottleneck.conv.weight)
    with warnings.catch_warnings():
        warnings.simplefilter("error", BaseMismatchWarning)
        PeftModel.from_pretrained(base, tmp_path)


def test_a_base_that_was_trained_on_a_little_is_another(tmp_path, pair):
    pair[0].save_pretrained(tmp_path)
    base = tiny.swin()
    with torch.no_grad():
        for p in base.backbone.parameters():
            p.mul_(1.0001)
    with pytest.warns(BaseMismatchWarning):
        PeftModel.from_pretrained(base, tmp_path)


def test_an_adapter_that_goes_on_with_another_base_takes_its_fingerprint(tmp_path, pair):
    pair[0].save_pretrained(tmp_path / "a")
    with pytest.warns(BaseMismatchWarning):
        model = PeftModel.from_pretrained(tiny.swin(seed=1), tmp_path / "a", is_trainable=True)
    model.save_pretrained(tmp_path / "b")
    with warnings.catch_warnings():
        warnings.simplefilter("error", BaseMismatchWarning)
        PeftModel.from_pretrained(tiny.swin(seed=1), tmp_path / "b")

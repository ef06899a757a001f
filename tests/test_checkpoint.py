import json

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file

import tiny
from adapters import trained
from sfa_peft import CheckpointError, SFAConfig, SFALayer
from sfa_peft.checkpoint.coding import encode_positions
from sfa_peft.checkpoint.packing import CODES, VALUES
from sfa_peft.checkpoint.reader import tensors_of
from sfa_peft.checkpoint.seal import read
from sfa_peft.checkpoint.writer import write_adapter

CONFIGS = {
    "both": {"budget": 0.1},
    "external": {"budget": 0.1, "external_share": 1.0},
    "internal": {"budget": 0.1, "external_share": 0.0},
    "parallel": {"budget": 0.2, "external_places": ["attention", "mlp_parallel"]},
    "every place": {"budget": 0.2, "external_places": ["attention", "mlp", "mlp_parallel", "block"]},
    "rows": {"budget": 0.1, "internal_granularity": "row"},
    "columns": {"budget": 0.1, "internal_granularity": "column"},
    "explicit": {"external_width": {"fc2": 3}, "internal_density": 0.05},
    "layer norms": {"budget": 40, "external_modules": [], "target_modules": ["layernorm_before", "layernorm_after"]},
}


def saved(folder, **options):
    model = trained(**options)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("adapter", ["default", "task_1"])
def test_a_saved_adapter_loads_exactly(tmp_path, name, adapter):
    options = {"budget": None} | CONFIGS[name]
    model = saved(tmp_path, searched=name != "external", **options)
    again = PeftModel.from_pretrained(tiny.swin(), tmp_path, adapter_name=adapter)
    assert torch.equal(tiny.output(again), tiny.output(model))
    ours, theirs = (get_peft_model_state_dict(m, adapter_name=a) for m, a in ((model, "default"), (again, adapter)))
    assert tiny.same_state(ours, theirs)
    assert not any(p.requires_grad for p in again.parameters())
    assert again.peft_config[adapter].ticket_sizes == model.peft_config["default"].ticket_sizes


@pytest.mark.parametrize("first", CONFIGS)
@pytest.mark.parametrize("second", ["both", "every place", "rows", "external"])
def test_adapters_load_next_to_each_other(tmp_path, first, second):
    a = saved(tmp_path / "street", searched=False, **({"budget": None} | CONFIGS[first]))
    b = saved(tmp_path / "depth", searched=False, seed=1, steps=3, **({"budget": None} | CONFIGS[second]))
    base = tiny.output(tiny.swin())
    for order in (("street", "depth"), ("depth", "street")):
        model = PeftModel.from_pretrained(tiny.swin(), tmp_path / order[0], adapter_name=order[0])
        model.load_adapter(tmp_path / order[1], adapter_name=order[1])
        for name, alone in (("street", a), ("depth", b)):
            model.set_adapter(name)
            assert torch.equal(tiny.output(model), tiny.output(alone))
            model.save_pretrained(tmp_path / "again", selected_adapters=[name])
            ours = load_file(tmp_path / name / "adapter_model.safetensors")
            assert tiny.same_state(load_file(tmp_path / "again" / name / "adapter_model.safetensors"), ours)
        with model.disable_adapter():
            assert torch.equal(tiny.output(model), base)
        model.delete_adapter("street")
        assert not any(".street." in name for name in model.state_dict())
        model.set_adapter("depth")
        assert torch.equal(tiny.output(model), tiny.output(b))


def test_training_goes_on_after_loading(tmp_path):
    model = saved(tmp_path)
    again = PeftModel.from_pretrained(tiny.swin(), tmp_path, is_trainable=True)
    assert {n for n, p in again.named_parameters() if p.requires_grad} == {
        n for n, p in model.named_parameters() if p.requires_grad
    }
    tiny.train(again)
    assert not torch.equal(tiny.output(again), tiny.output(model))


def test_low_cpu_mem_usage(tmp_path):
    model = saved(tmp_path)
    again = PeftModel.from_pretrained(tiny.swin(), tmp_path, low_cpu_mem_usage=True)
    assert torch.equal(tiny.output(again), tiny.output(model))


def test_a_loaded_config_makes_a_fresh_adapter_of_the_same_sizes(tmp_path):
    saved(tmp_path)
    config = SFAConfig.from_pretrained(tmp_path)
    config.inference_mode = False
    base = tiny.swin()
    expected = tiny.output(base)
    model = get_peft_model(base, config)
    assert torch.equal(tiny.output(model), expected)
    assert model.peft_config["default"].ticket_sizes == config.ticket_sizes
    tiny.train(model)


def test_transformers_own_integration(tmp_path):
    model = get_peft_model(tiny.swin(), SFAConfig(budget=0.1, init_weights=False))
    model.save_pretrained(tmp_path)
    base = tiny.swin()
    base.load_adapter(str(tmp_path), adapter_name="street")
    assert torch.equal(tiny.output(base), tiny.output(model))
    injected = tiny.swin()
    injected.add_adapter(SFAConfig(budget=0.1), adapter_name="fresh")
    assert torch.equal(tiny.output(injected), tiny.output(tiny.swin()))
    wrapped = PeftModel.from_pretrained(tiny.swin(), tmp_path)
    names = {n.removeprefix("base_model.model.").replace(".default", "") for n in wrapped.state_dict() if ".sfa_" in n}
    assert names == {n.replace(".street", "") for n in base.state_dict() if ".sfa_" in n}


def test_sizes_are_known_before_weights_are_read(tmp_path):
    saved(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    tensors = unpacked(tmp_path)
    codes = {k: v for k, v in tensors.items() if k.endswith("_positions")}
    assert len(codes) == len(config["ticket_sizes"])
    for key, code in codes.items():
        module, _, name = key.removeprefix("base_model.model.").removesuffix("_positions").rpartition(".")
        size = config["ticket_sizes"][f"{module.removesuffix('.sfa_internal')}.{name}"]
        assert size == len(tensors[key.removesuffix("_positions")])
        assert code.dtype == torch.uint8
    downs = [v for k, v in tensors.items() if k.endswith("down.bias")]
    widths = [w for place in config["external_widths"].values() for w in place.values()]
    assert sorted(len(d) for d in downs) == sorted(widths)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_values_and_heads_are_saved_in_another_dtype(tmp_path, dtype):
    model = saved(tmp_path / "plain")
    config = model.peft_config["default"]
    config.values_dtype, config.heads_dtype = dtype, dtype
    model.save_pretrained(tmp_path / "small")
    tensors = load_file(tmp_path / "small" / "adapter_model.safetensors")
    floats = {t.dtype for t in tensors.values() if t.is_floating_point()}
    assert floats == {getattr(torch, dtype)}
    sizes = [(tmp_path / n / "adapter_model.safetensors").stat().st_size for n in ("small", "plain")]
    assert sizes[0] < 0.75 * sizes[1]
    for options in ({}, {"low_cpu_mem_usage": True}):
        again = PeftModel.from_pretrained(tiny.swin(), tmp_path / "small", **options)
        assert all(p.dtype == torch.float32 for p in again.parameters())
        assert torch.allclose(tiny.output(again), tiny.output(model), atol=0.05)
    config.heads_dtype = None
    model.save_pretrained(tmp_path / "mixed")
    tensors = load_file(tmp_path / "mixed" / "adapter_model.safetensors")
    assert {t.dtype for k, t in tensors.items() if "decode_head" in k and t.is_floating_point()} == {torch.float32}


def test_values_that_the_dtype_cannot_hold_are_refused_before_anything_is_written(tmp_path):
    model = saved(tmp_path)
    before = {p: p.read_bytes() for p in tmp_path.iterdir()}
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if ".sfa_internal." in n).fill_(1e6)
    model.peft_config["default"].values_dtype = "float16"
    with pytest.raises(ValueError, match="cannot hold"):
        model.save_pretrained(tmp_path)
    assert {p: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_a_pretrained_head_is_adapted_instead_of_saved_whole(tmp_path):
    whole = saved(tmp_path / "whole", searched=False)
    options = {"target_heads": ["decode_head"], "modules_to_save": ["classifier", "batch_norm"]}
    model = saved(tmp_path / "adapted", **options)
    adapted = [n for n in model.peft_config["default"].ticket_sizes if n.startswith("decode_head.")]
    assert adapted
    assert not any(n.startswith("decode_head.classifier") for n in adapted)
    again = PeftModel.from_pretrained(tiny.swin(), tmp_path / "adapted")
    assert torch.equal(tiny.output(again), tiny.output(model))
    assert not torch.equal(tiny.output(again), tiny.output(tiny.swin()))

    def head_bytes(folder):
        tensors = unpacked(tmp_path / folder)
        return sum(t.numel() * t.element_size() for k, t in tensors.items() if "decode_head" in k)

    assert head_bytes("adapted") < 0.5 * head_bytes("whole")
    assert torch.equal(tiny.output(whole), tiny.output(PeftModel.from_pretrained(tiny.swin(), tmp_path / "whole")))


def test_target_heads_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="target_heads"):
        get_peft_model(tiny.swin(), SFAConfig(budget=0.1, target_heads=["no_head"]))
    with pytest.raises(ValueError, match="target_heads"):
        SFAConfig(target_heads="decode_head")
    with pytest.raises(ValueError, match="target_heads"):
        SFAConfig(target_heads=["decode_head"], target_modules=["fc1"])


def test_saving_twice_gives_the_same_bytes(tmp_path):
    model = saved(tmp_path / "a", target_modules=["fc1", "fc2", "q_proj"])
    model.save_pretrained(tmp_path / "b")
    for name in ("adapter_model.safetensors", "adapter_config.json", "ticket.png"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_a_pickle_is_neither_written_nor_read(tmp_path):
    model = trained(searched=False)
    with pytest.raises(ValueError, match="safe_serialization"):
        model.save_pretrained(tmp_path, safe_serialization=False)
    assert not list(tmp_path.iterdir())
    model.save_pretrained(tmp_path)
    torch.save(load_file(tmp_path / "adapter_model.safetensors"), tmp_path / "adapter_model.bin")
    (tmp_path / "adapter_model.safetensors").unlink()
    base = tiny.swin()
    before = tiny.state(base)
    with pytest.raises(CheckpointError, match=r"has no adapter_model.safetensors"):
        PeftModel.from_pretrained(base, tmp_path)
    assert tiny.same_state(tiny.state(base), before)


def unpacked(folder):
    """The tensors of a file, with those of the internal adapters by the parameters that they change."""
    config = SFAConfig.from_pretrained(folder)
    return tensors_of(config, read(folder / "adapter_model.safetensors"))


def broken(folder, change):
    """Change the tensors, and take the seal and its digest away, as if another program had written the file."""
    tensors = unpacked(folder)
    change(tensors)
    tensors = {key: tensor.clone() for key, tensor in tensors.items()}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "adapter_config.json").read_text())
    del config["weights_digest"]
    (folder / "adapter_config.json").write_text(json.dumps(config))


def packed_shorter(t):
    t[VALUES] = t[VALUES][:-1].clone()


def packed_alone(t):
    del t[CODES]


def packed_lengths(t):
    t[CODES][0] ^= 1


def packed_floats(t):
    t[CODES] = t[CODES].float()


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (packed_shorter, "values. has shape"),
        (packed_alone, "only one"),
        (packed_lengths, "does not hold"),
        (packed_floats, "of bytes"),
    ],
)
def test_broken_packed_tensors_are_refused(tmp_path, change, match):
    saved(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    shapes = read(path).shapes
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    fields = json.loads((tmp_path / "adapter_config.json").read_text())
    write_adapter(tmp_path, tensors, fields, shapes)
    with pytest.raises(CheckpointError, match=match):
        PeftModel.from_pretrained(tiny.swin(), tmp_path)


def longest_positions(tensors):
    return max((k for k in tensors if k.endswith("_positions")), key=lambda k: len(tensors[k]))


def flipped(t):
    t[longest_positions(t)][2] ^= 0xFF


def beyond(t):
    k = longest_positions(t)
    count = len(t[k.removesuffix("_positions")])
    t[k] = encode_positions(torch.arange(count) + 2**30)


def shorter(t):
    k = longest_positions(t)
    t[k] = t[k][:-1].clone()


def longer(t):
    k = longest_positions(t)
    t[k] = torch.cat([t[k], torch.zeros(1, dtype=torch.uint8)])


def fewer_values(t):
    k = longest_positions(t).removesuffix("_positions")
    t[k] = t[k][:-1].clone()


def not_finite(t):
    t[longest_positions(t).removesuffix("_positions")][0] = float("nan")


def bad_head(t):
    t[next(k for k in t if "classifier" in k)][0] = float("nan")


def floats(t):
    t[longest_positions(t)] = t[longest_positions(t)].float()


def lost(t):
    del t[longest_positions(t)]


def lost_head(t):
    del t[next(k for k in t if "classifier" in k)]


def added(t):
    t["base_model.model.backbone.sfa_internal.weight"] = torch.zeros(3)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (flipped, "is not the code"),
        (beyond, "positions up to"),
        (shorter, "is not the code"),
        (longer, "left over"),
        (fewer_values, "has shape"),
        (not_finite, "not finite"),
        (bad_head, "not finite"),
        (floats, "coded positions"),
        (lost, "does not have"),
        (lost_head, "lacks"),
        (added, "does not announce"),
    ],
)
def test_a_broken_file_is_refused_and_leaves_the_model_as_it_was(tmp_path, change, match):
    saved(tmp_path)
    broken(tmp_path, change)
    base = tiny.swin()
    before, flags = tiny.state(base), [p.requires_grad for p in base.parameters()]
    with pytest.raises(CheckpointError, match=match):
        PeftModel.from_pretrained(base, tmp_path)
    assert tiny.same_state(tiny.state(base), before)
    assert [p.requires_grad for p in base.parameters()] == flags
    assert not hasattr(base, "peft_config")

    model = get_peft_model(tiny.swin(), SFAConfig(budget=0.05))
    before, expected = tiny.state(model), tiny.output(model)
    with pytest.raises(CheckpointError, match=match):
        model.load_adapter(tmp_path, adapter_name="other")
    assert tiny.same_state(tiny.state(model), before)
    assert list(model.peft_config) == ["default"]
    assert torch.equal(tiny.output(model), expected)


def test_bad_tensors_do_not_touch_a_trained_adapter():
    model = trained()
    tensors = get_peft_model_state_dict(model)
    bad = {k: v.clone() for k, v in tensors.items()}
    beyond(bad)
    before = tiny.state(model)
    with pytest.raises(CheckpointError):
        set_peft_model_state_dict(model, bad)
    assert tiny.same_state(tiny.state(model), before)
    set_peft_model_state_dict(model, tensors)
    assert tiny.same_state(tiny.state(model), before)


@pytest.mark.parametrize("make", [tiny.dinov2, lambda: tiny.swin(embed_dim=4), lambda: tiny.swin(depths=[1, 1])])
def test_a_checkpoint_of_another_architecture_is_refused(tmp_path, make):
    saved(tmp_path)
    base = make()
    before = tiny.state(base)
    with pytest.raises(ValueError, match=r"another architecture|was trained on|lacks|has shape"):
        PeftModel.from_pretrained(base, tmp_path)
    assert tiny.same_state(tiny.state(base), before)


@settings(deadline=None, max_examples=10, suppress_health_check=[HealthCheck.too_slow])
@given(
    budget=st.integers(100, 2000),
    share=st.sampled_from([0.0, 0.5, 1.0]),
    granularity=st.sampled_from(["element", "row", "column"]),
    places=st.sets(st.sampled_from(["attention", "mlp", "mlp_parallel", "block"]), min_size=1),
)
def test_round_trip_of_any_adapter(tmp_path_factory, budget, share, granularity, places):
    folder = tmp_path_factory.mktemp("adapter")
    config = SFAConfig(
        budget=budget,
        external_share=share,
        internal_granularity=granularity,
        external_places=sorted(places),
        initial_ticket="random",
        init_weights=False,
    )
    model = get_peft_model(tiny.swin(), config).eval()
    model.save_pretrained(folder)
    assert torch.equal(tiny.output(PeftModel.from_pretrained(tiny.swin(), folder)), tiny.output(model))
    assert any(isinstance(m, SFALayer) for m in model.modules())


def test_another_ticket_is_no_reason_to_lose_an_adapter():
    tensors = get_peft_model_state_dict(trained())
    model = get_peft_model(tiny.swin(), SFAConfig(budget=0.1, modules_to_save=["decode_head"]))
    before = tiny.state(model)
    with pytest.raises(CheckpointError, match="is_trainable=True"):
        set_peft_model_state_dict(model, tensors)
    assert list(model.peft_config) == ["default"]
    assert tiny.same_state(tiny.state(model), before)


def test_a_head_of_another_size_is_refused_and_leaves_the_base_as_it_was(tmp_path):
    saved(tmp_path)
    base = tiny.upernet(tiny.swin_config(), num_labels=5)
    before, expected, flags = tiny.state(base), tiny.output(base), [p.requires_grad for p in base.parameters()]
    with pytest.raises(CheckpointError, match="num_labels"):
        PeftModel.from_pretrained(base, tmp_path)
    assert tiny.same_state(tiny.state(base), before)
    assert torch.equal(tiny.output(base), expected)
    assert [p.requires_grad for p in base.parameters()] == flags

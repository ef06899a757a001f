"""Adapters on quantized bases, on CPU: bitsandbytes and torchao, which `make test` keeps beside the environment."""

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import BitsAndBytesConfig, Dinov2Config, Dinov2Model, TorchAoConfig

import pages
import tiny
from sfa_peft import SFAConfig, install_ticket, search_ticket

pytest.importorskip("bitsandbytes")
torchao = pytest.importorskip("torchao.quantization")

BACKENDS = {
    "int8": lambda: BitsAndBytesConfig(load_in_8bit=True),
    "nf4": lambda: BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    ),
    "torchao": lambda: TorchAoConfig(torchao.Int8WeightOnlyConfig()),
}
KINDS = {
    "both": {"budget": 600},
    "external": {"budget": 600, "target_modules": []},
    "internal": {"budget": 600, "external_places": []},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("dinov2")
    options = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
    torch.manual_seed(0)
    Dinov2Model(Dinov2Config(**options)).save_pretrained(path)
    return path


def load(folder, backend=None, dtype=torch.float32):
    quantization = {"quantization_config": BACKENDS[backend](), "device_map": "cpu"} if backend else {}
    return Dinov2Model.from_pretrained(folder, dtype=dtype, **quantization).eval()


def train(model):
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(3):
        loss = model(tiny.pixels()).last_hidden_state[:, 0].square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def quantized_layers(model):
    return [m for m in model.modules() if type(m).__name__ == "QuantizedLinear" and m.sfa_internal]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_adapters_on_a_quantized_base(folder, tmp_path, backend, kind):
    before = tiny.output(load(folder, backend))
    assert torch.equal(tiny.output(get_peft_model(load(folder, backend), SFAConfig(**KINDS[kind]))), before)

    # A new one: on some CPUs bitsandbytes packs weights in eval mode in a way that it can neither train nor save.
    model = get_peft_model(load(folder, backend), SFAConfig(**KINDS[kind]))
    assert bool(quantized_layers(model)) == (kind != "external")
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) <= 600
    losses = train(model)
    assert losses[-1] < losses[0]
    model.save_pretrained(tmp_path)
    expected = tiny.output(model)
    assert not torch.equal(expected, before)

    again = PeftModel.from_pretrained(load(folder, backend), tmp_path)
    assert torch.equal(tiny.output(again), expected)
    with model.disable_adapter():
        assert torch.equal(tiny.output(model), before)
    assert torch.equal(tiny.output(model.unload()), before)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_ticket_is_that_of_the_quantized_weights_and_works_on_the_full_ones(folder, tmp_path, backend):
    """The largest of the quantized weights are nearly those of the full ones."""
    base = load(folder, backend)
    base.train()(tiny.pixels())  # which changes the form of bitsandbytes' 8-bit weights
    config = SFAConfig(internal_density=0.2, target_modules=["fc1"], external_places=[])
    model, full = get_peft_model(base, config), get_peft_model(load(folder), config)
    ticket, own = (m.base_model.positions("default") for m in (model, full))
    common = total = 0
    for name, positions in own.items():
        chosen = set(positions["weight"].tolist())
        common += len(chosen & set(ticket[name]["weight"].tolist()))
        total += len(chosen)
    assert common > 0.9 * total

    train(model)
    model.save_pretrained(tmp_path)
    exact = PeftModel.from_pretrained(load(folder), tmp_path)
    assert (tiny.output(exact) - tiny.output(model)).abs().mean() < 0.2
    exact.merge_and_unload()


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_quantized_weights_forbid(folder, backend):
    model = get_peft_model(load(folder, backend), SFAConfig(budget=600))
    before = tiny.output(model)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match="its weight is quantized"):
            merge()
    with pytest.raises(ValueError, match=r"is quantized.*install_ticket"):
        search_ticket(model, [{"pixel_values": tiny.pixels()}], steps=1, progress=False)
    assert torch.equal(tiny.output(model), before)


def relative(a, b):
    return float((a - b).abs().max() / b.abs().max())


@pytest.mark.parametrize(("make", "widen"), [(tiny.vit, "auto"), (tiny.swin, "auto"), (tiny.dinov2, True)])
def test_a_merged_model_is_quantized_as_its_base_is(make, widen):
    """Merged, then quantized: every linear layer is, the wider MLPs too, with an error as small as the base's."""

    def quantized(model):
        torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
        return sum(type(p).__name__ == "Int8Tensor" for p in model.parameters())

    before, base = tiny.output(make()), make()
    model = get_peft_model(make(), SFAConfig(budget=0.1, external_conv=0, init_weights=False))
    expected = tiny.output(model)
    merged = model.merge_and_unload(widen=widen)
    assert quantized(merged) == quantized(base) > 0
    assert relative(tiny.output(merged), expected) < max(0.02, 3 * relative(tiny.output(base), before))
    assert relative(before, expected) > 0.2


def test_the_example_in_the_documentation_runs():
    (snippet,) = [s for s in pages.snippets("docs/deploying.md", "python") if "torchao" in s.text]
    names = {"model": get_peft_model(tiny.swin(), SFAConfig(budget=0.1, external_conv=0, init_weights=False))}
    expected = tiny.output(names["model"])
    snippet.run(names)
    assert 0 < relative(tiny.output(names["quantized"]), expected) < 0.02


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_merged_folder_is_loaded_quantized(folder, tmp_path, backend):
    model = get_peft_model(load(folder), SFAConfig(budget=0.1, external_conv=0, init_weights=False))
    expected = tiny.output(model)
    model.merge_and_unload(widen=True).save_pretrained(tmp_path)
    merged = load(tmp_path, backend)
    assert merged.config.mlp_ratio == 5
    error = relative(tiny.output(load(folder, backend)), tiny.output(load(folder)))
    assert 0 < relative(tiny.output(merged), expected) < 3 * error
    assert relative(tiny.output(load(folder)), expected) > 0.2


def test_a_ticket_from_a_search_on_the_full_weights(folder):
    config = SFAConfig(budget=600)
    full = get_peft_model(load(folder), config)

    def loss(model, batch):
        return model(batch["pixel_values"]).last_hidden_state.square().mean()

    found = search_ticket(full, [{"pixel_values": tiny.pixels()}], steps=2, loss_fn=loss, progress=False).ticket
    model = get_peft_model(load(folder, "int8"), config)
    install_ticket(model, found)
    positions = model.base_model.positions("default")
    for name, own in full.base_model.positions("default").items():
        assert own.keys() == positions[name].keys()
        assert all(torch.equal(own[p], positions[name][p]) for p in own)


@pytest.mark.parametrize("backend", ["int8", "nf4"])
def test_a_fraction_of_a_quantized_backbone_is_that_of_the_full_one(folder, backend):
    full, quantized = (get_peft_model(load(folder, b), SFAConfig(budget=0.05)) for b in (None, backend))
    assert full.base_model.budget("default") == quantized.base_model.budget("default")


def test_several_adapters_and_mixed_batches(folder):
    model = get_peft_model(load(folder, "int8"), SFAConfig(budget=600, init_weights=False))
    model.add_adapter("other", SFAConfig(budget=550, init_weights=False, initial_ticket="random"))
    x = tiny.pixels(3)
    alone = []
    for i, name in enumerate(("default", "other")):
        model.set_adapter(name)
        alone.append(tiny.output(model, x)[i])
    with model.disable_adapter():
        alone.append(tiny.output(model, x)[2])
    with torch.no_grad():
        mixed = model(x, adapter_names=["default", "other", "__base__"]).last_hidden_state
    torch.testing.assert_close(mixed, torch.stack(alone), atol=1e-4, rtol=1e-3)
    model.base_model.add_weighted_adapter(["default", "other"], [1.0, 1.0], "sum")
    layer = quantized_layers(model)[0]
    torch.testing.assert_close(
        layer.get_delta_weight("sum"), layer.get_delta_weight("default") + layer.get_delta_weight("other")
    )


def test_a_weight_that_cannot_be_read_is_refused(folder):
    base = load(folder, "nf4")
    tiny.output(base)
    state = base.encoder.layer[0].mlp.fc1.weight.quant_state
    state.packing_format_for_cpu = True  # as it is on CPUs with AVX512-BF16
    config = {"budget": 600, "target_modules": ["layer.0.mlp.fc1"], "external_places": []}
    with pytest.raises(ValueError, match=r"packed.*before the first forward pass"):
        get_peft_model(base, SFAConfig(**config))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_half_precision_around_quantized_weights(folder, backend, dtype):
    x = tiny.pixels().to(dtype)
    before = tiny.output(load(folder, backend, dtype), x)
    assert torch.equal(tiny.output(get_peft_model(load(folder, backend, dtype), SFAConfig(budget=600)), x), before)
    model = get_peft_model(load(folder, backend, dtype), SFAConfig(budget=600, init_weights=False)).train()
    model(x).last_hidden_state.float().square().mean().backward()
    own = [p for p in model.parameters() if p.requires_grad]
    assert {p.dtype for p in own} == {torch.float32}
    assert all(p.grad is not None for p in own)

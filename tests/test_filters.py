"""External adapters with depthwise filters on their hidden units (`external_conv`)."""

import copy
import threading

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel, get_peft_model
from torch import nn

import backbones
import tiny
from adapters import checkpoint_activations
from backbones import BACKBONES, SIZES
from saved_tensors import Saved
from sfa_peft import Architecture, CheckpointError, SFAConfig, register_architecture, search_ticket
from sfa_peft.layers.bottleneck import ExternalAdapter
from sfa_peft.planning.architectures import known_modules
from sfa_peft.planning.registry import unregister_architecture

WIDE = torch.randn(2, 3, 32, 48, generator=torch.Generator().manual_seed(0))


def config(**fields):
    return SFAConfig(**{"budget": 0.3, "external_share": 0.8, "external_conv": 3, "modules_to_save": None} | fields)


def adapted(base, **fields):
    """A model whose adapters and filters do something."""
    return get_peft_model(base, config(init_weights=False, **fields)).eval()


def adapters_of(model):
    return [m for m in model.modules() if isinstance(m, ExternalAdapter)]


def reference(adapter, x, grid):
    """The formula, hidden unit by hidden unit and neighbour by neighbour."""
    hidden = F.linear(x, adapter.down.weight, adapter.down.bias)
    height, width = grid
    first = hidden[:, : -height * width]
    image = hidden[:, -height * width :].unflatten(1, grid)
    reach = adapter.kernel_size // 2
    padded = F.pad(image, (0, 0, reach, reach, reach, reach))
    filtered = image.clone()
    for i in range(adapter.kernel_size):
        for j in range(adapter.kernel_size):
            filtered = filtered + padded[:, i : i + height, j : j + width] * adapter.conv.weight[:, 0, i, j]
    hidden = torch.cat([first, filtered.flatten(1, 2)], dim=1)
    return F.linear(F.gelu(hidden) * adapter.scale, adapter.up.weight)


@pytest.mark.parametrize("conv", [3, 5])
@pytest.mark.parametrize(
    ("make", "grids"),
    [
        (tiny.swin, [(16, 24), (8, 12)]),
        (tiny.swinv2, [(16, 24), (8, 12)]),
        (tiny.dinov2, [(4, 6)]),
        (tiny.dinov2_with_registers, [(4, 6)]),
        (tiny.dinov3, [(4, 6)]),
    ],
)
def test_filters_see_the_neighbours_on_the_image(make, grids, conv):
    model = adapted(make(), external_conv=conv)
    seen = []
    for adapter in adapters_of(model):
        adapter.register_forward_hook(lambda a, args, output: seen.append((a, args[0], output)))
    tiny.output(model, WIDE)
    assert {next(g for g in grids if g[0] * g[1] <= x.shape[1]) for _, x, _ in seen} == set(grids)
    for adapter, x, output in seen:
        grid = next(g for g in grids if g[0] * g[1] <= x.shape[1])
        assert torch.allclose(output, reference(adapter, x, grid), atol=1e-5)


@pytest.mark.parametrize("name", BACKBONES)
def test_every_architecture_has_filters_or_says_that_it_has_none(name):
    base, x = BACKBONES[name](), tiny.pixels(size=SIZES.get(name, tiny.SIZE))
    known = [a for _, _, a in known_modules(base) if "mlp_parallel" in a.places]
    if not known or any(a.grid is None for a in known):
        with pytest.raises(ValueError, match=r"external_conv=3: the grid|have only the places"):
            get_peft_model(base, config(target_modules=[]))
        return
    model = adapted(base, target_modules=[])
    seen = []
    for adapter in adapters_of(model):
        adapter.register_forward_hook(lambda a, args, output: seen.append((a, args[0], output)))
    with torch.no_grad():
        backbones.output(model, x)
    assert {a for a, _, _ in seen} == set(adapters_of(model))
    for adapter, given, output in seen:
        grid = tuple(given.shape[1:3]) if given.dim() == 4 else adapter.conv.grid.hook.size()
        tokens = given.flatten(1, 2) if given.dim() == 4 else given
        assert 0 <= tokens.shape[1] - grid[0] * grid[1] <= 5  # class and register tokens
        assert torch.allclose(output.reshape(tokens.shape), reference(adapter, tokens, grid), atol=1e-5)


@pytest.mark.parametrize("make", [tiny.swin, tiny.dinov2])
def test_an_adapter_with_filters_is_the_identity_at_first_and_keeps_to_its_budget(make):
    base = make()
    before = tiny.output(base, WIDE)
    model = get_peft_model(base, config(budget=2000, modules_to_save=["decode_head"]))
    assert torch.equal(tiny.output(model, WIDE), before)
    assert sum(p.numel() for n, p in model.named_parameters() if p.requires_grad and ".sfa_" in n) == 2000
    tiny.train(model)
    assert all(a.conv.weight.any() for a in adapters_of(model))
    alone = get_peft_model(make(), config(budget=2000, external_share=1.0))
    assert 1800 < sum(p.numel() for n, p in alone.named_parameters() if p.requires_grad) <= 2000


@pytest.mark.parametrize("shape", [(2, 3 + 4 * 5, 6), (2, 4 * 5, 6), (2, 4, 5, 6)])
def test_the_gradients_are_those_of_plain_autograd(shape):
    adapter = ExternalAdapter(6, 4, scale=0.7, init_weights=False, conv=3).double()
    adapter.conv.size_of = lambda x: (4, 5) if x.dim() == 3 else None
    x = torch.randn(shape, dtype=torch.double, requires_grad=True)

    def plain():
        tokens = x.flatten(1, 2) if x.dim() == 4 else x
        return reference(adapter, tokens, (4, 5)).reshape(x.shape)

    inputs = [x, *adapter.parameters()]
    grads = [torch.autograd.grad(y.sin().sum(), inputs) for y in (adapter(x), plain())]
    assert torch.allclose(adapter(x), plain())
    assert all(torch.allclose(a, b) for a, b in zip(*grads, strict=True))
    assert torch.autograd.gradcheck(adapter, (x,))


def test_only_the_input_and_the_hidden_states_are_saved_for_backward():
    adapter = ExternalAdapter(6, 4, init_weights=False, conv=3)
    with Saved(adapter) as saved:
        adapter(torch.randn(2, 4, 5, 6, requires_grad=True))
    assert saved.shapes == [(2, 4, 5, 6), *2 * [(2, 4, 5, adapter.width)]]  # without and with what the filters add


def test_training_reaches_every_parameter_of_the_adapters():
    model = adapted(tiny.swin(), modules_to_save=["decode_head"])
    model.train()(**tiny.batch()).loss.backward()
    assert all(p.grad is not None and p.grad.any() for a in adapters_of(model) for p in a.parameters())


def test_sizes_of_images_may_change():
    model = adapted(tiny.dinov2())
    first = tiny.output(model, WIDE)
    other = tiny.output(model, WIDE.transpose(2, 3))
    assert other.shape[2:] == first.shape[2:][::-1]
    assert torch.equal(tiny.output(model, WIDE), first)


def test_saved_and_loaded(tmp_path):
    model = adapted(tiny.swin())
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny.swin(), tmp_path)
    assert torch.equal(tiny.output(loaded, WIDE), tiny.output(model, WIDE))
    assert loaded.peft_config["default"].external_conv == 3
    transformers_model = tiny.swin()
    transformers_model.load_adapter(str(tmp_path))
    assert torch.equal(tiny.output(transformers_model, WIDE), tiny.output(model, WIDE))


def test_an_older_file_has_no_filters(tmp_path):
    model = adapted(tiny.swin(), external_conv=0)
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    text = path.read_text()
    path.write_text(text.replace('  "external_conv": 0,\n', ""))
    assert "external_conv" not in path.read_text()
    loaded = PeftModel.from_pretrained(tiny.swin(), tmp_path)
    assert torch.equal(tiny.output(loaded, WIDE), tiny.output(model, WIDE))


@pytest.mark.parametrize("conv", [0, 5])
def test_another_size_in_the_config_is_refused(tmp_path, conv):
    adapted(tiny.swin()).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(path.read_text().replace('"external_conv": 3', f'"external_conv": {conv}'))
    base = tiny.swin()
    before = tiny.state(base)
    with pytest.raises(CheckpointError, match="external_conv: "):
        PeftModel.from_pretrained(base, tmp_path)
    assert tiny.same_state(tiny.state(base), before)


def test_a_search_leaves_the_filters_as_they_were():
    model = get_peft_model(tiny.swin(), config(modules_to_save=["decode_head"]))
    before = tiny.output(model, WIDE)
    search_ticket(model, [tiny.batch()], steps=3, progress=False)
    assert torch.equal(tiny.output(model, WIDE), before)
    assert not any(a.conv.weight.any() for a in adapters_of(model))


def test_combined_adapters_add():
    model = adapted(tiny.swin())
    model.add_adapter("other", config(init_weights=False, external_share=0.5))
    model.add_weighted_adapter(["default", "other"], [0.5, -2.0], "sum")
    outputs = {}
    for name in ("default", "other", "sum"):
        model.set_adapter(name)
        record = outputs.setdefault(name, [])
        first = adapters_of(model)[0]
        layer = next(m for m in model.modules() if hasattr(m, "sfa_block") and len(m.sfa_block))
        assert first is layer.sfa_block["default"]
        x = torch.randn(1, 16 * 24, layer.sfa_block[name].down.in_features, generator=torch.manual_seed(1))
        tiny.output(model, WIDE)
        record.append(layer.sfa_block[name](x))
    assert torch.allclose(outputs["sum"][0], 0.5 * outputs["default"][0] - 2 * outputs["other"][0], atol=1e-5)


def test_adapters_with_other_filters_cannot_be_combined():
    model = adapted(tiny.swin())
    model.add_adapter("other", config(external_conv=5))
    with pytest.raises(ValueError, match="their external_conv is 3 and 5"):
        model.add_weighted_adapter(["default", "other"], [1.0, 1.0], "sum")


def test_merged_they_stay_modules_and_cannot_be_saved(tmp_path):
    model = adapted(tiny.swin())
    expected = tiny.output(model, WIDE)
    with pytest.warns(UserWarning, match=r"without filters \(external_conv=0\)"):
        merged = model.merge_and_unload()
    assert torch.equal(tiny.output(merged, WIDE), expected)
    with pytest.raises(ValueError, match="external adapters as modules"):
        merged.save_pretrained(tmp_path)


@pytest.mark.parametrize("way", ["unload", "delete"])
def test_no_hook_stays(way):
    base = tiny.dinov2()
    hooks = sum(len(m._forward_pre_hooks) for m in base.modules())
    model = adapted(base)
    if way == "unload":
        model = model.unload()
    else:
        model.delete_adapter("default")
    assert sum(len(m._forward_pre_hooks) for m in model.modules()) == hooks


@pytest.mark.parametrize("make", [tiny.swin, tiny.dinov2])
def test_a_copy_is_independent(make):
    model = adapted(make())
    other = copy.deepcopy(model)
    expected = tiny.output(model, WIDE)
    turned = tiny.output(other, WIDE.transpose(2, 3))
    assert torch.equal(tiny.output(model, WIDE), expected)
    assert torch.equal(tiny.output(other, WIDE), expected)
    assert turned.shape[2:] == expected.shape[2:][::-1]


def test_mixed_batches():
    model = adapted(tiny.dinov2())
    model.add_adapter("other", config(init_weights=False, external_conv=5))
    alone = {}
    for name in ("default", "other"):
        model.set_adapter(name)
        alone[name] = tiny.output(model, WIDE)
    with torch.no_grad():
        mixed = model(WIDE, adapter_names=["other", "default"]).logits
    assert torch.allclose(mixed[0], alone["other"][0], atol=1e-5)
    assert torch.allclose(mixed[1], alone["default"][1], atol=1e-5)


@pytest.mark.parametrize("make", [tiny.swin, tiny.dinov2])
def test_gradient_checkpointing(make):
    gradients = []
    for checkpoints in (False, True):
        model = adapted(make(), modules_to_save=["decode_head"])
        if checkpoints:
            checkpoint_activations(model.base_model.model.backbone)
        model.train()
        torch.manual_seed(0)
        model(**tiny.batch()).loss.backward()
        gradients.append([p.grad for a in adapters_of(model) for p in a.parameters()])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*gradients, strict=True))


def test_threads_have_their_own_grids():
    model = adapted(tiny.dinov2())
    images = [WIDE, WIDE.transpose(2, 3)]
    expected = [tiny.output(model, x) for x in images]
    wrong = []

    def run(i):
        for _ in range(10):
            if not torch.equal(tiny.output(model, images[i]), expected[i]):
                wrong.append(i)

    threads = [threading.Thread(target=run, args=(i,)) for i in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("make", [tiny.swin, tiny.dinov2])
def test_compiled_in_one_graph(make):
    model = adapted(make().backbone)
    with torch.no_grad():
        expected = model(WIDE).feature_maps
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        found = compiled(WIDE).feature_maps
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_half_precision_and_autocast(dtype):
    model = adapted(tiny.dinov2().to(dtype))
    assert tiny.output(model, WIDE.to(dtype)).dtype == dtype
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.isfinite(tiny.output(model, WIDE.to(dtype))).all()


def test_maps_need_no_grid():
    base = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 1))
    model = get_peft_model(
        base, config(external_modules=["0"], target_modules=[], external_share=1.0, init_weights=False)
    )
    (adapter,) = adapters_of(model)
    x = torch.randn(1, 8, 5, 7)
    tokens = x.flatten(2).transpose(1, 2)
    assert torch.allclose(adapter(x).flatten(2).transpose(1, 2), reference(adapter, tokens, (5, 7)), atol=1e-5)


def test_tokens_without_a_known_grid_are_refused():
    base = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4))
    model = get_peft_model(base, config(budget=60, external_modules=["0"], target_modules=[], init_weights=False))
    with pytest.raises(RuntimeError, match=r"shape \(2, 9, 8\), and the grid of the image's tokens is not known"):
        model(torch.randn(2, 9, 4))


def test_attention_in_windows_is_refused():
    with pytest.raises(ValueError, match=r"external_conv=3: .*'attention'.*in windows"):
        get_peft_model(tiny.swin(), config(external_places=("attention",)))


def test_an_architecture_without_a_grid_is_refused():
    base = tiny.rf_detr()
    with pytest.raises(ValueError, match=r"external_conv=3: the grid of the tokens at the place 'mlp_parallel'"):
        get_peft_model(base, config())


def test_a_registered_architecture_can_have_filters():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.mlp = nn.LayerNorm(6), nn.Linear(6, 6)

        def forward(self, x, shape):
            return x + self.mlp(self.norm(x))

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = Block()

        def forward(self, x):
            return self.block(x.flatten(1, 2), shape=x.shape[1:3])

    Block.__name__ = "BlockWithShape"
    known = Architecture("with shape", "BlockWithShape", ("mlp",), {"mlp_parallel": "mlp"}, "norm", grid="shape")
    register_architecture(known)
    try:
        model = get_peft_model(Net(), config(budget=0.9, init_weights=False))
        (adapter,) = adapters_of(model)
        seen = []
        adapter.register_forward_hook(lambda a, args, output: seen.append((args[0], output)))
        model(torch.randn(2, 3, 5, 6))
        ((x, output),) = seen
        assert torch.allclose(output, reference(adapter, x, (3, 5)), atol=1e-6)
    finally:
        unregister_architecture("with shape")


@pytest.mark.parametrize("value", [1, 2, -3, 33, 3.0, True, "3"])
def test_bad_values_are_refused(value):
    with pytest.raises(ValueError, match=r"SFAConfig.external_conv=.* is not valid; use an odd int from 3 to 31"):
        SFAConfig(external_conv=value)


def test_not_with_a_placement_found_by_the_search():
    with pytest.raises(ValueError, match='cannot be combined with external_placement="auto"'):
        SFAConfig(external_conv=3, external_placement="auto")

"""Every architecture that SFA knows, and the register that they are in."""

import re
import warnings
from dataclasses import replace
from functools import partial

import pytest
import torch
import transformers as hf
from peft import PeftModel, get_peft_model
from torch import nn

import backbones
import sfa_peft
import tiny
from architectures_page import PAGE, page
from backbones import BACKBONES, CONTAINED, FOLDED, SIZES
from sfa_peft import Architecture, ArchitectureWarning, PlainMLP, SFAConfig, register_architecture, search_ticket
from sfa_peft.layers.adapted import sfa_layers
from sfa_peft.planning import registry
from sfa_peft.planning.architectures import EARLIER, known_modules
from sfa_peft.tuner.folding import ExternalsKeptWarning


def places_of(model):
    return sorted({place for _, _, known in known_modules(model) for place in known.places})


def adapted(model, **options):
    return get_peft_model(model, SFAConfig(**{"budget": 0.2, "external_places": places_of(model)} | options))


def loss(model, x):
    y = backbones.output(model, x)
    return (y - torch.linspace(-1, 1, len(y))).square().mean()


def train(model, x, steps):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(steps):
        loss(model, x).backward()
        optimizer.step()
        optimizer.zero_grad()


def difference(a, b):
    return float((a - b).abs().max() / b.abs().max())


def external_adapters(model):
    return [adapter for _, layer in sfa_layers(model) for _, adapter in layer.externals_of("default")]


@torch.no_grad()
def output(model, x):
    """Frozen, since torch multiplies by a weight that takes a gradient in another way, and may round differently."""
    wanted = [p for p in model.parameters() if p.requires_grad]
    try:
        return backbones.output(model.requires_grad_(False).eval(), x)
    finally:
        for p in wanted:
            p.requires_grad_(True)


@pytest.mark.parametrize("name", BACKBONES)
def test_it_is_found_trains_is_searched_saved_loaded_and_merged(name, tmp_path):
    base, x = BACKBONES[name](), tiny.pixels(size=SIZES.get(name, tiny.SIZE))
    start = output(base, x)
    found = {known.name.removesuffix(EARLIER) for _, _, known in known_modules(base)}
    assert name in found
    assert found - {name} <= {part for part, whole in CONTAINED.items() if name in (whole, "Swinv2 of timm")}

    model = adapted(base)
    assert torch.equal(output(model, x), start)
    loss(model, x).backward()
    assert external_adapters(model)
    assert all(bool(adapter.up.weight.grad.any()) for adapter in external_adapters(model))
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    model.zero_grad()

    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*never calls.*")
        search_ticket(model, [x], steps=2, loss_fn=loss, progress=False)
    train(model, x, 2)
    trained = output(model, x)
    assert not torch.allclose(trained, start, rtol=1e-3)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(BACKBONES[name](), tmp_path)
    assert torch.equal(output(loaded, x), trained)

    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        merged = loaded.merge_and_unload(widen=True)
    assert difference(output(merged, x), trained) < 1e-5
    assert any(w.category is ExternalsKeptWarning for w in told)  # those at `attention` and `mlp`

    parallel = [place for place in places_of(base) if place == "mlp_parallel"]
    if parallel:
        again = adapted(
            BACKBONES[name](), external_places=parallel, target_modules=[], init_weights=False, external_conv=0
        )
        trained = output(again, x)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            merged = again.merge_and_unload(widen=True)
        assert difference(output(merged, x), trained) < 1e-5
        assert (name in FOLDED) == (not any(w.category is ExternalsKeptWarning for w in told))
        if isinstance(merged, hf.PreTrainedModel) and name in FOLDED:
            merged.save_pretrained(tmp_path / "plain")
            plain = type(merged).from_pretrained(tmp_path / "plain")
            assert difference(output(plain, x), trained) < 1e-5


@pytest.mark.parametrize("name", BACKBONES)
def test_every_architecture_is_found_with_the_default_config(name):
    if name == "ViTPose, with experts":
        with pytest.raises(ValueError, match="have only the places"):
            get_peft_model(BACKBONES[name](), SFAConfig(budget=0.02))
        return
    model = get_peft_model(BACKBONES[name](), SFAConfig(budget=0.05))
    with_filters = {a.name for a in registry.registered_architectures() if a.grid and "block" in a.places}
    found = {known.name for _, _, known in known_modules(model.base_model.model) if known.places}
    config = model.peft_config["default"]
    assert set(config.external_widths) == {"block" if found <= with_filters else "mlp_parallel"}
    assert config.external_places == tuple(config.external_widths)
    assert config.ticket_sizes


# They scale the output of the MLP by a parameter of the block, or have no plain MLP.
WITHOUT_BLOCK = {
    "BEiT",
    "Data2Vec",
    "BEiT of timm",
    "DINOv3 and EVA of timm",
    "EVA of timm, with its biases apart",
    "ViTPose, with experts",
}


@pytest.mark.parametrize("name", BACKBONES)
def test_adapters_at_the_block_read_its_output_and_add_to_it(name):
    base, x = BACKBONES[name](), tiny.pixels(size=SIZES.get(name, tiny.SIZE))
    assert ("block" in places_of(base)) == (name not in WITHOUT_BLOCK)
    if name in WITHOUT_BLOCK:
        with pytest.raises(ValueError, match=r"external_places=\('block',\)"):
            adapted(base, external_places=["block"])
        return
    model = adapted(base, external_places=["block"], target_modules=[], external_conv=0, init_weights=False)
    prefix, block, _ = next(known for known in known_modules(base) if known[2].places)
    adapter = next(m for n, m in base.named_modules() if n.startswith(prefix) and n.endswith("sfa_block.default"))
    seen = []
    block.register_forward_hook(lambda module, args, y: seen.append(y[0] if isinstance(y, tuple) else y))
    output(model, x)
    with model.disable_adapter():
        output(model, x)
    changed, plain = (y.movedim(1, -1) if name == "VitDet" else y for y in seen[:: len(seen) // 2])
    assert torch.allclose(changed, plain + adapter(plain), atol=1e-5)
    assert not torch.allclose(changed, plain, atol=1e-3)


def whole_clip():
    text = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    return hf.CLIPModel(hf.CLIPConfig(text_config=text | {"vocab_size": 50}, vision_config=backbones.SIZED))


def whole_mae():
    decoder = {"decoder_hidden_size": 16, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2}
    return hf.ViTMAEForPreTraining(hf.ViTMAEConfig(**backbones.SIZED, **decoder, decoder_intermediate_size=32))


def whole_sam():
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "mlp_dim": 16}
    prompts = {"hidden_size": 16, "image_size": 32, "patch_size": 8, "mask_input_channels": 4}
    decoder = small | {"iou_head_hidden_dim": 16, "attention_downsample_rate": 1}
    vision = backbones.SAM | {"output_channels": 16}
    return hf.SamModel(hf.SamConfig(vision_config=vision, prompt_encoder_config=prompts, mask_decoder_config=decoder))


# Dense models whose other parts have leaves, or whole blocks, of the same names: where their backbone is.
DENSE = {
    "MaskFormer": (backbones.maskformer, "pixel_level_module.encoder."),
    "ZoeDepth on BEiT": (backbones.zoedepth_beit, "backbone."),
    "MAE with its decoder": (whole_mae, "vit."),
    "CLIP with its text tower": (whole_clip, "vision_model."),
    "SAM with its mask decoder": (whole_sam, "vision_encoder."),
    "SegFormer with its head": (BACKBONES["SegFormer"], "segformer."),
}


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # of ZoeDepth in transformers 5.18
@pytest.mark.parametrize("name", DENSE)
def test_in_a_dense_model_the_backbone_alone_is_adapted(name):
    make, prefix = DENSE[name]
    model = adapted(make())
    layers = [layer for layer, _ in sfa_layers(model.base_model.model)]
    assert layers
    assert all(prefix in layer for layer in layers)


SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}
SMALL_SWIN = {"img_size": 32, "patch_size": 2, "embed_dim": 8, "depths": (2, 2), "num_heads": (2, 2), "window_size": 4}


def from_timm(module, name, **options):
    def make():
        pytest.importorskip("timm", reason="timm needs torchvision, of which there is no build for the CPU alone")
        return getattr(pytest.importorskip(f"timm.models.{module}"), name)(**options)

    return make


def from_kornia(**options):
    """Meta's DINOv2, of which kornia has a copy."""

    def make():
        kornia = pytest.importorskip("kornia.feature.dedode.transformer")
        block = partial(kornia.layers.block.NestedTensorBlock, attn_class=kornia.layers.MemEffAttention)
        return kornia.dinov2.DinoVisionTransformer(**SMALL, block_fn=block, **options)

    return make


VIT, SCALED = "ViT of timm and Meta", "ViT of timm and Meta, with LayerScale"
REAL = {
    "timm's ViT": (from_timm("vision_transformer", "VisionTransformer", **SMALL), VIT),
    "timm's DINOv2": (from_timm("vision_transformer", "VisionTransformer", **SMALL, init_values=0.1), SCALED),
    "timm's DINOv3": (from_timm("eva", "Eva", **SMALL, init_values=0.1, qkv_bias=False), "DINOv3 and EVA of timm"),
    "timm's EVA": (from_timm("eva", "Eva", **SMALL), "EVA of timm, with its biases apart"),
    "timm's BEiT": (from_timm("beit", "Beit", **SMALL, init_values=0.1, qkv_bias=True), "BEiT of timm"),
    "timm's Swin": (from_timm("swin_transformer", "SwinTransformer", **SMALL_SWIN), "Swin of timm"),
    "timm's Swinv2": (from_timm("swin_transformer_v2", "SwinTransformerV2", **SMALL_SWIN), "Swinv2 of timm"),
    "Meta's DINOv2": (from_kornia(init_values=0.1), SCALED),
    "Meta's giant DINOv2": (from_kornia(init_values=0.1, ffn_layer="swiglufused"), SCALED),
    "Meta's DINOv2 without LayerScale": (from_kornia(), VIT),
}


@pytest.mark.parametrize("name", REAL)
def test_real_models_of_other_libraries(name, tmp_path):
    make, architecture = REAL[name]

    def made():
        torch.manual_seed(0)
        return make().eval()

    base, x = made(), tiny.pixels()
    assert architecture in {known.name for _, _, known in known_modules(base)}
    start = output(base, x)
    model = adapted(base)
    assert torch.equal(output(model, x), start)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*never calls.*")
        search_ticket(model, [x], steps=2, loss_fn=loss, progress=False)
    train(model, x, 2)
    trained = output(model, x)
    assert not torch.equal(trained, start)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(made(), tmp_path)
    assert torch.equal(output(loaded, x), trained)
    with pytest.warns(ExternalsKeptWarning):
        merged = loaded.merge_and_unload()
    assert difference(output(merged, x), trained) < 1e-5


def test_the_page_is_that_of_the_table():
    assert PAGE.read_text() == page(), "run: python tests/architectures_page.py"


def test_the_table_is_tested():
    """Those of earlier versions of transformers are tested with these versions."""
    assert {a.name.removesuffix(EARLIER) for a in registry.registered_architectures()} == {*BACKBONES, *CONTAINED}


# The register


class MyMLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, tokens):
        return self.down(nn.functional.gelu(self.up(tokens)))


class MyBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.mix, self.ffn = nn.LayerNorm(8), nn.Linear(8, 8), MyMLP()
        self.keep = nn.Identity()

    def forward(self, x):
        x = x + self.mix(self.norm(x))
        return x + self.keep(self.ffn(tokens=x))


class MyModel(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([MyBlock(), MyBlock()])
        self.head = nn.Linear(8, 8)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x)


MINE = Architecture(
    name="mine",
    block="MyBlock",
    targets=("norm", "mix", "ffn.up", "ffn.down"),
    places={"attention": "mix", "mlp": "ffn.down", "mlp_parallel": "ffn.down"},
    mlp_input="ffn",
)
TOKENS = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def _register(monkeypatch):
    """What a test registers is gone after it."""
    registry.registered_architectures()
    monkeypatch.setattr(registry, "_registered", dict(registry._registered))
    monkeypatch.setattr(registry, "_by_block", {block: list(of) for block, of in registry._by_block.items()})


def test_a_registered_block_is_found(tmp_path):
    register_architecture(MINE)
    base = MyModel()
    expected = output(base, TOKENS)
    model = get_peft_model(base, SFAConfig(budget=200, init_weights=False))
    config = model.peft_config["default"]
    assert config.external_widths == {"mlp_parallel": {"blocks.0.ffn.down": 3, "blocks.1.ffn.down": 2}}
    assert not torch.allclose(output(model, TOKENS), expected)
    model.save_pretrained(tmp_path)
    assert torch.equal(output(PeftModel.from_pretrained(MyModel(), tmp_path), TOKENS), output(model, TOKENS))
    registry.unregister_architecture("mine")
    with pytest.raises(sfa_peft.CheckpointError, match="register_architecture, call that before loading"):
        PeftModel.from_pretrained(MyModel(), tmp_path)


def test_a_name_is_registered_once():
    register_architecture(MINE)
    with pytest.raises(ValueError, match=r"'mine' is registered already, for blocks of the class 'MyBlock'"):
        register_architecture(MINE)
    with pytest.raises(ValueError, match=r"'Swin' is registered already"):
        register_architecture(replace(MINE, name="Swin"))
    register_architecture(replace(MINE, targets=("mix",)), replace=True)
    assert [a.targets for a in registry.registered_architectures() if a.name == "mine"] == [("mix",)]
    with pytest.raises(TypeError, match="takes an Architecture"):
        register_architecture({"block": "MyBlock"})


BAD = {
    "name": (" ", "use a name"),
    "block": ("a.b", "name of the block's class"),
    "targets": (("norm", "norm"), "each once"),
    "optional": (("norm",), r"\['norm'\] are in `targets` too"),
    "has": (("",), "tuple of names"),
    "inside": ("Model", "tuple of names"),
    "places": ({"middle": "mix"}, "mlp_parallel"),
    "mlp_input": (None, "needs the module whose input"),
    "mlp": ("ffn", "use a PlainMLP"),
    "note": (5, "use a string"),
}


@pytest.mark.parametrize("field", BAD)
def test_a_description_that_cannot_be_is_refused_at_once(field):
    value, message = BAD[field]
    with pytest.raises(ValueError, match=rf"Architecture\.{field}=.*{message}"):
        replace(MINE, **{field: value})


def test_a_description_of_nothing_or_of_half_a_place_is_refused():
    with pytest.raises(ValueError, match="name at least one target or place"):
        Architecture("empty", "MyBlock")
    with pytest.raises(ValueError, match="belong to the place `mlp_parallel`"):
        Architecture("half", "MyBlock", targets=("mix",), mlp_input="ffn")
    with pytest.raises(ValueError, match=r"PlainMLP\.fc1='' is not valid"):
        PlainMLP("mlp_ratio", is_ratio=True, fc1="")
    with pytest.raises(ValueError, match=r"PlainMLP\.is_ratio=1 is not valid"):
        PlainMLP("mlp_ratio", is_ratio=1)


MISFITS = {
    "place": ({"places": {"mlp": "ffn.fc2"}, "mlp_input": None}, r"place `mlp` is 'ffn.fc2', which it lacks"),
    "no leaf": ({"places": {"mlp": "ffn"}, "mlp_input": None}, r"place `mlp` is 'ffn', a MyMLP with submodules"),
    "no output": ({"places": {"mlp": "keep"}, "mlp_input": None}, r"'blocks.0.keep', a Identity"),
    "input": ({"mlp_input": "mlp"}, r"mlp_input is 'mlp', which it lacks"),
    "target": ({"targets": ("norm", "qkv")}, r"targets \['qkv'\] are in no such block"),
}


@pytest.mark.parametrize("what", MISFITS)
def test_names_that_the_blocks_lack_are_an_error_with_those_there_are(what):
    changes, message = MISFITS[what]
    register_architecture(replace(MINE, **changes))
    model = MyModel()
    with pytest.raises(ValueError, match=message) as told:
        get_peft_model(model, SFAConfig(budget=200, external_places=list(changes.get("places", ["mlp"]))))
    assert what == "no output" or "norm, mix, ffn.up, ffn.down" in str(told.value)
    assert not sfa_layers(model)


def test_of_several_descriptions_the_last_one_that_applies_is_used():
    register_architecture(MINE)
    register_architecture(replace(MINE, name="gated", has=("ffn.gate",)))
    assert {known.name for _, _, known in known_modules(MyModel())} == {"mine"}
    register_architecture(replace(MINE, name="newer", has=("ffn.up",)))
    assert {known.name for _, _, known in known_modules(MyModel())} == {"newer"}
    register_architecture(replace(MINE, name="nothing there", has=("keep",)))
    register_architecture(replace(MINE, name="elsewhere", inside=("Tower",)))
    assert {known.name for _, _, known in known_modules(MyModel())} == {"newer"}
    register_architecture(replace(MINE, name="here", inside=("Tower", "MyModel")))
    assert {known.name for _, _, known in known_modules(MyModel())} == {"here"}


def test_a_block_of_a_common_name_is_known_by_its_parts_alone():
    class Block(nn.Module):  # ConvNeXt's has the name of timm's ViT
        def __init__(self):
            super().__init__()
            self.norm, self.mlp = nn.LayerNorm(8), MyMLP()

    assert not list(known_modules(nn.Sequential(Block())))


class Entry:
    """An entry point of another package."""

    def __init__(self, name, loaded):
        self.name, self.loaded = name, loaded
        self.dist = type("Distribution", (), {"name": f"{name}-package"})
        self.module = name

    def load(self):
        if isinstance(self.loaded, Exception):
            raise self.loaded
        return self.loaded


def test_other_packages_register_theirs_when_blocks_are_first_looked_for(monkeypatch):
    entries = [
        Entry("one", MINE),
        Entry("broken", ImportError("no module named 'gone'")),
        Entry("several", [replace(MINE, name="second", block="Other"), replace(MINE, name="third", block="Third")]),
        Entry("twice", MINE),
    ]
    asked = []
    monkeypatch.setattr(registry, "entry_points", lambda group: asked.append(group) or entries)
    monkeypatch.setattr(registry, "_plugins_loaded", False)
    with pytest.warns(ArchitectureWarning) as told:
        model = get_peft_model(MyModel(), SFAConfig(budget=200))
    with warnings.catch_warnings():
        warnings.simplefilter("error", ArchitectureWarning)
        get_peft_model(MyModel(), SFAConfig(budget=200))
    assert asked == ["sfa_peft.architectures"]
    assert model.peft_config["default"].external_widths
    assert {"mine", "second", "third"} <= {a.name for a in registry.registered_architectures()}
    messages = [str(w.message) for w in told if w.category is ArchitectureWarning]
    assert len(messages) == 2
    assert "'broken-package'" in messages[0]
    assert "no module named 'gone'" in messages[0]
    assert "'twice-package'" in messages[1]
    assert "registered already" in messages[1]


# A user's own block, without registering


PARALLEL = {"ffn.down": "ffn"}


def by_hand(**options):
    given = {"budget": 200, "target_modules": ["mix", "ffn.up"], "external_modules": PARALLEL, "init_weights": False}
    return get_peft_model(MyModel(), SFAConfig(**given | options)).eval()


def test_external_modules_may_name_the_input():
    model = by_hand(external_scale=0.5)
    ffn = model.base_model.model.blocks[0].ffn
    adapter = ffn.down.sfa_parallel["default"]
    with torch.no_grad():
        plain = ffn.down.base_layer(nn.functional.gelu(ffn.up(TOKENS)))
        expected = plain + 0.5 * adapter.up(nn.functional.gelu(adapter.down(TOKENS)))
        assert torch.allclose(ffn(tokens=TOKENS), expected, atol=1e-6)  # by keyword, as the block calls it
    config = model.peft_config["default"]
    assert config.external_modules == {f"blocks.{i}.ffn.down": f"blocks.{i}.ffn" for i in range(2)}
    assert set(config.external_widths["module_parallel"]) == set(config.external_modules)


def test_it_equals_the_place_mlp_parallel():
    torch.manual_seed(1)
    first = by_hand()
    register_architecture(MINE)
    torch.manual_seed(1)
    second = by_hand(external_modules=None)
    assert torch.equal(output(first, TOKENS), output(second, TOKENS))


def test_none_is_the_output_itself():
    model = by_hand(external_modules={"ffn.down": "ffn", "mix": None})
    layers = dict(sfa_layers(model.base_model.model))
    assert not layers["blocks.0.mix"].sfa_parallel
    assert layers["blocks.0.mix"].sfa_external
    assert layers["blocks.0.ffn.down"].sfa_parallel
    assert by_hand(external_modules={}).peft_config["default"].external_widths == {}


@pytest.mark.parametrize("given", [PARALLEL, {"down": "up"}, {"down": "norm"}], ids=str)
def test_adapters_that_read_another_input_are_saved_loaded_mixed_and_merged(given, tmp_path):
    """The input may be that of a leaf with adapters, which such a layer does not call."""
    model = by_hand(external_modules=given, target_modules=["norm", "mix", "ffn.up"])
    trained = output(model, TOKENS)
    loss(model, TOKENS).backward()
    assert all(bool(adapter.up.weight.grad.any()) for adapter in external_adapters(model))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(MyModel(), tmp_path)
    assert torch.equal(output(loaded, TOKENS), trained)
    loaded.load_adapter(tmp_path, "second")
    with torch.no_grad():
        mixed = loaded(TOKENS, adapter_names=["default", "__base__", "second"])
        assert torch.allclose(mixed[[0, 2]], trained.view_as(TOKENS)[[0, 2]], atol=1e-6)
        assert torch.allclose(mixed[1], MyModel()(TOKENS)[1], atol=1e-6)
    loaded.delete_adapter("second")
    assert torch.equal(output(loaded, TOKENS), trained)
    with pytest.warns(ExternalsKeptWarning):
        merged = loaded.merge_and_unload()
    assert difference(output(merged, TOKENS), trained) < 1e-5
    assert torch.equal(output(model.unload(), TOKENS), output(MyModel(), TOKENS))


def test_searching_keeps_the_input():
    model = by_hand(init_weights=True)
    search_ticket(model, [TOKENS], steps=2, loss_fn=loss, progress=False)
    assert set(model.peft_config["default"].external_modules.values()) == {"blocks.0.ffn", "blocks.1.ffn"}


WRONG = {
    "kind": ({"ffn.down": 5}, r"SFAConfig\.external_modules=\{'ffn.down': 5\}.*name of a module, or to None"),
    "empty": ({"": "ffn"}, "dict from names of modules"),
    "output": ({"ffn.fc2": "ffn"}, "'ffn.fc2' matches no module of MyModel"),
    "one of two": (PARALLEL | {"fc2": "ffn"}, "'fc2' matches no module of MyModel"),
    "input": ({"ffn.down": "mlp"}, r"'mlp'\} is not valid for 'blocks.0.ffn.down': 'mlp' is not beside it or around"),
    "itself": ({"ffn.down": "down"}, "'down' is that module itself"),
    "no leaf": ({"ffn": "norm"}, "MyMLP with submodules; name the leaf"),
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_inputs_are_told(what):
    given, message = WRONG[what]
    with pytest.raises(ValueError, match=message):
        by_hand(external_modules=given)


@pytest.mark.parametrize("forged", ["gone", "blocks.0.ffn.down", "(a+)+$"])
def test_a_saved_input_is_checked_and_is_no_pattern(forged, tmp_path):
    by_hand().save_pretrained(tmp_path)
    given = '"blocks.0.ffn.down": "blocks.0.ffn"'
    text = (tmp_path / "adapter_config.json").read_text()
    assert given in text
    (tmp_path / "adapter_config.json").write_text(text.replace(given, f'"blocks.0.ffn.down": "{forged}"'))
    with pytest.raises(sfa_peft.CheckpointError, match="reads the input of"):
        PeftModel.from_pretrained(MyModel(), tmp_path)


def test_weighted_sums_of_adapters_that_read_another_input(tmp_path):
    model = by_hand()
    model.add_adapter(
        "second", SFAConfig(budget=150, target_modules=["mix"], external_modules=PARALLEL, init_weights=False)
    )
    model.add_weighted_adapter(["default", "second"], [1.0, 2.0], "both")
    assert set(model.peft_config["both"].external_modules.values()) == {"blocks.0.ffn", "blocks.1.ffn"}
    model.set_adapter("both")
    both = output(model, TOKENS)
    model.save_pretrained(tmp_path, selected_adapters=["both"])
    assert torch.equal(output(PeftModel.from_pretrained(MyModel(), tmp_path / "both"), TOKENS), both)
    model.add_adapter("other", SFAConfig(budget=150, target_modules=["mix"], external_modules={"down": "norm"}))
    with pytest.raises(ValueError, match=r"read the inputs of 'blocks.0.ffn' and 'blocks.0.norm'"):
        model.add_weighted_adapter(["default", "other"], [1.0, 1.0], "never")


# A model without known blocks


def test_the_error_says_what_to_write():
    with pytest.raises(ValueError, match="MyModel has no block of a known architecture") as told:
        get_peft_model(MyModel(), SFAConfig(budget=200))
    message = str(told.value)
    assert "MyBlock (2 times: norm, mix, ffn.up, ffn.down)" in message
    fields = re.search(r"SFAConfig\(\.\.\., (.*)\)$", message, re.MULTILINE).group(1)
    model = get_peft_model(MyModel(), eval(f"SFAConfig(budget=200, {fields})"))
    assert set(model.peft_config["default"].external_modules.values()) == {"blocks.0.ffn", "blocks.1.ffn"}
    call = re.search(r"sfa_peft\.register_architecture\(.*?^    \)$", message, re.MULTILINE | re.DOTALL).group(0)
    exec(call, {"sfa_peft": sfa_peft})
    model = get_peft_model(MyModel(), SFAConfig(budget=200))
    assert set(model.peft_config["default"].external_widths["mlp_parallel"]) == {
        "blocks.0.ffn.down",
        "blocks.1.ffn.down",
    }


def test_blocks_are_proposed_and_not_the_stages_around_them():
    model = hf.FocalNetModel(
        hf.FocalNetConfig(
            embed_dim=8, depths=[2, 2], hidden_sizes=[8, 16], image_size=32, focal_levels=[1, 1], focal_windows=[3, 3]
        )
    )
    with pytest.raises(ValueError, match="FocalNetLayer") as told:
        get_peft_model(model, SFAConfig(budget=0.1))
    assert "FocalNetStage" not in str(told.value)
    assert "external_modules={'mlp.fc2': 'mlp'}" in str(told.value)


def test_leaves_that_attention_reads_without_calling_are_not_proposed():
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16), 2)
    with pytest.raises(ValueError, match="TransformerEncoderLayer") as told:
        get_peft_model(model, SFAConfig(budget=0.1))
    assert "external_modules={'linear2': 'linear1'}" in str(told.value)
    assert "out_proj" not in str(told.value)


def test_a_model_without_repeated_blocks_gets_no_proposal():
    with pytest.raises(ValueError, match=r"`\[\]` for none\)\.$"):
        get_peft_model(nn.Sequential(nn.Linear(3, 3)), SFAConfig(budget=0.5))

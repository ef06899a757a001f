"""An adapter that stands alone: model, image processor and labels from its files and the base model that they name."""

import json
import subprocess
import sys
import textwrap
import warnings

import huggingface_hub
import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import (
    RTDetrImageProcessor,
    SegformerImageProcessor,
    SwinBackbone,
    UperNetConfig,
    UperNetForSemanticSegmentation,
)

import tiny
from sfa_peft import CheckpointError, SFAConfig, describe_adapter, load_dense
from sfa_peft.cli import main

LABELS = {0: "road", 1: "car", 2: "auto_map"}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """A backbone and a dense model with other classes, as their authors have saved them."""
    folder = tmp_path_factory.mktemp("bases")
    tiny.swin(seed=3).backbone.save_pretrained(folder / "backbone")
    tiny.upernet(tiny.swin_config(), seed=3, num_labels=5).save_pretrained(folder / "whole")
    return folder


@pytest.fixture(autouse=True)
def _empty_cache(hub, tmp_path, monkeypatch):
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        monkeypatch.setattr(huggingface_hub.constants, name, str(tmp_path / "cache"))


def dense(kind, source):
    """A dense model on a checkpoint: a fresh head on a backbone, or a whole model with a head for other classes."""
    labels = {"id2label": LABELS, "label2id": {name: i for i, name in LABELS.items()}}
    if kind == "whole":
        return UperNetForSemanticSegmentation.from_pretrained(source, **labels, ignore_mismatched_sizes=True)
    backbone = SwinBackbone.from_pretrained(source)
    own = {"hidden_size": 8, "pool_scales": [1, 2], "use_auxiliary_head": False}
    model = UperNetForSemanticSegmentation(UperNetConfig(backbone_config=backbone.config, **own, **labels))
    model.backbone.load_state_dict(backbone.state_dict())
    return model


def adapted(base, **options):
    model = get_peft_model(
        base, SFAConfig(**{"budget": 0.1, "external_conv": 0, "modules_to_save": ["decode_head"]} | options)
    )
    processor = SegformerImageProcessor(size={"height": tiny.SIZE, "width": tiny.SIZE})
    describe_adapter(model, dataset="me/scenes", metrics={"mean_iou": 0.5}, processor=processor)
    return tiny.train(model)


@pytest.fixture
def saved(bases, tmp_path):
    """The folder of an adapter on a plain backbone, and its model."""
    model = adapted(dense("backbone", bases / "backbone"))
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter", model


def test_from_the_hub_in_a_new_process_with_the_core_dependencies_only(hub, bases, tmp_path):
    """The base of one adapter is a plain backbone, that of the other a whole model; and then both bases change."""
    expected = {}
    for kind, cls in (("backbone", SwinBackbone), ("whole", UperNetForSemanticSegmentation)):
        cls.from_pretrained(bases / kind).push_to_hub(f"me/{kind}")
        model = adapted(dense(kind, f"me/{kind}"))
        model.push_to_hub(f"me/{kind}-sfa")
        expected[kind] = tiny.output(model)
        config = json.loads(hub.repos[f"me/{kind}-sfa"].branches["main"][-1]["files"]["adapter_config.json"])
        assert config["base_model_name_or_path"] == f"me/{kind}"
        assert config["revision"] == hub.repos[f"me/{kind}"].branches["main"][-1]["oid"]
        other = dense(kind, bases / kind)
        nn.init.ones_(other.backbone.swin.encoder.layers[0].blocks[0].mlp.fc1.weight)
        (other if kind == "whole" else other.backbone).push_to_hub(f"me/{kind}")
    torch.save(tiny.pixels(), tmp_path / "pixels.pt")
    code = f"""
        import sys, torch
        torch.set_num_threads(1)  # as here: with more, sums are rounded in another order
        for name in "datasets evaluate gradio kornia matplotlib onnx pycocotools scipy sklearn tensorboard".split():
            sys.modules[name] = None
        import sfa_peft
        from PIL import Image
        for kind in ("backbone", "whole"):
            model, processor, id2label = found = sfa_peft.load_dense(f"me/{{kind}}-sfa")
            assert id2label == {LABELS}, id2label
            assert found.task == "image-segmentation"
            inputs = processor(Image.new("RGB", (50, 40)), return_tensors="pt")
            assert inputs["pixel_values"].shape == (1, 3, {tiny.SIZE}, {tiny.SIZE})
            with torch.no_grad():
                outputs = model(**inputs)
                torch.save(model(torch.load("pixels.pt")).logits, f"{{kind}}.pt")
            assert processor.post_process_semantic_segmentation(outputs, [(40, 50)])[0].shape == (40, 50)
        from sfa_peft.cli import main
        assert main(["verify", "me/backbone-sfa"]) == main(["verify", "me/whole-sfa"]) == 0
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for kind, output in expected.items():
        assert torch.equal(torch.load(tmp_path / f"{kind}.pt"), output)


def test_the_card_of_an_adapter_that_stands_alone_has_code_that_predicts(saved):
    folder, _ = saved
    text = (folder / "README.md").read_text()
    assert "KeyError: 'SFA'" in text
    code = text.partition("```python\n")[2].partition("```")[0]
    assert code.startswith("# pip install sfa-peft\nimport sfa_peft")
    names = {}
    exec(code, names)
    assert names["prediction"].shape == (480, 640)


def test_merge_needs_no_flags_and_keeps_the_processor(saved, tmp_path):
    folder, model = saved
    assert main(["merge", str(folder), "--out", str(tmp_path / "merged")]) == 0
    merged = UperNetForSemanticSegmentation.from_pretrained(tmp_path / "merged")
    assert torch.allclose(tiny.output(merged), tiny.output(model), atol=1e-5)
    assert merged.config.id2label == LABELS
    assert (tmp_path / "merged" / "preprocessor_config.json").is_file()


def test_a_loaded_one_is_saved_whole_again(saved, tmp_path):
    folder, model = saved
    load_dense(str(folder), is_trainable=True).model.save_pretrained(tmp_path / "again")
    again = load_dense(str(tmp_path / "again"))
    assert torch.equal(tiny.output(again.model), tiny.output(model))
    assert type(again.processor) is type(load_dense(str(folder)).processor)


def test_a_detector_on_a_backbone_of_another_class(tmp_path):
    """RF-DETR makes its own DINOv2, and may get a plain one."""
    from transformers import Dinov2Backbone, RfDetrConfig, RfDetrForObjectDetection

    backbone = Dinov2Backbone(tiny.dinov2_config(num_windows=1, window_block_indexes=[]))
    backbone.save_pretrained(tmp_path / "base")
    backbone = Dinov2Backbone.from_pretrained(tmp_path / "base")
    options = {"d_model": 16, "decoder_layers": 1, "decoder_ffn_dim": 16, "num_queries": 4, "group_detr": 1}
    heads = {"decoder_self_attention_heads": 2, "decoder_cross_attention_heads": 2}
    base = RfDetrForObjectDetection(RfDetrConfig(backbone_config=backbone.config, **options, **heads))
    base.model.backbone.backbone = backbone
    own = ["class_embed", "bbox_embed", *(f"model.{name}" for name in ("backbone.projector", "decoder", "query_feat"))]
    own += [f"model.enc_{name}.0" for name in ("output", "output_norm", "out_bbox_embed", "out_class_embed")]
    own += ["model.reference_point_embed"]
    model = get_peft_model(base.eval(), SFAConfig(budget=0.1, init_weights=False, modules_to_save=own))
    describe_adapter(model, processor=RTDetrImageProcessor())
    model.save_pretrained(tmp_path / "adapter")
    found = load_dense(str(tmp_path / "adapter"))
    assert isinstance(found.model.get_base_model().model.backbone.backbone, Dinov2Backbone)
    x = tiny.pixels()
    with torch.no_grad():
        assert torch.equal(found.model(x).logits, model.eval()(x).logits)
    assert "post_process_object_detection" in (tmp_path / "adapter" / "README.md").read_text()


def test_a_model_that_its_class_does_not_make_is_not_said_to_stand_alone(bases, tmp_path):
    base = dense("backbone", bases / "backbone")
    model = adapted(base)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "base_config.json").is_file()
    base.backbone.swin.encoder.layers[0].blocks[0].mlp.activation_fn = nn.ReLU()
    model.save_pretrained(tmp_path)
    assert not (tmp_path / "base_config.json").exists()
    text = (tmp_path / "README.md").read_text()
    assert (
        "load_dense` cannot make this model: its backbone.swin.encoder.layers.0.blocks.0.mlp.activation_fn is ReLU"
        in text
    )
    with pytest.raises(ValueError, match="has no base_config"):
        load_dense(str(tmp_path))


def test_another_base_is_an_error(saved, bases, tmp_path):
    folder, _ = saved
    other = tiny.swin(seed=7).backbone
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(CheckpointError, match="trained on a base model that differs"):
        load_dense(str(folder), base=str(tmp_path / "other"))
    tiny.vit().save_pretrained(tmp_path / "vit")
    with pytest.raises(ValueError, match="is a vit, and the adapter is for a upernet, and the backbone in it a swin"):
        load_dense(str(folder), base=str(tmp_path / "vit"))
    with pytest.raises(ValueError, match="base= 'me/nothing' cannot be loaded"):
        load_dense(str(folder), base="me/nothing")
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": None}))
    with pytest.raises(ValueError, match="does not name its base model"):
        load_dense(str(folder))


def test_what_is_in_no_file_is_told(bases, tmp_path):
    adapted(dense("backbone", bases / "backbone"), modules_to_save=["classifier"]).save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=r"'decode_head.*other parameters are neither.*`modules_to_save`"):
        load_dense(str(tmp_path))


def test_a_buffer_of_a_loss_is_not_warned_of(tmp_path):
    base = tiny.mask2former_on_swin()
    base.model.pixel_level_module.encoder.save_pretrained(tmp_path / "base")
    base.model.pixel_level_module.encoder.name_or_path = str(tmp_path / "base")
    heads = ["model.pixel_level_module.decoder", "model.transformer_module", "class_predictor"]
    get_peft_model(base, SFAConfig(budget=0.1, modules_to_save=heads)).save_pretrained(tmp_path / "adapter")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        load_dense(str(tmp_path / "adapter"))


def test_what_is_in_the_files_is_not_warned_of(saved):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", category=FutureWarning)
        load_dense(str(saved[0]))


@pytest.mark.parametrize(
    "change",
    [
        "{",
        "[1]",
        {"model_type": 5},
        {"model_type": "timm_backbone"},
        {"architectures": ["os"]},
        {"architectures": 5},
        {"architectures": ["SwinBackbone"]},
        {"backbone_config": {"model_type": "timm_backbone", "backbone": "resnet18"}},
        {"backbone_config": {"model_type": "nothing"}},
        {"auto_map": {"AutoConfig": "code.Config"}, "model_type": "unknown"},
        {"hidden_size": "a"},
        {"hidden_size": 12},
    ],
)
def test_a_strange_base_config_is_refused(saved, change):
    folder, _ = saved
    file = folder / "base_config.json"
    file.write_text(change if isinstance(change, str) else json.dumps(json.loads(file.read_text()) | change))
    (folder / "code.py").write_text("raise SystemExit('ran')")
    with pytest.raises((CheckpointError, ValueError)):
        load_dense(str(folder))


def test_a_config_chooses_neither_attention_nor_kernels(saved):
    folder, model = saved
    file = folder / "base_config.json"
    fields = json.loads(file.read_text())
    fields["backbone_config"]["_attn_implementation"] = "me/kernels"
    fields |= {"attn_implementation": "me/kernels", "use_kernels": True}
    file.write_text(json.dumps(fields))
    assert torch.equal(tiny.output(load_dense(str(folder)).model), tiny.output(model))


def test_a_processor_is_one_of_transformers(saved):
    folder, model = saved
    with pytest.raises(TypeError, match="processor='a' must be an image processor"):
        describe_adapter(model, processor="a")
    (folder / "preprocessor_config.json").write_text('{"image_processor_type": "os"}')
    with pytest.raises(ValueError, match=r"preprocessor_config.json of .* cannot be loaded"):
        load_dense(str(folder))

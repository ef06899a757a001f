"""Tiny real models, built from configs, offline, in milliseconds."""

import torch
from transformers import (
    Dinov2Config,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    DPTConfig,
    DPTForDepthEstimation,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    SwinConfig,
    Swinv2Config,
    Swinv2Model,
    UperNetConfig,
    UperNetForSemanticSegmentation,
    ViTConfig,
    ViTModel,
)

SIZE = 32


def swin_config(**changes):
    options = {
        "image_size": SIZE,
        "patch_size": 2,
        "embed_dim": 8,
        "depths": [2, 2],
        "num_heads": [2, 2],
        "window_size": 4,
        "drop_path_rate": 0.0,
        "out_features": ["stage1", "stage2"],
    }
    return SwinConfig(**options | changes)


def dinov2_config(**changes):
    options = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": SIZE,
        "patch_size": 8,
        "out_features": ["stage1", "stage2"],
        "reshape_hidden_states": True,
    }
    return Dinov2Config(**options | changes)


def upernet(backbone_config, seed=0, num_labels=3):
    torch.manual_seed(seed)
    return UperNetForSemanticSegmentation(
        UperNetConfig(
            backbone_config=backbone_config,
            hidden_size=8,
            pool_scales=[1, 2],
            use_auxiliary_head=False,
            num_labels=num_labels,
        )
    ).eval()


def swin(seed=0, **changes):
    return upernet(swin_config(**changes), seed)


def dinov2(seed=0, **changes):
    return upernet(dinov2_config(**changes), seed)


def _vit_options():
    return {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": SIZE,
        "patch_size": 8,
        "intermediate_size": 32,
    }


def _alone(model_class, config):
    torch.manual_seed(0)
    return model_class(config).eval()


def swinv2():
    return _alone(
        Swinv2Model,
        Swinv2Config(image_size=SIZE, patch_size=2, embed_dim=8, depths=[2, 2], num_heads=[2, 2], window_size=4),
    )


def dinov2_with_registers():
    options = _vit_options()
    options.pop("intermediate_size")
    return _alone(Dinov2WithRegistersModel, Dinov2WithRegistersConfig(**options))


def dinov2_swiglu():
    return dinov2(use_swiglu_ffn=True)


def dinov3():
    return _alone(DINOv3ViTModel, DINOv3ViTConfig(**_vit_options()))


def dinov3_gated():
    return _alone(DINOv3ViTModel, DINOv3ViTConfig(**_vit_options(), use_gated_mlp=True))


def vit(**changes):
    return _alone(ViTModel, ViTConfig(**_vit_options() | changes))


def dpt_on_dinov2():
    torch.manual_seed(0)
    backbone = dinov2_config(
        num_hidden_layers=4,
        out_features=["stage1", "stage2", "stage3", "stage4"],
        reshape_hidden_states=False,
        apply_layernorm=False,
    )
    return DPTForDepthEstimation(
        DPTConfig(
            backbone_config=backbone,
            hidden_size=16,
            neck_hidden_sizes=[8, 8, 8, 8],
            fusion_hidden_size=8,
            head_in_index=-1,
            reassemble_factors=[4, 2, 1, 0.5],
        )
    ).eval()


def mask2former_on_swin():
    torch.manual_seed(0)
    backbone = swin_config(
        image_size=64,
        depths=[1, 1, 1, 1],
        num_heads=[1, 1, 1, 1],
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    return Mask2FormerForUniversalSegmentation(
        Mask2FormerConfig(
            backbone_config=backbone,
            feature_size=32,
            mask_feature_size=32,
            hidden_dim=32,
            encoder_feedforward_dim=16,
            encoder_layers=1,
            decoder_layers=2,
            num_attention_heads=2,
            dim_feedforward=16,
            num_queries=4,
            num_labels=3,
        )
    ).eval()


def _detector_backbone():
    return swin_config(
        image_size=64,
        depths=[1, 1, 1, 1],
        num_heads=[1, 1, 1, 1],
        out_features=["stage2", "stage3", "stage4"],
    )


def _detector_options():
    return {
        "backbone": None,
        "use_pretrained_backbone": False,
        "backbone_config": _detector_backbone(),
        "d_model": 32,
        "encoder_layers": 1,
        "decoder_layers": 2,
        "encoder_ffn_dim": 16,
        "decoder_ffn_dim": 16,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "num_queries": 4,
        "num_feature_levels": 3,
    }


def deformable_detr():
    """Its boxes' heads are tied to the decoder's."""
    from transformers import DeformableDetrConfig, DeformableDetrForObjectDetection

    torch.manual_seed(0)
    config = DeformableDetrConfig(
        **_detector_options(), use_timm_backbone=False, with_box_refine=True, two_stage=True, num_labels=3
    )
    return DeformableDetrForObjectDetection(config).eval()


def grounding_dino():
    """Its boxes' heads are tied to the decoder's."""
    from transformers import BertConfig, GroundingDinoConfig, GroundingDinoForObjectDetection

    torch.manual_seed(0)
    text = BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=200)
    return GroundingDinoForObjectDetection(GroundingDinoConfig(**_detector_options(), text_config=text)).eval()


def rf_detr():
    from transformers import RfDetrConfig, RfDetrForObjectDetection
    from transformers.models.rf_detr.configuration_rf_detr import RfDetrDinov2Config

    torch.manual_seed(0)
    backbone = RfDetrDinov2Config(
        hidden_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        image_size=64,
        patch_size=8,
        num_windows=2,
        out_features=["stage2", "stage4"],
        window_block_indexes=[0, 2],
    )
    return RfDetrForObjectDetection(
        RfDetrConfig(
            backbone_config=backbone,
            d_model=16,
            decoder_layers=1,
            decoder_ffn_dim=16,
            decoder_self_attention_heads=2,
            decoder_cross_attention_heads=2,
            num_queries=4,
            group_detr=1,
        )
    ).eval()


def pixels(batch=2, size=SIZE, seed=0):
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(seed))


def batch(size=2, seed=0, num_labels=3):
    generator = torch.Generator().manual_seed(seed)
    return {
        "pixel_values": pixels(size, seed=seed),
        "labels": torch.randint(0, num_labels, (size, SIZE, SIZE), generator=generator),
    }


@torch.no_grad()
def output(model, x=None):
    """The first tensor that a model gives, in eval mode."""
    model.eval()
    result = model(pixels() if x is None else x)
    return next(v for v in result.values() if isinstance(v, torch.Tensor))


def replica(module):
    """A copy as nn.DataParallel makes one for each device: it has tensors where the module has parameters."""
    copied = module._replicate_for_data_parallel()
    copied._modules = {name: child and replica(child) for name, child in module._modules.items()}
    for name, p in module._parameters.items():
        copied._parameters.pop(name, None)
        object.__setattr__(copied, name, None if p is None else p.clone())
    return copied


def train(model, steps=3, lr=1e-2):
    """Train what is trainable for a few steps, so that every adapter does something."""
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    for step in range(steps):
        model(**batch(seed=step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same_state(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)

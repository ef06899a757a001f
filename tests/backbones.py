"""A tiny model of every architecture that SFA knows, built offline in milliseconds."""

import torch
import transformers as hf
from torch import nn
from transformers.models.maskformer.configuration_maskformer_swin import MaskFormerSwinConfig
from transformers.models.maskformer.modeling_maskformer_swin import MaskFormerSwinModel

import other_libraries as other
import tiny

_VIT = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": tiny.SIZE,
    "patch_size": 8,
}
SIZED = _VIT | {"intermediate_size": 32}
_SWIN = {"image_size": tiny.SIZE, "patch_size": 2, "embed_dim": 8, "depths": [2, 2], "num_heads": [2, 2]}


def _simple(name, config="", **options):
    """A model of transformers, from the names of its class and of its config's class."""
    config = config or name.removesuffix("Model") + "Config"

    def make():
        torch.manual_seed(0)
        return getattr(hf, name)(getattr(hf, config)(**options)).eval()

    return make


def maskformer_swin():
    torch.manual_seed(0)
    return MaskFormerSwinModel(MaskFormerSwinConfig(**_SWIN, window_size=4)).eval()


def maskformer():
    torch.manual_seed(0)
    backbone = MaskFormerSwinConfig(
        **_SWIN | {"image_size": 64, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 1, 1]},
        window_size=4,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    decoder = hf.DetrConfig(
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        num_queries=4,
    )
    config = hf.MaskFormerConfig(
        backbone_config=backbone, decoder_config=decoder, fpn_feature_size=32, mask_feature_size=32, num_labels=3
    )
    return hf.MaskFormerForInstanceSegmentation(config).eval()


def zoedepth_beit():
    torch.manual_seed(0)
    backbone = hf.BeitConfig(
        **SIZED | {"num_hidden_layers": 4},
        out_indices=[1, 2, 3, 4],
        reshape_hidden_states=False,
        use_relative_position_bias=True,
    )
    config = hf.ZoeDepthConfig(
        backbone_config=backbone,
        backbone_hidden_size=16,
        neck_hidden_sizes=[8, 8, 8, 8],
        fusion_hidden_size=8,
        bottleneck_features=8,
        num_attractors=[2, 2, 2, 2],
        bin_embedding_dim=8,
        bin_configurations=[{"n_bins": 4, "min_depth": 0.1, "max_depth": 10.0, "name": "nyu"}],
    )
    return hf.ZoeDepthForDepthEstimation(config).eval()


def siglip2():
    config = hf.Siglip2VisionConfig(
        **{k: v for k, v in SIZED.items() if k != "image_size"},
        num_patches=16,
        vision_use_head=False,
        hidden_act="gelu",
    )
    torch.manual_seed(0)
    return Patches(hf.Siglip2VisionModel(config)).eval()


class Patches(nn.Module):
    """Cuts images into the patches that SigLIP 2 takes."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        patches = nn.functional.unfold(x, 8, stride=8).transpose(1, 2)
        batch, count, _ = patches.shape
        mask, shape = torch.ones(batch, count), torch.tensor([[4, 4]] * batch)
        return self.model(patches, pixel_attention_mask=mask, spatial_shapes=shape)


class WithExperts(nn.Module):
    """Says which expert ViTPose's blocks are to use."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x, dataset_index=torch.zeros(len(x), dtype=torch.long))


def vitpose_with_experts():
    torch.manual_seed(0)
    config = hf.VitPoseBackboneConfig(**_VITPOSE, num_experts=2, part_features=4)
    return WithExperts(hf.VitPoseBackbone(config)).eval()


_VITPOSE = _VIT | {"image_size": [32, 32], "patch_size": [8, 8]}
SAM = _VIT | {
    "output_channels": 8,
    "window_size": 2,
    "global_attn_indexes": [1],
    "mlp_dim": 32,
    "initializer_range": 0.02,
}
_EOMT = {"num_queries": 4, "num_blocks": 1, "num_upscale_blocks": 1, "num_labels": 3}

# For each architecture: a model. `CONTAINED` are those that other models have between their blocks.
BACKBONES = {
    "Swin": tiny.swin,
    "Swinv2": tiny.swinv2,
    "MaskFormer's Swin": maskformer_swin,
    "Donut's Swin": _simple("DonutSwinModel", **_SWIN, window_size=4),
    "ViT": _simple("ViTModel", **SIZED),
    "DeiT": _simple("DeiTModel", **SIZED),
    "MSN": _simple("ViTMSNModel", **SIZED),
    "I-JEPA": _simple("IJepaModel", **SIZED),
    "MAE": _simple("ViTMAEModel", **SIZED, mask_ratio=0.0),
    "BEiT": _simple("BeitModel", **SIZED, use_relative_position_bias=True),
    "YOLOS": _simple("YolosModel", **SIZED | {"image_size": [32, 32]}, num_detection_tokens=4),
    "DPT's ViT": _simple("DPTModel", **SIZED | {"num_hidden_layers": 4}, backbone_out_indices=[0, 1, 2, 3]),
    "Data2Vec": _simple("Data2VecVisionModel", **SIZED),
    "ViTPose": _simple("VitPoseBackbone", "VitPoseBackboneConfig", **_VITPOSE),
    "ViTPose, with experts": vitpose_with_experts,
    "VitDet": _simple(
        "VitDetModel",
        **_VIT,
        pretrain_image_size=32,
        window_size=2,
        window_block_indices=[0],
        use_relative_position_embeddings=True,
    ),
    "DINOv2": tiny.dinov2,
    "DINOv2 with registers": tiny.dinov2_with_registers,
    "RF-DETR's DINOv2": tiny.rf_detr,
    "DINOv3 ViT": tiny.dinov3,
    "EoMT": _simple("EomtForUniversalSegmentation", "EomtConfig", **_VIT, **_EOMT),
    "EoMT on DINOv3": _simple("EomtDinov3ForUniversalSegmentation", "EomtDinov3Config", **SIZED, **_EOMT),
    "rfdetr's windowed DINOv2": other.windowed_dinov2,
    "SegFormer": _simple(
        "SegformerForSemanticSegmentation",
        "SegformerConfig",
        hidden_sizes=[8, 16, 16, 16],
        depths=[1, 1, 1, 1],
        num_attention_heads=[1, 2, 2, 2],
        decoder_hidden_size=16,
    ),
    "Hiera": _simple(
        "HieraModel",
        embed_dim=8,
        image_size=[32, 32],
        depths=[1, 1],
        num_heads=[1, 2],
        masked_unit_size=[4, 4],
        query_stride=[2, 2],
        patch_size=[3, 3],
        patch_stride=[2, 2],
        patch_padding=[1, 1],
        num_query_pool=1,
        masked_unit_attention=[True, False],
    ),
    "SAM": _simple("SamVisionModel", **SAM),
    "SAM-HQ": _simple("SamHQVisionModel", **SAM),
    "SAM 2": _simple(
        "Sam2HieraDetModel",
        hidden_size=8,
        num_attention_heads=1,
        image_size=[64, 64],
        blocks_per_stage=[1, 1, 2, 1],
        embed_dim_per_stage=[8, 16, 32, 64],
        num_attention_heads_per_stage=[1, 1, 1, 1],
        window_size_per_stage=[4, 4, 4, 2],
        global_attention_blocks=[3],
        window_positional_embedding_background_size=[4, 4],
    ),
    "SAM 3": _simple("Sam3ViTModel", **SIZED, pretrain_image_size=32, window_size=2, global_attn_indexes=[1]),
    "CLIP": _simple("CLIPVisionModel", **SIZED, hidden_act="gelu"),
    "SigLIP": _simple("SiglipVisionModel", **SIZED, hidden_act="gelu", vision_use_head=False),
    "SigLIP 2": siglip2,
    "ViT of timm and Meta": other.vit,
    "ViT of timm and Meta, with LayerScale": other.dinov2,
    "Meta's DINOv3": other.dinov3_without_layer_scale,
    "Meta's DINOv3, with LayerScale": other.dinov3,
    "BEiT of timm": other.beit,
    "DINOv3 and EVA of timm": other.eva,
    "EVA of timm, with its biases apart": other.eva_with_biases,
    "Swin of timm": other.swin,
    "Swinv2 of Microsoft": other.microsoft_swinv2,
    "Swinv2 of timm": other.swinv2,
}
CONTAINED = {
    "Swin, patch merging": "Swin",
    "Swinv2, patch merging": "Swinv2",
    "MaskFormer's Swin, patch merging": "MaskFormer's Swin",
    "Donut's Swin, patch merging": "Donut's Swin",
    "Swin and Swinv2 of timm, patch merging": "Swin of timm",
}
# Those whose external adapters merging folds into the weights. In the others they stay modules.
FOLDED = {
    *(
        "Swin",
        "MaskFormer's Swin",
        "Donut's Swin",
        "ViT",
        "DeiT",
        "MSN",
        "I-JEPA",
        "MAE",
        "BEiT",
        "YOLOS",
        "DPT's ViT",
    ),
    *("Data2Vec", "ViTPose", "VitDet", "DINOv2", "DINOv2 with registers", "RF-DETR's DINOv2", "DINOv3 ViT", "EoMT"),
    *("EoMT on DINOv3", "Hiera", "SAM", "SAM-HQ", "SAM 2", "SAM 3", "CLIP", "SigLIP", "SigLIP 2"),
}
SIZES = {"RF-DETR's DINOv2": 64, "SAM 2": 64}


def output(model, x):
    """All that a model computes from images, as one vector: its floating-point tensors."""
    found = []

    def collect(value):
        if isinstance(value, torch.Tensor):
            found.extend([value.flatten()] if value.is_floating_point() else [])
        elif isinstance(value, dict):
            collect(list(value.values()))
        elif isinstance(value, list | tuple):
            for one in value:
                collect(one)

    torch.manual_seed(0)  # MAE shuffles its patches
    collect(model(x))
    return torch.cat(found)

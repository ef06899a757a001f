"""Builds the segmentation model: UperNet on a backbone, with its own head or a linear one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoBackbone, AutoConfig, PretrainedConfig, UperNetConfig, UperNetForSemanticSegmentation

IGNORE_INDEX = 255


class LinearHead(nn.Module):
    """A linear classifier on all feature levels: one 1x1 convolution per level, upsampled and summed.

    It is the same as one linear layer on the levels' features upsampled and concatenated, but cheaper. It leaves the
    work to the backbone, so that ways of adapting the backbone can be compared.
    """

    def __init__(self, channels: Sequence[int], num_labels: int) -> None:
        super().__init__()
        self.classifiers = nn.ModuleList(nn.Conv2d(c, num_labels, kernel_size=1) for c in channels)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Map features of shape (batch, channels, height, width), finest first, to logits at the finest size."""
        logits = [classify(f) for classify, f in zip(self.classifiers, features, strict=True)]
        size = logits[0].shape[2:]
        return torch.stack(
            [F.interpolate(level, size=size, mode="bilinear", align_corners=False) for level in logits]
        ).sum(0)


def build_model(
    name_or_path: str, id2label: Mapping[int, str], head: str = "upernet", head_channels: int = 64
) -> UperNetForSemanticSegmentation:
    """Load a dense checkpoint, or put a fresh UperNet on a plain backbone checkpoint.

    Args:
        name_or_path: A Hub id or a folder.
        id2label: The classes.
        head: ``upernet`` or ``linear``.
        head_channels: Hidden size of a fresh UperNet head.

    Raises:
        ValueError: If the checkpoint's architecture has no backbone in transformers.
    """
    config = AutoConfig.from_pretrained(name_or_path)
    labels = {"id2label": dict(id2label), "label2id": {v: k for k, v in id2label.items()}}
    if isinstance(config, UperNetConfig):
        model = UperNetForSemanticSegmentation.from_pretrained(
            name_or_path, **labels, loss_ignore_index=IGNORE_INDEX, ignore_mismatched_sizes=True
        )
    else:
        config.out_features = feature_levels(config)
        if hasattr(config, "reshape_hidden_states"):  # DINOv2: maps, not token sequences
            config.reshape_hidden_states = True
        # AutoBackbone.from_pretrained asks the Hub even for a folder; the class that it would choose does not.
        backbone = type(AutoBackbone.from_config(config)).from_pretrained(name_or_path, config=config)
        model = UperNetForSemanticSegmentation(
            UperNetConfig(
                backbone_config=backbone.config,
                hidden_size=head_channels,
                use_auxiliary_head=False,
                loss_ignore_index=IGNORE_INDEX,
                **labels,
            )
        )
        model.backbone.load_state_dict(backbone.state_dict())
    if head == "linear":
        model.decode_head = LinearHead(model.backbone.channels, len(id2label))
        model.auxiliary_head = None
    return model


def feature_levels(config: PretrainedConfig) -> list[str]:
    """The stages to read: all of a pyramid, four evenly spaced ones of a plain transformer."""
    stages = getattr(config, "stage_names", None)
    if not stages:
        raise ValueError(
            f"{config.model_type} has no backbone in transformers; use Swin, DINOv2 or an UperNet checkpoint"
        )
    stages = stages[1:]  # the first is the stem
    if hasattr(config, "depths"):
        return stages
    quarter = len(stages) / 4
    return [stages[round(quarter * i) - 1] for i in range(1, 5)] if len(stages) >= 4 else stages


def use_fast_attention(model: nn.Module, device: torch.device) -> None:
    """On a CPU, let Swin compute attention plainly.

    scaled_dot_product_attention takes its flash kernel when the position bias is frozen, whose backward is slow for
    windows of 16 to 49 tokens; every method with a frozen backbone pays for that otherwise.
    """
    if device.type == "cpu" and model.config.backbone_config.model_type.startswith("swin"):
        model.set_attn_implementation("eager")


def patch_multiple(model: nn.Module) -> int:
    """The number that image height and width must be multiples of."""
    patch = model.config.backbone_config.patch_size
    return patch if isinstance(patch, int) else max(patch)


def backbone_parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.backbone.parameters())

"""Backbones in dense models: loading them, counting them, telling them from the heads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoBackbone, AutoConfig, PretrainedConfig
from transformers.image_processing_base import ImageProcessingMixin

from .errors import FlagError


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


def require_plain(config: PretrainedConfig, head: str) -> None:
    """Check that a backbone has one width and one resolution in all its layers.

    Raises:
        FlagError: If not, naming the head that needs it.
    """
    is_plain = all(isinstance(getattr(config, name, None), int) for name in ("hidden_size", "num_attention_heads"))
    if not is_plain or hasattr(config, "depths"):
        raise FlagError(
            f"--model: {head}'s head is for plain vision transformers such as DINOv2, and {config.model_type} is none"
        )


def load_config(name_or_path: str) -> PretrainedConfig:
    """The config of a checkpoint.

    Raises:
        FlagError: If there is none of this name.
    """
    try:
        return AutoConfig.from_pretrained(name_or_path)
    except (OSError, ValueError) as error:
        is_folder = Path(name_or_path).is_dir()
        what = ": the folder has no model" if is_folder else " is neither a folder nor a model on the Hub"
        raise FlagError(f"--model {name_or_path!r}{what}: {str(error).splitlines()[0]}") from error


def load_backbone(name_or_path: str, config: PretrainedConfig, **options: Any) -> nn.Module:
    """The pretrained backbone of a checkpoint, giving the levels that a dense head needs.

    Args:
        name_or_path: A Hub id or a folder.
        config: Of the checkpoint.
        options: Fields of the config to be set, if it has them.

    Raises:
        FlagError: If the checkpoint's architecture has no backbone in transformers.
    """
    config.out_features = feature_levels(config)
    for field, value in options.items():
        if hasattr(config, field):
            setattr(config, field, value)
    # AutoBackbone.from_pretrained asks the Hub even for a folder; the class that it would choose does not.
    return type(AutoBackbone.from_config(config)).from_pretrained(name_or_path, config=config)


def feature_levels(config: PretrainedConfig) -> list[str]:
    """The stages to read: all of a pyramid, four evenly spaced ones of a plain transformer."""
    stages = getattr(config, "stage_names", None)
    if not stages:
        raise FlagError(
            f"--model: {config.model_type} has no backbone in transformers; take a Swin, DINOv2 or dense checkpoint"
        )
    stages = stages[1:]  # the first is the stem
    if hasattr(config, "depths"):
        return stages
    quarter = len(stages) / 4
    return [stages[round(quarter * i) - 1] for i in range(1, 5)] if len(stages) >= 4 else stages


def use_fast_attention(model: nn.Module, backbone: nn.Module, device: torch.device) -> None:
    """On a CPU, let Swin compute attention plainly.

    scaled_dot_product_attention takes its flash kernel when the position bias is frozen, whose backward is slow for
    windows of 16 to 49 tokens; every method with a frozen backbone pays for that otherwise.
    """
    if device.type == "cpu" and backbone.config.model_type.startswith("swin"):
        model.set_attn_implementation("eager")


def default_size(name_or_path: str, config: PretrainedConfig) -> tuple[tuple[int, int], str]:
    """The height and width that a checkpoint's image processor makes of an image, and where that is said.

    Raises:
        FlagError: If neither the processor nor the config says it.
    """
    inner = getattr(config, "backbone_config", None) or config
    try:
        said, _ = ImageProcessingMixin.get_image_processor_dict(name_or_path)
        size = said.get("crop_size") if said.get("do_center_crop") else said.get("size")
        source = "its image processor"
    except OSError:
        size, source = getattr(inner, "image_size", None), "its config"
    if isinstance(size, Mapping):
        edge = size.get("shortest_edge")
        size = (size["height"], size["width"]) if "height" in size else edge
    if size is None:
        raise FlagError(f"--model {name_or_path}: nothing in it says how large images are; give --image_size")
    height, width = (size, size) if isinstance(size, int) else size
    patch = getattr(inner, "patch_size", 1)
    multiple = (patch if isinstance(patch, int) else max(patch)) * getattr(inner, "num_windows", 1)
    rounded = tuple(max(1, round(side / multiple)) * multiple for side in (height, width))
    return (rounded[0], rounded[1]), source


def patch_multiple(backbone: nn.Module) -> int:
    """The number that image height and width must be multiples of."""
    patch = backbone.config.patch_size
    return (patch if isinstance(patch, int) else max(patch)) * getattr(backbone.config, "num_windows", 1)


def heads_of(model: nn.Module, backbone_path: str) -> list[str]:
    """Names of the modules that hold every parameter outside the backbone, as few as PEFT can save as heads."""
    heads = []
    for name, child in model.named_children():
        if next(child.parameters(), None) is None or name == backbone_path:
            continue
        inner = backbone_path.removeprefix(f"{name}.")
        if inner != backbone_path or isinstance(child, nn.ModuleList):  # PEFT saves no lists as a head
            heads += [f"{name}.{own}" for own in heads_of(child, inner)]
        else:
            heads.append(name)
    return heads


def count_parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())

"""Fine-tune a DINOv2 model for depth estimation with SFA, or with a peer at the same budget.

    python examples/depth_estimation.py                                        # embedded data and backbone
    python examples/depth_estimation.py --model facebook/dpt-dinov2-small-nyu --dataset me/my-depth \
        --max_depth 10 --image_size 476 630 --budget 0.02 --output_dir out/mine

The model is a DPT checkpoint on DINOv2, or a DINOv2 backbone that gets a fresh DPT head. The dataset has the columns
`image` and `depth_map`, an image of one channel or numbers, 0 where unknown. Run it under `accelerate launch` for
several processes or mixed precision.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DPTConfig, DPTForDepthEstimation, DPTImageProcessorPil

from dense.augmentation import normalised
from dense.limits import above_0, whole
from dense.methods import Rates
from dense.metrics import DepthErrors
from dense.models import require_plain
from dense.pictures import RELATIVE_ERRORS, depth_colours, paint_depth, paint_relative_errors
from dense.run import main
from dense.samples import Array, BadSampleError, Census, Note, Sample, read_depth, read_image
from dense.task import Task

DepthMap = TypeVar("DepthMap", Array, Tensor)

LEAST = 1e-3  # metres; less has no logarithm that helps
VARIANCE_FOCUS = 0.85


def softplus_in_training(relu: nn.Module, args: tuple[Tensor], output: Tensor, sharpness: float) -> Tensor | None:
    """A forward hook by which a ReLU is a softplus in training, so that a depth of 0 has a gradient too.

    Args:
        sharpness: In 1/metres. The softplus is at most ``0.7 / sharpness`` above the ReLU, at 0.
    """
    return F.softplus(args[0], beta=sharpness) if relu.training else None


class DepthEstimation(Task):
    """The depth of each pixel in metres, by DPT (Ranftl et al., 2021); judged by AbsRel."""

    name = "depth estimation"
    columns = {"image": "image", "depth": "depth_map"}
    headline = "abs_rel"
    score_words = "mean error relative to the depth (0 is perfect)"
    legend_is_scale = True
    lower_is_better = True
    cuts_images = False  # how far away a thing is, is seen from what is around it
    backbone_path = "backbone"
    answers_for = ("ForDepthEstimation",)
    dense_config = DPTConfig
    embedded_backbone = "dinov2"
    defaults = {"max_grad_norm": 1.0}
    # Measured on the embedded scenes.
    rates = {
        "sfa": Rates(backbone=1e-2, internal=4e-3, head=2e-3),
        "lora": Rates(backbone=2e-3, head=2e-3),
        "shira": Rates(backbone=4e-3, head=2e-3),
        "adaptformer": Rates(backbone=3e-3, head=2e-3),
        "full": Rates(backbone=1e-4, head=2e-3),
        "head": Rates(backbone=0.0, head=2e-3),
    }

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--max_depth", type=above_0, default=80.0, help="Metres; truth beyond does not count.")
        parser.add_argument(
            "--depth_scale", type=above_0, default=1.0, help="What a metre is in the map: 1000 for mm."
        )
        parser.add_argument("--head_channels", type=whole(1), default=64, help="Hidden size of a fresh head.")

    def backbone_options(self) -> dict[str, Any]:
        return {"reshape_hidden_states": False, "apply_layernorm": False}

    def processor(self) -> DPTImageProcessorPil:
        return DPTImageProcessorPil(**normalised(self.size))

    def load_whole(self, name_or_path: str) -> nn.Module:
        return DPTForDepthEstimation.from_pretrained(name_or_path, max_depth=self.args.max_depth)

    def fresh(self, backbone: nn.Module) -> nn.Module:
        channels = self.args.head_channels
        require_plain(backbone.config, "DPT")
        # DPT's own factors are for patches of 16 pixels; so its output has about the size of the image.
        coarse = 2.0 ** round(math.log2(backbone.config.patch_size / 16))
        model = DPTForDepthEstimation(
            DPTConfig(
                backbone_config=backbone.config,
                hidden_size=backbone.config.hidden_size,
                neck_hidden_sizes=[channels] * len(backbone.config.out_features),
                fusion_hidden_size=channels,
                reassemble_factors=[f if f < 1 else int(f) for f in (4 * coarse, 2 * coarse, coarse, coarse / 2)],
                head_in_index=-1,
                max_depth=self.args.max_depth,  # as Depth Anything's config has it, for what reads the model alone
            )
        )
        model.backbone.load_state_dict(backbone.state_dict())
        # The head ends in a ReLU: where it gives 0, nothing trains it any more. So it begins well above.
        with torch.no_grad():
            model.head.head[-2].bias.fill_(self.args.max_depth / 10)
        # A hook and no module of its own, so that transformers can rebuild the model from its config.
        model.head.head[-1].register_forward_hook(partial(softplus_in_training, sharpness=200 / self.args.max_depth))
        return model

    def read(self, row: Mapping[str, Any], note: Note) -> Sample:
        sample = Sample(read_image(row[self.column["image"]]))
        depth = read_depth(row[self.column["depth"]], sample.size, self.args.depth_scale, note)
        if not self._counts(depth).any():
            least = depth[depth > 0].min()
            raise BadSampleError(
                f"no depth from {LEAST} to {self.args.max_depth:g} m, which are --max_depth; is --depth_scale right?",
                f"the least is {least:g} m",
            )
        sample.depth = depth
        return sample

    def _counts(self, depth: DepthMap) -> DepthMap:
        return (depth > LEAST) & (depth <= self.args.max_depth)

    def counting(self, sample: Sample) -> float:
        return float(self._counts(sample.depth).sum() / (sample.depth > 0).sum())

    def doubts(self, census: Census) -> list[str]:
        found, left_out = super().doubts(census), 1 - census.counting / max(census.usable, 1)
        if census.usable and left_out > 0.5:
            found.append(
                f"{left_out:.0%} of the known depth is outside {LEAST} to {self.args.max_depth:g} m, which are "
                f"--max_depth: is --depth_scale right?"
            )
        return found

    def batch(self, tensors: Sequence[dict[str, Tensor]]) -> dict[str, Any]:
        return {
            "pixel_values": torch.stack([t["image"] for t in tensors]),
            "depth": torch.stack([t["depth"] for t in tensors]),
        }

    def loss(self, model: nn.Module, batch: dict[str, Any]) -> Tensor:
        """The scale-invariant log loss (Eigen et al., 2014).

        ``sqrt(mean d² - 0.85 (mean d)²)`` with ``d = log prediction - log truth`` where the truth is known.
        """
        predicted = model(pixel_values=batch["pixel_values"]).predicted_depth.float()
        truth = batch["depth"]
        predicted = F.interpolate(predicted[:, None], size=truth.shape[-2:], mode="bilinear", align_corners=False)[
            :, 0
        ]
        known = self._counts(truth)
        if not known.any():
            return 0 * predicted.sum()
        d = (predicted[known] + LEAST).log() - truth[known].log()
        return ((d**2).mean() - VARIANCE_FOCUS * d.mean() ** 2).clamp(min=1e-8).sqrt()

    def predict(self, model: nn.Module, images: Tensor, sizes: Sequence[tuple[int, int]]) -> list[Array]:
        predicted = model(pixel_values=images).predicted_depth.float()
        return [
            F.interpolate(one[None, None], size=size, mode="bilinear", align_corners=False)[0, 0].cpu().numpy()
            for one, size in zip(predicted, sizes, strict=True)
        ]

    def truth(self, sample: Sample) -> Array:
        return sample.depth

    def metric(self) -> DepthErrors:
        return DepthErrors(LEAST, self.args.max_depth)

    def paint(self, image: Array, annotation: Array) -> Array:
        return paint_depth(annotation, self.args.max_depth)

    def paint_errors(self, image: Array, truth: Array, found: Array) -> Array:
        return paint_relative_errors(truth, found, self._counts(truth))

    def error_legend(self) -> dict[str, tuple[float, float, float]]:
        return RELATIVE_ERRORS

    def legend(self) -> dict[str, tuple[float, float, float]]:
        return depth_colours(self.args.max_depth)


if __name__ == "__main__":
    main(DepthEstimation)

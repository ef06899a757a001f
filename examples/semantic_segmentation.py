"""Fine-tune a Swin or DINOv2 model for semantic segmentation with SFA, or with a peer at the same budget.

    python examples/semantic_segmentation.py                                   # embedded data and backbone
    python examples/semantic_segmentation.py --model microsoft/swin-tiny-patch4-window7-224 \
        --dataset me/my-segmentation-set --budget 0.02 --output_dir out/mine

The model is an UperNet checkpoint, or a backbone that gets a fresh UperNet or linear head. The dataset has the columns
`image` and `label`, a map of class ids; or it is a folder with COCO's JSON, whose objects are drawn as maps. Run it
under `accelerate launch` for several processes or mixed precision.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import SegformerImageProcessorPil, UperNetConfig, UperNetForSemanticSegmentation

from dense.augmentation import normalised
from dense.data import Rows
from dense.limits import whole
from dense.mask_values import load_map_classes
from dense.metrics import MeanIoU
from dense.models import LinearHead
from dense.pictures import WRONG_PIXELS, paint_labels, paint_wrong_pixels, palette
from dense.run import main
from dense.samples import IGNORE_INDEX, Array, Census, Classes, Note, Sample, draw_label, read_image, read_label
from dense.task import Task
from dense.windows import Box, join_maps


class SemanticSegmentation(Task):
    """A class for each pixel, by UperNet (Xiao et al., 2018) or a linear head; judged by the mean IoU."""

    name = "semantic segmentation"
    columns = {"image": "image", "label": "label"}
    headline = "mean_iou"
    score_words = "mean IoU (1 is perfect)"
    backbone_path = "backbone"
    answers_for = ("ForSemanticSegmentation",)
    dense_config = UperNetConfig

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--id2label", help="A JSON file of class names, or user/repository/file on the Hub.")
        parser.add_argument(
            "--reduce_labels", action="store_true", help="Label 0 is no class, and 1 the first one (ADE20K)."
        )
        parser.add_argument("--head", choices=("upernet", "linear"), default="upernet")
        parser.add_argument("--head_channels", type=whole(1), default=64, help="Hidden size of a fresh UperNet head.")

    @classmethod
    def load_classes(cls, args: argparse.Namespace, rows: Rows) -> Classes:
        return load_map_classes(args, rows, args.label_column)

    def processor(self) -> SegformerImageProcessorPil:
        return SegformerImageProcessorPil(**normalised(self.size))

    def load_whole(self, name_or_path: str) -> nn.Module:
        model = UperNetForSemanticSegmentation.from_pretrained(
            name_or_path, **self.labels, loss_ignore_index=IGNORE_INDEX, ignore_mismatched_sizes=True
        )
        return self._with_head(model)

    def fresh(self, backbone: nn.Module) -> nn.Module:
        config = UperNetConfig(
            backbone_config=backbone.config,
            hidden_size=self.args.head_channels,
            use_auxiliary_head=False,
            loss_ignore_index=IGNORE_INDEX,
            **self.labels,
        )
        model = UperNetForSemanticSegmentation(config)
        model.backbone.load_state_dict(backbone.state_dict())
        return self._with_head(model)

    def _with_head(self, model: UperNetForSemanticSegmentation) -> UperNetForSemanticSegmentation:
        if self.args.head == "linear":
            model.decode_head = LinearHead(model.backbone.channels, len(self.id2label))
            model.auxiliary_head = None
        return model

    def read(self, row: Mapping[str, Any], note: Note) -> Sample:
        sample = Sample(read_image(row[self.column["image"]]))
        value = row[self.column["label"]]
        if isinstance(value, Mapping) and "segmentation" in value:
            sample.label = draw_label(value, self.classes, sample.size, note)
            return sample
        label = read_label(value, sample.size, self.classes.colours)
        if self.args.reduce_labels:
            label = np.where((label == 0) | (label == IGNORE_INDEX), IGNORE_INDEX, label - 1)
        sample.label = self.classes.of_map(label)
        return sample

    def counting(self, sample: Sample) -> float:
        return float((sample.label != IGNORE_INDEX).mean())

    def doubts(self, census: Census) -> list[str]:
        found, ignored = super().doubts(census), 1 - census.counting / max(census.usable, 1)
        if census.usable and (ignored > 0.5 or (found and ignored)):
            labels = sorted({IGNORE_INDEX, *((0,) if self.args.reduce_labels else self.classes.ignored)})
            found.append(
                f"{ignored:.0%} of the pixels are ignored, those labelled {' or '.join(map(str, labels))}: if that is "
                f'a class, name it in --id2label, as in {{"0": "background", "255": "thing"}}'
            )
        return found

    def batch(self, tensors: Sequence[dict[str, Tensor]]) -> dict[str, Any]:
        return {
            "pixel_values": torch.stack([t["image"] for t in tensors]),
            "labels": torch.stack([t["label"] for t in tensors]),
        }

    def loss(self, model: nn.Module, batch: dict[str, Any]) -> Tensor:
        output = model(**batch)
        # Cropping may leave a batch without a labelled pixel, whose mean loss is NaN.
        return output.loss if (batch["labels"] != IGNORE_INDEX).any() else 0 * output.logits.sum()

    def predict(self, model: nn.Module, images: Tensor, sizes: Sequence[tuple[int, int]]) -> list[Array]:
        logits = model(pixel_values=images).logits.float()
        return [
            F.interpolate(one[None], size=size, mode="bilinear", align_corners=False)[0].argmax(0).cpu().numpy()
            for one, size in zip(logits, sizes, strict=True)
        ]

    def join(self, boxes: Sequence[Box], found: Sequence[Array], size: tuple[int, int]) -> Array:
        return join_maps(boxes, found, size)

    def truth(self, sample: Sample) -> Array:
        return sample.label

    def metric(self) -> MeanIoU:
        return MeanIoU(len(self.id2label), IGNORE_INDEX)

    def paint(self, image: Array, annotation: Array) -> Array:
        return paint_labels(image, annotation, palette(len(self.id2label)))

    def paint_errors(self, image: Array, truth: Array, found: Array) -> Array:
        return paint_wrong_pixels(image, (truth != found) & (truth != IGNORE_INDEX), truth == IGNORE_INDEX)

    def error_legend(self) -> dict[str, tuple[float, float, float]]:
        return WRONG_PIXELS

    def legend(self) -> dict[str, tuple[float, float, float]]:
        return dict(zip(self.id2label.values(), palette(len(self.id2label)), strict=True))


if __name__ == "__main__":
    main(SemanticSegmentation)

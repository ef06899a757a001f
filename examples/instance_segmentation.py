"""Fine-tune a Swin model for instance segmentation with SFA, or with a peer at the same budget.

    python examples/instance_segmentation.py                                   # embedded data and backbone
    python examples/instance_segmentation.py --model facebook/mask2former-swin-tiny-coco-instance \
        --dataset qubvel-hf/ade20k-mini --image_size 512 512 --budget 0.02 --output_dir out/mine

The model is a Mask2Former checkpoint, or a Swin backbone that gets a fresh Mask2Former head. The dataset has the
columns `image` and `objects`, with `bbox` and `category` in it; masks are `segmentation` in `objects` (COCO's polygons
or run lengths), or a column `instances`, a map of the objects' ids. Or it has `image` and `annotation`, whose red
channel is the class and whose green one the object, as in transformers' example. Run it under `accelerate launch` for
several processes or mixed precision.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import Any, Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, Mask2FormerImageProcessorPil

from dense.augmentation import normalised
from dense.data import Rows, load_classes
from dense.errors import DataError, FlagError
from dense.limits import whole
from dense.methods import Rates
from dense.metrics import CocoAP
from dense.pictures import WRONG_OBJECTS, paint_objects, paint_wrong_objects, palette
from dense.run import main
from dense.samples import (
    Array,
    BadSampleError,
    Classes,
    Note,
    Sample,
    boxes_of,
    encoded,
    read_image,
    read_masks,
    read_objects,
    read_painted_objects,
)
from dense.task import Task
from dense.windows import Box, join_objects
from object_detection import DETECTIONS, add_object_arguments

POINTS = 12544  # where a mask's loss is sampled, on large images


class InstanceSegmentation(Task):
    """A mask and a class for each object, by Mask2Former (Cheng et al., 2022); judged by COCO's AP of masks."""

    name = "instance segmentation"
    columns = {"image": "image"}
    optional_columns = {"objects": "objects", "instances": "instances", "annotation": "annotation"}
    headline = "ap"
    score_words = "AP of masks (1 is perfect)"
    backbone_path = "model.pixel_level_module.encoder"
    answers_for = ("Mask2FormerForUniversalSegmentation", "MaskFormerForInstanceSegmentation")
    dense_config = Mask2FormerConfig
    defaults = {"max_grad_norm": 1.0}
    # Measured on the embedded scenes: a fresh transformer head learns best at half of what a convolutional one takes.
    rates = {
        "sfa": Rates(backbone=1e-2, internal=1.2e-2, head=1e-3),
        "lora": Rates(backbone=3e-3, head=1e-3),
        "shira": Rates(backbone=1.2e-2, head=1e-3),
        "adaptformer": Rates(backbone=1e-2, head=1e-3),
        "full": Rates(backbone=5e-4, head=1e-3),
        "head": Rates(backbone=0.0, head=1e-3),
    }

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        add_object_arguments(parser)
        parser.add_argument("--head_channels", type=whole(1), default=64, help="Hidden size of a fresh head, by 32.")
        parser.add_argument(
            "--queries", type=whole(1), default=30, help="Of a fresh head: how many objects it can find."
        )
        parser.add_argument("--encoder_layers", type=whole(1), default=2, help="Of a fresh head's pixel decoder.")
        parser.add_argument("--decoder_layers", type=whole(1), default=3, help="Of a fresh head.")

    @classmethod
    def load(cls, args: argparse.Namespace) -> tuple[Self, Rows, Rows]:
        task, train, validation = super().load(args)
        for rows in (train, validation):
            if not {task.column["objects"], task.column["annotation"]} & set(rows.columns):
                raise DataError(
                    f"dataset {args.dataset!r} has neither a column {task.column['objects']!r} nor "
                    f"{task.column['annotation']!r}; it has {rows.columns}. Name one with --objects_column or "
                    f"--annotation_column."
                )
        return task, train, validation

    @classmethod
    def load_classes(cls, args: argparse.Namespace, rows: Rows) -> Classes:
        return load_classes(args, rows, args.objects_column, args.category_key, ignored={"background"})

    def processor(self) -> Mask2FormerImageProcessorPil:
        return Mask2FormerImageProcessorPil(**normalised(self.size), size_divisor=1)

    def load_whole(self, name_or_path: str) -> nn.Module:
        return Mask2FormerForUniversalSegmentation.from_pretrained(
            name_or_path, **self.labels, ignore_mismatched_sizes=True
        )

    def fresh(self, backbone: nn.Module) -> nn.Module:
        args, own = self.args, backbone.config
        height, width = self.size
        if len(getattr(own, "depths", ())) < 3:
            raise FlagError(
                f"--model: Mask2Former needs a pyramid of three stages or more, and {own.model_type} has none"
            )
        if args.head_channels % 32:
            raise FlagError(f"--head_channels {args.head_channels} must be a multiple of 32, the groups of its norms")
        model = Mask2FormerForUniversalSegmentation(
            Mask2FormerConfig(
                backbone_config=own,
                feature_size=args.head_channels,
                mask_feature_size=args.head_channels,
                hidden_dim=args.head_channels,
                encoder_feedforward_dim=4 * args.head_channels,
                dim_feedforward=4 * args.head_channels,
                encoder_layers=args.encoder_layers,
                decoder_layers=args.decoder_layers + 1,  # transformers counts the prediction before the first layer
                num_attention_heads=max(1, args.head_channels // 32),
                num_queries=args.queries,
                feature_strides=[own.patch_size * 2**i for i in range(len(own.depths))],
                common_stride=own.patch_size,
                train_num_points=min(POINTS, height * width // 4),
                **self.labels,
            )
        )
        model.model.pixel_level_module.encoder.load_state_dict(backbone.state_dict())
        return model

    def read(self, row: Mapping[str, Any], note: Note) -> Sample:
        sample = Sample(read_image(row[self.column["image"]]))
        if self.column["objects"] in row:
            keys = {"bbox": self.args.bbox_key, "category": self.args.category_key}
            corners = self.args.bbox_format == "xyxy"
            found = read_objects(row[self.column["objects"]], self.classes, sample.size, keys, corners, note)
            masks = read_masks(row, self.column, found, sample.size)
        else:
            found = read_painted_objects(row[self.column["annotation"]], self.classes, sample.size, note)
            masks = found["masks"]
        kept = masks.any((1, 2))
        if not kept.all():
            note("mask without a pixel")
        if len(kept) and not kept.any():
            raise BadSampleError("no usable object")
        sample.masks, sample.classes, sample.crowd = masks[kept], found["classes"][kept], found["crowd"][kept]
        return sample

    def batch(self, tensors: Sequence[dict[str, Tensor]]) -> dict[str, Any]:
        return {
            "pixel_values": torch.stack([t["image"] for t in tensors]),
            "mask_labels": [t["masks"].float() for t in tensors],
            "class_labels": [t["classes"] for t in tensors],
        }

    def predict(self, model: nn.Module, images: Tensor, sizes: Sequence[tuple[int, int]]) -> list[dict[str, Any]]:
        output = model(pixel_values=images)
        found = []
        for logits, masks, size in zip(output.class_queries_logits, output.masks_queries_logits, sizes, strict=True):
            probabilities = logits.float().softmax(-1)[:, :-1]  # the last class is no object
            scores, places = probabilities.flatten().topk(min(DETECTIONS, probabilities.numel()))
            # Not transformers' post_process_instance_segmentation, which brings every mask to 384 x 384 first.
            large = F.interpolate(masks[None].float(), size=size, mode="bilinear", align_corners=False)[0]
            inside = large > 0
            area = inside.flatten(1).sum(1)
            confidence = (large.sigmoid() * inside).flatten(1).sum(1) / area.clamp(min=1)
            query = places // probabilities.shape[-1]
            kept = area[query] > 0
            scores, places, query = (scores * confidence[query])[kept], places[kept], query[kept]
            own = inside.cpu().numpy()
            shapes = {q: encoded(own[q]) for q in set(query.tolist())}
            boxes = {q: boxes_of(own[q][None])[0] for q in shapes}
            found.append(
                {
                    "scores": scores.cpu().numpy(),
                    "labels": (places % probabilities.shape[-1]).cpu().numpy(),
                    "boxes": np.array([boxes[q] for q in query.tolist()], np.float32).reshape(-1, 4),
                    "masks": [shapes[q] for q in query.tolist()],
                }
            )
        return found

    def join(self, boxes: Sequence[Box], found: Sequence[Mapping[str, Any]], size: tuple[int, int]) -> dict[str, Any]:
        return join_objects(boxes, found, size)

    def truth(self, sample: Sample) -> dict[str, Any]:
        return {
            "labels": sample.classes,
            "boxes": boxes_of(sample.masks),
            "masks": [encoded(mask) for mask in sample.masks],
            "crowd": sample.crowd,
        }

    def metric(self) -> CocoAP:
        return CocoAP(self.id2label, ("segm", "bbox"))

    def paint(self, image: Array, annotation: Mapping[str, Any]) -> Array:
        return paint_objects(image, annotation, self.id2label, palette(len(self.id2label)))

    def paint_errors(self, image: Array, truth: Mapping[str, Any], found: Mapping[str, Any]) -> Array:
        return paint_wrong_objects(image, truth, found)

    def error_legend(self) -> dict[str, tuple[float, float, float]]:
        return WRONG_OBJECTS

    def legend(self) -> dict[str, tuple[float, float, float]]:
        return dict(zip(self.id2label.values(), palette(len(self.id2label)), strict=True))


if __name__ == "__main__":
    main(InstanceSegmentation)

"""Fine-tune a DINOv2 model for object detection with SFA, or with a peer at the same budget.

    python examples/object_detection.py                                        # embedded data and backbone
    python examples/object_detection.py --model Roboflow/rf-detr-base --dataset rishitdagli/cppe-5 \
        --validation_split test --image_size 560 560 --budget 0.02 --output_dir out/mine

The model is an RF-DETR checkpoint, or a DINOv2 backbone that gets a fresh RF-DETR head. The dataset has the columns
`image` and `objects`, with `bbox` and `category` in it. Run it under `accelerate launch` for several processes or
mixed precision.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import RfDetrConfig, RfDetrForObjectDetection, RTDetrImageProcessorPil
from transformers.image_transforms import center_to_corners_format, corners_to_center_format

from dense.augmentation import normalised
from dense.data import Rows, load_classes
from dense.errors import FlagError
from dense.limits import whole
from dense.methods import Rates
from dense.metrics import CocoAP
from dense.models import require_plain
from dense.pictures import WRONG_OBJECTS, paint_objects, paint_wrong_objects, palette
from dense.run import main
from dense.samples import Array, Classes, Note, Sample, read_image, read_objects
from dense.task import Task
from dense.windows import Box, join_objects

DETECTIONS = 100  # that COCO judges an image by


def add_object_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that say what the objects in a row are called."""
    parser.add_argument("--id2label", help="A JSON file of class names, or user/repository/file on the Hub.")
    parser.add_argument("--bbox_key", default="bbox", help="What the objects' boxes are called. Default: bbox.")
    parser.add_argument("--category_key", default="category", help="What their classes are called. Default: category.")
    parser.add_argument(
        "--bbox_format", choices=("xywh", "xyxy"), default="xywh", help="COCO's x, y, width, height; or corners."
    )


class ObjectDetection(Task):
    """Boxes with classes, by RF-DETR (Robinson et al., 2025); judged by COCO's AP."""

    name = "object detection"
    columns = {"image": "image", "objects": "objects"}
    headline = "ap"
    score_words = "AP of boxes (1 is perfect)"
    backbone_path = "model.backbone.backbone"
    answers_for = ("RfDetrForObjectDetection", "RTDetrForObjectDetection", "DeformableDetrForObjectDetection")
    dense_config = RfDetrConfig
    embedded_backbone = "dinov2"
    defaults = {"max_grad_norm": 1.0}
    # Measured on blood cells: a transformer head that begins fresh diverges at the rates that segmentation takes.
    rates = {
        "sfa": Rates(backbone=5e-4, internal=2e-3, head=7e-4),
        "lora": Rates(backbone=1e-3, head=7e-4),
        "shira": Rates(backbone=2e-3, head=7e-4),
        "adaptformer": Rates(backbone=2e-3, head=7e-4),
        "full": Rates(backbone=3e-4, head=7e-4),
        "head": Rates(backbone=0.0, head=7e-4),
    }

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        add_object_arguments(parser)
        parser.add_argument("--head_channels", type=whole(1), default=128, help="Hidden size of a fresh head.")
        parser.add_argument(
            "--queries", type=whole(1), default=50, help="Of a fresh head: how many objects it can find."
        )
        parser.add_argument(
            "--query_groups",
            type=whole(1),
            default=5,
            help="Of a fresh head: copies of the queries, for training alone.",
        )
        parser.add_argument("--decoder_layers", type=whole(1), default=1, help="Of a fresh head.")

    @classmethod
    def load_classes(cls, args: argparse.Namespace, rows: Rows) -> Classes:
        return load_classes(args, rows, args.objects_column, args.category_key)

    def processor(self) -> RTDetrImageProcessorPil:
        return RTDetrImageProcessorPil(**normalised(self.size))  # RF-DETR's own needs torchvision

    def load_whole(self, name_or_path: str) -> nn.Module:
        return RfDetrForObjectDetection.from_pretrained(name_or_path, **self.labels, ignore_mismatched_sizes=True)

    def fresh(self, backbone: nn.Module) -> nn.Module:
        args, own = self.args, backbone.config
        require_plain(own, "RF-DETR")
        tokens = (self.size[0] // own.patch_size) * (self.size[1] // own.patch_size)
        if tokens < args.queries:
            raise FlagError(
                f"--queries {args.queries}: each is a place in the image, and --image_size gives {tokens}; lower the "
                f"one or raise the other"
            )
        own.num_windows, own.window_block_indexes = 1, []  # which RF-DETR asks for
        model = RfDetrForObjectDetection(
            RfDetrConfig(
                backbone_config=own,
                d_model=args.head_channels,
                decoder_layers=args.decoder_layers,
                decoder_ffn_dim=4 * args.head_channels,
                decoder_self_attention_heads=max(1, args.head_channels // 32),
                decoder_cross_attention_heads=max(1, args.head_channels // 16),
                num_queries=args.queries,
                group_detr=args.query_groups,
                **self.labels,
            )
        )
        # RF-DETR's own is DINOv2 with windows and other position embeddings; a plain one keeps working as pretrained.
        model.model.backbone.backbone = backbone
        return model

    def read(self, row: Mapping[str, Any], note: Note) -> Sample:
        sample = Sample(read_image(row[self.column["image"]]))
        keys = {"bbox": self.args.bbox_key, "category": self.args.category_key}
        found = read_objects(
            row[self.column["objects"]], self.classes, sample.size, keys, self.args.bbox_format == "xyxy", note
        )
        sample.boxes, sample.classes, sample.areas, sample.crowd = (
            found[name] for name in ("boxes", "classes", "areas", "crowd")
        )
        return sample

    def batch(self, tensors: Sequence[dict[str, Tensor]]) -> dict[str, Any]:
        height, width = self.size
        scale = torch.tensor([width, height, width, height])
        return {
            "pixel_values": torch.stack([t["image"] for t in tensors]),
            "labels": [
                {"class_labels": t["classes"], "boxes": corners_to_center_format(t["boxes"] / scale)} for t in tensors
            ],
        }

    def predict(self, model: nn.Module, images: Tensor, sizes: Sequence[tuple[int, int]]) -> list[dict[str, Array]]:
        output = model(pixel_values=images)
        probabilities = output.logits.float().sigmoid()
        count = probabilities.shape[-1]
        scores, places = probabilities.flatten(1).topk(min(DETECTIONS, probabilities[0].numel()))
        corners = center_to_corners_format(output.pred_boxes.float())
        found = []
        for (height, width), score, place, own in zip(sizes, scores, places, corners, strict=True):
            scale = own.new_tensor([width, height, width, height])
            boxes = (own[place // count].clamp(0, 1) * scale).cpu().numpy()
            found.append({"scores": score.cpu().numpy(), "labels": (place % count).cpu().numpy(), "boxes": boxes})
        return found

    def join(self, boxes: Sequence[Box], found: Sequence[Mapping[str, Any]], size: tuple[int, int]) -> dict[str, Any]:
        return join_objects(boxes, found, size)

    def truth(self, sample: Sample) -> dict[str, Array]:
        return {"labels": sample.classes, "boxes": sample.boxes, "areas": sample.areas, "crowd": sample.crowd}

    def metric(self) -> CocoAP:
        return CocoAP(self.id2label)

    def paint(self, image: Array, annotation: Mapping[str, Any]) -> Array:
        return paint_objects(image, annotation, self.id2label, palette(len(self.id2label)))

    def paint_errors(self, image: Array, truth: Mapping[str, Any], found: Mapping[str, Any]) -> Array:
        return paint_wrong_objects(image, truth, found)

    def error_legend(self) -> dict[str, tuple[float, float, float]]:
        return WRONG_OBJECTS

    def legend(self) -> dict[str, tuple[float, float, float]]:
        return dict(zip(self.id2label.values(), palette(len(self.id2label)), strict=True))


if __name__ == "__main__":
    main(ObjectDetection)

"""Metrics as `evaluate.Metric`s that need nothing from the Hub."""

from __future__ import annotations

import contextlib
import io
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import datasets
import evaluate
import numpy as np
import numpy.typing as npt
from accelerate import Accelerator
from accelerate.utils import gather_object
from pycocotools import mask as rle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

Labels = npt.NDArray[Any]

LABEL_MAP = datasets.Sequence(datasets.Sequence(datasets.Value("int64")))
DEPTH_MAP = datasets.Sequence(datasets.Sequence(datasets.Value("float32")))


class InMemoryMetric(evaluate.Metric):
    """A metric that counts at once what is added: written to disk as `evaluate` does, maps would take gigabytes.

    Attributes:
        counts: What was counted; a list, so that those of several processes can be joined.
    """

    description = ""
    citation = ""
    inputs = ""
    features: Mapping[str, Any] = {}

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.counts: list[Any] = []

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=self.description,
            citation=self.citation,
            inputs_description=self.inputs,
            features=datasets.Features(dict(self.features)),
        )

    def add_batch(self, *, predictions: Any = None, references: Any = None, **kwargs: Any) -> None:
        """Count a batch of predictions with their references."""
        for prediction, reference in zip(predictions, references, strict=True):
            self._count(prediction, reference)

    def add(self, *, prediction: Any = None, reference: Any = None, **kwargs: Any) -> None:
        """Count one prediction with its reference."""
        self._count(prediction, reference)

    def compute(self, *, predictions: Any = None, references: Any = None, **kwargs: Any) -> dict[str, Any]:
        """Give the scores of what was added, and forget it."""
        if predictions is not None:
            self.add_batch(predictions=predictions, references=references)
        counts, self.counts = self.counts, []
        return self._scores(counts)

    def gather(self, accelerator: Accelerator) -> None:
        """Join what was counted on all processes."""
        if accelerator.num_processes > 1:
            self.counts = gather_object(self.counts)

    @abstractmethod
    def _count(self, prediction: Any, reference: Any) -> None: ...

    @abstractmethod
    def _scores(self, counts: list[Any]) -> dict[str, Any]: ...


class MeanIoU(InMemoryMetric):
    """Mean intersection over union and pixel accuracy of label maps.

    Per class, ``IoU = |prediction and truth| / |prediction or truth|`` over all pixels of all images together, as in
    the PASCAL VOC protocol (Everingham et al., 2010). Classes that occur in neither are left out of the mean.

    Args:
        num_labels: Number of classes.
        ignore_index: Truth value of pixels that do not count.

    `compute` gives ``mean_iou``, ``pixel_accuracy`` and ``per_class_iou``, NaN where nothing counts.
    """

    description = "Mean intersection over union."
    citation = "Everingham et al., The PASCAL Visual Object Classes Challenge, IJCV 2010"
    inputs = "Label maps of shape (height, width), integers; truth may hold ignore_index."
    features = {"predictions": LABEL_MAP, "references": LABEL_MAP}

    def __init__(self, num_labels: int, ignore_index: int = 255, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.num_labels = num_labels
        self.ignore_index = ignore_index

    def _count(self, prediction: Any, reference: Any) -> None:
        confusion = self._confusion(np.asarray(prediction), np.asarray(reference))
        self.counts = [sum(self.counts, confusion)]

    def _scores(self, counts: list[npt.NDArray[np.int64]]) -> dict[str, Any]:
        confusion = sum(counts, np.zeros((self.num_labels, self.num_labels), np.int64))
        hits = np.diag(confusion).astype(float)
        union = confusion.sum(0) + confusion.sum(1) - hits
        iou = np.divide(hits, union, out=np.full_like(hits, np.nan), where=union > 0)
        total = confusion.sum()
        return {
            "mean_iou": float(np.nanmean(iou)) if total else float("nan"),
            "pixel_accuracy": float(hits.sum() / total) if total else float("nan"),
            "per_class_iou": iou.tolist(),
        }

    def _confusion(self, prediction: Labels, reference: Labels) -> npt.NDArray[np.int64]:
        if prediction.shape != reference.shape:
            raise ValueError(f"prediction of shape {prediction.shape} and reference of shape {reference.shape} differ")
        counted = reference != self.ignore_index
        truth, guess = reference[counted].astype(np.int64), prediction[counted].astype(np.int64)
        for name, values in (("reference", truth), ("prediction", guess)):
            if values.size and not (values.min() >= 0 and values.max() < self.num_labels):
                raise ValueError(
                    f"{name} holds labels {values.min()}..{values.max()} outside 0..{self.num_labels - 1}; ignored "
                    f"pixels are {self.ignore_index}"
                )
        index = truth * self.num_labels + guess
        return np.bincount(index, minlength=self.num_labels**2).reshape(self.num_labels, self.num_labels)


class CocoAP(InMemoryMetric):
    """COCO's average precision of boxes or masks, as pycocotools computes it (Lin et al., 2014).

    A prediction is a dict of ``scores`` (n,), ``labels`` (n,), class ids, and ``boxes`` (n, 4), corners in pixels; for
    masks also ``masks``, n run-length encodings of pycocotools. A reference is the same without scores, and may have
    ``crowd`` (n,), regions that are neither right nor wrong, and ``areas`` (n,), which decide what is small; by
    default those of the masks or boxes.

    Args:
        id2label: The classes.
        kinds: Of ``bbox`` and ``segm``.

    `compute` gives ``ap`` (over IoU 0.5 to 0.95), ``ap50``, ``ap75``, ``ap_small``, ``ap_medium``, ``ap_large``,
    ``ar100`` and ``per_class_ap`` of the first kind, and of others the same behind their name, as in ``bbox_ap``. NaN
    where there is no reference.
    """

    description = "COCO's average precision."
    citation = "Lin et al., Microsoft COCO: Common Objects in Context, ECCV 2014"
    inputs = "Dicts of scores, labels and boxes, and of masks for segm."
    # Where COCOeval's stats have them.
    STATS = {"ap": 0, "ap50": 1, "ap75": 2, "ap_small": 3, "ap_medium": 4, "ap_large": 5, "ar100": 8}

    def __init__(self, id2label: Mapping[int, str], kinds: Sequence[str] = ("bbox",), **kwargs: Any) -> None:
        if not kinds or set(kinds) - {"bbox", "segm"}:
            raise ValueError(f"kinds={kinds!r} must be of 'bbox' and 'segm'")
        self.id2label, self.kinds = dict(id2label), tuple(kinds)
        objects = {"labels": datasets.Sequence(datasets.Value("int64"))}
        self.features = {
            "predictions": {**objects, "scores": datasets.Sequence(datasets.Value("float32"))},
            "references": objects,
        }
        super().__init__(**kwargs)

    def _count(self, prediction: Mapping[str, Any], reference: Mapping[str, Any]) -> None:
        found = [
            shape | {"category_id": int(label), "score": float(score)}
            for shape, label, score in zip(
                self._shapes(prediction), prediction["labels"], prediction["scores"], strict=True
            )
        ]
        shapes = self._shapes(reference)
        crowd = reference.get("crowd", [False] * len(shapes))
        areas = reference.get("areas", [shape["area"] for shape in shapes])
        true = [
            shape | {"category_id": int(label), "iscrowd": int(c), "area": float(area)}
            for shape, label, c, area in zip(shapes, reference["labels"], crowd, areas, strict=True)
        ]
        self.counts.append((found, true))

    def _shapes(self, objects: Mapping[str, Any]) -> list[dict[str, Any]]:
        corners = np.asarray(objects["boxes"], dtype=float).reshape(-1, 4)
        sides = corners[:, 2:] - corners[:, :2]
        shapes = [
            {"bbox": [*corner[:2].tolist(), *side.tolist()], "area": float(side.prod())}
            for corner, side in zip(corners, sides, strict=True)
        ]
        if "segm" in self.kinds:
            for shape, mask in zip(shapes, objects["masks"], strict=True):
                shape |= {"segmentation": mask, "area": float(rle.area(mask))}
        return shapes

    def _scores(self, counts: list[tuple[list[dict[str, Any]], list[dict[str, Any]]]]) -> dict[str, Any]:
        scores: dict[str, Any] = {}
        for kind in self.kinds:
            prefix = "" if kind == self.kinds[0] else f"{kind}_"
            scores |= {f"{prefix}{name}": value for name, value in self._of_kind(kind, counts).items()}
        return scores

    def _of_kind(self, kind: str, counts: list[tuple[list[dict[str, Any]], list[dict[str, Any]]]]) -> dict[str, Any]:
        nothing = float("nan")
        if not any(true for _, true in counts):
            return {**dict.fromkeys(self.STATS, nothing), "per_class_ap": [nothing] * len(self.id2label)}
        truth, found = COCO(), COCO()
        shared = {
            # Sizes are looked up, but only polygons would need them.
            "images": [{"id": i, "height": 0, "width": 0} for i in range(len(counts))],
            "categories": [{"id": i, "name": name} for i, name in self.id2label.items()],
        }
        truth.dataset = shared | {"annotations": _numbered(true for _, true in counts)}
        found.dataset = shared | {"annotations": _numbered(own for own, _ in counts)}
        with contextlib.redirect_stdout(io.StringIO()):
            truth.createIndex()
            found.createIndex()
            evaluation = COCOeval(truth, found, kind)
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
        # Over IoUs, recalls and classes: objects of all areas, and the most detections.
        precision = evaluation.eval["precision"][..., 0, -1]
        stats = {name: float(evaluation.stats[place]) for name, place in self.STATS.items()}
        return {
            **{name: value if value >= 0 else nothing for name, value in stats.items()},
            "per_class_ap": [_mean(precision[..., k]) for k in range(precision.shape[-1])],
        }


def _numbered(objects: Iterable[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The objects of all images, numbered from 1: pycocotools takes an id of 0 for no match."""
    every = [{**one, "image_id": image} for image, own in enumerate(objects) for one in own]
    return [{**one, "id": number} for number, one in enumerate(every, start=1)]


def _mean(precision: npt.NDArray[np.float64]) -> float:
    counted = precision[precision > -1]
    return float(counted.mean()) if counted.size else float("nan")


class DepthErrors(InMemoryMetric):
    """Errors of depth maps: AbsRel, RMSE, log10, and the part of pixels within a factor of 1.25, 1.25² and 1.25³.

    With prediction p and truth t in metres, over an image's pixels where t counts: ``abs_rel = mean |p - t| / t``,
    ``rmse = sqrt(mean (p - t)²)``, ``log10 = mean |log10 p - log10 t|``, ``delta_i = part of max(p/t, t/p) < 1.25^i``.
    Each is then averaged over images, as is usual on NYUv2 and KITTI (Eigen et al., 2014; Bhat et al., 2021).

    Args:
        min_depth: Truth below does not count; predictions are raised to it.
        max_depth: Truth above does not count; predictions are lowered to it.
    """

    description = "Errors of depth maps."
    citation = "Eigen, Puhrsch, Fergus, Depth Map Prediction from a Single Image, NeurIPS 2014"
    inputs = "Depth maps of shape (height, width), metres; truth that is 0 or not finite does not count."
    features = {"predictions": DEPTH_MAP, "references": DEPTH_MAP}
    KEYS = ("abs_rel", "rmse", "log10", "delta1", "delta2", "delta3")

    def __init__(self, min_depth: float = 1e-3, max_depth: float = 80.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.min_depth, self.max_depth = min_depth, max_depth

    def _count(self, prediction: Any, reference: Any) -> None:
        guess, truth = np.asarray(prediction, np.float64), np.asarray(reference, np.float64)
        if guess.shape != truth.shape:
            raise ValueError(f"prediction of shape {guess.shape} and reference of shape {truth.shape} differ")
        counted = np.isfinite(truth) & (truth >= self.min_depth) & (truth <= self.max_depth)
        if not counted.any():
            return
        p, t = guess[counted].clip(self.min_depth, self.max_depth), truth[counted]
        ratio = np.maximum(p / t, t / p)
        self.counts.append(
            (
                np.mean(np.abs(p - t) / t),
                np.sqrt(np.mean((p - t) ** 2)),
                np.mean(np.abs(np.log10(p) - np.log10(t))),
                *(np.mean(ratio < 1.25**i) for i in (1, 2, 3)),
            )
        )

    def _scores(self, counts: Sequence[tuple[float, ...]]) -> dict[str, Any]:
        means = np.mean(counts, axis=0) if counts else np.full(len(self.KEYS), np.nan)
        return dict(zip(self.KEYS, means.tolist(), strict=True))

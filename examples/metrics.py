"""Metrics as `evaluate.Metric`s that need nothing from the Hub."""

from __future__ import annotations

from typing import Any

import datasets
import evaluate
import numpy as np
import numpy.typing as npt

Labels = npt.NDArray[Any]


class MeanIoU(evaluate.Metric):
    """Mean intersection over union and pixel accuracy of label maps.

    Per class, ``IoU = |prediction and truth| / |prediction or truth|`` over all pixels of all images together, as in
    the PASCAL VOC protocol (Everingham et al., 2010). Classes that occur in neither are left out of the mean.

    Args:
        num_labels: Number of classes.
        ignore_index: Truth value of pixels that do not count.
    """

    def __init__(self, num_labels: int, ignore_index: int = 255, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.num_labels = num_labels
        self.ignore_index = ignore_index
        self.confusion = np.zeros((num_labels, num_labels), dtype=np.int64)

    def _info(self) -> evaluate.MetricInfo:
        label_map = datasets.Sequence(datasets.Sequence(datasets.Value("int64")))
        return evaluate.MetricInfo(
            description="Mean intersection over union.",
            citation="Everingham et al., The PASCAL Visual Object Classes Challenge, IJCV 2010",
            inputs_description="Label maps of shape (height, width), integers; truth may hold ignore_index.",
            features=datasets.Features({"predictions": label_map, "references": label_map}),
        )

    def add_batch(self, *, predictions: Any = None, references: Any = None, **kwargs: Any) -> None:
        """Count a batch of label maps, in memory: written to disk as `evaluate` does, they would take gigabytes."""
        for prediction, reference in zip(predictions, references, strict=True):
            self.confusion += self._count(np.asarray(prediction), np.asarray(reference))

    def add(self, *, prediction: Any = None, reference: Any = None, **kwargs: Any) -> None:
        """Count one pair of label maps."""
        self.add_batch(predictions=[prediction], references=[reference])

    def compute(self, *, predictions: Any = None, references: Any = None, **kwargs: Any) -> dict[str, Any]:
        """Give ``mean_iou``, ``pixel_accuracy`` and ``per_class_iou`` of what was added, and forget it."""
        if predictions is not None:
            self.add_batch(predictions=predictions, references=references)
        confusion = self.confusion
        self.confusion = np.zeros_like(confusion)
        return self.scores(confusion)

    @staticmethod
    def scores(confusion: npt.NDArray[np.int64]) -> dict[str, Any]:
        """The metric from a confusion matrix of shape (truth, prediction); NaN where nothing counts."""
        hits = np.diag(confusion).astype(float)
        union = confusion.sum(0) + confusion.sum(1) - hits
        iou = np.divide(hits, union, out=np.full_like(hits, np.nan), where=union > 0)
        total = confusion.sum()
        return {
            "mean_iou": float(np.nanmean(iou)) if total else float("nan"),
            "pixel_accuracy": float(hits.sum() / total) if total else float("nan"),
            "per_class_iou": iou.tolist(),
        }

    def _count(self, prediction: Labels, reference: Labels) -> npt.NDArray[np.int64]:
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

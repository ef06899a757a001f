"""The examples' metrics, against known implementations."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as rle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from sklearn import metrics as sklearn

from dense.metrics import CocoAP, DepthErrors, MeanIoU


def test_mean_iou_on_a_case_counted_by_hand():
    truth = np.array([[0, 0, 1, 1], [2, 2, 255, 1]])
    guess = np.array([[0, 1, 1, 1], [2, 0, 0, 1]])
    metric = MeanIoU(num_labels=4)
    metric.add(prediction=guess, reference=truth)
    result = metric.compute()
    assert result["per_class_iou"][:3] == [1 / 3, 3 / 4, 1 / 2]
    assert np.isnan(result["per_class_iou"][3])
    assert result["mean_iou"] == pytest.approx((1 / 3 + 3 / 4 + 1 / 2) / 3)
    assert result["pixel_accuracy"] == pytest.approx(5 / 7)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**32 - 1), st.integers(2, 6))
def test_mean_iou_is_scikit_learns_jaccard_score(seed, labels):
    rng = np.random.default_rng(seed)
    truth, guess = rng.integers(0, labels, (3, 5, 7)), rng.integers(0, labels, (3, 5, 7))
    ignored = rng.random(truth.shape) < 0.1
    result = MeanIoU(labels).compute(predictions=guess, references=np.where(ignored, 255, truth))
    t, g = truth[~ignored], guess[~ignored]
    present = np.union1d(t, g)
    assert result["mean_iou"] == pytest.approx(sklearn.jaccard_score(t, g, average="macro", labels=present))
    assert result["pixel_accuracy"] == pytest.approx(sklearn.accuracy_score(t, g))


def test_mean_iou_adds_up_over_batches_and_starts_anew():
    rng = np.random.default_rng(0)
    truth, guess = rng.integers(0, 3, (4, 5, 6)), rng.integers(0, 3, (4, 5, 6))
    whole = MeanIoU(3).compute(predictions=guess, references=truth)
    metric = MeanIoU(3)
    for i in range(4):
        metric.add_batch(predictions=guess[i : i + 1], references=truth[i : i + 1])
    assert metric.compute() == whole
    assert np.isnan(metric.compute()["mean_iou"])
    with pytest.raises(ValueError, match=r"labels 0..3 outside 0..2"):
        metric.add(prediction=truth[0], reference=np.where(truth[0] == 0, 3, 0))
    with pytest.raises(ValueError, match="differ"):
        metric.add(prediction=truth[0][:2], reference=truth[0])


def test_counts_of_several_processes_can_be_joined():
    rng = np.random.default_rng(0)
    truth, guess = rng.integers(0, 3, (4, 5, 6)), rng.integers(0, 3, (4, 5, 6))
    whole = MeanIoU(3).compute(predictions=guess, references=truth)
    parts = [MeanIoU(3), MeanIoU(3)]
    for i, part in enumerate(parts):
        part.add_batch(predictions=guess[i::2], references=truth[i::2])
    parts[0].counts += parts[1].counts
    assert parts[0].compute() == whole


NAMES = {0: "cell", 1: "plate"}


def random_objects(rng, count, scored):
    corners = np.sort(rng.uniform(0, 200, (count, 2, 2)), axis=1)
    boxes = np.concatenate([corners[:, 0], corners[:, 1] + 1], axis=1)
    objects = {"boxes": boxes, "labels": rng.integers(0, 2, count)}
    return objects | ({"scores": rng.random(count)} if scored else {})


def as_coco(images, scored):
    annotations = [
        {
            "id": 0,
            "image_id": i,
            "category_id": int(o["labels"][j]),
            "bbox": [*o["boxes"][j][:2], *(o["boxes"][j][2:] - o["boxes"][j][:2])],
            "area": float(np.prod(o["boxes"][j][2:] - o["boxes"][j][:2])),
            "iscrowd": 0,
            **({"score": float(o["scores"][j])} if scored else {}),
        }
        for i, o in enumerate(images)
        for j in range(len(o["labels"]))
    ]
    for number, annotation in enumerate(annotations, start=1):
        annotation["id"] = number
    return annotations


def test_box_ap_is_that_of_pycocotools_own_way(capsys):
    rng = np.random.default_rng(0)
    truth = [random_objects(rng, rng.integers(0, 8), scored=False) for _ in range(12)]
    guess = []
    for own in truth:
        near = own["boxes"] + rng.normal(scale=6, size=own["boxes"].shape)
        near[:, 2:] = np.maximum(near[:, 2:], near[:, :2] + 1)
        labels = np.where(rng.random(len(near)) < 0.8, own["labels"], 1 - own["labels"])
        extra = random_objects(rng, 3, scored=True)
        guess.append(
            {
                "boxes": np.concatenate([near, extra["boxes"]]),
                "labels": np.concatenate([labels, extra["labels"]]),
                "scores": np.concatenate([rng.random(len(near)), extra["scores"]]),
            }
        )
    result = CocoAP(NAMES).compute(predictions=guess, references=truth)

    coco = COCO()
    coco.dataset = {
        "images": [{"id": i} for i in range(12)],
        "categories": [{"id": i, "name": n} for i, n in NAMES.items()],
        "annotations": as_coco(truth, scored=False),
    }
    coco.createIndex()
    found = coco.loadRes([{k: v for k, v in a.items() if k != "id"} for a in as_coco(guess, scored=True)])
    evaluation = COCOeval(coco, found, "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    capsys.readouterr()
    assert 0.05 < result["ap"] < 0.95
    names = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")
    for name, expected in zip(names, evaluation.stats[:6], strict=True):
        assert result[name] == pytest.approx(expected) if expected >= 0 else np.isnan(result[name])
    assert np.nanmean(result["per_class_ap"]) == pytest.approx(result["ap"])


def square(y, x, side, size=64):
    mask = np.zeros((size, size), np.uint8, order="F")
    mask[y : y + side, x : x + side] = 1
    return rle.encode(mask)


def test_mask_ap_judges_masks_and_boxes_apart():
    truth = {"boxes": [[0, 0, 20, 20]], "labels": [1], "masks": [square(0, 0, 20)]}
    # The right mask with a wrong box, as the box is given.
    guess = {"boxes": [[40, 40, 60, 60]], "labels": [1], "scores": [0.9], "masks": [square(0, 0, 20)]}
    result = CocoAP(NAMES, ("segm", "bbox")).compute(predictions=[guess], references=[truth])
    assert result["ap"] == pytest.approx(1)
    assert result["bbox_ap"] == pytest.approx(0)
    assert np.isnan(result["per_class_ap"][0])
    assert result["per_class_ap"][1] == pytest.approx(1)


def test_a_crowd_is_neither_right_nor_wrong():
    truth = {"boxes": [[0, 0, 20, 20], [30, 30, 60, 60]], "labels": [0, 0], "crowd": [False, True]}
    guess = {"boxes": [[0, 0, 20, 20], [35, 35, 50, 50]], "labels": [0, 0], "scores": [0.5, 0.9]}
    assert CocoAP(NAMES).compute(predictions=[guess], references=[truth])["ap"] == pytest.approx(1)
    alone = truth | {"crowd": [False, False]}
    assert CocoAP(NAMES).compute(predictions=[guess], references=[alone])["ap"] < 0.6


def test_ap_without_any_reference_or_detection():
    none = {"boxes": np.zeros((0, 4)), "labels": []}
    one = {"boxes": [[0, 0, 9, 9]], "labels": [0]}
    assert np.isnan(CocoAP(NAMES).compute(predictions=[none | {"scores": []}], references=[none])["ap"])
    assert CocoAP(NAMES).compute(predictions=[none | {"scores": []}], references=[one])["ap"] == 0
    with pytest.raises(ValueError, match="kinds"):
        CocoAP(NAMES, ("boxes",))


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**32 - 1))
def test_depth_errors_are_scikit_learns_by_image(seed):
    rng = np.random.default_rng(seed)
    truth, guess = rng.uniform(0.5, 20, (3, 6, 5)), rng.uniform(0.5, 20, (3, 6, 5))
    unknown = rng.random(truth.shape) < 0.2
    result = DepthErrors(max_depth=80).compute(predictions=guess, references=np.where(unknown, 0, truth))
    pairs = [(t[~u], g[~u]) for t, g, u in zip(truth, guess, unknown, strict=True)]
    relative = np.mean([sklearn.mean_absolute_percentage_error(t, g) for t, g in pairs])
    assert result["abs_rel"] == pytest.approx(relative)
    assert result["rmse"] == pytest.approx(np.mean([sklearn.root_mean_squared_error(t, g) for t, g in pairs]))
    logs = [sklearn.mean_absolute_error(np.log10(t), np.log10(g)) for t, g in pairs]
    assert result["log10"] == pytest.approx(np.mean(logs))
    ratios = [np.maximum(t / g, g / t) for t, g in pairs]
    for i in (1, 2, 3):
        within = [sklearn.accuracy_score(np.ones(len(r), bool), r < 1.25**i) for r in ratios]
        assert result[f"delta{i}"] == pytest.approx(np.mean(within))


def test_depth_that_is_unknown_or_too_far_does_not_count():
    metric = DepthErrors(max_depth=10)
    metric.add(prediction=[[1.0, 5, 5, 5]], reference=[[1.0, 0, np.nan, 11]])
    assert metric.compute() == {"abs_rel": 0, "rmse": 0, "log10": 0, "delta1": 1, "delta2": 1, "delta3": 1}
    metric.add(prediction=[[1.0]], reference=[[0.0]])
    assert np.isnan(metric.compute()["abs_rel"])
    metric.add(prediction=[[99.0, -3.0]], reference=[[10.0, 0.001]])  # predictions are brought into the range
    assert metric.compute()["abs_rel"] == pytest.approx(0)
    with pytest.raises(ValueError, match="differ"):
        metric.add(prediction=[[1.0]], reference=[[1.0, 2.0]])

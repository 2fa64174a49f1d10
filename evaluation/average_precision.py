"""Average precision of detections by the devkit's rules, at ten IoU thresholds.

Two of the field's three numbers are offered: `voc`, the all-point area under the monotone precision–recall curve (2010
on), and `voc07`, the mean of the best precision at eleven recalls (2007). COCO's 101 points go with COCO's own matching
rule and are not mixed with the devkit's.

Source: VOCap.m and VOCevaldet.m of the VOC development kits; Everingham et al., The Pascal VOC Challenge, IJCV 2010,
section 4.2.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from data.errors import DetectionsError
from data.records import VOC_CLASSES, ImageRecord

from .detections import Detections
from .matching import IOU_THRESHOLDS, Metric, match_detections

_RECALLS = np.linspace(0, 1, 101)


@dataclass(frozen=True)
class EvaluationResult:
    """Average precision over a set of images, as fractions; None where nothing was there to find.

    mAP: mean over classes and the ten IoU thresholds.  per_iou: mean over classes, by threshold, "0.50" … "0.95".
    per_class: {class: {"mAP": mean over thresholds, "AP50": at 0.50}}, in the devkit's order.
    A class without an object that is not difficult has no AP and is left out of every mean.
    """

    images: int
    metric: Metric
    mAP: float | None  # noqa: N815  (the field's own name)
    per_iou: dict[str, float | None]
    per_class: dict[str, dict[str, float | None]]

    def to_json(self) -> dict[str, object]:
        """Return what `eval --json` prints, ready for `json.dumps`."""
        return {
            "images": self.images,
            "metric": self.metric,
            "mAP": self.mAP,
            "per_iou": self.per_iou,
            "per_class": self.per_class,
        }


def evaluate(detections: Detections, records: Sequence[ImageRecord], metric: Metric = "voc") -> EvaluationResult:
    """Return the average precision of the detections against the records' ground truth.

    Raises DetectionsError where the two do not cover the same images.
    """
    targets = {record.id: record.target for record in records}
    differing = sorted(targets.keys() ^ set(detections.image_ids))
    if differing:
        raise DetectionsError(
            f"expected detections of exactly the {len(targets)} images to score, found those of"
            f" {len(detections.image_ids)}; {differing[0]} is in only one of the two",
            hint="name the image sets the detector was run on with --voc-set",
        )
    matches = match_detections(detections, [targets[image_id] for image_id in detections.image_ids], metric)
    table = np.array([average_precision(m.true_positive, m.ignored, m.num_positives, metric) for m in matches.values()])
    return EvaluationResult(
        images=len(targets),
        metric=metric,
        mAP=_mean(table),
        per_iou={f"{iou:.2f}": _mean(table[:, column]) for column, iou in enumerate(IOU_THRESHOLDS)},
        per_class={
            name: {"mAP": _mean(table[row]), "AP50": _mean(table[row, :1])} for row, name in enumerate(VOC_CLASSES)
        },
    )


def _mean(values: NDArray[np.float64]) -> float | None:
    """Return the mean of the values that are numbers, None where there is none."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else None


def average_precision(
    true_positive: NDArray[np.bool_], ignored: NDArray[np.bool_], num_positives: int, metric: Metric = "voc"
) -> NDArray[np.float64]:
    """Return the AP [T] of one class at T thresholds; NaN without positives.

    true_positive, ignored: [T, n] bool over detections by falling score; the rest are false positives.
    num_positives: how many objects there were to find.

    Source: VOCap.m. Between two true positives the recall stands still and the precision falls, so precision at
    the true positives alone gives the whole monotone curve.
    """
    if num_positives == 0:
        return np.full(len(true_positive), np.nan)
    counted = (~ignored).cumsum(axis=1, dtype=np.int32)
    average = {"voc": _area, "voc07": _eleven_points, "coco": _101_points}[metric]
    values = np.zeros(len(true_positive))
    for row, found in enumerate(true_positive):
        ranks = counted[row, found]
        precision = np.arange(1, len(ranks) + 1) / ranks
        values[row] = average(np.maximum.accumulate(precision[::-1])[::-1], num_positives)
    return values


def _area(precision: NDArray[np.float64], num_positives: int) -> float:
    """Return the area under the curve whose precision at recall (k + 1) / num_positives is precision[k]."""
    return float(precision.sum() / num_positives)


def _eleven_points(precision: NDArray[np.float64], num_positives: int) -> float:
    """Return the mean precision at recalls 0, 0.1, … 1, 0 beyond the curve's end.

    A recall of 3 of 10 reaches 0.3: compared as integers, since 3 × 0.1 > 3 / 10 in floating point.
    """
    # Recall k/10 is first reached by the true positive number ceil(k · num_positives / 10), the first for k = 0.
    needed = np.maximum(-(-np.arange(11) * num_positives // 10), 1)
    return float(precision[needed[needed <= len(precision)] - 1].sum() / 11)


def _101_points(precision: NDArray[np.float64], num_positives: int) -> float:
    """Return the mean precision at recalls 0, 0.01, … 1, 0 beyond the curve's end.

    Recalls are compared as pycocotools compares them, rounding included: 7 of 20 do not reach its 0.35, which is
    0.35000000000000003.
    """
    recall = np.arange(1, len(precision) + 1) / num_positives
    reached = np.searchsorted(recall, _RECALLS, side="left")
    return float(precision[reached[reached < len(precision)]].sum() / len(_RECALLS))

"""Average precision of detections by three definitions, at ten IoU thresholds, by class and by size.

`voc`: the devkit's matching, all-point area under the monotone precision–recall curve (2010 on).  `voc07`: the same
matching, mean of the best precision at eleven recalls (2007).  `coco`: COCO's matching, mean of the best precision at
101 recalls; difficult objects are ignored. Matching and averaging of different definitions are never mixed.

Source: VOCap.m and VOCevaldet.m of the VOC development kits; Everingham et al., The Pascal VOC Challenge, IJCV 2010,
section 4.2; COCOeval.accumulate of pycocotools.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypedDict

import numpy as np
from numpy.typing import NDArray

from data.records import VOC_CLASSES, ImageRecord

from .detections import Detections
from .ground_truth import join_ground_truth
from .matching import IOU_THRESHOLDS, ClassMatches, Matcher, Metric
from .pairing import pair
from .sizes import SIZES

_RECALLS = np.linspace(0, 1, 101)


class DefinitionMeans(TypedDict):
    """Means over classes by one definition of average precision; per_iou: by threshold."""

    mAP: float | None
    AP50: float | None
    per_iou: dict[str, float | None]


class SizeMeans(TypedDict):
    """Means over classes for objects of one size; objects: how many of them are not difficult."""

    mAP: float | None
    AP50: float | None
    objects: int


@dataclass(frozen=True)
class EvaluationResult:
    """Average precision over a set of images, as fractions; None where nothing was there to find.

    mAP: mean over classes and the ten IoU thresholds.  per_iou: mean over classes, by threshold, "0.50" … "0.95".
    per_class: {class: {"mAP": mean over thresholds, "AP50": at 0.50}}, in the devkit's order.
    definitions: by metric, this one too.  by_size: of small, medium and large objects, by this metric.
    A class without an object that is not difficult has no AP and is left out of every mean.
    """

    images: int
    metric: Metric
    mAP: float | None  # noqa: N815  (the field's own name)
    per_iou: dict[str, float | None]
    per_class: dict[str, dict[str, float | None]]
    definitions: dict[str, DefinitionMeans] = field(default_factory=dict)
    by_size: dict[str, SizeMeans] = field(default_factory=dict)

    def to_json(self) -> dict[str, object]:
        """Return what `eval --json` prints, ready for `json.dumps`."""
        return {
            "images": self.images,
            "metric": self.metric,
            "mAP": self.mAP,
            "per_iou": self.per_iou,
            "per_class": self.per_class,
            "definitions": self.definitions,
            "by_size": self.by_size,
        }


def evaluate(detections: Detections, records: Sequence[ImageRecord], metric: Metric = "voc") -> EvaluationResult:
    """Return the average precision of the detections against the records' ground truth.

    Raises DetectionsError where the two do not cover the same images.
    """
    targets = join_ground_truth(detections, records).targets
    pairing = pair(detections, targets, IOU_THRESHOLDS[0])
    by_devkit, by_coco = Matcher(pairing, "voc"), Matcher(pairing, "coco")
    matches = by_devkit.matches()
    tables = {name: _table(matches, name) for name in ("voc", "voc07")} | {"coco": _table(by_coco.matches(), "coco")}
    table = tables[metric]
    return EvaluationResult(
        images=len(targets),
        metric=metric,
        mAP=_mean(table),
        per_iou=_per_iou(table),
        per_class={
            name: {"mAP": _mean(row), "AP50": _mean(row[:1])} for name, row in zip(VOC_CLASSES, table, strict=True)
        },
        definitions={
            name: {"mAP": _mean(values), "AP50": _mean(values[:, 0]), "per_iou": _per_iou(values)}
            for name, values in tables.items()
        },
        by_size=_by_size(by_coco if metric == "coco" else by_devkit, metric),
    )


def _by_size(matcher: Matcher, metric: Metric) -> dict[str, SizeMeans]:
    sizes: dict[str, SizeMeans] = {}
    for name, area_range in SIZES.items():
        matches = matcher.matches(area_range)
        objects = sum(match.num_positives for match in matches.values())
        table = _table(matches, metric)
        sizes[name] = {"mAP": _mean(table), "AP50": _mean(table[:, 0]), "objects": objects}
    return sizes


def _table(matches: dict[str, ClassMatches], metric: Metric) -> NDArray[np.float64]:
    """Return the AP [20, T] of every class at every threshold, NaN for a class with nothing to find."""
    return np.array([average_precision(m.true_positive, m.ignored, m.num_positives, metric) for m in matches.values()])


def _per_iou(table: NDArray[np.float64]) -> dict[str, float | None]:
    return {f"{iou:.2f}": _mean(column) for iou, column in zip(IOU_THRESHOLDS, table.T, strict=True)}


def _mean(values: NDArray[np.float64]) -> float | None:
    """Return the mean of the values that are numbers, None where there is none."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else None


def average_precision(
    true_positive: NDArray[np.bool_], ignored: NDArray[np.bool_], num_positives: int, metric: Metric = "voc"
) -> NDArray[np.float64]:
    """Return the AP [T] of one class at T thresholds; NaN without positives.

    true_positive, ignored: [T, n] bool over detections by falling score; the rest are false positives.
    num_positives: how many objects there were to find.  metric: how precision is averaged; matching was done before.

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

"""Which detection found which object, by the devkit's rule or by COCO's, at every IoU threshold.

`match_detections` is the one way in; all that is derived from matches starts there: average precision, curves, errors,
intervals.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from data.records import LABEL_OF_CLASS, NUM_CLASSES, Target

from .coco_matching import RankedPairs, coco_assignment, kept_detections, rank_pairs
from .detections import Detections
from .devkit_matching import devkit_assignment
from .pairing import Pairing, pair

Metric = Literal["voc", "voc07", "coco"]
METRICS: tuple[Metric, ...] = get_args(Metric)
# Divided, not added up: 55 / 100 is the very double that an overlap of 11 / 20 pixels gives.
IOU_THRESHOLDS: tuple[float, ...] = tuple(percent / 100 for percent in range(50, 100, 5))


@dataclass(frozen=True, eq=False)
class ClassMatches:
    """What became of one class's n detections at each of T IoU thresholds.

    num_positives: objects that were there to find, neither difficult nor outside the area range.
    detections: [n] int64, rows of the `Detections` by falling score, ties as `ranking` breaks them; with `coco` at most
    100 of each image, the others are not judged at all.
    objects: [n] int64, the object of its class and image that each overlaps most, numbered over all targets joined; −1
    where it overlaps none.  iou: [n] float64, that overlap.
    matched: [T, n] int32, the object each is matched with, ignored ones too; −1 for none.
    true_positive, ignored: [T, n] bool; the rest are false positives.
    """

    num_positives: int
    detections: NDArray[np.int64]
    objects: NDArray[np.int64]
    iou: NDArray[np.float64]
    matched: NDArray[np.int32]
    true_positive: NDArray[np.bool_]
    ignored: NDArray[np.bool_]

    @property
    def false_positive(self) -> NDArray[np.bool_]:
        """[T, n] bool."""
        return ~(self.true_positive | self.ignored)


def match_detections(
    detections: Detections,
    targets: Sequence[Target],
    metric: Metric = "voc",
    thresholds: Sequence[float] = IOU_THRESHOLDS,
) -> dict[str, ClassMatches]:
    """Return the matches of every VOC class, by name in the devkit's order.

    targets[i]: the objects of the image detections.image_ids[i].  metric: `voc` and `voc07` have the devkit's rule.
    """
    return Matcher(pair(detections, targets, min(thresholds)), metric, thresholds).matches()


class Matcher:
    """Matches one pairing by one rule, for one area range after the other."""

    def __init__(self, pairing: Pairing, metric: Metric, thresholds: Sequence[float] = IOU_THRESHOLDS) -> None:
        """pairing: with all pairs whose IoU reaches the lowest threshold."""
        self._pairing = pairing
        self._thresholds = thresholds
        self._ranked: RankedPairs | None = None
        self._kept = np.ones(len(pairing.order), dtype=np.bool_)
        if metric == "coco":
            self._kept = kept_detections(pairing)
            self._ranked = rank_pairs(pairing, self._kept)

    def matches(self, area_range: tuple[float, float] | None = None) -> dict[str, ClassMatches]:
        """Return the matches of every VOC class, by name in the devkit's order.

        area_range: px², both ends included. Objects outside are ignored, and so are detections outside that are not
        matched with any object.
        """
        pairing = self._pairing
        ignored_objects = pairing.difficult
        if area_range is not None:
            ignored_objects = ignored_objects | _outside(pairing.object_areas, area_range)
        if self._ranked is None:
            assigned = devkit_assignment(pairing, ignored_objects, self._thresholds)
        else:
            assigned = coco_assignment(pairing, self._ranked, ignored_objects, self._thresholds)
        on_ignored = np.append(ignored_objects, False)[assigned]  # the appended one is read by −1
        true_positive = (assigned >= 0) & ~on_ignored
        if area_range is not None:
            on_ignored |= (assigned < 0) & _outside(pairing.areas, area_range)
        positives = np.bincount(pairing.object_labels[~ignored_objects], minlength=NUM_CLASSES)
        ends = np.cumsum(np.bincount(pairing.labels, minlength=NUM_CLASSES))
        matches = {}
        for name, label in LABEL_OF_CLASS.items():
            part: slice | NDArray[np.int64] = slice(ends[label - 1], ends[label])
            if not self._kept[part].all():
                part = ends[label - 1] + np.flatnonzero(self._kept[part])
            matches[name] = ClassMatches(
                num_positives=int(positives[label]),
                detections=pairing.order[part],
                objects=pairing.best_object[part],
                iou=pairing.best_iou[part],
                matched=assigned[:, part],
                true_positive=true_positive[:, part],
                ignored=on_ignored[:, part],
            )
        return matches


def _outside(areas: NDArray[np.float64], area_range: tuple[float, float]) -> NDArray[np.bool_]:
    return (areas < area_range[0]) | (areas > area_range[1])

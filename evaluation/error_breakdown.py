"""What kinds of mistakes a detector makes, and how much average precision each costs.

Every false positive is of one kind, by the overlaps with all objects of its image, difficult ones too:

```
localisation    IoU with an object of its class in [background_iou, iou)
classification  else IoU ≥ iou with an object of another class
duplicate       else IoU ≥ iou with an object of its class, which another detection has found
background      else IoU < background_iou with every object
both            else: the class is wrong, and the box, too
```

An object that is not difficult, that nothing found, and that no classification or localisation error points at, is
missed. The cost of a kind is the AP after putting that kind alone right, less the AP as it is:

- classification and localisation errors become true positives of the object that they overlap most; they vanish where
  it is found already, is difficult, or a higher-scored error of the same kind points at it, too,
- both, duplicate, background, and all false positives: they vanish,
- missed and all false negatives: the objects no longer count; where a class has none left, its AP is 1.

Costs do not add up to what is lacking to 1, since mistakes hide each other.

Source: Bolya et al., TIDE: A General Toolbox for Identifying Object Detection Errors, ECCV 2020, section 2. Unlike
there, difficult objects follow the devkit's rule, and the best of several errors is sought among one kind.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from data.records import LABEL_OF_CLASS, VOC_CLASSES, ImageRecord

from .confusion import confusion_matrix
from .detections import Detections
from .error_costs import average_after
from .error_kinds import ERRORS, FALSE_POSITIVES, KINDS, TOTALS, Judged, judge
from .ground_truth import join_ground_truth
from .matching import Metric, match_detections

__all__ = ["ERRORS", "KINDS", "TOTALS", "ErrorBreakdown", "error_breakdown"]


@dataclass(frozen=True, eq=False)
class ErrorBreakdown:
    """What became of D detections and G objects.

    counts: of every one of KINDS, which add up to D, of "missed", "false positive" and "false negative".
    average_precision: mean over classes as it is.  cost: AP gained by putting right each of ERRORS and TOTALS alone,
    fractions; both None and empty where there is nothing to find.
    per_class: {class: counts}; detections count with their own class, objects with theirs.
    confusion: [21, 21] int64; row: class of the object, 0 for none; column: class detected, 0 for nothing; detections
    with a score of confusion_score or more.
    kind_of_detection: [D] int8, index into KINDS.
    missed_objects: [G] bool over the targets joined, images in the order of the detections' image_ids: the "missed".
    pointed_object: [D] int64, the object that a true positive found or an error points at, over the targets joined;
    −1 for ignored, background and both.
    """

    counts: dict[str, int]
    cost: dict[str, float]
    average_precision: float | None
    per_class: dict[str, dict[str, int]]
    confusion: NDArray[np.int64]
    confusion_score: float
    kind_of_detection: NDArray[np.int8]
    missed_objects: NDArray[np.bool_]
    pointed_object: NDArray[np.int64]

    def to_json(self) -> dict[str, object]:
        """Return the figures, without what is kept of single detections and objects, ready for `json.dumps`."""
        return {
            "counts": self.counts,
            "cost": self.cost,
            "average_precision": self.average_precision,
            "per_class": self.per_class,
            "confusion": {
                "rows": ["background", *VOC_CLASSES],
                "columns": ["nothing", *VOC_CLASSES],
                "score_threshold": self.confusion_score,
                "matrix": self.confusion.tolist(),
            },
        }

    def most_confused(self, count: int = 5) -> list[tuple[str, str, int]]:
        """Return the pairs of classes confused most: the object's class, the detected one, how often."""
        wrong = self.confusion.copy()
        wrong[0], wrong[:, 0] = 0, 0
        np.fill_diagonal(wrong, 0)
        ranked = np.argsort(-wrong, axis=None, kind="stable")[:count]
        pairs = zip(*np.unravel_index(ranked, wrong.shape), strict=True)
        return [(VOC_CLASSES[a - 1], VOC_CLASSES[b - 1], int(wrong[a, b])) for a, b in pairs if wrong[a, b]]


def error_breakdown(
    detections: Detections,
    records: Sequence[ImageRecord],
    metric: Metric = "voc",
    iou: float = 0.5,
    background_iou: float = 0.1,
    confusion_score: float = 0.3,
) -> ErrorBreakdown:
    """Return the kinds of mistakes among the detections and their costs.

    metric: whose matching and AP.  iou: from which overlap on an object is found.  background_iou: below which a
    detection has nothing to do with an object.  confusion_score: detections below it are not in the confusion matrix.

    Raises DetectionsError where detections and records do not cover the same images.
    """
    if not 0 < background_iou <= iou <= 1:
        raise ValueError(f"expected 0 < background_iou ≤ iou ≤ 1, found {background_iou} and {iou}")
    truth = join_ground_truth(detections, records)
    matches = match_detections(detections, truth.targets, metric, [iou])
    judged = judge(detections, truth, matches, iou, background_iou)
    before = average_after(judged, (), metric)
    cost: dict[str, float] = {}
    if before is not None:
        cost = {kind: (average_after(judged, (kind,), metric) or 0.0) - before for kind in (*ERRORS, *TOTALS)}
    return ErrorBreakdown(
        counts=_counts(judged, np.ones(len(detections), np.bool_), np.ones(len(truth), np.bool_)),
        cost=cost,
        average_precision=before,
        per_class={
            name: _counts(judged, detections.labels == label, truth.labels == label)
            for name, label in LABEL_OF_CLASS.items()
        },
        confusion=confusion_matrix(detections, truth, iou, confusion_score),
        confusion_score=confusion_score,
        kind_of_detection=judged.kind,
        missed_objects=judged.missed,
        pointed_object=judged.pointed,
    )


def _counts(judged: Judged, detections: NDArray[np.bool_], objects: NDArray[np.bool_]) -> dict[str, int]:
    """Return how many of the chosen detections [D] and objects [G] are of each kind."""
    by_kind = np.bincount(judged.kind[detections], minlength=len(KINDS)).tolist()
    counts = dict(zip(KINDS, by_kind, strict=True))
    return counts | {
        "missed": int(judged.missed[objects].sum()),
        "false positive": sum(counts[kind] for kind in FALSE_POSITIVES),
        "false negative": int(judged.not_found[objects].sum()),
    }

"""Precision–recall curves of detections, and the score threshold that balances the two best.

Source: Everingham et al., The Pascal VOC Challenge, IJCV 2010, section 4.2.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from data.records import ImageRecord

from .average_precision import average_precision
from .detections import Detections
from .ground_truth import join_ground_truth
from .matching import ClassMatches, Metric, match_detections


@dataclass(frozen=True)
class OperatingPoint:
    """What keeping the detections with at least this score gives; f1 is the harmonic mean of the two."""

    score: float
    precision: float
    recall: float
    f1: float


@dataclass(frozen=True, eq=False)
class Curve:
    """Precision and recall of one class after each of its n detections by falling score, ignored ones left out.

    recall, precision: [n] float64 fractions, as they are.  envelope: [n] float64, the highest precision at this recall
    or a higher one.  scores: [n], as the detections have them.  num_positives: objects there were to find.
    average_precision: by the metric the curve was made with.
    """

    recall: NDArray[np.float64]
    precision: NDArray[np.float64]
    envelope: NDArray[np.float64]
    scores: NDArray[np.floating]
    num_positives: int
    average_precision: float

    @property
    def best_f1(self) -> OperatingPoint | None:
        """The threshold with the highest F1, the highest such; None where nothing was found.

        A threshold keeps all detections of its score, so only the last of equal scores is one.
        """
        last = np.flatnonzero(np.append(self.scores[1:] != self.scores[:-1], True)[: len(self.scores)])
        total = self.precision[last] + self.recall[last]
        f1 = 2 * self.precision[last] * self.recall[last] / np.where(total > 0, total, 1)
        if not f1.size or not f1.max():
            return None
        best = int(f1.argmax())
        row = last[best]
        return OperatingPoint(
            float(self.scores[row]), float(self.precision[row]), float(self.recall[row]), float(f1[best])
        )

    def to_json(self, max_points: int = 200) -> dict[str, object]:
        """Return the curve with at most so many points, ready for `json.dumps`; fractions with six decimals.

        The points are spread evenly over the length of the curve, recall and precision together, so that both ends of
        every drop larger than that spacing are among them.
        """
        kept = self._thinned(max_points)
        best = self.best_f1
        points = {name: getattr(self, name)[kept] for name in ("recall", "precision", "envelope", "scores")}
        return {
            **{name: np.round(values.astype(np.float64), 6).tolist() for name, values in points.items()},
            "num_positives": self.num_positives,
            "average_precision": self.average_precision,
            "best_f1": None if best is None else vars(best),
        }

    def _thinned(self, max_points: int) -> NDArray[np.int64]:
        """Return the rows to keep: the first, the last, both sides of every step from one equal part to the next."""
        count = len(self.recall)
        if max_points < 4:
            raise ValueError(f"expected max_points of at least 4, found {max_points}")
        if count <= max_points:
            return np.arange(count)
        length = np.abs(np.diff(self.recall)).cumsum() + np.abs(np.diff(self.envelope)).cumsum()
        parts = max_points // 2 - 1
        part = np.floor(np.append(0.0, length) / length[-1] * parts) if length[-1] else np.zeros(count)
        steps = np.flatnonzero(np.diff(part))
        return np.unique(np.concatenate([[0, count - 1], steps, steps + 1]))


def precision_recall_curves(
    detections: Detections, records: Sequence[ImageRecord], metric: Metric = "voc", iou: float = 0.5
) -> dict[str, Curve]:
    """Return the curve of every class that has an object to find, by name in the devkit's order.

    Raises DetectionsError where detections and records do not cover the same images.
    """
    matches = match_detections(detections, join_ground_truth(detections, records).targets, metric, [iou])
    return {name: _curve(match, detections.scores, metric) for name, match in matches.items() if match.num_positives}


def _curve(match: ClassMatches, scores: NDArray[np.floating], metric: Metric) -> Curve:
    counted = ~match.ignored[0]
    true_positives = match.true_positive[0][counted].cumsum()
    precision = true_positives / np.arange(1, len(true_positives) + 1)
    average = average_precision(match.true_positive, match.ignored, match.num_positives, metric)
    return Curve(
        recall=true_positives / match.num_positives,
        precision=precision,
        envelope=np.maximum.accumulate(precision[::-1])[::-1],
        scores=scores[match.detections[counted]],
        num_positives=match.num_positives,
        average_precision=float(average[0]),
    )

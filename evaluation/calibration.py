"""Whether a detection's score is the probability that it is right.

Detections are put into bins of equal width by score. In a calibrated detector the share of true positives in a bin
(its precision) is the bin's mean score (its confidence). The detection expected calibration error (D-ECE) is the mean
gap between the two, bins weighted by their detections; detections on difficult objects count nowhere.

Source: Küppers et al., Multivariate Confidence Calibration for Object Detection, CVPR Workshops 2020, section 3 (by
confidence alone).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from data.errors import DetectionsError
from data.records import ImageRecord

from .detections import Detections
from .ground_truth import join_ground_truth
from .matching import Metric, match_detections


@dataclass(frozen=True, eq=False)
class Calibration:
    """Confidence and precision by bins of the score.

    edges: [B + 1] float64, from the lowest score considered to 1; a bin holds its lower edge, the last one both.
    confidence: [B] float64, mean score.  precision: [B] float64, share of true positives; both NaN in an empty bin.
    counts: [B] int64.  expected_calibration_error: fraction, None where no detection reaches the lowest edge.
    """

    edges: NDArray[np.float64]
    confidence: NDArray[np.float64]
    precision: NDArray[np.float64]
    counts: NDArray[np.int64]
    expected_calibration_error: float | None

    @property
    def overconfidence(self) -> float | None:
        """Mean score less precision over all detections considered: above 0 where scores promise too much."""
        total = self.counts.sum()
        gaps = np.where(self.counts > 0, self.confidence - self.precision, 0.0)
        return float((self.counts * gaps).sum() / total) if total else None

    def to_json(self) -> dict[str, object]:
        """Return everything, ready for `json.dumps`; null in empty bins."""
        return {
            "edges": self.edges.tolist(),
            "confidence": [None if np.isnan(value) else float(value) for value in self.confidence],
            "precision": [None if np.isnan(value) else float(value) for value in self.precision],
            "counts": self.counts.tolist(),
            "expected_calibration_error": self.expected_calibration_error,
            "overconfidence": self.overconfidence,
        }


def calibration(
    detections: Detections,
    records: Sequence[ImageRecord],
    metric: Metric = "voc",
    iou: float = 0.5,
    bins: int = 10,
    min_score: float = 0.05,
) -> Calibration:
    """Return how far scores are probabilities of being a true positive at the IoU, over all classes.

    bins: how many, of equal width from min_score to 1.  min_score: detections below it are left out; an evaluation
    keeps many of almost no score, which would drown the others.

    Raises DetectionsError where detections and records do not cover the same images, or a score is above 1.
    """
    if not 0 <= min_score < 1 or bins < 1:
        raise ValueError(f"expected bins ≥ 1 and 0 ≤ min_score < 1, found {bins} and {min_score}")
    highest = detections.scores.max(initial=0.0)
    if highest > 1:
        raise DetectionsError(f"expected scores in 0..1 to judge them as probabilities, found {highest:g}")
    truth = join_ground_truth(detections, records)
    found = match_detections(detections, truth.targets, metric, [iou]).values()
    counted = np.concatenate([match.detections[~match.ignored[0]] for match in found])
    true_positive = np.concatenate([match.true_positive[0][~match.ignored[0]] for match in found])
    scores, edges = detections.scores[counted], np.linspace(min_score, 1.0, bins + 1)
    # As float32 both, since a multiple of a tenth is rarely the double that it is written as: 0.3 begins its bin.
    index = np.searchsorted(edges.astype(np.float32), scores.astype(np.float32), side="right") - 1
    considered = index >= 0
    return _in_bins(
        index[considered].clip(max=bins - 1), scores[considered].astype(np.float64), true_positive[considered], edges
    )


def _in_bins(
    index: NDArray[np.int64], scores: NDArray[np.float64], true: NDArray[np.bool_], edges: NDArray[np.float64]
) -> Calibration:
    bins = len(edges) - 1
    counts = np.bincount(index, minlength=bins)
    confidence, precision = np.full(bins, np.nan), np.full(bins, np.nan)
    np.divide(np.bincount(index, scores, bins), counts, out=confidence, where=counts > 0)
    np.divide(np.bincount(index, true, bins), counts, out=precision, where=counts > 0)
    gaps = np.abs(precision - confidence)[counts > 0]
    error = float((gaps * counts[counts > 0]).sum() / counts.sum()) if len(gaps) else None
    return Calibration(edges, confidence, precision, counts.astype(np.int64), error)

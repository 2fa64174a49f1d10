"""Average precision of many weightings of the images at once.

Axes: n detections of a class by falling score, U those that are a true positive at any threshold, K at one threshold,
P points of recall, I images, R weightings, T thresholds.

Between two true positives precision only falls and recall stands still, so cumulative weights are needed at the U
alone, and nothing after the last of them matters. Weight w of a true positive stands for w true positives in a row:
precision grows along them, so that all share the monotone curve's value at the last.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .matching import ClassMatches, Metric

Weights = NDArray[np.int32]

_COCO_RECALLS = np.linspace(0, 1, 101)


@dataclass(frozen=True, eq=False)
class RankedClass:
    """One class's detections as far as weights need them.

    positives: [I] int64, objects to find by image.  image: [n] int64, of the detections up to the last that is a true
    positive at any threshold.  true_ranks: [U] int64.  thresholds: T entries, `(columns, ignored, before)`: which of
    the U are true positives there [K], the ranks ignored there [m], and how many of those precede each [K].
    """

    name: str
    positives: NDArray[np.int64]
    image: NDArray[np.int64]
    true_ranks: NDArray[np.int64]
    thresholds: tuple[tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]], ...]

    @property
    def num_positives(self) -> int:
        """Objects to find in all images."""
        return int(self.positives.sum())


def rank_class(name: str, match: ClassMatches, image: NDArray[np.int64], positives: NDArray[np.int64]) -> RankedClass:
    """Return a class's matches made ready for weights; image: [n] of the match's detections."""
    true_ranks = np.flatnonzero(match.true_positive.any(axis=0))
    end = int(true_ranks[-1]) + 1 if len(true_ranks) else 0
    thresholds = []
    for true, ignored in zip(match.true_positive, match.ignored, strict=True):
        columns, left_out = np.flatnonzero(true[true_ranks]), np.flatnonzero(ignored[:end])
        thresholds.append((columns, left_out, np.searchsorted(left_out, true_ranks[columns])))
    return RankedClass(name, positives, image[:end], true_ranks, tuple(thresholds))


def weighted_average_precision(ranked: RankedClass, weights: Weights, metric: Metric) -> NDArray[np.float64]:
    """Return the AP [R, T] of a class under R weightings [I, R] of its images; NaN where they hold no object."""
    positives = ranked.positives @ weights
    result = np.full((weights.shape[1], len(ranked.thresholds)), np.nan)
    known = positives > 0
    if not known.any():
        return result
    result[known] = 0.0
    counted = _cumulative_at_true(ranked, weights)
    for column, (true, ignored, before) in enumerate(ranked.thresholds):
        if not len(true):
            continue
        weight = weights[ranked.image[ranked.true_ranks[true]]]
        found = weight.cumsum(axis=0, dtype=np.int32)
        left_out = weights[ranked.image[ignored]].cumsum(axis=0, dtype=np.int32)
        left_out = np.concatenate([np.zeros_like(weights[:1]), left_out])[before]
        # Nothing counted means nothing found: 0 / 1 is the 0 that such a place adds.
        precision = found / np.maximum(counted[true] - left_out, 1)
        envelope = np.maximum.accumulate(precision[::-1], axis=0)[::-1]
        if metric == "voc":
            values = (weight * envelope).sum(axis=0) / np.maximum(positives, 1)
        else:
            values = _mean_at_points(found, envelope, _needed(positives, metric))
        result[known, column] = values[known]
    return result


def _cumulative_at_true(ranked: RankedClass, weights: Weights) -> NDArray[np.int32]:
    """Return the cumulative weight [U, R] of all detections down to each true positive."""
    if not len(ranked.true_ranks):
        return np.zeros((0, weights.shape[1]), dtype=np.int32)
    starts = np.append(0, ranked.true_ranks[:-1] + 1)
    return np.add.reduceat(weights[ranked.image], starts, axis=0).cumsum(axis=0, dtype=np.int32)


def _needed(positives: NDArray[np.int64], metric: Metric) -> NDArray[np.int64]:
    """Return how many true positives reach each point of recall, [P, R]."""
    needed: NDArray[np.int64]
    if metric == "voc07":
        needed = np.maximum(-(-np.arange(11)[:, None] * positives // 10), 1)
        return needed
    recall = _COCO_RECALLS[:, None]
    # Compared as COCO's tools compare: by the rounded quotient, which may want one more or one less than the ceiling.
    near = np.ceil(recall * positives).astype(np.int64) + np.arange(-1, 2)[:, None, None]
    reaches = near / np.maximum(positives, 1) >= recall
    needed = np.maximum(np.where(reaches, near, near[-1]).min(axis=0), 1)
    return needed


def _mean_at_points(
    found: NDArray[np.int32], envelope: NDArray[np.float64], needed: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Return the mean [R] of the envelope [K, R] where the found [K, R] first reach the needed [P, R]; 0 beyond."""
    reached = found[-1].astype(np.int64)
    # One search over all weightings: each has numbers of its own range.
    offset = np.arange(len(reached)) * (int(reached.max()) + 1)
    keys = (found + offset).T.reshape(-1)
    places = np.searchsorted(keys, (np.minimum(needed, reached) + offset).T)  # [R, P], into R runs of K
    values = envelope.T.reshape(-1)[np.minimum(places, keys.size - 1)]
    average: NDArray[np.float64] = np.where((needed <= reached).T, values, 0.0).mean(axis=1)
    return average

"""How far average precision depends on which images happen to be scored: the bootstrap over images.

A resample draws as many images as there are, with replacement. It is kept as a weight an image: how often it was drawn.
Detections and objects count with their image's weight, so that matching is done once and a resample costs cumulative
sums of weights only. That is exactly the average precision of the set with its images literally repeated (where scores
tie, with the copies of a detection next to each other).

Average precision is higher on fewer different images, and a resample has but 63 % of them: resamples lie above the
estimate by half of their own spread or more, and their plain percentiles hold the true value too seldom (at 500 images
89 % where 95 % are promised, nearly always erring upwards). So the resamples are moved onto the estimate first:
intervals are percentiles of `estimate + resample − mean of the resamples`. What they are to hold is the AP expected on
other sets of as many images.

Source: Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapters 10 (bias) and 13 (percentile interval).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from data.errors import DetectionsError
from data.records import LABEL_OF_CLASS, ImageRecord

from .detections import Detections
from .ground_truth import join_ground_truth
from .matching import Metric, match_detections
from .weighted_precision import RankedClass, rank_class, weighted_average_precision

Table = NDArray[np.float64]  # AP [R, C, T] over resamples, classes and IoU thresholds; NaN where nothing is to find
Figure = Callable[[Table], NDArray[np.float64]]
Tick = Callable[[int], None]

_CHUNK = 32  # resamples at once: their weights stay in the processor's cache, which is twice as fast as 512


def _unheard(done: int) -> None:
    """Take no notice of progress."""


@dataclass(frozen=True)
class Interval:
    """A figure on these images, and between what it may lie on as many others of the same kind.

    estimate, low, high: fractions.  level: the share of resamples between low and high, cut evenly at both ends.
    """

    estimate: float
    low: float
    high: float
    level: float

    def to_json(self) -> dict[str, float]:
        """Return everything, ready for `json.dumps`."""
        return dict(vars(self))


@dataclass(frozen=True)
class Difference(Interval):
    """A second figure less a first one, on the same images; share_below_zero: of the resamples."""

    share_below_zero: float

    @property
    def holds_zero(self) -> bool:
        """Whether the interval cannot tell the two apart."""
        return self.low <= 0 <= self.high


def bootstrap(
    detections: Detections,
    records: Sequence[ImageRecord],
    metric: Metric = "voc",
    *,
    resamples: int = 1000,
    seed: int = 0,
    level: float = 0.95,
    tick: Tick = _unheard,
) -> dict[str, Interval]:
    """Return the intervals of "mAP" and "AP50", the means over classes as `evaluate` gives them.

    tick: called with how many more resamples are done.

    Raises DetectionsError where detections and records do not cover the same images, or there is nothing to find.
    """
    ranked = _rank(detections, records, metric)
    estimate, resampled = _tables([ranked], len(records), metric, resamples, seed, tick)
    return {
        name: _interval(_centred(figure(resampled[0]), figure(estimate[0])), figure(estimate[0]), level, least=0.0)
        for name, figure in (("mAP", _mean_ap), ("AP50", _mean_ap50))
    }


def paired_bootstrap(
    first: Detections,
    second: Detections,
    records: Sequence[ImageRecord],
    metric: Metric = "voc",
    *,
    resamples: int = 1000,
    seed: int = 0,
    level: float = 0.95,
    tick: Tick = _unheard,
) -> dict[str, Difference]:
    """Return second less first in "mAP", "AP50", and the AP50 of each class with an object to find, by its name.

    Both are scored on the same resampled images: what makes an image easy or hard for both falls out.

    Raises DetectionsError where detections and records do not cover the same images, or there is nothing to find.
    """
    ranked = [_rank(detections, records, metric) for detections in (first, second)]
    estimate, resampled = _tables(ranked, len(records), metric, resamples, seed, tick)

    def difference(figure: Figure) -> Difference:
        change = figure(estimate[1]) - figure(estimate[0])
        resampled_change = _centred(figure(resampled[1]) - figure(resampled[0]), change)
        interval = _interval(resampled_change, change, level, least=-1.0)
        return Difference(**vars(interval), share_below_zero=float((resampled_change < 0).mean()))

    differences = {"mAP": difference(_mean_ap), "AP50": difference(_mean_ap50)}
    for column, ranked_class in enumerate(ranked[0]):
        if ranked_class.num_positives:
            differences[ranked_class.name] = difference(_ap50_of(column))
    return differences


def weighted_evaluation(
    detections: Detections, records: Sequence[ImageRecord], weights: NDArray[np.int32], metric: Metric = "voc"
) -> Table:
    """Return the AP of every class at every threshold with each image counted so often as its weight says.

    weights: [I, R] int32, images by their sorted ids.

    Raises DetectionsError where detections and records do not cover the same images, or there is nothing to find.
    """
    return _table(_rank(detections, records, metric), weights, metric)


def _rank(detections: Detections, records: Sequence[ImageRecord], metric: Metric) -> list[RankedClass]:
    """Return the classes' matches; images are numbered by id, so that weights mean the same for every detector."""
    truth = join_ground_truth(detections, records)
    if truth.difficult.all():
        raise DetectionsError("expected an object to find in these images, found none: there is no AP to resample")
    place = np.argsort(np.argsort(np.array(detections.image_ids)))
    ranked = []
    for name, match in match_detections(detections, truth.targets, metric).items():
        sought = (truth.labels == LABEL_OF_CLASS[name]) & ~truth.difficult
        positives = np.bincount(place[truth.image_index[sought]], minlength=len(place))
        ranked.append(rank_class(name, match, place[detections.image_index[match.detections]], positives))
    return ranked


def _tables(
    detectors: Sequence[list[RankedClass]], images: int, metric: Metric, resamples: int, seed: int, tick: Tick
) -> tuple[list[Table], list[Table]]:
    """Return each detector's table on the images as they are, R = 1, and on the resamples."""
    if resamples < 1:
        raise ValueError(f"expected at least one resample, found {resamples}")
    once = np.ones((images, 1), dtype=np.int32)
    rng = np.random.default_rng(seed)
    parts: list[list[Table]] = [[] for _ in detectors]
    for start in range(0, resamples, _CHUNK):
        weights = draw_weights(rng, images, min(_CHUNK, resamples - start))
        for part, detector in zip(parts, detectors, strict=True):
            part.append(_table(detector, weights, metric))
        tick(weights.shape[1])
    return [_table(detector, once, metric) for detector in detectors], [np.concatenate(part) for part in parts]


def draw_weights(rng: np.random.Generator, images: int, resamples: int) -> NDArray[np.int32]:
    """Return how often each image was drawn, [I, R]; the same draws however resamples are cut into chunks."""
    weights = np.empty((images, resamples), dtype=np.int32)
    for column in range(resamples):
        weights[:, column] = np.bincount(rng.integers(0, images, images), minlength=images)
    return weights


def _table(detector: Sequence[RankedClass], weights: NDArray[np.int32], metric: Metric) -> Table:
    return np.stack([weighted_average_precision(ranked, weights, metric) for ranked in detector], axis=1)


def _mean_ap(table: Table) -> NDArray[np.float64]:
    """Return the mean [R] over classes and thresholds that have an AP; NaN where none has."""
    known = ~np.isnan(table)
    count = known.sum(axis=(1, 2))
    total = np.where(known, table, 0.0).sum(axis=(1, 2))
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def _mean_ap50(table: Table) -> NDArray[np.float64]:
    return _mean_ap(table[:, :, :1])


def _ap50_of(column: int) -> Figure:
    return lambda table: table[:, column, 0]


def _centred(resampled: NDArray[np.float64], estimate: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the resampled figures moved onto the estimate; those without an object to find are left out."""
    known = resampled[~np.isnan(resampled)]
    if not len(known) or known.min() == known.max():
        return np.broadcast_to(estimate, known.shape)  # no rounding where there is no spread
    centred: NDArray[np.float64] = known + (estimate - known.mean())
    return centred


def _interval(centred: NDArray[np.float64], estimate: NDArray[np.float64], level: float, least: float) -> Interval:
    """Return the middle `level` of the centred figures, cut to what the figure can be: from least to 1."""
    ends = np.percentile(centred, [50 * (1 - level), 50 * (1 + level)]) if len(centred) else estimate.repeat(2)
    low, high = np.clip(ends, least, 1.0).tolist()
    return Interval(float(estimate[0]), low, high, level)

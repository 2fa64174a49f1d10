"""Everything that a report shows of its runs, computed from what they found and what was there."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from data.records import ImageRecord
from evaluation.average_precision import EvaluationResult, evaluate
from evaluation.bootstrap import Interval, bootstrap, paired_bootstrap
from evaluation.calibration import Calibration, calibration
from evaluation.curves import Curve, precision_recall_curves
from evaluation.detections import Detections
from evaluation.error_breakdown import ErrorBreakdown, error_breakdown

from .run import Run

THRESHOLDS = (0.3, 0.25, 0.2, 0.15, 0.1, 0.05)
_WEAK_DETECTIONS_PER_IMAGE = 3
Tick = Callable[[int], None]


@dataclass(frozen=True, eq=False)
class Analysis:
    """What one run's detections come to.

    result: by the devkit's all-point area, with the other definitions' means.  curves: by class, at IoU 0.50.
    interval: of `mAP` and `AP50`, over images.  gain: the same of the difference to the baseline, and that of AP50 by
    class, images paired; None for the baseline itself.
    """

    result: EvaluationResult
    curves: Mapping[str, Curve]
    breakdown: ErrorBreakdown
    calibration: Calibration
    interval: Mapping[str, Interval]
    gain: Mapping[str, Interval] | None


@dataclass(frozen=True, eq=False)
class Comparison:
    """Runs on the same images. baseline: place of the run that the others are compared with.

    image_set: the images' name, `2007:val`.  records: these images.  threshold: the score from which on single
    detections are shown and confusions counted.  analyses: one a run.
    """

    runs: tuple[Run, ...]
    baseline: int
    image_set: str
    records: tuple[ImageRecord, ...]
    threshold: float
    analyses: tuple[Analysis, ...]

    @property
    def names(self) -> list[str]:
        """The runs' names."""
        return [run.name for run in self.runs]


def compare(
    runs: Sequence[Run], baseline: int, image_set: str, records: Sequence[ImageRecord], resamples: int, tick: Tick
) -> Comparison:
    """Return the comparison of runs whose detections are all of these records.

    resamples: behind each interval.  tick: called with how many more are done, of a run's own interval and of that of
    its difference to the baseline.

    Raises DetectionsError where detections are of other images.
    """
    threshold = usual_threshold([run.detections for run in runs])
    analyses = []
    for place, run in enumerate(runs):
        found = run.detections
        gain = None
        if place != baseline:
            gain = paired_bootstrap(runs[baseline].detections, found, records, resamples=resamples, tick=tick)
        analyses.append(
            Analysis(
                result=evaluate(found, records),
                curves=precision_recall_curves(found, records),
                breakdown=error_breakdown(found, records, confusion_score=threshold),
                calibration=calibration(found, records),
                interval=bootstrap(found, records, resamples=resamples, tick=tick),
                gain=gain,
            )
        )
    return Comparison(tuple(runs), baseline, image_set, tuple(records), threshold, tuple(analyses))


def usual_threshold(detections: Sequence[Detections]) -> float:
    """Return the score from which on single detections are worth showing.

    The highest of THRESHOLDS at which one of the detectors finds something in every image on average; of weaker ones,
    the score at which the first to do so finds three times as much.
    """
    for threshold in THRESHOLDS:
        if any(int(np.sum(found.scores >= threshold)) >= len(found.image_ids) for found in detections):
            return threshold
    least = 0.001
    for found in detections:
        wanted = min(_WEAK_DETECTIONS_PER_IMAGE * len(found.image_ids), len(found))
        if wanted:
            least = max(least, math.floor(1000 * float(np.sort(found.scores)[-wanted])) / 1000)
    return least

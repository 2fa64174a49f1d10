"""Everything that a report shows of its runs, computed from what they found and what was there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import get_args

from data.records import ImageRecord
from evaluation.average_precision import EvaluationResult, evaluate
from evaluation.bootstrap import Interval, bootstrap, paired_bootstrap
from evaluation.calibration import Calibration, calibration
from evaluation.curves import Curve, precision_recall_curves
from evaluation.error_breakdown import ErrorBreakdown, error_breakdown
from evaluation.matching import Metric

from .run import Run

METRICS: tuple[Metric, ...] = get_args(Metric)


@dataclass(frozen=True, eq=False)
class Analysis:
    """What one run's detections come to.

    results: by definition of AP.  curves: by class, at IoU 0.50.  interval: of `mAP` and `AP50`, over images.
    gain: the same of the difference to the baseline, images paired; None for the baseline itself.
    """

    results: Mapping[Metric, EvaluationResult]
    curves: Mapping[str, Curve]
    breakdown: ErrorBreakdown
    calibration: Calibration
    interval: Mapping[str, Interval]
    gain: Mapping[str, Interval] | None


@dataclass(frozen=True, eq=False)
class Comparison:
    """Runs on the same images. baseline: place of the run that the others are compared with.

    image_set: the images' name, `2007:val`.  records: these images.  analyses: one a run.
    """

    runs: tuple[Run, ...]
    baseline: int
    image_set: str
    records: tuple[ImageRecord, ...]
    analyses: tuple[Analysis, ...]

    @property
    def names(self) -> list[str]:
        """The runs' names."""
        return [run.name for run in self.runs]


def compare(runs: Sequence[Run], baseline: int, image_set: str, records: Sequence[ImageRecord]) -> Comparison:
    """Return the comparison of runs whose detections are all of these records.

    Raises DetectionsError where detections are of other images.
    """
    analyses = tuple(
        _analyse(run, None if place == baseline else runs[baseline], records) for place, run in enumerate(runs)
    )
    return Comparison(tuple(runs), baseline, image_set, tuple(records), analyses)


def _analyse(run: Run, baseline: Run | None, records: Sequence[ImageRecord]) -> Analysis:
    found = run.detections
    return Analysis(
        results={metric: evaluate(found, records, metric) for metric in METRICS},
        curves=precision_recall_curves(found, records),
        breakdown=error_breakdown(found, records),
        calibration=calibration(found, records),
        interval=bootstrap(found, records),
        gain=None if baseline is None else paired_bootstrap(baseline.detections, found, records),
    )

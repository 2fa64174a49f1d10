"""What is behind an average precision: how sure it is, which mistakes it lacks to 1, what scores are worth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import RenderableType

from data.records import ImageRecord
from evaluation.average_precision import EvaluationResult, evaluate
from evaluation.bootstrap import Interval, bootstrap
from evaluation.calibration import Calibration, calibration
from evaluation.curves import Curve, precision_recall_curves
from evaluation.detail_tables import (
    calibration_line,
    confused_lines,
    error_table,
    interval_lines,
    operating_points_table,
)
from evaluation.detections import Detections
from evaluation.error_breakdown import ErrorBreakdown, error_breakdown
from evaluation.matching import Metric
from pipeline.progress import progress
from pipeline.scoring import ScoreRequest, find_detections, keep

RESAMPLES = 1000


@dataclass(frozen=True)
class Detail:
    """What `eval --detail` adds. calibration: None where scores go above 1."""

    intervals: dict[str, Interval]
    errors: ErrorBreakdown
    calibration: Calibration | None
    curves: dict[str, Curve]

    def to_json(self) -> dict[str, object]:
        """Return everything, ready for `json.dumps`."""
        return {
            "resamples": RESAMPLES,
            "intervals": {name: found.to_json() for name, found in self.intervals.items()},
            "errors": self.errors.to_json(),
            "calibration": None if self.calibration is None else self.calibration.to_json(),
            "curves": {name: curve.to_json() for name, curve in self.curves.items()},
        }

    def tables(self) -> list[RenderableType]:
        """Return everything as rich renderables for 80 columns."""
        return [
            interval_lines(self.intervals),
            error_table(self.errors),
            confused_lines(self.errors),
            operating_points_table(self.curves),
            calibration_line(self.calibration),
        ]


def score_in_detail(request: ScoreRequest) -> tuple[EvaluationResult, Detail, list[str]]:
    """Return the figures as `score` does, and what is behind them; raises as `score`."""
    records, found, notes = find_detections(request)
    result = evaluate(found, records, request.metric)
    return result, examine(found, records, request.metric), notes + keep(request, records, found)


def examine(detections: Detections, records: Sequence[ImageRecord], metric: Metric) -> Detail:
    """Return the detail of one set of detections.

    Raises DetectionsError where there is nothing to find in the images.
    """
    with progress("resampling", RESAMPLES, "resamples") as tick:
        intervals = bootstrap(detections, records, metric, resamples=RESAMPLES, tick=tick)
    return Detail(
        intervals=intervals,
        errors=error_breakdown(detections, records, metric),
        calibration=calibration(detections, records, metric) if detections.scores.max(initial=0.0) <= 1 else None,
        curves=precision_recall_curves(detections, records, metric),
    )

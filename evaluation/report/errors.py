"""What goes wrong: kinds of errors and what each costs, confusions between classes, and calibration."""

from __future__ import annotations

import numpy as np
from markupsafe import Markup

from data.records import VOC_CLASSES
from evaluation.error_kinds import ERRORS, KINDS, TOTALS

from .bars import Bars, bar_chart
from .charts import chart_grid
from .comparison import Comparison
from .heat_map import heat_map
from .page import Section
from .reliability import reliability_diagram
from .tables import Cell, Column, table
from .text import count, percent

_CALIBRATION = (
    "How often detections of a score are right, at IoU 0.50, detections on difficult objects left out. On the dashed"
    " line, a score is the probability of being right; bars below it promise too much. D-ECE is the mean gap."
)
_NO_SCORES = '<p class="absent">No detection reaches a score of {:g}: nothing to calibrate.</p>'


def errors_section(shown: Comparison) -> Section:
    """Return what each kind of error costs in AP50, and how many there are of each kind."""
    kinds = [*ERRORS, *TOTALS]
    bars = [
        Bars(run.name, [None if kind not in cost else 100 * cost[kind] for kind in kinds], place)
        for place, (run, analysis) in enumerate(zip(shown.runs, shown.analyses, strict=True))
        for cost in [analysis.breakdown.cost]
    ]
    chart = bar_chart(kinds, bars, title="AP50 that each kind of error costs, in points", text=lambda v: f"{v:.1f}")
    columns = [Column("run", numeric=False), *(Column(kind) for kind in (*KINDS, "missed"))]
    rows = [
        [Cell(run.name), *(Cell(count(analysis.breakdown.counts[kind])) for kind in (*KINDS, "missed"))]
        for run, analysis in zip(shown.runs, shown.analyses, strict=True)
    ]
    body = chart_grid([("AP50 gained by putting right this kind alone, in points", chart)], names=shown.names)
    body += table(columns, rows, caption="How many of each, at all scores", styles=range(len(rows)))
    note = (
        "Localisation: right class, IoU 0.10 to 0.50. Classification: wrong class, IoU of 0.50 or more. Both: wrong"
        " class, IoU 0.10 to 0.50. Duplicate: the object is found already. Background: nothing near. Missed: no"
        " detection comes near the object. The costs do not add up, since errors hide each other (TIDE, Bolya 2020)."
    )
    return Section("errors", "Errors and what they cost", body, note)


def confusion_section(shown: Comparison) -> Section:
    """Return which classes are taken for which, a matrix a run."""
    parts = []
    for place, (run, analysis) in enumerate(zip(shown.runs, shown.analyses, strict=True)):
        folded = Markup("<details{}><summary>{}</summary>{}{}</details>").format(
            Markup(" open") if place < 2 else "", run.name, _confusions(shown, place), _matrix(shown, place)
        )
        parts.append(folded if len(shown.runs) > 1 else _confusions(shown, place) + _matrix(shown, place))
        score = analysis.breakdown.confusion_score
    note = (
        f"Detections with a score of {score:g} or more, at IoU 0.50, by the object they overlap most; in percent of the"
        " row. Nothing: objects that no such detection found. Background: detections where no object is."
    )
    return Section(
        "confusion", "Confusion matrix", Markup('<div class="matrices">{}</div>').format(Markup("\n").join(parts)), note
    )


def calibration_section(shown: Comparison) -> Section:
    """Return the reliability diagram of every run."""
    figures = []
    for place, (run, analysis) in enumerate(zip(shown.runs, shown.analyses, strict=True)):
        found = analysis.calibration
        error = found.expected_calibration_error
        precision = [None if np.isnan(value) else float(value) for value in found.precision]
        if error is None:
            figures.append((run.name, Markup(_NO_SCORES).format(found.edges[0])))
            continue
        chart = reliability_diagram(
            found.edges.tolist(), precision, found.counts.tolist(), title=f"Precision by confidence, {run.name}",
            style=place,
        )  # fmt: skip
        figures.append((f"{run.name}: D-ECE {percent(error)} points", chart))
    return Section("calibration", "Calibration", chart_grid(figures), _CALIBRATION)


def _confusions(shown: Comparison, place: int) -> Markup:
    pairs = shown.analyses[place].breakdown.most_confused()
    if not pairs:
        return Markup("<p>No class is taken for another one.</p>")
    told = ", ".join(f"{actual} for {detected} ({number})" for actual, detected, number in pairs)
    return Markup("<p>Most often taken: {}.</p>").format(told)


def _matrix(shown: Comparison, place: int) -> Markup:
    matrix = shown.analyses[place].breakdown.confusion
    # Classes that neither occur nor are detected, in any run, would only make the rest smaller.
    totals = np.sum([analysis.breakdown.confusion for analysis in shown.analyses], axis=0)
    kept = [0, *(label for label in range(1, len(matrix)) if totals[label].any() or totals[:, label].any())]
    rows = [*kept[1:], 0]
    cut = matrix[np.ix_(rows, rows)].astype(float)
    sums = cut.sum(axis=1, keepdims=True)
    shares = np.divide(cut, sums, out=np.zeros_like(cut), where=sums > 0)
    values = [[float(share) if number else None for share, number in zip(*line, strict=True)]
              for line in zip(shares, cut, strict=True)]  # fmt: skip
    names = [VOC_CLASSES[label - 1] if label else "" for label in rows]
    row_names, column_names = [*names[:-1], "background"], [*names[:-1], "nothing"]
    details = [
        [f"{row} detected as {column}: {number:.0f}" for column, number in zip(column_names, line, strict=True)]
        for row, line in zip(row_names, cut, strict=True)
    ]
    return heat_map(
        values, rows=row_names, columns=column_names, title=f"Confusion matrix of {shown.runs[place].name}",
        row_label="object", column_label="detected as", text=lambda v: f"{100 * v:.0f}", scale=(0.0, 1.0),
        compact=True, details=details,
    )  # fmt: skip

"""AP by class, and the precision–recall curve of each."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from data.records import LABEL_OF_CLASS, VOC_CLASSES
from evaluation.average_precision import EvaluationResult
from evaluation.curves import Curve

from .charts import Series, chart_grid, line_chart
from .comparison import Comparison
from .page import Section
from .summary import gain_cell
from .tables import Cell, Column, table
from .text import count, percent, points


def classes_section(shown: Comparison) -> Section:
    """Return AP50 and mAP of every class that has an object, and each run's difference to the baseline."""
    found = [name for name in VOC_CLASSES if any(name in analysis.curves for analysis in shown.analyses)]
    numbers = {name: _num_objects(shown, name) for name in found}
    columns = [Column("class", numeric=False), Column("objects")]
    for place, run in enumerate(shown.runs):
        columns.append(Column("AP50", group=run.name, style=place))
        if place != shown.baseline:
            columns.append(Column("Δ AP50", title="less the baseline's", group=run.name, style=place))
        columns.append(Column("mAP", title="mean over IoU 0.50 … 0.95", group=run.name, style=place))
    rows = []
    for name in found:
        row = [Cell(name), Cell(count(numbers[name]), value=numbers[name])]
        for place in range(len(shown.runs)):
            row += _cells(shown, place, name)
        rows.append(row)
    caption = "AP by class, percent; Δ to the baseline in points"
    note = (
        "Objects that are not difficult. Δ with its interval over images, bold where that excludes zero; with twenty"
        " classes, one of them does so by chance."
    )
    return Section(
        "classes", "Classes", table(columns, rows, caption=caption, sortable=True, footer=_means(shown)), note
    )


def curves_of_classes_section(shown: Comparison) -> Section:
    """Return precision over recall of every class, as small charts on common axes."""
    figures = []
    for name in VOC_CLASSES:
        curves = [analysis.curves.get(name) for analysis in shown.analyses]
        if not any(curves):
            continue
        series = [
            Series(run.name, *_steps(curve), style=place, marked=False)
            for place, (run, curve) in enumerate(zip(shown.runs, curves, strict=True))
            if curve is not None
        ]
        chart = line_chart(
            series, title=f"precision over recall, {name}", x_range=(0, 1), y_range=(0, 1), size=(260, 200),
            most_ticks=3, x_label="recall", y_label="precision",
        )  # fmt: skip
        objects = max(curve.num_positives for curve in curves if curve is not None)
        figures.append((f"{name}, {objects:,} object{'s' * (objects != 1)}", chart))
    body = chart_grid(figures, names=shown.names, small=True)
    note = "At IoU 0.50. The highest precision at each recall or beyond: the area below is AP50."
    return Section("precision-recall", "Precision and recall", body, note)


def _num_objects(shown: Comparison, name: str) -> int:
    label = LABEL_OF_CLASS[name]
    return sum(int(np.sum((r.target.labels == label) & ~r.target.difficult)) for r in shown.records)


def _cells(shown: Comparison, place: int, name: str) -> list[Cell]:
    values = _of(shown, place).per_class[name]
    ap50, mean = values["AP50"], values["mAP"]
    cells = [Cell(percent(ap50), value=ap50, share=ap50, style=place)]
    if place != shown.baseline:
        cells.append(gain_cell((shown.analyses[place].gain or {}).get(name)))
    return [*cells, Cell(percent(mean), value=mean)]


def _means(shown: Comparison) -> list[Cell | str]:
    total = sum(int(np.sum(~record.target.difficult)) for record in shown.records)
    row: list[Cell | str] = ["mean over classes", Cell(count(total))]
    before = _of(shown, shown.baseline).per_iou["0.50"]
    for place in range(len(shown.runs)):
        result = _of(shown, place)
        ap50 = result.per_iou["0.50"]
        row.append(percent(ap50))
        if place != shown.baseline:
            row.append(points(None if ap50 is None or before is None else ap50 - before))
        row.append(percent(result.mAP))
    return row


def _of(shown: Comparison, place: int) -> EvaluationResult:
    return shown.analyses[place].result


def _steps(curve: Curve) -> tuple[Sequence[float], Sequence[float]]:
    """Return the corners of the curve's staircase: precision falls where recall does not rise."""
    recall, envelope = curve.recall, curve.envelope
    if not len(recall):
        return [0.0], [0.0]
    # The last detection of each height reaches farthest; the next height starts there.
    last = np.flatnonzero(np.append(envelope[1:] != envelope[:-1], True))
    x: NDArray[np.float64] = np.repeat(recall[last], 2)
    y = np.append(np.repeat(envelope[last], 2)[1:], 0.0)
    corners_x, corners_y = np.append(0.0, x), np.append(envelope[0], y)
    return corners_x.tolist(), corners_y.tolist()

"""The first section: every run in one table, its gain over the baseline, and AP by definition and by IoU."""

from __future__ import annotations

import math
from collections.abc import Mapping

from markupsafe import Markup

from evaluation.bootstrap import Interval
from evaluation.matching import METRICS, Metric
from evaluation.sizes import SIZES

from .bars import IntervalRow, interval_chart
from .charts import Series, chart_grid, line_chart
from .comparison import Comparison
from .page import Section
from .tables import Cell, Column, table
from .text import percent, points

METRIC_NAMES: Mapping[Metric, str] = {
    "voc": "VOC, area under the curve",
    "voc07": "VOC2007, 11 points",
    "coco": "COCO, 101 points",
}


def summary_section(shown: Comparison) -> Section:
    """Return the runs side by side."""
    body = [_runs_table(shown)]
    figures = [("AP by the IoU that counts as found", _by_iou(shown))]
    if len(shown.runs) > 1:
        over = f"over {shown.runs[shown.baseline].name}, points"
        figures = [(f"Gain in {key} {over}", _gains(shown, key)) for key in ("mAP", "AP50")] + figures
    body += [chart_grid(figures, names=shown.names), _definitions(shown), _sizes(shown)]
    return Section("summary", "Summary", Markup("\n").join(body), _note(shown))


def _note(shown: Comparison) -> str:
    level = next(iter(shown.analyses[0].interval.values())).level
    note = (
        f"Percent, all-point area AP of the last epoch; mAP is the mean over IoU 0.50 … 0.95. Brackets: {level:.0%}"
        f" bootstrap interval over the {len(shown.records):,} images of {shown.image_set}."
    )
    if len(shown.runs) > 1:
        note += (
            " Differences are paired image by image; bold where the interval excludes zero. It says how far other"
            " images would move the figure, and nothing of other seeds."
        )
    return note


def _runs_table(shown: Comparison) -> Markup:
    compared = len(shown.runs) > 1
    columns = [Column("run", numeric=False), Column("distilled", numeric=False), Column("seed"), Column("mAP")]
    columns += [Column("Δ mAP")] * compared + [Column("AP50")] + [Column("Δ AP50")] * compared
    columns += [Column("best epoch", title="The epoch with the highest validation mAP, chosen on these images")]
    rows = []
    for place, (run, analysis) in enumerate(zip(shown.runs, shown.analyses, strict=True)):
        row = [
            Cell(run.name, note="baseline of Δ" if compared and place == shown.baseline else ""),
            Cell(run.arm, note=run.backbone),
            Cell(str(run.seed), value=run.seed),
        ]
        figures = analysis.result
        for key, value in (("mAP", figures.mAP), ("AP50", figures.per_iou["0.50"])):
            row.append(Cell(percent(value), note=interval_text(analysis.interval.get(key)), value=value))
            if compared:
                row.append(gain_cell(None if analysis.gain is None else analysis.gain.get(key)))
        row.append(Cell(percent(run.best_mean_ap), note=f"val mAP, epoch {run.best_epoch}", value=run.best_mean_ap))
        rows.append(row)
    return table(columns, rows, caption="Runs", sortable=len(rows) > 2, styles=range(len(rows)))


def gain_cell(gain: Interval | None) -> Cell:
    """Return a difference with its interval, set off where that excludes zero."""
    if gain is None:
        return Cell("")
    excludes_zero = gain.low > 0 or gain.high < 0
    return Cell(points(gain.estimate), note=interval_text(gain, signed=True), value=gain.estimate, strong=excludes_zero)


def interval_text(interval: Interval | None, *, signed: bool = False) -> str:
    """Return the ends of an interval of fractions, in percent or signed points."""
    if interval is None:
        return ""
    written = points if signed else percent
    return f"[{written(interval.low)}, {written(interval.high)}]"


def _gains(shown: Comparison, key: str) -> Markup:
    rows = [
        IntervalRow(run.name, 100 * gain.estimate, 100 * gain.low, 100 * gain.high, place)
        for place, (run, analysis) in enumerate(zip(shown.runs, shown.analyses, strict=True))
        if analysis.gain is not None and (gain := analysis.gain.get(key)) is not None
    ]
    title = f"Gain in {key} over the baseline with its interval, a line a run"
    return interval_chart(rows, title=title, x_label=f"Δ {key}, points") if rows else Markup("")


def _by_iou(shown: Comparison) -> Markup:
    series = []
    for place, (run, analysis) in enumerate(zip(shown.runs, shown.analyses, strict=True)):
        by_iou = analysis.result.per_iou
        values = [None if value is None else 100 * value for value in by_iou.values()]
        series.append(Series(run.name, [float(iou) for iou in by_iou], values, place))
    return line_chart(series, title="AP by IoU threshold", x_label="IoU threshold", y_label="AP, percent",
                      x_range=(0.5, 0.95), most_ticks=9)  # fmt: skip


def _definitions(shown: Comparison) -> Markup:
    columns = [Column("run", numeric=False)]
    columns += [Column(what, group=METRIC_NAMES[metric]) for metric in METRICS for what in ("mAP", "AP50")]
    rows = []
    for run, analysis in zip(shown.runs, shown.analyses, strict=True):
        means = [analysis.result.definitions[metric] for metric in METRICS]
        figures = [value for mean in means for value in (mean["mAP"], mean["AP50"])]
        rows.append([Cell(run.name), *(Cell(percent(value, 2), value=value) for value in figures)])
    caption = "The same detections by every definition of AP, in percent"
    return table(columns, rows, caption=caption, styles=range(len(rows)))


def _sizes(shown: Comparison) -> Markup:
    by_run = [analysis.result.by_size for analysis in shown.analyses]
    columns = [Column("run", numeric=False)]
    for name, (low, high) in SIZES.items():
        area = f"from {low**0.5:.0f}²" if math.isinf(high) else f"up to {high**0.5:.0f}²"
        group = f"{name}, {area} px, {by_run[0][name]['objects']:,} objects"
        columns += [Column(what, group=group) for what in ("mAP", "AP50")]
    rows = []
    for run, sizes in zip(shown.runs, by_run, strict=True):
        figures = [value for name in SIZES for value in (sizes[name]["mAP"], sizes[name]["AP50"])]
        rows.append([Cell(run.name), *(Cell(percent(value), value=value) for value in figures)])
    return table(columns, rows, caption="AP by size of object, in percent", styles=range(len(rows)))

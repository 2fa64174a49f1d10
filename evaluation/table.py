"""Shows an evaluation as tables that read well at 80 columns."""

from __future__ import annotations

from itertools import zip_longest

from rich import box
from rich.console import Group
from rich.table import Table

from .average_precision import DefinitionMeans, EvaluationResult
from .matching import Metric

_METRIC_NAMES: dict[Metric, str] = {
    "voc": "voc: all-point area, the devkit's matching",
    "voc07": "voc07: 11 points, the devkit's matching",
    "coco": "coco: 101 points, COCO's matching",
}


def result_table(result: EvaluationResult) -> Group:
    """Return a rich renderable: AP by IoU threshold and definition, then by class in the devkit's order and by size.

    Numbers are percent; – stands where there is no ground truth. The whole fits a terminal of 24 lines by 80 columns.
    """
    images = f"{result.images:,} image{'' if result.images == 1 else 's'}"
    return Group(_by_iou(result, f"mAP in percent, {images}"), _by_class_and_size(result))


def _by_iou(result: EvaluationResult, title: str) -> Table:
    table = _table(title)
    table.add_column("IoU", no_wrap=True, min_width=5)
    for iou in result.per_iou:
        table.add_column(iou, justify="right", no_wrap=True, min_width=5)
    table.add_column("0.50:0.95", justify="right", no_wrap=True, min_width=11, style="bold")
    own = {result.metric: DefinitionMeans(mAP=result.mAP, AP50=None, per_iou=result.per_iou)}
    for metric, means in (result.definitions | own).items():
        values = map(_percent, [*means["per_iou"].values(), means["mAP"]])
        table.add_row(metric, *values, style="" if metric == result.metric else "dim")
    return table


def _by_class_and_size(result: EvaluationResult) -> Table:
    """Return the classes in two halves side by side, and the sizes beside them."""
    table = _table(_METRIC_NAMES[result.metric])
    for column in ("class", "AP50", "mAP", " ", "class", "AP50", "mAP", " ", "size", "AP50", "mAP"):
        width = {"AP50": 6, "mAP": 6, " ": 2}.get(column, 1)
        table.add_column(column, justify="right" if width == 6 else "left", no_wrap=True, min_width=width)
    by_class = [(name, _percent(of["AP50"]), _percent(of["mAP"])) for name, of in result.per_class.items()]
    by_size = [(name, _percent(of["AP50"]), _percent(of["mAP"])) for name, of in result.by_size.items()]
    half = (len(by_class) + 1) // 2
    nothing = ("", "", "")
    for left, middle, right in zip_longest(by_class[:half], by_class[half:], by_size, fillvalue=nothing):
        table.add_row(*left, "", *middle, "", *right)
    return table


def _table(title: str | None = None) -> Table:
    return Table(title=title, title_style="bold", title_justify="left", box=box.SIMPLE_HEAD, padding=0, pad_edge=False)


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}"

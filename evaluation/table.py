"""Shows an evaluation as tables that read well at 80 columns."""

from __future__ import annotations

from rich import box
from rich.console import Group
from rich.table import Table

from .average_precision import EvaluationResult
from .matching import Metric

_METRIC_NAMES: dict[Metric, str] = {
    "voc": "VOC all-point area AP",
    "voc07": "VOC2007 11-point AP",
    "coco": "COCO 101-point AP",
}


def result_table(result: EvaluationResult) -> Group:
    """Return a rich renderable: AP by IoU threshold, each class in the devkit's order, then all definitions and sizes.

    Numbers are percent; – stands where a class has no ground truth.
    """
    images = f"{result.images:,} image{'' if result.images == 1 else 's'}"
    title = f"{_METRIC_NAMES[result.metric]} in percent, {images}"
    return Group(_by_iou(result, title), _by_class(result), _by_definition_and_size(result))


def _by_iou(result: EvaluationResult, title: str) -> Table:
    table = _table(title)
    table.add_column("IoU", no_wrap=True)
    for iou in result.per_iou:
        table.add_column(iou, justify="right", no_wrap=True, min_width=5)
    table.add_column("0.50:0.95", justify="right", no_wrap=True, min_width=11, style="bold")
    table.add_row("mAP", *(_percent(value) for value in result.per_iou.values()), _percent(result.mAP))
    return table


def _by_class(result: EvaluationResult) -> Table:
    """Return the classes in two halves side by side, so that the whole fits a terminal of 24 lines."""
    table = _table()
    for column in ("class", "AP50", "mAP", "", "class", "AP50", "mAP"):
        table.add_column(column, justify="left" if column == "class" else "right", no_wrap=True, min_width=6)
    rows = [(name, _percent(values["AP50"]), _percent(values["mAP"])) for name, values in result.per_class.items()]
    half = (len(rows) + 1) // 2
    for left, right in zip(rows[:half], [*rows[half:], ("", "", "")], strict=False):
        table.add_row(*left, "", *right)
    return table


def _by_definition_and_size(result: EvaluationResult) -> Table:
    """Return the three definitions beside the three sizes, which go by the definition of the title."""
    table = _table()
    table.add_column("definition", no_wrap=True, min_width=12)
    for column in ("AP50", "mAP", ""):
        table.add_column(column, justify="right", no_wrap=True, min_width=6)
    table.add_column("size", no_wrap=True, min_width=7)
    for column in ("objects", "AP50", "mAP"):
        table.add_column(column, justify="right", no_wrap=True, min_width=6)
    for (metric, means), (size, of_size) in zip(result.definitions.items(), result.by_size.items(), strict=True):
        table.add_row(
            f"{metric} *" if metric == result.metric else metric,
            _percent(means["AP50"]),
            _percent(means["mAP"]),
            "",
            size,
            f"{of_size['objects']:,}",
            _percent(of_size["AP50"]),
            _percent(of_size["mAP"]),
        )
    return table


def _table(title: str | None = None) -> Table:
    return Table(title=title, title_style="bold", title_justify="left", box=box.SIMPLE_HEAD, padding=0, pad_edge=False)


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}"

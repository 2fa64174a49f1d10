"""Shows what is behind an average precision, and what lies between two, at 80 columns."""

from __future__ import annotations

from collections.abc import Mapping

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from .average_precision import EvaluationResult
from .bootstrap import Difference, Interval
from .calibration import Calibration
from .curves import Curve
from .error_breakdown import ERRORS, TOTALS, ErrorBreakdown

_MEANS = ("mAP", "AP50")
_MEANING = {
    "classification": "the box fits, the class is wrong",
    "localisation": "the box is too far off",
    "both": "class wrong and box off",
    "duplicate": "found once more",
    "background": "nothing is there",
    "missed": "nothing found it at all",
    "false positive": "the first five kinds",
    "false negative": "all objects not found",
}


def interval_lines(intervals: Mapping[str, Interval]) -> RenderableType:
    """Return one line for mAP and one for AP50."""
    lines = [
        f"{name:<5} {_percent(found.estimate)}  [{_percent(found.low)}, {_percent(found.high)}]"
        for name, found in intervals.items()
    ]
    level = next(iter(intervals.values())).level
    return Group(Text(f"{100 * level:g} % interval over images", style="bold"), *lines, "")


def error_table(errors: ErrorBreakdown) -> RenderableType:
    """Return every kind of mistake, how many there are, and the AP they cost."""
    table = _table("Mistakes at IoU 0.50, and the AP50 gained by putting each kind alone right")
    table.add_column("kind", no_wrap=True, min_width=16)
    table.add_column("count", justify="right", no_wrap=True, min_width=8)
    table.add_column("AP50", justify="right", no_wrap=True, min_width=6)
    table.add_column("", no_wrap=True, min_width=11)
    table.add_column("what", no_wrap=True)
    most = max((errors.cost[kind] for kind in (*ERRORS, *TOTALS)), default=0.0) or 1.0
    for kind in (*ERRORS, *TOTALS):
        cost = errors.cost[kind]
        style = "bold" if kind in TOTALS else ""
        bar = "█" * round(10 * cost / most)
        table.add_row(kind, f"{errors.counts[kind]:,}", f"+{100 * cost:.1f}", f" {bar}", _MEANING[kind], style=style)
        if kind == ERRORS[-1]:
            table.add_section()
    return table


def confused_lines(errors: ErrorBreakdown, count: int = 5) -> RenderableType:
    """Return the pairs of classes taken for each other most, a line each."""
    pairs = errors.most_confused(count)
    title = Text(f"Most confused, scores ≥ {errors.confusion_score:g}", style="bold")
    lines = [f"{times:>6,}  {shown} taken for {detected}" for shown, detected, times in pairs]
    return Group(title, *(lines or ["     –  no two classes"]), "")


def calibration_line(found: Calibration | None) -> str:
    """Return in words whether scores can be read as probabilities."""
    if found is None:
        return "calibration: scores above 1 cannot be read as probabilities"
    error, over = found.expected_calibration_error, found.overconfidence
    if error is None or over is None:
        return f"calibration: no detection has a score of {found.edges[0]:g} or more"
    tendency = f"too {'high' if over > 0 else 'low'} by {100 * abs(over):.1f} on average"
    return f"calibration: D-ECE {100 * error:.1f} points (scores ≥ {found.edges[0]:g}); scores {tendency}"


def operating_points_table(curves: Mapping[str, Curve]) -> RenderableType:
    """Return for each class the score threshold of the best F1, in two halves side by side."""
    table = _table("Best F1 by class: the score threshold, precision and recall there, in percent")
    for column in ("class", "score", "P", "R", "F1", "", "class", "score", "P", "R", "F1"):
        width = {"class": 11, "score": 6, "": 3}.get(column, 5)
        table.add_column(column, justify="left" if column == "class" else "right", no_wrap=True, min_width=width)
    rows = [_operating_point(name, curve) for name, curve in curves.items()]
    half = (len(rows) + 1) // 2
    for left, right in zip(rows[:half], [*rows[half:], ("", "", "", "", "")], strict=False):
        table.add_row(*left, "", *right)
    return table


def difference_table(
    first: EvaluationResult, second: EvaluationResult, differences: Mapping[str, Difference]
) -> RenderableType:
    """Return mAP, AP50, and AP50 by class of both, B − A with its interval; marked where that does not hold 0."""
    title = f"B − A in percent, {100 * differences['mAP'].level:g} % interval over {first.images:,} images"
    table = _table(title)
    for name, width in (("", 13), ("A", 6), ("B", 6), ("B − A", 7), ("interval", 15), ("B is worse in", 15)):
        table.add_column(name, justify="right" if name else "left", no_wrap=True, min_width=width)
    for name, found in differences.items():
        one, other = (_figure(result, name) for result in (first, second))
        interval = f"[{_signed(found.low)}, {_signed(found.high)}]"
        worse = f"{100 * found.share_below_zero:.1f} %{' ' if found.holds_zero else '*'}"
        table.add_row(
            name, one, other, _signed(found.estimate), interval, worse, style="bold" if name in _MEANS else ""
        )
        if name == "AP50":
            table.add_section()
    return table


def verdict(differences: Mapping[str, Difference]) -> str:
    """Return in words which detector is better on these images, if that can be told."""
    parts = []
    for name in _MEANS:
        found = differences[name]
        interval = f"[{_signed(found.low)}, {_signed(found.high)}]"
        if found.holds_zero:
            parts.append(f"{name}: the interval {interval} holds 0: these images cannot tell the two apart.")
        else:
            which = "better" if found.estimate > 0 else "worse"
            parts.append(f"{name}: B is {which} by {100 * abs(found.estimate):.1f} points {interval}.")
    return "\n".join(parts)


def _figure(result: EvaluationResult, name: str) -> str:
    if name == "mAP":
        value = result.mAP
    else:
        value = result.per_iou["0.50"] if name == "AP50" else result.per_class[name]["AP50"]
    return "–" if value is None else _percent(value)


def _operating_point(name: str, curve: Curve) -> tuple[str, str, str, str, str]:
    best = curve.best_f1
    if best is None:
        return name, "–", "–", "–", "–"
    return name, f"{best.score:.3f}", _percent(best.precision), _percent(best.recall), _percent(best.f1)


def _table(title: str) -> Table:
    return Table(title=title, title_style="bold", title_justify="left", box=box.SIMPLE_HEAD, padding=0, pad_edge=False)


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.1f}"


def _signed(fraction: float) -> str:
    points = round(100 * fraction, 1)
    return f"{points:+.1f}" if points else "0.0"

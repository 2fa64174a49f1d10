"""Precision–recall curves as small multiples: a panel a class, several detectors or IoU thresholds as lines in each.

Lines differ in colour (Okabe and Ito's palette) and in their dashes, so they are told apart in grey, too.
"""

from __future__ import annotations

from collections.abc import Mapping
from io import BytesIO
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import NDArray

from data.records import VOC_CLASSES

from .curves import Curve

# Of lines in the order they are given: colour and dashes.
_STYLES: tuple[tuple[str, tuple[float, ...] | None], ...] = (
    ("#0072B2", None),
    ("#D55E00", (5, 1.5)),
    ("#009E73", (1.5, 1.5)),
    ("#CC79A7", (6, 1.5, 1.5, 1.5)),
    ("#000000", (3, 3)),
    ("#56B4E9", (8, 2)),
)
MAX_LINES = len(_STYLES)
_PANELS_ACROSS = 5
_PANEL_INCHES = 1.9


def curve_figure(lines: Mapping[str, Mapping[str, Curve]], title: str) -> bytes:
    """Return a PNG with a panel for every class that has a curve in any of the lines, in the devkit's order.

    lines: curves by class, by what a line is called: a run, or an IoU threshold; 1 … MAX_LINES of them.  The precision
    is drawn as the envelope that area AP is measured under, over the raw one, pale, where there is one line only.
    Panels say AP in percent, a figure a line.

    Raises ValueError for no line or too many.
    """
    if not 1 <= len(lines) <= MAX_LINES:
        raise ValueError(f"expected 1 … {MAX_LINES} lines, found {len(lines)}")
    classes = [name for name in VOC_CLASSES if any(name in curves for curves in lines.values())]
    across = max(1, min(_PANELS_ACROSS, len(classes)))
    down = max(1, -(-len(classes) // across))
    # A narrow figure would have no room for its legend.
    width = max(across * _PANEL_INCHES, 6.0)
    figure = Figure(figsize=(width, down * (_PANEL_INCHES + 0.35) + 1.1), dpi=110, layout="constrained")
    order = "" if len(lines) == 1 else ", in the order of the lines"
    figure.suptitle(f"{title}\neach class (objects): AP in percent{order}", fontsize=12, parse_math=False)
    grid = figure.subplots(down, across, squeeze=False, sharex=True, sharey=True)
    for name, axis in zip(classes, grid.flat, strict=False):
        _draw_class(axis, name, {line: curves.get(name) for line, curves in lines.items()})
    for axis in list(grid.flat)[len(classes) :]:
        axis.set_visible(False)
    for place in range(across):
        # Of each column the lowest panel that is there has the numbers.
        lowest = max(row for row in range(down) if row * across + place < max(len(classes), 1))
        grid[lowest, place].tick_params(labelbottom=True)
        if place == across // 2:
            grid[lowest, place].set_xlabel("recall", fontsize=11)
    grid[(down - 1) // 2, 0].set_ylabel("precision", fontsize=11)
    if len(lines) > 1:
        handles = [Line2D([], [], label=line, **_style(number)) for number, line in enumerate(lines)]
        legend = figure.legend(handles=handles, loc="outside lower center", ncols=min(3, len(lines)), fontsize=10,
                               frameon=False, handlelength=4)  # fmt: skip
        for text in legend.get_texts():
            text.set_parse_math(False)
    png = BytesIO()
    figure.savefig(png, format="png", metadata={"Software": None})
    return png.getvalue()


def _draw_class(axis: Axes, name: str, curves: Mapping[str, Curve | None]) -> None:
    averages = ["–" if curve is None else f"{100 * curve.average_precision:.1f}" for curve in curves.values()]
    objects = next(curve.num_positives for curve in curves.values() if curve is not None)
    axis.set_title(f"{name} ({objects:,})\n{' · '.join(averages)}", fontsize=10)
    axis.set_xlim(0, 1)
    axis.set_ylim(0, 1.02)
    ticks = (0.0, 0.5, 1.0)
    axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks], fontsize=9)
    axis.set_yticks(ticks, [f"{tick:g}" for tick in ticks], fontsize=9)
    axis.set_xticks((0.25, 0.75), minor=True)
    axis.set_yticks((0.25, 0.75), minor=True)
    axis.grid(which="both", color="#DDDDDD", linewidth=0.6)
    axis.set_axisbelow(True)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    for number, curve in enumerate(curves.values()):
        if curve is None or not len(curve.recall):
            continue
        if len(curves) == 1:
            axis.plot(*_steps(curve.recall, curve.precision), color="#888888", linewidth=0.7)
        axis.plot(*_steps(curve.recall, curve.envelope), **_style(number))


def _steps(recall: NDArray[np.float64], precision: NDArray[np.float64]) -> tuple[NDArray[np.float64], ...]:
    """Return the corners of a curve: from recall 0, and down to 0 where the recall ends, for what is never found."""
    x = np.concatenate([[0.0], recall, recall[-1:]])
    y = np.concatenate([precision[:1], precision, [0.0]])
    return x, y


def _style(number: int) -> dict[str, Any]:
    colour, dashes = _STYLES[number]
    return {"color": colour, "linewidth": 1.6, "dashes": dashes or (1, 0)}

"""Grouped bars and intervals as inline SVG."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from .axes import axis, tick_label
from .charts import Frame, fmt, style_of, svg

_WIDTH = 400.0
_LETTER = 7.2


@dataclass(frozen=True)
class Bars:
    """A member of every group. values: one a group, None where there is none.  style: place in the palette."""

    name: str
    values: Sequence[float | None]
    style: int = 0


@dataclass(frozen=True)
class IntervalRow:
    """An estimate with the ends of its interval, None where it has none.  style: place in the palette."""

    label: str
    estimate: float
    low: float | None = None
    high: float | None = None
    style: int = 0


def bar_chart(groups: Sequence[str], bars: Sequence[Bars], *, title: str, text: Callable[[float], str]) -> Markup:
    """Return horizontal bars, a block of them for each group, each with its value beside it.

    text: how a value is written.  Bars of negative values go to the left of the line at zero.
    """
    thick, gap = (13.0 if len(bars) > 1 else 17.0), 12.0
    left = 8 + _LETTER * max(map(len, groups), default=0)
    values = [value for each in bars for value in each.values if value is not None]
    room = 8 + _LETTER * max((len(text(value)) for value in values), default=0)
    low, high = min(0.0, *values, 0.0), max(0.0, *values, 1e-9)
    across = axis(low, high, left + (room if low < 0 else 0), _WIDTH - room)
    block = thick * len(bars) + gap
    parts = []
    for row, group in enumerate(groups):
        top = row * block + gap / 2
        middle = top + thick * len(bars) / 2 + 4
        parts.append(
            Markup('<text x="{}" y="{}" text-anchor="end">{}</text>').format(fmt(left - 8), fmt(middle), group)
        )
        for place, each in enumerate(bars):
            value = each.values[row]
            if value is not None:
                parts.append(_bar(across(0), across(value), top + place * thick, thick, each, group, text(value)))
    height = block * len(groups)
    parts.append(Markup('<path class="axis" d="M{} 0V{}"/>').format(fmt(across(0)), fmt(height)))
    return svg(Markup("").join(parts), title, (_WIDTH, height))


def interval_chart(rows: Sequence[IntervalRow], *, title: str, x_label: str, zero: bool = True) -> Markup:
    """Return estimates as points on their intervals, one below the other.

    zero: draw the line at zero, which an interval crosses or not, and keep it in view.
    """
    left = 8 + _LETTER * max((len(row.label) for row in rows), default=0)
    ends = [end for row in rows for end in (row.low, row.estimate, row.high) if end is not None]
    ends += [0.0] if zero else []
    height = 24.0 * len(rows) + 46
    x = axis(min(ends), max(ends), left + 8, _WIDTH - 14, most_ticks=5)
    frame = Frame(_WIDTH, height, x, axis(0, 1, height - 42, 4))
    parts = [_upright(frame, tick, "grid") for tick in x.ticks]
    parts += [_upright(frame, 0, "axis")] if zero else []
    bottom = frame.y.start
    for tick in x.ticks:
        parts.append(
            Markup('<text x="{}" y="{}" text-anchor="middle">{}</text>').format(
                fmt(x(tick)), fmt(bottom + 17), tick_label(tick, x.ticks)
            )
        )
    parts.append(
        Markup('<text class="label" x="{}" y="{}" text-anchor="middle">{}</text>').format(
            fmt((x.start + x.end) / 2), fmt(bottom + 35), x_label
        )
    )
    parts += [_interval(row, 24.0 * place + 16, left, frame) for place, row in enumerate(rows)]
    return svg(Markup("").join(parts), title, (_WIDTH, height))


def _bar(zero: float, end: float, top: float, thick: float, bars: Bars, group: str, written: str) -> Markup:
    start, width = min(zero, end), max(abs(end - zero), 1.0)
    beside = (end + 5, "start") if end >= zero else (end - 5, "end")
    return Markup(
        '<g class="s{}"><title>{}, {}: {}</title><rect class="bar" x="{}" y="{}" width="{}" height="{}"/></g>'
        '<text x="{}" y="{}" text-anchor="{}">{}</text>'
    ).format(
        style_of(bars.style), bars.name, group, written, fmt(start), fmt(top + 1), fmt(width), fmt(thick - 2),
        fmt(beside[0]), fmt(top + thick / 2 + 4), beside[1], written,
    )  # fmt: skip


def _upright(frame: Frame, value: float, kind: str) -> Markup:
    return Markup('<path class="{}" d="M{} {}V{}"/>').format(
        kind, fmt(frame.x(value)), fmt(frame.y.start), fmt(frame.y.end)
    )


def _interval(row: IntervalRow, y: float, left: float, frame: Frame) -> Markup:
    label = Markup('<text x="{}" y="{}" text-anchor="end">{}</text>').format(fmt(left), fmt(y + 4), row.label)
    line = Markup("")
    if row.low is not None and row.high is not None:
        line = Markup('<path class="line" d="M{} {}H{}M{} {}v8M{} {}v8"/>').format(
            fmt(frame.x(row.low)), fmt(y), fmt(frame.x(row.high)),
            fmt(frame.x(row.low)), fmt(y - 4), fmt(frame.x(row.high)), fmt(y - 4),
        )  # fmt: skip
    point = Markup('<circle class="mark" cx="{}" cy="{}" r="5"/>').format(fmt(frame.x(row.estimate)), fmt(y))
    return label + Markup('<g class="s{}">{}{}</g>').format(style_of(row.style), line, point)

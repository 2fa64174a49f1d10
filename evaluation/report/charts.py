"""Line charts as inline SVG: no script, no font, colours from the page's scheme.

Every line has a colour of its own (Okabe and Ito), a dash and a marker of its own, so that it is told apart in grey
too. A chart is drawn 400 units wide and scales with its place; the page never stretches it beyond readable sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from .axes import Axis, axis, tick_label
from .page import render

NUM_STYLES = 8
_DASHES = ("", "7 3", "2 3", "9 3 2 3", "12 4", "4 2", "1 3", "8 2 2 2 2 2")
_MARKERS = (
    "M-3 0a3 3 0 1 0 6 0a3 3 0 1 0-6 0z", "M-3-3h6v6h-6z", "M0-4L3.6 2.6h-7.2z", "M0-4L4 0L0 4L-4 0z",
    "M0 4L3.6-2.6h-7.2z", "M-4-1.3h2.7V-4h2.6v2.7H4v2.6H1.3V4h-2.6V1.3H-4z", "M-4-1.5h8v3h-8z", "M-1.5-4h3v8h-3z",
)  # fmt: skip
_MOST_MARKERS = 24


@dataclass(frozen=True)
class Series:
    """One line. x ascending; y: None leaves a gap.  low, high: ends of a band around it.  style: place in the palette.

    marked: whether its points carry markers.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float | None]
    style: int = 0
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    marked: bool = True


@dataclass(frozen=True)
class Frame:
    """The outline of a chart: its size, axes, and what they are called."""

    width: float
    height: float
    x: Axis
    y: Axis

    def grid(self, x_label: str, y_label: str, y_text: Callable[[float], str] | None = None) -> Markup:
        """Return grid lines, tick labels and axis labels."""
        left, right, bottom, top = self.x.start, self.x.end, self.y.start, self.y.end
        parts = []
        for tick in self.y.ticks:
            y = self.y(tick)
            label = y_text(tick) if y_text else tick_label(tick, self.y.ticks)
            parts.append(Markup('<path class="grid" d="M{} {}H{}"/>').format(fmt(left), fmt(y), fmt(right)))
            parts.append(
                Markup('<text x="{}" y="{}" text-anchor="end">{}</text>').format(fmt(left - 6), fmt(y + 4), label)
            )
        for tick in self.x.ticks:
            x = self.x(tick)
            parts.append(Markup('<path class="tick" d="M{} {}v4"/>').format(fmt(x), fmt(bottom)))
            parts.append(
                Markup('<text x="{}" y="{}" text-anchor="middle">{}</text>').format(
                    fmt(x), fmt(bottom + 17), tick_label(tick, self.x.ticks)
                )
            )
        parts.append(Markup('<path class="axis" d="M{} {}H{}"/>').format(fmt(left), fmt(bottom), fmt(right)))
        if x_label:
            parts.append(
                Markup('<text class="label" x="{}" y="{}" text-anchor="middle">{}</text>').format(
                    fmt((left + right) / 2), fmt(bottom + 35), x_label
                )
            )
        if y_label:
            parts.append(Markup('<text class="label" x="0" y="{}">{}</text>').format(fmt(top - 11), y_label))
        return Markup("").join(parts)


def line_chart(
    series: Sequence[Series],
    *,
    title: str,
    x_label: str = "",
    y_label: str = "",
    x_range: tuple[float, float] | None = None,
    y_range: tuple[float, float] | None = None,
    whole_x: bool = False,
    size: tuple[float, float] = (400, 250),
    most_ticks: int = 6,
) -> Markup:
    """Return lines over common axes, with their bands behind them.

    title: what the chart shows, for whoever cannot see it.  x_range, y_range: ends of the axes; from the data where not
    given, the upright axis from zero.  size: width and height in units.
    """
    frame = _frame(series, x_range, y_range, whole_x, size, most_ticks, bool(x_label), bool(y_label))
    body = [frame.grid(x_label, y_label)]
    body += [_band(each, frame) for each in series if each.low is not None]
    body += [_line(each, frame) for each in series]
    return svg(Markup("").join(body), title, size)


def legend(names: Sequence[str]) -> Markup:
    """Return the names of lines beside a piece of each, in the palette's order."""
    entries = Markup("").join(
        Markup('<li><svg class="swatch s{}" viewBox="0 0 28 12" aria-hidden="true">{}</svg>{}</li>').format(
            style_of(place), _stroke("M1 6H27", place) + _marker(14, 6, place), name
        )
        for place, name in enumerate(names)
    )
    return Markup('<ul class="legend">{}</ul>').format(entries)


def svg(body: Markup, title: str, size: tuple[float, float], extra: str = "") -> Markup:
    """Return a drawing that scales with its place and says what it shows."""
    return Markup('<svg class="chart{}" viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(
        f" {extra}" if extra else "", fmt(size[0]), fmt(size[1]), title, body
    )


def style_of(place: int) -> int:
    """Return the colour of a place in the palette; there are `NUM_STYLES`."""
    return place % NUM_STYLES


def fmt(value: float) -> str:
    """Return a coordinate with at most one decimal."""
    return f"{round(value, 1) + 0.0:g}"


def _frame(
    series: Sequence[Series],
    x_range: tuple[float, float] | None,
    y_range: tuple[float, float] | None,
    whole_x: bool,
    size: tuple[float, float],
    most_ticks: int,
    labelled_x: bool,
    labelled_y: bool,
) -> Frame:
    width, height = size
    xs = [x for each in series for x in each.x]
    ys = [y for each in series for part in (each.y, each.low or (), each.high or ()) for y in part if y is not None]
    low_x, high_x = x_range or (min(xs, default=0), max(xs, default=1))
    low_y, high_y = y_range or (min(0, *ys, 0), max(0, *ys, 1e-9))
    bottom = height - (40 if labelled_x else 22)
    y = axis(low_y, high_y, bottom, 24 if labelled_y else 8, most_ticks=most_ticks - 1)
    widest = max(len(tick_label(tick, y.ticks)) for tick in y.ticks)
    x = axis(low_x, high_x, 12 + 7.5 * widest, width - 14, most_ticks=most_ticks, whole=whole_x)
    return Frame(width, height, x, y)


def _line(series: Series, frame: Frame) -> Markup:
    runs: list[list[tuple[float, float]]] = [[]]
    for x, y in zip(series.x, series.y, strict=True):
        if y is None:
            runs.append([])
        else:
            runs[-1].append((frame.x(x), frame.y(y)))
    path = "".join("M" + "L".join(f"{fmt(x)} {fmt(y)}" for x, y in run) for run in runs if run)
    drawn = _stroke(path, series.style)
    points = [point for run in runs for point in run]
    if series.marked and len(points) <= _MOST_MARKERS:
        drawn += Markup("").join(_marker(x, y, series.style) for x, y in points)
    return Markup('<g class="s{}"><title>{}</title>{}</g>').format(style_of(series.style), series.name, drawn)


def _band(series: Series, frame: Frame) -> Markup:
    assert series.low is not None
    assert series.high is not None
    upper = [f"{fmt(frame.x(x))} {fmt(frame.y(y))}" for x, y in zip(series.x, series.high, strict=True)]
    lower = [f"{fmt(frame.x(x))} {fmt(frame.y(y))}" for x, y in zip(series.x, series.low, strict=True)]
    return Markup('<path class="band s{}" d="M{}z"/>').format(style_of(series.style), "L".join(upper + lower[::-1]))


def _stroke(path: str, place: int) -> Markup:
    # The second round through the colours goes with other dashes: 64 lines are all different.
    dash = _DASHES[(place + place // NUM_STYLES) % len(_DASHES)]
    dashed = Markup(' stroke-dasharray="{}"').format(dash) if dash else ""
    return Markup('<path class="line" d="{}"{}/>').format(path, dashed)


def _marker(x: float, y: float, place: int) -> Markup:
    shape = _MARKERS[(place + place // NUM_STYLES) % len(_MARKERS)]
    return Markup('<path class="mark" transform="translate({} {})" d="{}"/>').format(fmt(x), fmt(y), shape)


def chart_grid(figures: Sequence[tuple[str, Markup]], *, names: Sequence[str] = (), small: bool = False) -> Markup:
    """Return captioned charts side by side, as many as the page is wide for.

    names: of the lines, for one legend over all of them.  small: many to a row.
    """
    size = "small" if small else ""
    return render("charts.html", figures=figures, legend=legend(names) if len(names) > 1 else "", size=size)

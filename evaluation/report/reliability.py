"""The reliability diagram: how often detections of a confidence are right, beside how often that should be."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup

from .axes import axis
from .charts import Frame, fmt, style_of, svg

_SIZE = (400.0, 300.0)


def reliability_diagram(
    edges: Sequence[float], precision: Sequence[float | None], counts: Sequence[int], *, title: str, style: int = 0
) -> Markup:
    """Return precision by confidence over the diagonal where the two agree, and below it how many detections there are.

    edges: [B + 1] of the bins, in [0, 1].  precision: [B], None for an empty bin.  counts: [B] detections.
    """
    frame = Frame(*_SIZE, axis(0, 1, 40, _SIZE[0] - 10), axis(0, 1, _SIZE[1] - 100, 24))
    x, y = frame.x, frame.y
    bars = [
        Markup('<rect class="bar" x="{}" y="{}" width="{}" height="{}"><title>{}</title></rect>').format(
            fmt(x(low) + 1), fmt(y(value)), fmt(x(high) - x(low) - 2), fmt(y.start - y(value)),
            f"confidence {low:.2f} to {high:.2f}: {value:.0%} of {count:,} right",
        )
        for low, high, value, count in zip(edges[:-1], edges[1:], precision, counts, strict=True)
        if value is not None
    ]  # fmt: skip
    diagonal = Markup('<path class="reference" d="M{} {}L{} {}"/>').format(
        *(fmt(place) for place in (x(0), y(0), x(1), y(1)))
    )
    body = frame.grid("confidence", "precision") + Markup('<g class="s{}">{}</g>').format(
        style_of(style), Markup("").join(bars)
    )
    return svg(body + diagonal + _counts(edges, counts, frame), title, _SIZE)


def _counts(edges: Sequence[float], counts: Sequence[int], frame: Frame) -> Markup:
    most, base = max(counts, default=0) or 1, _SIZE[1] - 16
    bars = [
        Markup('<rect class="quiet" x="{}" y="{}" width="{}" height="{}"/>').format(
            fmt(frame.x(low) + 1), fmt(base - 30 * count / most), fmt(frame.x(high) - frame.x(low) - 2),
            fmt(30 * count / most),
        )
        for low, high, count in zip(edges[:-1], edges[1:], counts, strict=True)
    ]  # fmt: skip
    label = Markup('<text class="label" x="{}" y="{}" text-anchor="middle">detections, at most {} a bin</text>').format(
        fmt((frame.x.start + frame.x.end) / 2), fmt(_SIZE[1] - 2), f"{most:,}"
    )
    return Markup("").join(bars) + label

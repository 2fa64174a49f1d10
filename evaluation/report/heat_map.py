"""Heat maps as tables of shaded cells: read out by screen readers, copied as text, scrolled on a phone."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from markupsafe import Markup

from .page import render
from .text import NOTHING

# Where the text on a cell changes between dark and light: in the dark scheme first, in the light one later.
_MIDDLE, _HIGH = 0.58, 0.76


def heat_map(
    values: Sequence[Sequence[float | None]],
    *,
    rows: Sequence[str],
    columns: Sequence[str],
    title: str,
    row_label: str,
    column_label: str,
    text: Callable[[float], str],
    scale: tuple[float, float] | None = None,
    diverging: bool = False,
    compact: bool = False,
    details: Sequence[Sequence[str]] | None = None,
) -> Markup:
    """Return a table whose cells are as deep as their values are high.

    values: by row and column, None for an empty cell.  text: what a cell says.  scale: values of the palest and the
    deepest shade; from the data where not given.  diverging: shades in two colours, from zero to the largest size.
    compact: small cells and upright column names, for many of them.  details: what each cell tells when pointed at.
    """
    known = [value for row in values for value in row if value is not None and not math.isnan(value)]
    low, high = scale or (min(known, default=0.0), max(known, default=1.0))
    reach = max((abs(value) for value in known), default=1.0) or 1.0

    def cell(value: float | None, detail: str) -> dict[str, object]:
        if value is None or math.isnan(value):
            return {"text": NOTHING if not compact else "", "shade": 0.0, "kind": "lo", "detail": detail}
        depth = abs(value) / reach if diverging else (value - low) / (high - low) if high > low else 0.5
        depth = min(max(depth, 0.0), 1.0)
        kind = "hi" if depth >= _HIGH else "mid" if depth >= _MIDDLE else "lo"
        kind += " below" if diverging and value < 0 else ""
        return {"text": text(value), "shade": round(depth, 3), "kind": kind, "detail": detail}

    told = details or [[""] * len(columns)] * len(rows)
    cells = [
        [cell(value, detail) for value, detail in zip(row, line, strict=True)]
        for row, line in zip(values, told, strict=True)
    ]
    return render(
        "heat_map.html",
        title=title,
        row_label=row_label,
        column_label=column_label,
        columns=columns,
        lines=list(zip(rows, cells, strict=True)),
        compact=compact,
    )

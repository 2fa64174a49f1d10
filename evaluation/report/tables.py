"""Tables of a report: they scroll by themselves where they are too wide, and sort by any column of numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from markupsafe import Markup

from .page import render


@dataclass(frozen=True)
class Column:
    """A column. numeric: right-aligned, and sortable where cells have values.  title: told when it is pointed at.

    group: a heading over neighbouring columns with the same one.  style: its place in the palette, shown before it.
    """

    label: str
    numeric: bool = True
    title: str = ""
    group: str = ""
    style: int | None = None


@dataclass(frozen=True)
class Cell:
    """A cell. note: in small letters below.  value: what it is sorted by.  share: length of its bar, in [0, 1].

    style: the bar's place in the palette.  strong: set off from the others.
    """

    text: str
    note: str = ""
    value: float | None = None
    share: float | None = None
    style: int = 0
    strong: bool = False


def table(
    columns: Sequence[Column],
    rows: Sequence[Sequence[Cell | str]],
    *,
    caption: str,
    sortable: bool = False,
    styles: Sequence[int] | None = None,
    footer: Sequence[Cell | str] | None = None,
) -> Markup:
    """Return a table whose first column names its rows.

    caption: what it shows; read out, and shown above.  sortable: with buttons in the head.  styles: place in the
    palette of each row's line in the charts, shown before its name.  footer: a row that stays last.
    """

    def cells(row: Sequence[Cell | str]) -> list[Cell]:
        return [cell if isinstance(cell, Cell) else Cell(cell) for cell in row]

    groups = [(*key, len(list(found))) for key, found in groupby(columns, lambda column: (column.group, column.style))]
    return render(
        "table.html",
        columns=columns,
        groups=groups if any(column.group for column in columns) else None,
        rows=[cells(row) for row in rows],
        caption=caption,
        sortable=sortable,
        styles=styles,
        footer=None if footer is None else cells(footer),
    )

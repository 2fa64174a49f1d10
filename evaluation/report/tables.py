"""Tables of a report: they scroll by themselves where they are too wide, and sort by any column of numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from .page import render


@dataclass(frozen=True)
class Column:
    """A column. numeric: right-aligned, and sortable where cells have values."""

    label: str
    numeric: bool = True
    title: str = ""


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

    return render(
        "table.html",
        columns=columns,
        rows=[cells(row) for row in rows],
        caption=caption,
        sortable=sortable,
        styles=styles,
        footer=None if footer is None else cells(footer),
    )

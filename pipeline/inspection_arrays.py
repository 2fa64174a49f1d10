"""The arrays' tables of `inspect-cache`: what is stored, and whether its values are plausible."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.text import Text

from pipeline.text_tables import GAP, Heading, plain_table, readable_size, titled

SHORT_DIGEST = 12


@dataclass(frozen=True)
class _Column:
    """One column of the arrays' tables. show: an array's cell of it."""

    name: str
    show: Callable[[dict[str, Any]], str | Text]
    right: bool = True


_STORED = (
    _Column("shape", lambda a: "×".join(map(str, a["shape"])), right=False),
    _Column("dtype", lambda a: str(a["dtype"]), right=False),
    _Column("size", lambda a: readable_size(a["bytes"])),
    _Column("of float32", lambda a: f"{a['bytes'] / a['float32_bytes']:.0%}" if a["float32_bytes"] else "–"),
    _Column("committed", lambda a: _committed(a)),
)
_VALUES = (
    _Column("mean", lambda a: _number(a["mean"])),
    _Column("std", lambda a: _number(a["std"])),
    _Column("outliers", lambda a: _outliers(a)),
)
_FIDELITY = _Column("cosine mean, p01", lambda a: _cosines(a["fidelity"]))
# As long as there is room for.
_DIGESTS = (
    (
        _Column("fingerprint", lambda a: str(a["fingerprint"])[:SHORT_DIGEST], right=False),
        _Column("content", lambda a: str(a["content"])[:SHORT_DIGEST], right=False),
    ),
    (_Column("fingerpr content", lambda a: f"{a['fingerprint'][:8]} {a['content'][:8]}", right=False),),
)


class Arrays:
    """The arrays by teacher and view: in one table where that fits, else in one of what is stored and one of values."""

    def __init__(self, arrays: Sequence[dict[str, Any]]) -> None:
        """Show `arrays` of the JSON of `inspect-cache`."""
        self._arrays = arrays
        self._valued = [array for array in arrays if array["mean"] is not None]
        measured = any(array["fidelity"] is not None for array in arrays)
        self._values = (*_VALUES, *([_FIDELITY] if measured else []))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        """Yield the tables that suit the terminal's width."""
        room = options.max_width
        together = [_ArraysTable(self._arrays, (*_STORED, *self._values, *digests)) for digests in _DIGESTS]
        apart = [_ArraysTable(self._valued, (*self._values, *digests)) for digests in _DIGESTS]
        fitting = next((table for table in together if table.width <= room), None)
        if fitting is not None:
            yield fitting.shown("Arrays", room)
            return
        yield _ArraysTable(self._arrays, _STORED).shown("Arrays", room)
        if self._valued:
            yield next((table for table in apart if table.width <= room), apart[-1]).shown("Values", room)


class _ArraysTable:
    """Some columns of some arrays, with a line above those of each view. width: in characters."""

    def __init__(self, arrays: Sequence[dict[str, Any]], columns: Sequence[_Column]) -> None:
        self._views = [array["path"].rpartition("/")[0] for array in arrays]
        self._rows: list[list[str | Text]] = []
        for array in arrays:
            self._rows.append([f"  {array['path'].rpartition('/')[2]}", *(column.show(array) for column in columns)])
        self._headings = [Heading("array"), *(Heading(column.name, column.right) for column in columns)]
        cells = [[heading.name, *column] for heading, *column in zip(self._headings, *self._rows, strict=True)]
        self._widths = [max(map(len, column)) for column in cells]
        self.width = sum(self._widths) + GAP * (len(cells) - 1)

    def shown(self, title: str, room: int) -> Group:
        """Return the table below its title. room: the terminal's width; what does not fit is folded."""
        headings = self._headings
        if self.width <= room:  # alike in the tables of all views
            headings = [replace(h, width=width) for h, width in zip(headings, self._widths, strict=True)]
        parts: list[RenderableType] = [plain_table(*headings)]
        for view, rows in groupby(zip(self._views, self._rows, strict=True), key=lambda pair: pair[0]):
            table = plain_table(*headings, header=False)
            for _, row in rows:
                table.add_row(*row)
            parts += [Text(view), table]
        return titled(title, *parts)


def _committed(array: dict[str, Any]) -> Text:
    if array["complete"]:
        return Text("all", style="green")
    samples = array["shape"][0]
    return Text(f"{samples - array['missing']}/{samples}", style="yellow")


def _outliers(array: dict[str, Any]) -> Text:
    count = array["outliers"]
    return Text("–") if count is None else Text(f"{count:,}", style="yellow" if count else "")


def _cosines(fidelity: dict[str, Any] | None) -> str:
    return "–" if fidelity is None else f"{fidelity['cosine_mean']:.5f}, {fidelity['cosine_p01']:.5f}"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"

"""Text tables and units for the terminal."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

GAP = 2  # characters between columns


@dataclass(frozen=True)
class Heading:
    """A column's name and side. width: at least so many characters."""

    name: str
    right: bool = False
    width: int | None = None


def plain_table(*headings: Heading, header: bool = True) -> Table:
    """Return an empty table with a rule below its header and no other lines; long cells fold."""
    table = Table(box=box.SIMPLE_HEAD, show_header=header, show_edge=False, padding=(0, GAP - 1, 0, 0), pad_edge=False)
    for heading in headings:
        justify: Literal["left", "right"] = "right" if heading.right else "left"
        table.add_column(heading.name, justify=justify, overflow="fold", min_width=heading.width)
    return table


def titled(title: str, *parts: RenderableType) -> Group:
    """Return the parts below a title, an empty line above it."""
    return Group("", Text(title, style="bold"), *parts)


def readable_time(seconds: float) -> str:
    """Return a duration in seconds, minutes or hours."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, hours = seconds / 60, seconds / 3600
    return f"{minutes:.1f} min" if minutes < 60 else f"{hours:.1f} h"


def readable_size(count: float) -> str:
    """Return a number of bytes in B, kB, MB or GB (powers of a thousand)."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"


def printable(value: object) -> str:
    """Return text without what would steer a terminal: a store is untrusted."""
    return "".join(character if character.isprintable() else "�" for character in str(value))

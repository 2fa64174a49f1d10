"""Figures of several rounds, and Markdown tables that show them beside their targets, at most 80 columns wide."""

from __future__ import annotations

import os
import platform
import resource
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import median, quantiles

MAX_COLUMNS = 80
# How a time in seconds is shown, by the header of its column; all of them are per sample.
UNITS = {
    "µs": lambda seconds: f"{seconds * 1e6:.1f}",
    "samples/s": lambda seconds: f"{1 / seconds:,.0f}",
}


@dataclass(frozen=True)
class Figure:
    """One line of a table.

    seconds: the time a sample of every round.  at_least: target of the ratio, this line's time over ours.  note: what
    stands in the table's additional column, where it has one.
    """

    name: str
    seconds: tuple[float, ...]
    at_least: float | None = None
    note: str = ""

    def ratios_to(self, ours: Figure) -> list[float]:
        """Return this line's time over ours, round by round: what slows a whole round down cancels."""
        return [mine / theirs for mine, theirs in zip(self.seconds, ours.seconds, strict=True)]


@dataclass(frozen=True)
class Check:
    """A target and what was found."""

    name: str
    found: float
    target: str
    met: bool


@dataclass(frozen=True)
class Table:
    """A titled Markdown table, and the targets that its lines were held to."""

    title: str
    lines: tuple[str, ...]
    checks: tuple[Check, ...] = ()

    def text(self) -> str:
        """Return the table as Markdown."""
        return "\n".join([f"## {self.title}", "", *self.lines])


def time_table(title: str, figures: Sequence[Figure], *, unit: str = "µs", note: str | None = None) -> Table:
    """Return a table of figures, the first of which is ours.

    unit: a key of UNITS.  note: header of the additional column.
    """
    rows, checks = [], []
    for figure in figures:
        ratios = figure.ratios_to(figures[0])
        ratio = median(ratios)
        target = "" if figure.at_least is None else f"≥ {figure.at_least:g}"
        row = [figure.name, UNITS[unit](median(figure.seconds)), f"{ratio:.2f}", _spread(ratios), target]
        rows.append(row if note is None else [*row, figure.note])
        if figure.at_least is not None:
            checks.append(Check(figure.name, ratio, target, ratio >= figure.at_least))
    header = ["", unit, "ratio", "±", "target"]
    return Table(title, markdown(header if note is None else [*header, note], rows), tuple(checks))


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> tuple[str, ...]:
    """Return the lines of a Markdown table, the first column to the left and all others to the right."""
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    rule = [f"{'-' * (widths[0] + 2)}", *(f"{'-' * (width + 1)}:" for width in widths[1:])]
    lines = [_line(header, widths), f"|{'|'.join(rule)}|", *(_line(row, widths) for row in rows)]
    assert len(lines[0]) <= MAX_COLUMNS, f"a table of {len(lines[0])} columns: {lines[0]}"
    return tuple(lines)


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    right = [f"{cell:>{width}}" for cell, width in zip(cells[1:], widths[1:], strict=True)]
    return f"| {' | '.join([f'{cells[0]:<{widths[0]}}', *right])} |"


def _spread(ratios: Sequence[float]) -> str:
    """Return half the interquartile range in percent of the median: how far to trust the last digit."""
    lower, middle, upper = quantiles(ratios, n=4) if len(ratios) > 1 else (ratios[0],) * 3
    return f"{(upper - lower) / 2 / middle:.0%}"


def report(title: str, facts: Sequence[str], rule: str, tables: Sequence[Table]) -> str:
    """Return the whole report as Markdown that reads well on a terminal."""
    checks = [(table.title, check) for table in tables for check in table.checks]
    missed = [
        textwrap.fill(f"- missed: {where}; {check.name}: {check.found:.2f}, not {check.target}", MAX_COLUMNS)
        for where, check in checks
        if not check.met
    ]
    paragraphs = [
        f"# {title}",
        "\n".join(facts),
        textwrap.fill(rule, MAX_COLUMNS),
        "\n".join([f"{len(checks) - len(missed)} of {len(checks)} targets met.", *missed]),
        *(table.text() for table in tables),
    ]
    return "\n\n".join(paragraphs)


def machine(packages: Sequence[str]) -> list[str]:
    """Return lines on this machine and the versions of the packages that were measured."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    versions = ", ".join(f"{name} {version(name)}" for name in packages)
    open_files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    hardware = f"{_cpu_model()}, {os.cpu_count()} cores, {memory:.0f} GiB"
    return [
        f"{hardware}; {platform.system()}, {open_files} open files",
        *textwrap.wrap(f"Python {platform.python_version()}, {versions}", MAX_COLUMNS),
    ]


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or "unknown processor"

"""A sweep's results as Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from pipeline.sweep.cells import HEADINGS, table_cells
from pipeline.sweep.cost import SweepCost, cost_lines
from pipeline.sweep.notes import LEGEND, caption, notes
from pipeline.sweep.settings_table import varied_settings
from pipeline.sweep.summary import SweepSummary, SweepTable


def markdown(summary: SweepSummary, cost: SweepCost) -> str:
    """Return the results as a Markdown page: notes, the headline, the other tables, settings, cost."""
    parts = [f"# Sweep {summary.plan_name}"]
    parts += [_escaped(summary.about)] if summary.about else []
    parts += [_escaped(summary.protocol), _list(notes(summary))]
    parts += [_table(summary, table) for table in summary.tables]
    parts += [LEGEND.replace("*", r"\*"), "## Settings", _settings(summary), "## Cost", _list(cost_lines(cost))]
    return "\n\n".join(part for part in parts if part) + "\n"


def _table(summary: SweepSummary, table: SweepTable) -> str:
    rows = [
        (*cells[:1], row.baseline or "–", *cells[1:], row.comparison.reading if row.comparison else "baseline")
        for row, cells in table_cells(table)
    ]
    header = (HEADINGS[0], "against", *HEADINGS[1:], "reading")
    below = "; ".join(caption(summary, table))
    return f"## {_escaped(table.title)}\n\n{_pipes(header, rows, left=(0, 1, 8))}" + (
        f"\n\n*{_escaped(below)}*" if below else ""
    )


def _settings(summary: SweepSummary) -> str:
    names, rows = varied_settings(summary)
    return _pipes(("arm", *names, "finished seeds"), rows, left=range(len(names) + 2))


def _pipes(header: Sequence[str], rows: Iterable[Sequence[str]], left: Iterable[int]) -> str:
    sides = ["---" if index in set(left) else "---:" for index in range(len(header))]
    lines = [header, sides, *rows]
    return "\n".join(f"| {' | '.join(_escaped(cell) for cell in line)} |" for line in lines)


def _list(lines: Sequence[str]) -> str:
    return "\n".join(f"- {_escaped(line)}" for line in lines)


def _escaped(text: str) -> str:
    """Return text that Markdown takes literally: names hold underscores, messages anything."""
    plain = " ".join(text.split())
    for character in "\\`*_[]|<>":
        plain = plain.replace(character, f"\\{character}")
    return plain

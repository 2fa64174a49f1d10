"""A sweep's results in the terminal, at 80 columns."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from pipeline.sweep.cells import starts_block, table_cells
from pipeline.sweep.notes import LEGEND, caption, notes
from pipeline.sweep.summary import SweepSummary, SweepTable
from pipeline.text_tables import Heading, plain_table, titled

_HEADINGS = (
    Heading("arm"), Heading("n", right=True), Heading("mean ± SD", right=True), Heading("Δ", right=True),
    Heading("95 % interval", right=True), Heading("p", right=True), Heading("detects", right=True),
)  # fmt: skip


def summary_tables(summary: SweepSummary) -> list[RenderableType]:
    """Return the headline table, the one at the best epoch where there is one, and what has to be known with them."""
    tables = list(dict.fromkeys((summary.table("mAP", "last"), summary.table("mAP", "best"))))
    told = Table.grid(padding=(0, 1, 0, 0))
    for note in notes(summary):
        told.add_row("•", Text(note))
    heading = titled(f"Sweep {summary.plan_name}", *([Text(summary.about)] if summary.about else []), summary.protocol)
    return [heading, *(_table(summary, table) for table in tables), "", Text(LEGEND, style="dim"), "", told]


def _table(summary: SweepSummary, table: SweepTable) -> Group:
    shown: Table = plain_table(*_HEADINGS)
    for column in shown.columns[1:]:
        column.no_wrap = True
    for index, (_, cells) in enumerate(table_cells(table)):
        if index and starts_block(table, index):
            shown.add_section()
        shown.add_row(*(Text(cell) for cell in cells))
    below = caption(summary, table)
    return titled(table.title, shown, *([Text("; ".join(below), style="italic")] if below else []))

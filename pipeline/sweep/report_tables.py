"""The sections of a sweep's report that hold tables: results with their intervals, settings, cost."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup

from evaluation.report.bars import IntervalRow, interval_chart
from evaluation.report.charts import chart_grid
from evaluation.report.page import Section
from evaluation.report.tables import Cell, Column, table
from evaluation.statistics import ALPHA
from pipeline.sweep.cells import interval_text, p_text, signed, spread_text
from pipeline.sweep.cost import SweepCost, cost_lines
from pipeline.sweep.notes import LEGEND, caption
from pipeline.sweep.settings_table import varied_settings
from pipeline.sweep.summary import Row, SweepSummary, SweepTable

_COLUMNS = (
    Column("arm", numeric=False), Column("seeds"), Column("mean ± SD"), Column("Δ", title="in percentage points"),
    Column("95 % interval", title="of this row alone"), Column("p", title="Holm's, over the table"),
    Column("detects", title="true difference found in 80 % of such sweeps"), Column("reading", numeric=False),
)  # fmt: skip
_TOLD_APART, _NOT_TOLD_APART = 0, 5  # places in the palette: a colour, and grey
_LONGEST_LABEL = 26


def results_section(summary: SweepSummary) -> Section:
    """Return the headline table, its differences drawn, and the other tables folded away."""
    headline, *others = summary.tables
    folded = Markup("").join(
        Markup("<details><summary>{}</summary>{}</details>").format(each.title, _table(summary, each))
        for each in others
    )
    body = [_table(summary, headline), difference_chart(headline), Markup('<p class="note">{}</p>').format(LEGEND)]
    return Section("results", "Results", Markup("\n").join([*body, folded]))


def difference_chart(table: SweepTable) -> Markup:
    """Return the arms' differences from their baselines with their intervals, all on one scale; nothing without any."""
    rows = [row for each in table.rows if (row := _interval_row(each)) is not None]
    if not rows:
        return Markup("")
    baselines = list(dict.fromkeys(row.baseline for row in table.rows if row.baseline is not None))
    title = f"Difference from {baselines[0] if len(baselines) == 1 else 'the baseline'}, {table.metric}"
    chart = interval_chart(rows, title=f"{title}, 95 % intervals over seeds", x_label="points; grey: not told apart")
    return chart_grid([(title, chart)])


def settings_section(summary: SweepSummary) -> Section:
    """Return what sets the arms apart, which seeds are finished, and what failed or is missing."""
    names, rows = varied_settings(summary)
    columns = [Column(name, numeric=False) for name in ("arm", *names, "finished seeds")]
    said = {arm.name: "; ".join([*[arm.about] * bool(arm.about), *arm.chosen]) for arm in summary.arms}
    cells: list[list[Cell | str]] = [[Cell(row[0], note=said[row[0]]), *row[1:]] for row in rows]
    return Section("arms", "Arms", table(columns, cells, caption="What sets the arms apart"))


def cost_section(cost: SweepCost) -> Section:
    """Return what the sweep cost, and what it would have cost without the store."""
    lines = Markup("").join(Markup("<li>{}</li>").format(line) for line in cost_lines(cost))
    return Section("cost", "Cost", Markup("<ul>{}</ul>").format(lines))


def _table(summary: SweepSummary, shown: SweepTable) -> Markup:
    told = caption(summary, shown)
    rows = [_cells(row) for row in shown.rows]
    return table(_COLUMNS, rows, caption="; ".join([shown.title, *told]), sortable=True)


def _cells(row: Row) -> Sequence[Cell | str]:
    mean = Cell(spread_text(row.over_seeds), value=row.over_seeds.mean)
    seeds = Cell(str(row.over_seeds.n), value=row.over_seeds.n)
    if row.comparison is None:
        return [row.arm, seeds, mean, "", "", "", "", "baseline"]
    found, p = row.comparison.difference, row.comparison.p_holm
    detects = row.comparison.detectable
    return [
        Cell(row.arm, note=f"against {row.baseline}"),
        seeds,
        mean,
        Cell(signed(found.mean), value=found.mean, strong=p is not None and p < ALPHA),
        interval_text(found.interval),
        Cell(p_text(p), value=p),
        Cell("–" if detects is None else f"±{100 * detects:.2f}", value=detects),
        row.comparison.reading,
    ]


def _interval_row(row: Row) -> IntervalRow | None:
    """Return a difference to draw, in points; None where no seed is shared."""
    if row.comparison is None or row.comparison.difference.mean is None:
        return None
    found, p = row.comparison.difference, row.comparison.p_holm
    low, high = (None, None) if found.interval is None else (100 * found.interval[0], 100 * found.interval[1])
    style = _TOLD_APART if p is not None and p < ALPHA else _NOT_TOLD_APART
    return IntervalRow(short(row.arm), 100 * found.mean, low, high, style) if found.mean is not None else None


def short(name: str) -> str:
    """Return a name that fits beside a chart; its end tells a grid's members apart."""
    if len(name) <= _LONGEST_LABEL:
        return name
    half = _LONGEST_LABEL // 2
    return f"{name[: half - 1]}…{name[-half:]}"

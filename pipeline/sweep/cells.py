"""A sweep's tables as text, cell by cell: what the terminal, Markdown, LaTeX and HTML have in common."""

from __future__ import annotations

from collections.abc import Iterator

from evaluation.statistics import ALPHA, Comparison, Interval, Spread
from pipeline.results import NOT_MEASURED, percent
from pipeline.sweep.summary import Row, SweepTable

HEADINGS = ("arm", "n", "mean ± SD", "Δ", "95 % interval", "p", "detects")


def table_cells(table: SweepTable) -> Iterator[tuple[Row, tuple[str, ...]]]:
    """Yield every row with its cells under HEADINGS; numbers are percent."""
    for row in table.rows:
        yield row, (row.arm, str(row.over_seeds.n), spread_text(row.over_seeds), *_compared(row.comparison))


def spread_text(spread: Spread) -> str:
    """Return a mean and its standard deviation over seeds in percent."""
    if spread.mean is None:
        return NOT_MEASURED
    return percent(spread.mean) if spread.std is None else f"{percent(spread.mean)} ± {percent(spread.std)}"


def signed(fraction: float | None) -> str:
    """Return a difference of fractions in percentage points, with its sign."""
    if fraction is None:
        return NOT_MEASURED
    text = f"{100 * fraction:+.2f}".replace("-", "−")
    return "0.00" if text in ("+0.00", "−0.00") else text


def interval_text(interval: Interval | None) -> str:
    """Return an interval of differences in percentage points."""
    return NOT_MEASURED if interval is None else f"{signed(interval[0])} … {signed(interval[1])}"


def p_text(p: float | None) -> str:
    """Return a p with three decimals, a star where it is below 0.05."""
    if p is None:
        return NOT_MEASURED
    return f"{'<0.001' if p < 0.001 else f'{p:.3f}'}{'*' if p < ALPHA else ''}"


def starts_block(table: SweepTable, index: int) -> bool:
    """Return whether a row begins a block: a baseline, or another baseline than the row's above."""
    row = table.rows[index]
    above = table.rows[index - 1] if index else None
    return above is None or row.baseline is None or row.baseline not in (above.baseline, above.arm)


def _compared(comparison: Comparison | None) -> tuple[str, str, str, str]:
    if comparison is None:
        return (NOT_MEASURED,) * 4
    found = comparison.difference
    detects = NOT_MEASURED if comparison.detectable is None else f"±{percent(comparison.detectable)}"
    interval = comparison.reading if found.interval is None and found.n > 0 else interval_text(found.interval)
    return signed(found.mean), interval.removesuffix(" to tell"), p_text(comparison.p_holm), detects

"""How a report writes numbers: percent with one decimal, differences with their sign, a dash for what is not there."""

from __future__ import annotations

import math

NOTHING = "–"
MINUS = "−"


def percent(fraction: float | None, decimals: int = 1) -> str:
    """Return a fraction as percent without the sign."""
    return NOTHING if fraction is None or math.isnan(fraction) else _signed(100 * fraction, decimals)


def points(difference: float | None, decimals: int = 1) -> str:
    """Return a difference of fractions in percentage points, its sign always there."""
    if difference is None or math.isnan(difference):
        return NOTHING
    written = _signed(100 * difference, decimals)
    return written if written.startswith(MINUS) or float(written) == 0 else f"+{written}"


def seconds(value: float | None) -> str:
    """Return a duration: seconds below two minutes, then minutes, then hours."""
    if value is None:
        return NOTHING
    if value < 120:
        return f"{value:.1f} s"
    return f"{value / 60:.1f} min" if value < 7200 else f"{value / 3600:.1f} h"


def count(value: float) -> str:
    """Return a whole number with thousands set off."""
    return f"{value:,.0f}"


def number(value: float | None) -> str:
    """Return a number with three significant digits, trailing zeros left out."""
    return NOTHING if value is None else f"{value:.3g}".replace("-", MINUS)


def _signed(value: float, decimals: int) -> str:
    written = f"{abs(value):.{decimals}f}"
    return f"{MINUS}{written}" if value < 0 and float(written) != 0 else written

"""Axes of charts: round ticks, and from data to the units of a drawing."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True)
class Axis:
    """A linear axis. low, high: its ends in data.  start, end: the same in the drawing.  ticks: where labels stand."""

    low: float
    high: float
    start: float
    end: float
    ticks: tuple[float, ...]

    def __call__(self, value: float) -> float:
        """Return where in the drawing a value is."""
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


def axis(low: float, high: float, start: float, end: float, *, most_ticks: int = 6, whole: bool = False) -> Axis:
    """Return an axis that reaches from the round number at or below `low` to the one at or above `high`.

    whole: ticks at whole numbers only; the ends stay as they are.
    """
    if high <= low:
        low, high = (low - 0.5, high + 0.5) if low == high else (high, low)
    step = _round_step((high - low) / most_ticks)
    if whole:
        step = max(1.0, math.ceil(step))
        return Axis(low, high, start, end, _multiples(step, low, high))
    low, high = math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step
    return Axis(low, high, start, end, _multiples(step, low, high))


def tick_label(value: float, ticks: tuple[float, ...]) -> str:
    """Return a tick's label, with as many decimals as tell it from its neighbours."""
    gaps = [b - a for a, b in pairwise(ticks)]
    decimals = max(0, -math.floor(math.log10(min(gaps)) + 1e-9)) if gaps else 0
    if gaps and round(min(gaps), decimals) != round(min(gaps), decimals + 1):
        decimals += 1  # a step of 0.25 needs two
    return f"{value + 0.0:.{decimals}f}".replace("-", "−")


def _multiples(step: float, low: float, high: float) -> tuple[float, ...]:
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return tuple(step * k for k in range(first, last + 1))


def _round_step(rough: float) -> float:
    """Return the smallest of 1, 2, 2.5 or 5 times a power of ten that is not below `rough`."""
    power = 10.0 ** math.floor(math.log10(rough))
    return next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * (1 - 1e-9))

"""What seeds can tell of a difference between two arms: paired intervals, corrected p, the smallest detectable one.

A seed fixes order, views and initialisation, so the same seed in two arms makes a pair, and the difference of each pair
is freed of what the arms share. All figures here are of these differences, over seeds alone: they say what another seed
would give, not what other images would.

Intervals are uncorrected: each one alone covers its own difference in 95 % of experiments. That is the interval of
scipy and of the literature, and it answers "how large". Whether there is a difference at all is decided by the p of
Holm's procedure over all comparisons of a table, and by nothing else. Step-down procedures have no simple interval of
their own, so a table's `simultaneous` interval is Bonferroni's: all of a table's cover together. Where it leaves zero
out, Holm's p is below 0.05 too; not the other way round, since Holm is the more powerful.

A difference that is not significant is never called equality: its interval says what was not ruled out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import special

ALPHA = 0.05
POWER = 0.8
# Fewer pairs than this give intervals, but wide ones that rest on a poorly known spread.
FEW_SEEDS = 5

Interval = tuple[float, float]
Reading = Literal["higher", "lower", "not told apart", "identical", "too few seeds to tell"]


@dataclass(frozen=True)
class Spread:
    """Values over seeds. std: over n − 1; None for a single value. mean: None without any."""

    n: int
    mean: float | None
    std: float | None


@dataclass(frozen=True)
class PairedDifference:
    """Arm minus baseline over n shared seeds, with a t interval on n − 1 degrees of freedom.

    p: two-sided, of no difference.  std, interval, p: None for fewer than two seeds; interval and p also where all
    differences are the same and not zero, which says nothing of the spread.
    """

    n: int
    mean: float | None
    std: float | None
    interval: Interval | None
    p: float | None


@dataclass(frozen=True)
class Comparison:
    """A paired difference as one of a table's comparisons.

    p_holm: adjusted over the table.  simultaneous: Bonferroni's interval over the table.  detectable: the true
    difference that n seeds would call significant in 80 % of experiments, tested alone (α 0.05); detectable_corrected:
    tested as the hardest of the table (α 0.05 over the number of comparisons).
    """

    difference: PairedDifference
    p_holm: float | None
    simultaneous: Interval | None
    detectable: float | None
    detectable_corrected: float | None
    reading: Reading


def spread(values: Sequence[float]) -> Spread:
    """Return mean and standard deviation (n − 1) of values over seeds."""
    if not values:
        return Spread(0, None, None)
    return Spread(len(values), float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else None)


def paired_difference(arm: Sequence[float], baseline: Sequence[float], level: float = 1 - ALPHA) -> PairedDifference:
    """Return the mean difference between values of the same seeds, in the same order, with its t interval.

    Raises ValueError where the two differ in length.

    Source: Student, The probable error of a mean, Biometrika 6, 1908.
    """
    if len(arm) != len(baseline):
        raise ValueError(f"paired values: expected as many of the baseline as {len(arm)}, found {len(baseline)}")
    differences = np.subtract(arm, baseline, dtype=np.float64)
    found = spread(differences.tolist())
    if found.mean is None or found.std is None:
        return PairedDifference(found.n, found.mean, None, None, None)
    # Values that differ by rounding alone are the same: the spread of such differences is noise of the arithmetic.
    scale = float(np.max(np.abs([*arm, *baseline]), initial=0.0))
    if found.std <= 8 * np.finfo(np.float64).eps * scale:
        same = abs(found.mean) <= 8 * np.finfo(np.float64).eps * scale
        return PairedDifference(found.n, found.mean, 0.0, (0.0, 0.0) if same else None, 1.0 if same else None)
    error = found.std / np.sqrt(found.n)
    freedom = found.n - 1
    half = float(special.stdtrit(freedom, (1 + level) / 2) * error)
    p = float(2 * special.stdtr(freedom, -abs(found.mean) / error))
    return PairedDifference(found.n, found.mean, found.std, (found.mean - half, found.mean + half), p)


def holm(p_values: Sequence[float]) -> list[float]:
    """Return the adjusted p of each test: those below α are significant with a family-wise error of at most α.

    Source: Holm, A simple sequentially rejective multiple test procedure, Scandinavian Journal of Statistics 6, 1979.
    """
    order = np.argsort(np.asarray(p_values, dtype=np.float64), kind="stable")
    factors = len(p_values) - np.arange(len(p_values))
    adjusted = np.empty(len(p_values))
    adjusted[order] = np.minimum(np.maximum.accumulate(np.asarray(p_values)[order] * factors), 1.0)
    return [float(value) for value in adjusted]


def paired_power(difference: float, std: float, n: int, alpha: float = ALPHA) -> float:
    """Return how often a two-sided paired t test of n ≥ 2 seeds finds a true difference.

    std > 0: of the paired differences. The statistic is then noncentral t with n − 1 degrees of freedom.

    Source: Cohen, Statistical Power Analysis for the Behavioral Sciences, 1988, section 2.
    """
    critical = special.stdtrit(n - 1, 1 - alpha / 2)
    noncentrality = abs(difference) * np.sqrt(n) / std
    # Beyond 8 the other side has less than 1e-15, and scipy's distribution no answer there.
    other_side = special.nctdtr(n - 1, noncentrality, -critical) if noncentrality < 8 else 0.0
    return float(1 - special.nctdtr(n - 1, noncentrality, critical) + other_side)


def smallest_detectable(std: float | None, n: int, alpha: float = ALPHA, power: float = POWER) -> float | None:
    """Return the true difference that a two-sided paired t test of n seeds finds with this power.

    std: of the paired differences; None for fewer than two seeds or where it is zero, as is what is returned.
    """
    if std is None or n < 2 or std == 0.0:
        return None
    critical = special.stdtrit(n - 1, 1 - alpha / 2)
    # The side of the other sign, below 1e-5 at such a power, is left out.
    noncentrality = special.nctdtrinc(n - 1, 1 - power, critical)
    return float(noncentrality * std / np.sqrt(n))


def compare(pairs: Mapping[str, tuple[Sequence[float], Sequence[float]]]) -> dict[str, Comparison]:
    """Return the comparisons of one table by name. pairs: values of an arm and of its baseline at the same seeds.

    What cannot be tested, for want of seeds or of a spread, is no part of the correction.
    """
    found = {name: paired_difference(arm, baseline) for name, (arm, baseline) in pairs.items()}
    tested = {name: difference.p for name, difference in found.items() if difference.p is not None}
    adjusted = dict(zip(tested, holm(list(tested.values())), strict=True))
    family = max(1, len(tested))
    return {
        name: Comparison(
            difference=difference,
            p_holm=adjusted.get(name),
            simultaneous=paired_difference(*pairs[name], level=1 - ALPHA / family).interval,
            detectable=smallest_detectable(difference.std, difference.n),
            detectable_corrected=smallest_detectable(difference.std, difference.n, ALPHA / family),
            reading=_reading(difference, adjusted.get(name)),
        )
        for name, difference in found.items()
    }


def _reading(difference: PairedDifference, p_holm: float | None) -> Reading:
    if p_holm is None or difference.mean is None:
        return "too few seeds to tell"
    if difference.std == 0.0:
        return "identical"
    if p_holm >= ALPHA:
        return "not told apart"
    return "higher" if difference.mean > 0 else "lower"

import numpy as np
import pytest
from scipy import integrate, stats

from evaluation.statistics import (
    ALPHA,
    POWER,
    compare,
    holm,
    paired_difference,
    paired_power,
    smallest_detectable,
    spread,
)

# Student's own data: additional hours of sleep of ten patients with two drugs (Biometrika 6, 1908, table on page 20).
DEXTRO = (0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0)
LAEVO = (1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4)


@pytest.mark.parametrize("level", [0.9, 0.95, 1 - 0.05 / 13])
@pytest.mark.parametrize("n", [2, 3, 10])
def test_interval_and_p_are_those_of_scipy(n: int, level: float) -> None:
    found = paired_difference(LAEVO[:n], DEXTRO[:n], level)
    expected = stats.ttest_rel(LAEVO[:n], DEXTRO[:n])
    assert found.interval == pytest.approx(tuple(expected.confidence_interval(level)), rel=1e-9)
    assert found.p == pytest.approx(expected.pvalue, rel=1e-9)


def test_students_sleep_gives_what_student_printed() -> None:
    found = paired_difference(LAEVO, DEXTRO)
    assert (found.n, found.mean) == (10, pytest.approx(1.58))
    assert found.std == pytest.approx(1.230, abs=5e-4)  # 1.17 over n in his paper
    assert found.p == pytest.approx(2 * (1 - 0.9985), abs=3e-4)  # the odds are about 666 to 1


def test_interval_agrees_with_a_bootstrap_where_there_are_many_seeds() -> None:
    draw = np.random.default_rng(1)
    shared, arm, baseline = draw.normal(size=(3, 60))
    found = paired_difference((shared + 0.3 + 0.2 * arm).tolist(), (shared + 0.2 * baseline).tolist())
    differences = 0.3 + 0.2 * arm - 0.2 * baseline
    bootstrap = stats.bootstrap((differences,), np.mean, rng=draw, n_resamples=4000).confidence_interval
    assert found.interval is not None
    width = found.interval[1] - found.interval[0]
    assert found.interval == pytest.approx(tuple(bootstrap), abs=0.06 * width)
    # What arms share is gone: unpaired, the interval would be several times as wide.
    unpaired = stats.ttest_ind(shared + 0.3 + 0.2 * arm, shared + 0.2 * baseline).confidence_interval()
    assert unpaired.high - unpaired.low > 2.5 * width


def test_without_two_seeds_there_is_no_interval() -> None:
    one, none = paired_difference([0.4], [0.3]), paired_difference([], [])
    assert (one.n, one.mean) == (1, pytest.approx(0.1))
    assert (one.std, one.interval, one.p) == (None, None, None)
    assert (none.n, none.mean, none.std, none.interval) == (0, None, None, None)
    assert compare({"arm": ([0.4], [0.3])})["arm"].reading == "too few seeds to tell"


def test_differences_that_are_all_the_same_say_nothing_of_the_spread() -> None:
    same = paired_difference([0.25, 0.5, 0.75], [0.125, 0.375, 0.625])
    assert (same.mean, same.std, same.interval, same.p) == (0.125, 0.0, None, None)
    rounded = paired_difference([0.3, 0.4], [0.2, 0.3])  # 0.3 − 0.2 is not 0.4 − 0.3
    assert (rounded.std, rounded.interval) == (0.0, None)
    equal = paired_difference([0.3, 0.4], [0.3, 0.4])
    assert (equal.mean, equal.interval, equal.p) == (0.0, (0.0, 0.0), 1.0)
    assert compare({"arm": ([0.3, 0.4], [0.3, 0.4])})["arm"].reading == "identical"


def test_pairs_of_different_length_are_refused() -> None:
    with pytest.raises(ValueError, match="as many of the baseline as 2, found 1"):
        paired_difference([1.0, 2.0], [1.0])


@pytest.mark.parametrize(
    ("p_values", "expected"),
    [
        # 4 × 0.005, 3 × 0.01, 2 × 0.03, 1 × 0.04 raised to the one before.
        ([0.01, 0.04, 0.03, 0.005], [0.03, 0.06, 0.06, 0.02]),
        ([0.5, 0.6], [1.0, 1.0]),
        ([0.02, 0.02], [0.04, 0.04]),
        ([0.04], [0.04]),
        ([], []),
    ],
    ids=["worked by hand", "at most one", "ties", "one test", "none"],
)
def test_holm(p_values: list[float], expected: list[float]) -> None:
    assert holm(p_values) == pytest.approx(expected)


def test_what_cannot_be_tested_is_no_part_of_the_correction() -> None:
    arm, baseline = [0.5, 0.6, 0.72], [0.4, 0.5, 0.6]
    alone = compare({"a": (arm, baseline)})["a"]
    beside = compare({"a": (arm, baseline), "one seed": ([0.1], [0.2])})["a"]
    assert alone.p_holm == alone.difference.p == beside.p_holm
    assert alone.simultaneous == alone.difference.interval
    two = compare({"a": (arm, baseline), "b": (arm, baseline)})["a"]
    assert two.p_holm == pytest.approx(2 * (alone.p_holm or 0))
    assert two.detectable == alone.detectable
    assert two.detectable_corrected == smallest_detectable(alone.difference.std, 3, ALPHA / 2)


def test_reading_follows_the_corrected_p_and_the_sign() -> None:
    draw = np.random.default_rng(2)
    baseline = draw.normal(size=12)
    arms = {name: (baseline + shift + 0.1 * draw.normal(size=12)).tolist() for name, shift in
            (("up", 0.5), ("down", -0.5), ("level", 0.0))}  # fmt: skip
    found = compare({name: (arm, baseline.tolist()) for name, arm in arms.items()})
    assert [found[name].reading for name in arms] == ["higher", "lower", "not told apart"]
    # Bonferroni's intervals never leave zero out where Holm sees nothing.
    for comparison in found.values():
        low, high = comparison.simultaneous or (0.0, 0.0)
        assert (low > 0 or high < 0) <= ((comparison.p_holm or 1) < ALPHA)
        assert high - low > np.subtract(*(comparison.difference.interval or (0.0, 0.0))[::-1])


@pytest.mark.parametrize("alpha", [ALPHA, ALPHA / 13])
@pytest.mark.parametrize("n", [2, 3, 5, 30])
def test_power_is_the_integral_over_the_spread_that_is_seen(n: int, alpha: float) -> None:
    true = smallest_detectable(0.7, n, alpha)
    assert true is not None
    shift, critical = true * np.sqrt(n) / 0.7, stats.t.ppf(1 - alpha / 2, n - 1)

    def passes(
        share: float,
    ) -> float:  # share: where the spread that is seen stands in its distribution
        edge = critical * np.sqrt(stats.chi2.ppf(share, n - 1) / (n - 1))
        return float(stats.norm.sf(edge - shift) + stats.norm.cdf(-edge - shift))

    expected = integrate.quad(passes, 0, 1, limit=400)[0]
    assert paired_power(true, 0.7, n, alpha) == pytest.approx(expected, abs=1e-5)
    assert expected == pytest.approx(POWER, abs=1e-4)


def test_the_smallest_detectable_difference_is_found_in_80_percent_of_simulated_sweeps() -> None:
    true = smallest_detectable(1.0, 5)
    assert true is not None
    sweeps = np.random.default_rng(3).normal(true, 1.0, size=(6_000, 5)).tolist()
    found = [paired_difference(differences, [0.0] * 5).p for differences in sweeps]
    share = np.mean([p is not None and p < ALPHA for p in found])
    assert share == pytest.approx(POWER, abs=0.018)  # 3.5 standard errors
    assert paired_power(0.0, 1.0, 5) == pytest.approx(ALPHA)
    assert smallest_detectable(1.0, 1) is smallest_detectable(None, 5) is smallest_detectable(0.0, 5) is None


def test_no_effect_is_called_significant_in_5_percent_and_family_wise_no_more() -> None:
    draw = np.random.default_rng(4)
    alone, corrected, uncorrected, sweeps = 0, 0, 0, 600
    for _ in range(sweeps):
        # Six arms and the one baseline that they share, over four seeds: their differences are correlated.
        seed = draw.normal(size=4)
        baseline, *arms = seed + 0.3 * draw.normal(size=(7, 4))
        found = compare({str(index): (arm.tolist(), baseline.tolist()) for index, arm in enumerate(arms)})
        p_values = [comparison.difference.p or 0.0 for comparison in found.values()]
        alone += p_values[0] < ALPHA
        uncorrected += min(p_values) < ALPHA
        corrected += any(comparison.reading != "not told apart" for comparison in found.values())
    error = np.sqrt(ALPHA * (1 - ALPHA) / sweeps)
    assert alone / sweeps == pytest.approx(ALPHA, abs=3.5 * error)
    assert corrected / sweeps <= ALPHA + 2 * error
    assert uncorrected / sweeps > 2 * ALPHA  # what the correction is for


def test_spread_over_seeds() -> None:
    assert spread([1.0, 2.0, 4.0]).std == pytest.approx(np.sqrt(7 / 3))
    assert spread([0.5]).std is None
    assert spread([]).mean is None

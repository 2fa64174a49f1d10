import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evaluation.report.axes import axis, tick_label


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0, 1, (0, 0.2, 0.4, 0.6, 0.8, 1)),
        (0, 47.3, (0, 10, 20, 30, 40, 50)),
        (0.5, 0.95, (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)),
        (-3, 11, (-5, -2.5, 0, 2.5, 5, 7.5, 10, 12.5)),
        (0, 0.0031, (0, 0.001, 0.002, 0.003, 0.004)),
    ],
)
def test_ticks_are_round_and_the_ends_reach_them(low: float, high: float, ticks: tuple[float, ...]) -> None:
    found = axis(low, high, 0, 100)
    assert found.ticks == pytest.approx(ticks)
    assert (found.low, found.high) == pytest.approx((ticks[0], ticks[-1]))


def test_whole_ticks_leave_the_ends_where_they_are():
    found = axis(1, 40, 0, 100, whole=True)
    assert found.ticks == (10, 20, 30, 40)
    assert (found.low, found.high) == (1, 40)
    assert axis(1, 3, 0, 100, whole=True).ticks == (1, 2, 3)


def test_an_axis_maps_its_ends_and_middle_also_upside_down():
    found = axis(0, 10, 200, 0)
    assert [found(value) for value in (0, 5, 10)] == [200, 100, 0]


@pytest.mark.parametrize(
    ("ticks", "labels"),
    [
        ((0, 10, 20), ["0", "10", "20"]),
        ((0, 0.25, 0.5), ["0.00", "0.25", "0.50"]),
        ((-0.2, 0.0, 0.2), ["−0.2", "0.0", "0.2"]),
        ((0, 2.5, 5), ["0.0", "2.5", "5.0"]),
        ((0.001, 0.002), ["0.001", "0.002"]),
    ],
)
def test_labels_have_the_decimals_that_tell_them_apart(ticks: tuple[float, ...], labels: list[str]) -> None:
    assert [tick_label(tick, ticks) for tick in ticks] == labels


@given(st.floats(-1e6, 1e6), st.floats(-1e6, 1e6))
def test_every_axis_holds_its_data_has_ticks_and_labels_that_differ(one: float, other: float) -> None:
    low, high = sorted((one, other))
    found = axis(low, high, 0, 1)
    slack = 1e-6 * (found.high - found.low)
    assert found.low <= low + slack
    assert found.high >= high - slack
    assert 2 <= len(found.ticks) <= 9
    assert all(math.isfinite(found(value)) for value in (low, high))

from collections.abc import Callable
from typing import Any

import pytest

from evaluation.report import text


@pytest.mark.parametrize(
    ("write", "value", "written"),
    [
        (text.percent, 0.4126, "41.3"),
        (text.percent, 0.0, "0.0"),
        (text.percent, -0.0001, "0.0"),
        (text.percent, None, "–"),
        (text.percent, float("nan"), "–"),
        (text.points, 0.0123, "+1.2"),
        (text.points, -0.0123, "−1.2"),
        (text.points, 0.0001, "0.0"),
        (text.points, -0.0001, "0.0"),
        (text.points, None, "–"),
        (text.seconds, 12.34, "12.3 s"),
        (text.seconds, 600, "10.0 min"),
        (text.seconds, 9000, "2.5 h"),
        (text.seconds, None, "–"),
        (text.count, 12345, "12,345"),
        (text.number, -0.00012345, "−0.000123"),
    ],
)
def test_numbers_are_written(write: Callable[[Any], str], value: float | None, written: str) -> None:
    assert write(value) == written

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from evaluation.report.choice import MOST_DIFFERENT, MOST_ERRORS, SPREAD, choose_images, how_chosen


def test_of_two_runs_a_third_differs_a_third_fails_and_a_third_is_spread():
    one = np.array([0, 9, 0, 0, 5, 0, 0, 0, 1, 0, 0, 0])
    other = np.array([0, 9, 0, 6, 0, 0, 0, 0, 1, 0, 0, 0])
    assert choose_images(np.stack([one, other]), 6) == {
        0: SPREAD, 1: MOST_ERRORS, 3: MOST_DIFFERENT, 4: MOST_DIFFERENT, 8: MOST_ERRORS, 11: SPREAD,
    }  # fmt: skip


def test_of_one_run_half_fails():
    errors = np.array([[0, 3, 0, 2, 0, 0, 1, 0]])
    assert choose_images(errors, 4) == {0: SPREAD, 1: MOST_ERRORS, 3: MOST_ERRORS, 7: SPREAD}


def test_images_without_errors_are_not_said_to_have_most():
    assert set(choose_images(np.zeros((2, 10), np.int64), 6).values()) == {SPREAD}


@given(
    hnp.arrays(np.int64, st.tuples(st.integers(1, 3), st.integers(1, 30)), elements=st.integers(0, 20)),
    st.integers(0, 40),
)
def test_so_many_images_as_asked_for_in_the_order_of_the_set(errors: np.ndarray, count: int) -> None:
    chosen = choose_images(errors, count)
    assert len(chosen) == min(count, errors.shape[1])
    assert list(chosen) == sorted(chosen)
    total = errors.sum(axis=0)
    worst = [total[place] for place, reason in chosen.items() if reason == MOST_ERRORS]
    others = [total[place] for place in range(errors.shape[1]) if place not in chosen]
    if worst and others:
        assert min(worst) >= max(others)


@pytest.mark.parametrize(
    ("reasons", "num_images", "start"),
    [
        ([SPREAD] * 4, 4, "All 4 images."),
        ([SPREAD, MOST_ERRORS, SPREAD], 2510, "3 of 2,510 images: 1 × most errors, 2 × spread over the set."),
    ],
)
def test_how_they_were_chosen_is_said(reasons: list[str], num_images: int, start: str) -> None:
    assert how_chosen(reasons, num_images, 0.3).startswith(start)

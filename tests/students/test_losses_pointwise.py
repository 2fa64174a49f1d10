import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial import distance

from students.losses.pointwise import feature_cosine, feature_mse
from tests.students.loss_inputs import randn


def test_mse_by_hand() -> None:
    student = torch.tensor([[[[1.0, 2.0]], [[0.0, 1.0]]]])  # B=1, C=2, H=1, W=2
    teacher = torch.tensor([[[[3.0, 5.0]], [[10.0, 30.0]]]])
    # (1-3)², (2-5)², (0-10)², (1-30)² over four elements.
    assert feature_mse(student, teacher).item() == pytest.approx((4 + 9 + 100 + 841) / 4)


def test_mse_matches_numpy() -> None:
    student, teacher = randn(2, 6, 3, 4), randn(2, 6, 3, 4, seed=1)
    expected = np.mean((student.double().numpy() - teacher.double().numpy()) ** 2)
    assert feature_mse(student, teacher).item() == pytest.approx(expected, rel=1e-6)


def test_mse_of_a_half_precision_student_does_not_overflow() -> None:
    student, teacher = torch.full((1, 2, 30, 30), 300.0).half(), torch.zeros(1, 2, 30, 30).half()
    assert feature_mse(student, teacher).item() == 90_000  # beyond float16's 65,504


def test_cosine_by_hand() -> None:
    # Three places of two channels: (1, 0) and (0, 2) at a right angle; (3, 4) and (4, 3) with cosine 24/25; opposites.
    student = torch.tensor([[[[1.0, 3.0, 1.0]], [[0.0, 4.0, 1.0]]]])
    teacher = torch.tensor([[[[0.0, 4.0, -2.0]], [[2.0, 3.0, -2.0]]]])
    assert feature_cosine(student, teacher).item() == pytest.approx((1 + 1 / 25 + 2) / 3)


def test_cosine_matches_scipy_place_by_place() -> None:
    student, teacher = randn(2, 5, 3, 4) + 0.3, randn(2, 5, 3, 4, seed=1) + 0.3
    places = [(b, i, j) for b in range(2) for i in range(3) for j in range(4)]
    expected = np.mean([distance.cosine(student[b, :, i, j], teacher[b, :, i, j]) for b, i, j in places])
    assert feature_cosine(student, teacher).item() == pytest.approx(expected, rel=1e-5)


@given(seed=st.integers(0, 1000), exponent=st.integers(-3, 12))
def test_cosine_does_not_depend_on_a_places_length(seed: int, exponent: int) -> None:
    student, teacher = randn(2, 5, 3, 4, seed=seed), randn(2, 5, 3, 4, seed=seed + 1)
    lengths = 2.0**exponent * (1 + randn(2, 1, 3, 4, seed=seed + 2).abs())
    loss = feature_cosine(student, teacher).item()
    assert feature_cosine(student * lengths, teacher).item() == pytest.approx(loss, abs=2e-6)
    assert feature_cosine(student, teacher * lengths).item() == pytest.approx(loss, abs=2e-6)


def test_cosine_counts_a_place_without_direction_one() -> None:
    student, teacher = torch.tensor([[[[0.0, 1.0]], [[0.0, 0.0]]]]), torch.ones(1, 2, 1, 2)
    assert feature_cosine(student, teacher).item() == pytest.approx((1 + 1 - 0.5**0.5) / 2)

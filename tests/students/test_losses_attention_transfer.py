import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from students.losses.attention_transfer import attention_transfer
from tests.students.loss_inputs import randn


def test_by_hand() -> None:
    # Sums of squares over three channels: student (3, 4), teacher (4, 3); normalised (0.6, 0.8) and (0.8, 0.6).
    student = torch.tensor([[[[1.0, 2.0]], [[1.0, 0.0]], [[-1.0, 0.0]]]])
    teacher = torch.tensor([[[[0.0, 1.0]], [[2.0, -1.0]], [[0.0, 1.0]]]])
    assert attention_transfer(student, teacher).item() == pytest.approx(2 * 0.2**2)


def test_matches_two_minus_twice_the_cosine_of_the_maps() -> None:
    student, teacher = randn(3, 4, 5, 6), randn(3, 4, 5, 6, seed=1)
    expected = []
    for s, t in zip(student.double().numpy(), teacher.double().numpy(), strict=True):
        maps = np.einsum("chw,chw->hw", s, s).ravel(), np.einsum("chw,chw->hw", t, t).ravel()
        expected.append(2 - 2 * maps[0] @ maps[1] / np.sqrt((maps[0] @ maps[0]) * (maps[1] @ maps[1])))
    assert attention_transfer(student, teacher).item() == pytest.approx(np.mean(expected), rel=1e-5)


@given(seed=st.integers(0, 1000), exponent=st.integers(-8, 8))
def test_an_images_scale_changes_nothing(seed: int, exponent: int) -> None:
    student, teacher = randn(2, 3, 4, 5, seed=seed), randn(2, 3, 4, 5, seed=seed + 1)
    scales = 2.0**exponent * (1 + randn(2, 1, 1, 1, seed=seed + 2).abs())
    loss = attention_transfer(student, teacher).item()
    assert attention_transfer(scales * student, teacher).item() == pytest.approx(loss, rel=1e-4)
    assert attention_transfer(student, scales * teacher).item() == pytest.approx(loss, rel=1e-4)


@given(seed=st.integers(0, 1000))
def test_which_channel_is_active_does_not_count(seed: int) -> None:
    student, teacher = randn(2, 3, 4, 5, seed=seed), randn(2, 3, 4, 5, seed=seed + 1)
    permuted = attention_transfer(-student[:, [2, 0, 1]], teacher)
    assert permuted.item() == pytest.approx(attention_transfer(student, teacher).item(), rel=1e-4)


def test_large_half_precision_features_do_not_overflow() -> None:
    student = torch.full((1, 64, 30, 30), 60_000.0).half()
    student[:, :, 0] = 0
    assert 0 < attention_transfer(student, torch.ones_like(student)).item() < 2

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import pearsonr
from torch import Tensor

from students.losses.feature_loss import FeatureLoss
from students.losses.pearson import pearson
from tests.students.loss_inputs import randn


def test_by_hand() -> None:
    # Two images of two places, three channels. 0: the teacher is 10 · student − 3, r = 1. 1: reversed, r = −1.
    # 2: (0, 0, 1, 1) and (0, 1, 0, 1), r = 0.
    student = torch.tensor([[[[0.0, 2.0]], [[0.0, 2.0]], [[0.0, 0.0]]], [[[5.0, 1.0]], [[5.0, 1.0]], [[1.0, 1.0]]]])
    teacher = torch.tensor([[[[-3.0, 17.0]], [[4.0, 2.0]], [[0.0, 1.0]]], [[[47.0, 7.0]], [[-1.0, 3.0]], [[0.0, 1.0]]]])
    assert pearson(student, teacher).item() == pytest.approx(((1 - 1) + (1 + 1) + (1 - 0)) / 3, abs=1e-6)


def test_matches_one_minus_scipys_correlation() -> None:
    student = randn(3, 4, 5, 6)
    teacher = 0.5 * student + randn(3, 4, 5, 6, seed=1)
    rs = [pearsonr(student[:, c].flatten().numpy(), teacher[:, c].flatten().numpy()).statistic for c in range(4)]
    assert pearson(student, teacher).item() == pytest.approx(1 - np.mean(rs), rel=1e-5)


@given(seed=st.integers(0, 1000), exponent=st.integers(-3, 8))
def test_an_affine_map_of_a_channel_changes_nothing(seed: int, exponent: int) -> None:
    student, teacher = randn(2, 3, 4, 5, seed=seed), randn(2, 3, 4, 5, seed=seed + 1)
    scales = 2.0**exponent * (1 + randn(1, 3, 1, 1, seed=seed + 2).abs())
    shifts = scales * randn(1, 3, 1, 1, seed=seed + 3)
    loss = pearson(student, teacher).item()
    assert pearson(scales * student + shifts, teacher).item() == pytest.approx(loss, abs=1e-5)
    assert pearson(student, scales * teacher + shifts).item() == pytest.approx(loss, abs=1e-5)


def test_a_channel_constant_on_one_side_counts_a_half() -> None:
    constant = torch.full((2, 1, 3, 4), 0.1)
    assert pearson(constant, randn(2, 1, 3, 4)).item() == pytest.approx(0.5)
    assert pearson(randn(2, 1, 3, 4), constant).item() == pytest.approx(0.5)
    assert pearson(constant, 3 * constant).item() == pytest.approx(0, abs=1e-6)


def in_two_ranks(run: Callable[[int, Callable[[Tensor], Tensor]], Tensor]) -> list[Tensor]:
    """Return run(rank, mean over both ranks) of two threads that meet at every mean, and differentiate through it."""
    meeting, said = threading.Barrier(2, timeout=60), {}

    def mean(rank: int, value: Tensor) -> Tensor:
        said[rank] = value
        meeting.wait()
        result = (said[0] + said[1]) / 2
        meeting.wait()
        return result

    with ThreadPoolExecutor(2) as threads:
        ranks = [threads.submit(run, rank, lambda value, rank=rank: mean(rank, value)) for rank in range(2)]
        return [rank.result() for rank in ranks]


def test_halves_of_a_batch_with_means_over_ranks_average_to_the_whole() -> None:
    student, teacher = randn(4, 3, 5, 6, dtype=torch.float64), randn(4, 3, 5, 6, seed=1, dtype=torch.float64)
    student[2:] += 2  # the halves' own statistics differ
    whole, parts = student.clone().requires_grad_(), student.clone().requires_grad_()
    expected = pearson(whole, teacher)
    expected.backward()

    def run(rank: int, mean: Callable[[Tensor], Tensor]) -> Tensor:
        half = slice(2 * rank, 2 * rank + 2)
        loss: Tensor = FeatureLoss("pkd", 3, over_ranks=mean)(parts[half], teacher[half], ())
        return loss

    found = torch.stack(in_two_ranks(run)).mean()
    found.backward()
    assert found.item() == pytest.approx(expected.item(), rel=1e-12)
    torch.testing.assert_close(parts.grad, whole.grad, rtol=1e-10, atol=1e-14)
    alone = (pearson(student[:2], teacher[:2]) + pearson(student[2:], teacher[2:])) / 2
    assert alone.item() != pytest.approx(expected.item(), rel=1e-2)

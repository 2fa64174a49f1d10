import numpy as np
import pytest
import torch

from students.losses.standardise import standardise
from tests.students.loss_inputs import randn


def test_by_hand() -> None:
    teacher = torch.tensor([[[[3.0, 10.0], [5.0, 30.0]]]])  # B=1, Gh=1, Gw=2, C=2
    mean, std = torch.tensor([1.0, 10.0]), torch.tensor([2.0, 20.0])
    # Channel 0: (3-1)/2, (5-1)/2; channel 1: (10-10)/20, (30-10)/20.
    assert standardise(teacher, mean, std).tolist() == [[[[1.0, 2.0]], [[0.0, 1.0]]]]
    assert standardise(teacher, mean, None).tolist() == [[[[2.0, 4.0]], [[0.0, 20.0]]]]
    assert standardise(teacher, None, std).tolist() == [[[[1.5, 2.5]], [[0.5, 1.5]]]]
    assert standardise(teacher, None, None).tolist() == [[[[3.0, 5.0]], [[10.0, 30.0]]]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_matches_numpy_for_every_stored_dtype(dtype: torch.dtype) -> None:
    teacher = (randn(2, 3, 4, 6, seed=1) * 40 + 7).to(dtype)
    mean, std = randn(6, seed=2) + 7, randn(6, seed=3).abs() + 30
    target = standardise(teacher, mean, std)
    expected = ((teacher.double().numpy() - mean.numpy()) / std.numpy()).transpose(0, 3, 1, 2)
    np.testing.assert_allclose(target.numpy(), expected, atol=1e-6)
    assert target.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_half_precision_does_not_overflow() -> None:
    teacher = torch.full((1, 1, 1, 2), 60_000.0).half()
    assert standardise(teacher, torch.tensor([-60_000.0, 0.0]), None).flatten().tolist() == [120_000.0, 60_000.0]


def test_a_channel_that_never_moves_becomes_zero() -> None:
    std = torch.tensor([1.0, float("inf")])
    assert standardise(torch.full((1, 2, 2, 2), 3.0), None, std)[:, 1].abs().max() == 0


def test_has_no_gradient() -> None:
    assert not standardise(randn(1, 2, 2, 3).requires_grad_(), None, None).requires_grad


@pytest.mark.parametrize(
    ("teacher", "mean", "message"),
    [
        pytest.param(
            torch.zeros(2, 3, 4), None, r"float teacher features \[B, Gh, Gw, C\].*\[2, 3, 4\]", id="no batch"
        ),
        pytest.param(
            torch.zeros(2, 3, 4, 5, dtype=torch.int8), None, r"found torch.int8 \[2, 3, 4, 5\]", id="integers"
        ),
        pytest.param(torch.zeros(2, 5, 3, 4), torch.zeros(5), r"mean of shape \[4\].*\[5\]", id="channels first"),
        pytest.param(torch.zeros(2, 3, 4, 5), torch.zeros(1), r"mean of shape \[5\].*\[1\]", id="would broadcast"),
    ],
)
def test_refuses(teacher: torch.Tensor, mean: torch.Tensor | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        standardise(teacher, mean, None)


def test_refuses_a_std_of_other_channels() -> None:
    with pytest.raises(ValueError, match=r"std of shape \[5\].*\[4\]"):
        standardise(torch.zeros(2, 3, 4, 5), None, torch.ones(4))

import numpy as np
import pytest
import torch
from scipy.special import rel_entr, softmax
from torch import Tensor

from students.losses.feature_mse import feature_mse
from students.losses.logit_kl import logit_kl


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def test_feature_mse_by_hand() -> None:
    student = torch.tensor([[[[1.0, 2.0]], [[0.0, 1.0]]]])  # B=1, C=2, Gh=1, Gw=2
    teacher = torch.tensor([[[[3.0, 10.0], [5.0, 30.0]]]])  # B=1, Gh=1, Gw=2, C=2
    mean, std = torch.tensor([1.0, 10.0]), torch.tensor([2.0, 20.0])
    # Standardised: channel 0 gives 1, 2; channel 1 gives 0, 1.
    assert feature_mse(student, teacher, mean, std) == 0
    # As it is: (1-3)², (2-5)², (0-10)², (1-30)² over four elements.
    assert feature_mse(student, teacher).item() == pytest.approx((4 + 9 + 100 + 841) / 4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_feature_mse_matches_numpy_for_every_stored_dtype(dtype: torch.dtype) -> None:
    student, teacher = randn(2, 6, 3, 4), (randn(2, 3, 4, 6, seed=1) * 40 + 7).to(dtype)
    mean, std = randn(6, seed=2) + 7, randn(6, seed=3).abs() + 30
    target = (teacher.double().numpy() - mean.numpy()) / std.numpy()
    expected = np.mean((student.numpy() - target.transpose(0, 3, 1, 2)) ** 2)
    loss = feature_mse(student, teacher, mean, std)
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_feature_mse_of_a_half_precision_student_is_computed_in_float32() -> None:
    student, teacher = torch.full((1, 2, 30, 30), 300.0).half(), torch.zeros(1, 30, 30, 2).half()
    assert feature_mse(student, teacher).item() == 90_000  # beyond float16's 65,504


def test_feature_mse_gradient() -> None:
    student = randn(2, 3, 2, 2, dtype=torch.float64).requires_grad_()
    teacher, std = randn(2, 2, 2, 3, seed=1, dtype=torch.float64), randn(3, seed=2, dtype=torch.float64).abs() + 1
    assert torch.autograd.gradcheck(lambda features: feature_mse(features, teacher, std, std), student)


def test_feature_mse_refuses_a_channels_first_teacher() -> None:
    with pytest.raises(ValueError, match=r"\[B, Gh, Gw, C\] = \[2, 30, 30, 8\].*found \[2, 8, 30, 30\]"):
        feature_mse(torch.zeros(2, 8, 30, 30), torch.zeros(2, 8, 30, 30))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_logit_kl_matches_scipy(temperature: float, dtype: torch.dtype) -> None:
    student, teacher = randn(5, 20) * 3, (randn(5, 20, seed=1) * 3).to(dtype)
    probs_t = softmax(teacher.double().numpy() / temperature, axis=1)
    probs_s = softmax(student.double().numpy() / temperature, axis=1)
    expected = temperature**2 * rel_entr(probs_t, probs_s).sum(axis=1).mean()
    assert logit_kl(student, teacher, temperature).item() == pytest.approx(expected, rel=1e-5)


def test_logit_kl_by_hand() -> None:
    # Teacher (1/2, 1/2), student (1/4, 3/4): KL = ½ ln 2 + ½ ln ⅔ = ½ ln 4/3.
    student = torch.tensor([[0.0, np.log(3.0)]])
    assert logit_kl(student, torch.zeros(1, 2), 1.0).item() == pytest.approx(0.5 * np.log(4 / 3))


def test_logit_kl_is_zero_for_equal_distributions() -> None:
    logits = randn(3, 20)
    assert logit_kl(logits, logits + 5, 2.0).item() == pytest.approx(0, abs=1e-6)


def test_logit_kl_of_a_nearly_one_hot_teacher_is_finite() -> None:
    student, teacher = randn(2, 20).requires_grad_(), torch.zeros(2, 20)
    teacher[:, 3] = 1e4
    loss = logit_kl(student, teacher.half(), 1.0)
    loss.backward()
    assert torch.isfinite(loss)
    assert student.grad is not None
    assert torch.isfinite(student.grad).all()


def test_logit_kl_gradient() -> None:
    student = randn(3, 5, dtype=torch.float64).requires_grad_()
    teacher = randn(3, 5, seed=1, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda logits: logit_kl(logits, teacher, 2.0), student)


@pytest.mark.parametrize(
    ("shape", "temperature", "message"),
    [
        pytest.param((3, 19), 2.0, r"one shape \[B, K\], found \[3, 20\] and \[3, 19\]", id="classes"),
        pytest.param((3, 20), 0.0, "positive temperature, found 0", id="zero temperature"),
        pytest.param((3, 20), float("nan"), "positive temperature, found nan", id="temperature that is no number"),
    ],
)
def test_logit_kl_refuses(shape: tuple[int, int], temperature: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        logit_kl(torch.zeros(3, 20), torch.zeros(shape), temperature)

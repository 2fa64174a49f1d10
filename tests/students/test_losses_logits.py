from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import rel_entr, softmax
from torch import Tensor
from torch.distributions import Bernoulli, kl_divergence

from students.losses.binary_kl import binary_kl, teacher_probs
from students.losses.logit_kl import logit_kl
from students.losses.region_kl import region_kl
from tests.students.loss_inputs import randn

LogitLoss = Callable[[Tensor, Tensor, float], Tensor]


def region_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Return `region_kl` of scores with a background, column 0, in front."""
    return region_kl(F.pad(student, (1, 0), value=3.0), teacher, temperature)


LOSSES = [
    pytest.param(logit_kl, id="logit_kl"),
    pytest.param(partial(binary_kl, centre=None), id="binary_kl"),
    pytest.param(partial(binary_kl, centre=randn(20, seed=8)), id="binary_kl-centred"),
    pytest.param(region_loss, id="region_kl"),
]


def clip_like(num_images: int) -> Tensor:
    """100 × cosine as an image-text model gives it: 20 to 30 for every class of every image, classes apart."""
    per_class = 25 + 2 * torch.linspace(-1, 1, 20)
    return (per_class + 1.2 * randn(num_images, 20, seed=5)).clamp(20, 30)


@pytest.mark.parametrize("loss", LOSSES)
class TestLogitLossContract:
    def test_gradient_is_the_derivative(self, loss: LogitLoss) -> None:
        student, teacher = randn(3, 20, dtype=torch.float64), randn(3, 20, seed=1, dtype=torch.float64)
        assert torch.autograd.gradcheck(lambda s: loss(s, teacher, 2.0), student.requires_grad_())

    def test_no_gradient_reaches_the_teacher(self, loss: LogitLoss) -> None:
        student, teacher = randn(3, 20).requires_grad_(), randn(3, 20, seed=1).requires_grad_()
        loss(student, teacher, 2.0).backward()
        assert student.grad is not None
        assert student.grad.abs().max() > 0
        assert teacher.grad is None

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half_precision_and_autocast_are_computed_in_float32(self, loss: LogitLoss, dtype: torch.dtype) -> None:
        student, teacher = randn(3, 20, dtype=dtype), randn(3, 20, seed=1, dtype=dtype)
        expected = loss(student.float(), teacher.float(), 2.0)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert loss(student, teacher, 2.0) == expected
        assert loss(student, teacher, 2.0) == expected
        assert expected.dtype == torch.float32

    def test_a_nearly_certain_teacher_gives_finite_values_and_gradients(self, loss: LogitLoss) -> None:
        student, teacher = (1e4 * randn(2, 20)).requires_grad_(), torch.zeros(2, 20)
        teacher[:, 3], teacher[:, 4] = 6e4, -6e4
        value = loss(student, teacher.half(), 1.0)
        value.backward()
        assert torch.isfinite(value)
        assert student.grad is not None
        assert torch.isfinite(student.grad).all()

    @pytest.mark.parametrize("temperature", [0.0, -2.0, float("nan")])
    def test_refuses_a_temperature_that_is_not_positive(self, loss: LogitLoss, temperature: float) -> None:
        with pytest.raises(ValueError, match=f"positive temperature, found {temperature}"):
            loss(torch.zeros(3, 20), torch.zeros(3, 20), temperature)

    def test_refuses_other_classes(self, loss: LogitLoss) -> None:
        with pytest.raises(ValueError, match=r"found \[3, 2[01]\] and \[3, 19\]"):
            loss(torch.zeros(3, 20), torch.zeros(3, 19), 2.0)


class TestLogitKl:
    def test_by_hand(self) -> None:
        # Teacher (1/2, 1/2), student (1/4, 3/4): KL = ½ ln 2 + ½ ln ⅔ = ½ ln 4/3.
        student = torch.tensor([[0.0, np.log(3.0)]])
        assert logit_kl(student, torch.zeros(1, 2), 1.0).item() == pytest.approx(0.5 * np.log(4 / 3))

    @pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
    def test_matches_scipy(self, temperature: float) -> None:
        student, teacher = randn(5, 20) * 3, randn(5, 20, seed=1) * 3
        probs_t = softmax(teacher.double().numpy() / temperature, axis=1)
        probs_s = softmax(student.double().numpy() / temperature, axis=1)
        expected = temperature**2 * rel_entr(probs_t, probs_s).sum(axis=1).mean()
        assert logit_kl(student, teacher, temperature).item() == pytest.approx(expected, rel=1e-5)

    def test_is_zero_for_equal_distributions(self) -> None:
        logits = randn(3, 20)
        assert logit_kl(logits, logits + 5, 2.0).item() == pytest.approx(0, abs=1e-6)


class TestBinaryKl:
    def test_by_hand(self) -> None:
        # Class 0: teacher sigmoid(25 − 25) = ½, student sigmoid(ln 3) = ¾: KL = ½ ln ⅔ + ½ ln 2 = ½ ln 4/3.
        # Class 1: teacher sigmoid(22 + ln 3 − 22) = ¾, student ½: KL = ¾ ln 3/2 + ¼ ln ½.
        student = torch.tensor([[np.log(3.0), 0.0]], dtype=torch.float64)
        teacher = torch.tensor([[25.0, 22.0 + np.log(3.0)]], dtype=torch.float64)
        centre = torch.tensor([25.0, 22.0], dtype=torch.float64)
        expected = 0.5 * np.log(4 / 3) + 0.75 * np.log(1.5) + 0.25 * np.log(0.5)
        assert binary_kl(student, teacher, 1.0, centre).item() == pytest.approx(expected)
        # At T = 2 with everything twice as far from its centre: the same distributions, and T² = 4.
        hot = binary_kl(2 * student, centre + 2 * (teacher - centre), 2.0, centre)
        assert hot.item() == pytest.approx(4 * expected)

    @pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
    def test_matches_torchs_bernoulli_divergence(self, temperature: float) -> None:
        student, teacher, centre = randn(5, 20) * 3, clip_like(5), clip_like(5).mean(dim=0)
        teachers = Bernoulli(logits=(teacher.double() - centre.double()) / temperature)
        students = Bernoulli(logits=student.double() / temperature)
        expected = temperature**2 * kl_divergence(teachers, students).sum(dim=1).mean()
        assert binary_kl(student, teacher, temperature, centre).item() == pytest.approx(expected.item(), rel=1e-4)

    def test_probabilities_of_an_image_text_teacher_saturate_without_a_centre_only(self) -> None:
        logits = clip_like(200)
        assert logits.min() == 20
        assert logits.max() == 30
        assert teacher_probs(logits, 1.0, None).min() > 0.99998
        centred = teacher_probs(logits, 2.0, logits.mean(dim=0))
        assert centred.min() > 0.02
        assert centred.max() < 0.98
        assert centred.std() > 0.1  # they still tell images apart

    @given(seed=st.integers(0, 1000), temperature=st.sampled_from([0.5, 1.0, 2.0, 5.0]))
    def test_a_student_that_says_the_same_is_at_the_minimum(self, seed: int, temperature: float) -> None:
        teacher, centre = randn(4, 20, seed=seed) * 3, randn(20, seed=seed + 1)
        student = (teacher - centre).requires_grad_()
        loss = binary_kl(student, teacher, temperature, centre)
        loss.backward()
        assert loss.item() == pytest.approx(0, abs=1e-6)
        assert student.grad is not None
        assert student.grad.abs().max() < 1e-6

    def test_gradient_is_temperature_times_the_difference_of_probabilities(self) -> None:
        student, teacher, centre = (
            randn(4, 20).double().requires_grad_(),
            clip_like(4).double(),
            torch.full((20,), 25.0),
        )
        binary_kl(student, teacher, 3.0, centre).backward()
        difference = torch.sigmoid(student.detach() / 3) - teacher_probs(teacher, 3.0, centre)
        torch.testing.assert_close(student.grad, 3 * difference / 4)

    def test_refuses_a_centre_of_other_classes(self) -> None:
        with pytest.raises(ValueError, match=r"centre of shape \[20\], one a class, found \[21\]"):
            binary_kl(torch.zeros(3, 20), torch.zeros(3, 20), 2.0, torch.zeros(21))


class TestRegionKl:
    def test_by_hand(self) -> None:
        # Two proposals, background first. First: (1/4, 3/4) and (1/2, 1/2), KL = ½ ln 4/3. Second: equal.
        student = torch.tensor([[9.0, 0.0, np.log(3.0)], [-9.0, 1.0, 2.0]])
        teacher = torch.tensor([[24.0, 24.0], [21.0, 22.0]])
        assert region_kl(student, teacher, 1.0).item() == pytest.approx(0.5 * np.log(4 / 3) / 2)

    @pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
    def test_matches_scipy_over_the_foreground(self, temperature: float) -> None:
        student, teacher = randn(7, 21) * 3, clip_like(7)
        probs_t = softmax(teacher.double().numpy() / temperature, axis=1)
        probs_s = softmax(student.double().numpy()[:, 1:] / temperature, axis=1)
        expected = temperature**2 * rel_entr(probs_t, probs_s).sum(axis=1).mean()
        assert region_kl(student, teacher, temperature).item() == pytest.approx(expected, rel=1e-4)

    def test_background_gets_no_gradient(self) -> None:
        student = randn(7, 21).requires_grad_()
        region_kl(student, clip_like(7), 2.0).backward()
        assert student.grad is not None
        assert student.grad[:, 0].abs().max() == 0

    def test_no_proposals_give_zero_with_a_gradient_of_zeros(self) -> None:
        head = torch.nn.Linear(8, 21)
        loss = region_kl(head(torch.zeros(0, 8)), torch.zeros(0, 20), 2.0)
        loss.backward()
        assert loss.item() == 0
        assert all(p.grad is not None and p.grad.abs().max() == 0 for p in head.parameters())

    def test_parts_average_to_the_whole_by_their_proposals(self) -> None:
        student, teacher = randn(7, 21), clip_like(7)
        parts = 2 * region_kl(student[:2], teacher[:2], 2.0) + 5 * region_kl(student[2:], teacher[2:], 2.0)
        assert region_kl(student, teacher, 2.0).item() == pytest.approx(parts.item() / 7, rel=1e-5)

    @pytest.mark.parametrize("shape", [(7, 20), (6, 21), (7, 22)])
    def test_refuses_scores_that_do_not_belong_to_the_logits(self, shape: tuple[int, int]) -> None:
        with pytest.raises(ValueError, match=r"\[P, K \+ 1\], background first.*found .* and \[7, 20\]"):
            region_kl(torch.zeros(shape), torch.zeros(7, 20), 2.0)

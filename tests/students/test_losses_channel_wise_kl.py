import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import rel_entr, softmax

from students.losses.channel_wise_kl import channel_wise_kl
from students.losses.feature_loss import CWD_TEMPERATURE, FeatureLoss
from tests.students.loss_inputs import randn


def test_by_hand() -> None:
    # Channel 0: teacher (1/2, 1/2), student (1/4, 3/4), KL = ½ ln 2 + ½ ln ⅔ = ½ ln 4/3. Channel 1: the same on both.
    student = torch.tensor([[[[0.0, np.log(3.0)]], [[7.0, 2.0]]]])
    teacher = torch.tensor([[[[1.0, 1.0]], [[7.0, 2.0]]]])
    assert channel_wise_kl(student, teacher, 1.0).item() == pytest.approx(0.5 * np.log(4 / 3) / 2)
    # At T = 2 with logits twice as far apart the distributions are the same again, and T² = 4.
    assert channel_wise_kl(2 * student, 2 * teacher, 2.0).item() == pytest.approx(4 * 0.5 * np.log(4 / 3) / 2)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_matches_scipy_channel_by_channel(temperature: float) -> None:
    student, teacher = 2 * randn(3, 4, 5, 6), 2 * randn(3, 4, 5, 6, seed=1)
    divergences = []
    for s, t in zip(student.double().flatten(0, 1).numpy(), teacher.double().flatten(0, 1).numpy(), strict=True):
        divergences.append(rel_entr(softmax(t / temperature), softmax(s / temperature)).sum())
    expected = temperature**2 * np.mean(divergences)
    assert channel_wise_kl(student, teacher, temperature).item() == pytest.approx(expected, rel=1e-5)


@given(seed=st.integers(0, 1000), size=st.sampled_from([0.1, 1.0, 30.0]))
def test_a_shift_of_a_channel_changes_nothing(seed: int, size: float) -> None:
    student, teacher = randn(2, 3, 4, 5, seed=seed), randn(2, 3, 4, 5, seed=seed + 1)
    shifts = size * randn(2, 3, 1, 1, seed=seed + 2)
    loss = channel_wise_kl(student, teacher, 1.0).item()
    assert channel_wise_kl(student + shifts, teacher, 1.0).item() == pytest.approx(loss, rel=1e-4)
    assert channel_wise_kl(student, teacher + shifts, 1.0).item() == pytest.approx(loss, rel=1e-4)


def test_tends_to_half_the_centred_squared_error_as_it_gets_hot() -> None:
    student, teacher = randn(2, 3, 30, 30, dtype=torch.float64), randn(2, 3, 30, 30, seed=1, dtype=torch.float64)
    half_variance = (student - teacher).flatten(2).var(dim=2, correction=0).mean().item() / 2
    assert channel_wise_kl(student, teacher, 1000.0).item() == pytest.approx(half_variance, rel=1e-2)


def test_is_what_cwd_names() -> None:
    student, teacher = randn(2, 3, 4, 5), randn(2, 3, 4, 5, seed=1)
    expected = channel_wise_kl(student, teacher, CWD_TEMPERATURE)
    assert FeatureLoss("cwd", 3)(student, teacher, ()) == expected


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
def test_refuses_a_temperature_that_is_not_positive(temperature: float) -> None:
    with pytest.raises(ValueError, match=f"positive temperature, found {temperature}"):
        channel_wise_kl(torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3, 4), temperature)

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from data.records import VOC_CLASSES
from evaluation.logit_agreement import bernoulli_kl, logit_agreement, softened_kl
from students.losses.binary_kl import binary_kl
from students.losses.logit_kl import logit_kl


@pytest.fixture
def pair():
    """Logits of 6 images, of the size that a contrastive teacher's have."""
    rng = np.random.default_rng(5)
    return rng.normal(0, 2, size=(6, 20)).astype(np.float32), rng.normal(22, 4, size=(6, 20)).astype(np.float32)


def presence(*shown):
    matrix = np.zeros((len(shown), 20), np.int8)
    for row, classes in zip(matrix, shown, strict=True):
        row[list(classes)] = 1
    return matrix


def compared(student, teacher, *shown, **settings):
    chosen = {"divergence": "kl", "temperature": 2.0, "order": None, **settings}
    return logit_agreement(student, teacher, presence(*shown), **chosen)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 8.0])
def test_kl_is_torchs_image_by_image(pair, temperature):
    student, teacher = (torch.from_numpy(logits).double() for logits in pair)
    each = F.kl_div((student / temperature).log_softmax(1), (teacher / temperature).softmax(1), reduction="none")
    np.testing.assert_allclose(softened_kl(*pair, temperature), temperature**2 * each.sum(1).numpy(), rtol=1e-5)


def test_kl_of_two_classes_by_hand():
    """Teacher (3/4, 1/4) against student (1/2, 1/2): 3/4 · ln 1.5 + 1/4 · ln 0.5."""
    found = softened_kl(np.zeros((1, 2)), np.array([[math.log(3), 0.0]]), 1.0)
    assert found == pytest.approx([0.75 * math.log(1.5) + 0.25 * math.log(0.5)])


def test_bernoulli_kl_is_torchs_image_by_image(pair):
    student, teacher = pair[0], pair[1] - 22
    one, other = (torch.distributions.Bernoulli(logits=torch.from_numpy(m).double() / 2) for m in (teacher, student))
    expected = 4 * torch.distributions.kl_divergence(one, other).sum(1).numpy()
    np.testing.assert_allclose(bernoulli_kl(student, teacher, 2.0), expected, rtol=1e-5)


def test_both_are_the_training_losses(pair):
    student, teacher = (torch.from_numpy(logits) for logits in pair)
    assert softened_kl(*pair, 2.0).mean() == pytest.approx(float(logit_kl(student, teacher, 2.0)), rel=1e-5)
    centre = teacher.mean(0)
    mine = bernoulli_kl(pair[0], pair[1] - centre.numpy(), 2.0).mean()
    assert mine == pytest.approx(float(binary_kl(student, teacher, 2.0, centre)), rel=1e-5)


@pytest.mark.parametrize("measure", [softened_kl, bernoulli_kl])
def test_equal_logits_diverge_by_nothing_and_extreme_ones_stay_finite(measure):
    extreme = np.array([[-3000.0, 0.0, 3000.0]])
    assert measure(extreme, extreme, 1.0) == pytest.approx([0], abs=1e-12)
    assert np.isfinite(measure(extreme, -extreme, 1.0)).all()


def test_a_class_has_the_mean_over_the_images_that_show_it(pair):
    found = compared(*pair, [0], [0, 1], [1], [], [], [])
    each = softened_kl(*pair, 2.0)
    assert found.kl == pytest.approx(each.mean())
    assert found.per_class[VOC_CLASSES[0]] == pytest.approx(each[:2].mean())
    assert found.per_class[VOC_CLASSES[1]] == pytest.approx(each[1:3].mean())
    assert set(found.per_class) == set(VOC_CLASSES)
    assert found.per_class[VOC_CLASSES[2]] is None


def test_highest_classes_are_counted():
    student, teacher = np.eye(20)[[0, 1, 2, 3]], np.eye(20)[[0, 1, 2, 9]]
    found = compared(student, teacher, *[[]] * 4, order=np.array([1, 0, 3, 2]))
    assert (found.top1, found.top1_shuffled) == (0.75, 0.0)
    assert found.kl_shuffled > found.kl
    assert (found.student_map, found.teacher_map) == (None, None)


def test_the_map_of_both_is_against_the_annotations():
    student, teacher = np.eye(20)[[0, 1]], np.eye(20)[[1, 0]]
    found = compared(student, teacher, [0], [1])
    # The teacher ranks the wrong image first: its one positive is second, and 1/2 of what stands before it is right.
    assert (found.student_map, found.teacher_map) == (1.0, 0.5)


def test_a_head_that_was_not_taught_has_no_kl(pair):
    found = compared(*pair, *[[0]] * 6, taught=False, order=np.roll(np.arange(6), 1))
    assert (found.kl, found.kl_shuffled, found.per_class) == (None, None, None)
    assert found.top1_shuffled is not None

"""What every feature loss promises, whatever it compares."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from students.losses.feature_loss import FEATURE_LOSSES, FeatureLoss
from tests.students.loss_inputs import randn, streams

CHANNELS = 3
BOXES = [torch.tensor([[100.0, 40.0, 260.0, 300.0], [120.0, 60.0, 200.0, 130.0]]), torch.zeros(0, 4)]


def build(name: str, dtype: torch.dtype = torch.float32) -> FeatureLoss:
    return FeatureLoss(name, CHANNELS, seed_generator=torch.Generator().manual_seed(9)).to(dtype)


def loss_of(name: str, student: Tensor, teacher: Tensor, first: int = 0) -> Tensor:
    """Return the loss of the images first, first + 1, … of a fixed set: their boxes and masks are their own."""
    count = len(student)
    dtype = torch.float64 if student.dtype == torch.float64 else torch.float32
    images = range(first, first + count)
    loss: Tensor = build(name, dtype)(student, teacher, [BOXES[i] for i in images], streams(*images))
    return loss


@pytest.fixture(autouse=True)
def _global_stream_untouched() -> Iterator[None]:
    before = torch.random.get_rng_state()
    yield
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("name", FEATURE_LOSSES)
class TestFeatureLossContract:
    def test_gradient_is_the_derivative(self, name: str) -> None:
        student, teacher = randn(2, CHANNELS, 3, 4, dtype=torch.float64), randn(2, CHANNELS, 3, 4, seed=1).double()
        assert torch.autograd.gradcheck(lambda s: loss_of(name, s, teacher), student.requires_grad_())

    def test_no_gradient_reaches_the_teacher(self, name: str) -> None:
        student, teacher = randn(2, CHANNELS, 3, 4).requires_grad_(), randn(2, CHANNELS, 3, 4, seed=1).requires_grad_()
        loss_of(name, student, teacher).backward()
        assert student.grad is not None
        assert student.grad.abs().max() > 0
        assert teacher.grad is None

    def test_is_zero_only_where_nothing_is_left_to_learn(self, name: str) -> None:
        student, teacher = randn(2, CHANNELS, 3, 4), randn(2, CHANNELS, 3, 4, seed=1)
        assert loss_of(name, student, teacher) > 0.01
        target = teacher
        if name == "mgd":  # what it makes of the student's map is compared, not the map
            generator = build(name).generator
            assert generator is not None
            target = generator(teacher, streams(0, 1))
        assert loss_of(name, teacher, target).item() == pytest.approx(0, abs=1e-6)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half_precision_is_computed_in_float32(self, name: str, dtype: torch.dtype) -> None:
        student, teacher = randn(2, CHANNELS, 3, 4, dtype=dtype), randn(2, CHANNELS, 3, 4, seed=1, dtype=dtype)
        loss = loss_of(name, student, teacher)
        assert loss.dtype == torch.float32
        assert loss == loss_of(name, student.float(), teacher.float())

    def test_a_float64_student_is_computed_in_float64(self, name: str) -> None:
        student, teacher = randn(2, CHANNELS, 3, 4, dtype=torch.float64), randn(2, CHANNELS, 3, 4, seed=1)
        assert loss_of(name, student, teacher).dtype == torch.float64

    def test_autocast_changes_nothing(self, name: str) -> None:
        student, teacher = randn(2, CHANNELS, 3, 4), randn(2, CHANNELS, 3, 4, seed=1)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = loss_of(name, student, teacher)
        assert loss.dtype == torch.float32
        assert loss == loss_of(name, student, teacher)

    @pytest.mark.parametrize("student_value", [None, 0.0, 5.3])
    @pytest.mark.parametrize("teacher_value", [None, 0.0, 300.7])
    def test_constant_maps_give_finite_values_and_gradients(
        self, name: str, student_value: float | None, teacher_value: float | None
    ) -> None:
        shape = (2, CHANNELS, 30, 30)
        student = randn(*shape) if student_value is None else torch.full(shape, student_value)
        teacher = randn(*shape, seed=1) if teacher_value is None else torch.full(shape, teacher_value)
        loss = loss_of(name, student.requires_grad_(), teacher)
        loss.backward()
        assert torch.isfinite(loss)
        assert student.grad is not None
        assert torch.isfinite(student.grad).all()
        # Bounded by what counts as shortest and smallest: 2 to 20 times less for the channels of a real teacher.
        if teacher_value != 300.7:
            assert student.grad.norm() < 150

    @pytest.mark.parametrize("image", [0, 1], ids=["with boxes", "without boxes"])
    def test_one_image_with_one_place(self, name: str, image: int) -> None:
        student = randn(1, CHANNELS, 1, 1).requires_grad_()
        loss = loss_of(name, student, randn(1, CHANNELS, 1, 1, seed=1), first=image)
        loss.backward()
        assert torch.isfinite(loss)
        assert student.grad is not None
        assert torch.isfinite(student.grad).all()

    def test_memory_format_changes_nothing(self, name: str) -> None:
        student, teacher = randn(2, CHANNELS, 3, 4), randn(2, CHANNELS, 3, 4, seed=1)
        last = loss_of(name, student.to(memory_format=torch.channels_last), teacher)
        assert last.item() == pytest.approx(loss_of(name, student, teacher).item(), rel=1e-6)

    @pytest.mark.parametrize(
        ("shape", "message"),
        [
            pytest.param((2, 3, 4, 3), r"\[B, C, H, W\].*found \[2, 3, 3, 4\] and \[2, 3, 4, 3\]", id="grid"),
            pytest.param((2, 5, 3, 4), r"found \[2, 3, 3, 4\] and \[2, 5, 3, 4\]", id="channels"),
            pytest.param((1, 3, 3, 4), r"found \[2, 3, 3, 4\] and \[1, 3, 3, 4\]", id="images, which would broadcast"),
        ],
    )
    def test_refuses_a_teacher_of_another_shape(self, name: str, shape: tuple[int, ...], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            loss_of(name, torch.zeros(2, CHANNELS, 3, 4), torch.zeros(shape))

    def test_refuses_a_student_of_other_channels(self, name: str) -> None:
        with pytest.raises(ValueError, match=r"student features \[B, 3, H, W\], found \[2, 5, 3, 4\]"):
            loss_of(name, torch.zeros(2, 5, 3, 4), torch.zeros(2, 5, 3, 4))

    def test_refuses_an_empty_batch(self, name: str) -> None:
        with pytest.raises(ValueError, match=r"none of them 0, found \[0, 3, 3, 4\]"):
            loss_of(name, torch.zeros(0, CHANNELS, 3, 4), torch.zeros(0, CHANNELS, 3, 4))


# Correlations are over the batch: test_losses_pearson.py has what holds for pkd.
@pytest.mark.parametrize("name", [name for name in FEATURE_LOSSES if name != "pkd"])
def test_images_average_to_their_batch(name: str) -> None:
    student, teacher = randn(2, CHANNELS, 3, 4), randn(2, CHANNELS, 3, 4, seed=1)
    parts = [loss_of(name, student[i : i + 1], teacher[i : i + 1], first=i).item() for i in range(2)]
    assert loss_of(name, student, teacher).item() == pytest.approx(sum(parts) / 2, rel=1e-5)


def test_refuses_an_unknown_name() -> None:
    with pytest.raises(ValueError, match="mse, cosine, cwd, pkd, mgd, attention, fgd, found 'l1'"):
        FeatureLoss("l1", CHANNELS)


def test_mgd_refuses_to_draw_from_the_global_stream() -> None:
    student = torch.zeros(2, CHANNELS, 3, 4)
    with pytest.raises(ValueError, match="seed generator for the weights of mgd, found none"):
        FeatureLoss("mgd", CHANNELS)
    with pytest.raises(ValueError, match="mask generator for each of 2 images, found 0"):
        build("mgd")(student, student, BOXES)
    with pytest.raises(ValueError, match="mask generator for each of 2 images, found 1"):
        build("mgd")(student, student, BOXES, streams(0))


def test_only_mgd_has_weights() -> None:
    assert [name for name in FEATURE_LOSSES if list(build(name).parameters())] == ["mgd"]

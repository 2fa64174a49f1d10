"""What every student promises, whatever its backbone."""

import pytest
import torch
from torch import Tensor

from students.detector import Student, StudentOutput

LOSSES = {"loss_objectness", "loss_rpn_box_reg", "loss_classifier", "loss_box_reg"}
# Channels of the stride-16 map: from each architecture's paper or timm's model card, not from our code.
CHANNELS = {
    "resnet18": 256,
    "mobilenet_v3_small": 48,
    "vit_tiny": 192,
    "timm:mambaout_femto": 192,
}

Targets = list[dict[str, Tensor]]


def step(student: Student, images: Tensor, targets: Targets, seeds: list[int]) -> StudentOutput:
    student.train()
    student.seed_sampling(seeds)
    output = student(images, targets)
    assert isinstance(output, StudentOutput)
    return output


@pytest.fixture(scope="module")
def output(student: Student, images: Tensor, targets: Targets) -> StudentOutput:
    """One training step, gradients included."""
    result = step(student, images[:1], targets[:1], [11])
    (sum(result.losses.values()) + result.features.mean() + result.logits.mean()).backward()
    return result


class TestStudentContract:
    def test_features_are_the_30_by_30_backbone_map(self, student: Student, output: StudentOutput) -> None:
        channels = CHANNELS[student.config.backbone]
        assert output.features.shape == (1, channels, 30, 30)
        assert student.feature_channels == channels

    def test_features_of_random_weights_do_not_vanish(self, output: StudentOutput) -> None:
        assert output.features.std() > 0.05

    def test_logits_have_one_column_a_class(self, output: StudentOutput) -> None:
        assert output.logits.shape == (1, 20)

    def test_losses_are_torchvisions_four_and_finite(self, output: StudentOutput) -> None:
        assert set(output.losses) == LOSSES
        assert all(loss.ndim == 0 and torch.isfinite(loss) for loss in output.losses.values())

    def test_every_parameter_receives_a_gradient(self, student: Student, output: StudentOutput) -> None:
        missing = [name for name, parameter in student.named_parameters() if parameter.grad is None]
        assert missing == []
        assert all(torch.isfinite(parameter.grad).all() for parameter in student.parameters())

    def test_pyramid_is_that_of_a_480_frame(self, student: Student, images: Tensor) -> None:
        student.eval()
        with torch.no_grad():
            levels = student.detector.backbone(images[:1])
        assert [tuple(level.shape[1:]) for level in levels.values()] == [
            (128, 60, 60), (128, 30, 30), (128, 15, 15), (128, 8, 8)
        ]  # fmt: skip

    def test_an_image_without_objects_trains(self, student: Student, images: Tensor, targets: Targets) -> None:
        with torch.no_grad():
            losses = step(student, images[1:], targets[1:], [5]).losses
        assert all(torch.isfinite(loss) for loss in losses.values())
        assert losses["loss_rpn_box_reg"] == losses["loss_box_reg"] == 0

    def test_detections_are_torchvisions_on_the_same_weights(self, student: Student, images: Tensor) -> None:
        student.eval()
        with torch.no_grad():
            ours = student(images[:1])
            theirs = student.detector(list(images[:1]))  # its own forward: normalise, resize, batch, scale back
        assert len(ours[0]["boxes"]) > 0
        for key in ("boxes", "labels", "scores"):
            torch.testing.assert_close(ours[0][key], theirs[0][key])

    def test_detections_are_frame_boxes_best_first(self, student: Student, images: Tensor) -> None:
        student.eval()
        with torch.no_grad():
            (detections,) = student(images[:1])
        boxes, labels, scores = detections["boxes"], detections["labels"], detections["scores"]
        assert boxes.shape == (len(scores), 4)
        assert labels.shape == scores.shape
        assert 0 < len(scores) <= 100
        assert boxes.min() >= 0
        assert boxes.max() <= 480
        assert set(labels.tolist()) <= set(range(1, 21))
        assert (scores.diff() <= 0).all()
        assert scores.min() > 0.001

    def test_pixels_are_normalised_once(self, student: Student, images: Tensor) -> None:
        seen: list[Tensor] = []
        body = student.detector.backbone.body
        hook = body.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
        with hook, torch.no_grad():
            student.eval().distillation_maps(images[:1])
        # The statistics each model was trained with, by its timm card: ImageNet's, or 0.5 for the augreg transformers.
        half = student.config.backbone == "vit_tiny"
        mean = [0.5] * 3 if half else [0.485, 0.456, 0.406]
        std = [0.5] * 3 if half else [0.229, 0.224, 0.225]
        expected = (images[:1] - torch.tensor(mean).view(1, 3, 1, 1)) / torch.tensor(std).view(1, 3, 1, 1)
        assert len(seen) == 1
        torch.testing.assert_close(seen[0], expected)

    def test_a_step_repeats_by_its_seeds_whatever_the_global_generator(
        self, student: Student, images: Tensor, targets: Targets
    ) -> None:
        losses = []
        for global_seed, seed in ((1, 7), (2, 7), (2, 8)):
            torch.manual_seed(global_seed)
            state = torch.get_rng_state()
            with torch.no_grad():
                losses.append(step(student, images[:1], targets[:1], [seed]).losses)
            assert torch.equal(state, torch.get_rng_state())
        assert losses[0] == losses[1]
        assert losses[0]["loss_objectness"] != losses[2]["loss_objectness"]

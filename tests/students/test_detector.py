import pytest
import torch
from torch import Tensor
from torchvision.models.detection.image_list import ImageList

from students.anchors import FrameAnchorGenerator
from students.config import StudentConfig
from students.detector import Student, StudentOutput, build_student

Targets = list[dict[str, Tensor]]


def test_losses_do_not_depend_on_the_order_of_the_batch(vit_tiny: Student, images: Tensor, targets: Targets) -> None:
    both = []
    for order in ([0, 1], [1, 0]):
        vit_tiny.train().seed_sampling([100 + index for index in order])
        with torch.no_grad():
            both.append(vit_tiny(images[order], [targets[index] for index in order]).losses)
    for name in both[0]:
        torch.testing.assert_close(both[0][name], both[1][name])


def test_distillation_maps_are_those_of_a_step(vit_tiny: Student, images: Tensor, targets: Targets) -> None:
    vit_tiny.train().seed_sampling([0])
    with torch.no_grad():
        output = vit_tiny(images[:1], targets[:1])
        features, logits = vit_tiny.eval().distillation_maps(images[:1])
    assert isinstance(output, StudentOutput)
    torch.testing.assert_close(features, output.features)
    torch.testing.assert_close(logits, output.logits)


def test_a_stream_serves_one_step(mobilenet: Student, images: Tensor, targets: Targets) -> None:
    mobilenet.train().seed_sampling([0])
    with torch.no_grad():
        mobilenet(images[:1], targets[:1])
        with pytest.raises(ValueError, match=r"streams of 1 images, found 0: call seed_sampling"):
            mobilenet(images[:1], targets[:1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param({"images": torch.zeros(1, 3, 600, 480)}, r"\[B, 3, 480, 480\], found .*600, 480", id="size"),
        pytest.param({"images": torch.zeros(1, 3, 480, 480, dtype=torch.uint8)}, r"float images .*uint8", id="dtype"),
        pytest.param({"targets": None}, r"targets of 1 images in training, found none", id="no targets"),
        pytest.param({"targets": []}, r"targets of 1 images in training, found 0", id="too few targets"),
        pytest.param({"seeds": [1, 2]}, r"streams of 1 images, found 2", id="too many seeds"),
    ],
)
def test_a_wrong_call_is_refused(
    mobilenet: Student, images: Tensor, targets: Targets, change: dict[str, object], message: str
) -> None:
    call = {"images": images[:1], "targets": targets[:1], "seeds": [1], **change}
    mobilenet.train().seed_sampling(call["seeds"])
    with pytest.raises(ValueError, match=message):
        mobilenet(call["images"], call["targets"])


def test_boxes_and_losses_keep_float32_under_autocast(vit_tiny: Student, images: Tensor, targets: Targets) -> None:
    vit_tiny.train().seed_sampling([0])
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        output = vit_tiny(images[:1], targets[:1])
        (detections,) = vit_tiny.eval()(images[:1])
    assert output.logits.dtype == torch.bfloat16
    assert {loss.dtype for loss in output.losses.values()} == {torch.float32}
    # bfloat16 coordinates above 256 would all be even.
    large = detections["boxes"][detections["boxes"] > 256]
    assert len(large) > 0
    assert (large % 2 != 0).any()


def test_the_deployed_detector_holds_no_training_state(mobilenet: Student) -> None:
    extra = set(mobilenet.state_dict()) - {f"detector.{key}" for key in mobilenet.detector.state_dict()}
    assert extra == {"logit_head.weight", "logit_head.bias"}


def test_equal_seeds_build_equal_students(mobilenet: Student) -> None:
    torch.manual_seed(0)
    again = build_student(mobilenet.config)
    for (name, one), (_, other) in zip(mobilenet.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(one, other), name


def test_evaluation_limits_are_the_configs(images: Tensor) -> None:
    config = StudentConfig(
        backbone="mobilenet_v3_small", backbone_weights="none", detections_per_image=3, score_threshold=0.02
    )
    student = build_student(config).eval()
    with torch.no_grad():
        (detections,) = student(images[:1])
    assert len(detections["scores"]) == 3
    assert detections["scores"].min() > 0.02


def test_anchors_lie_at_the_true_strides_of_the_pyramid() -> None:
    maps = [torch.zeros(1, 1, size, size) for size in (60, 30, 15, 8)]
    (anchors,) = FrameAnchorGenerator()(ImageList(torch.zeros(1, 3, 480, 480), [(480, 480)]), maps)
    centres = (anchors[:, :2] + anchors[:, 2:]) / 2
    assert anchors.shape == (6 * (60**2 + 30**2 + 15**2 + 8**2), 4)
    # The last cell of a level stands at (cells − 1) × stride: 59 × 8, 29 × 16, 14 × 32, 7 × 64.
    ends = torch.tensor([60**2, 60**2 + 30**2, 60**2 + 30**2 + 15**2, 60**2 + 30**2 + 15**2 + 8**2]) * 6 - 1
    assert centres[ends].tolist() == [[472, 472], [464, 464], [448, 448], [448, 448]]
    # Two sizes, ratios 1:2, 1:1, 2:1: the square ones are 32 and 45 px wide.
    widths, heights = (anchors[:6, 2:] - anchors[:6, :2]).unbind(1)
    assert widths[widths == heights].tolist() == [32, 44]

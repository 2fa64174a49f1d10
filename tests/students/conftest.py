"""Students with random weights, built once; a test that uses one sets the mode it needs."""

import pytest
import torch
from torch import Tensor

from students.config import StudentConfig
from students.detector import Student, build_student

Targets = list[dict[str, Tensor]]


def build_random(backbone: str, **fields: object) -> Student:
    torch.manual_seed(0)
    # Few proposals: these tests are about what a student promises, not how well it learns.
    config = {"backbone": backbone, "backbone_weights": "none", "train_proposals": 50, "eval_proposals": 50, **fields}
    return build_student(StudentConfig.model_validate(config))


@pytest.fixture(scope="module", params=["resnet18", "mobilenet_v3_small", "vit_tiny", "timm:mambaout_femto"])
def student(request: pytest.FixtureRequest) -> Student:
    """Each backbone in turn; timm's mambaout gives NHWC maps of its own accord."""
    return build_random(request.param)


@pytest.fixture(scope="session")
def mobilenet() -> Student:
    return build_random("mobilenet_v3_small")


@pytest.fixture(scope="session")
def vit_tiny() -> Student:
    return build_random("vit_tiny")


@pytest.fixture(scope="session")
def images() -> Tensor:
    """Two frames [2, 3, 480, 480] in [0, 1]: noise over a slope, so that no two places look alike."""
    generator = torch.Generator().manual_seed(3)
    slope = torch.linspace(0, 0.5, 480)[None, None, :, None]
    return torch.rand(2, 3, 480, 480, generator=generator) * 0.5 + slope


@pytest.fixture(scope="session")
def targets() -> Targets:
    """Ground truth of the two frames; the second is empty."""
    boxes = torch.tensor([[20.0, 30.0, 180.0, 200.0], [200.0, 100.0, 470.0, 460.0]])
    return [
        {"boxes": boxes, "labels": torch.tensor([1, 20])},
        {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)},
    ]

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from features.registry import build_teacher
from features.teacher import Teacher

Build = Callable[[str], Teacher]


@pytest.fixture(scope="session")
def untrained() -> Build:
    """Builds a teacher with seeded weights once a session."""
    return functools.cache(lambda name: build_teacher(name, untrained=True))


@pytest.fixture(scope="session")
def random_images() -> Callable[[Teacher, int], Tensor]:
    def draw(teacher: Teacher, count: int) -> Tensor:
        generator = torch.Generator().manual_seed(5)
        return torch.randint(0, 256, (count, *teacher.input.size, 3), dtype=torch.uint8, generator=generator)

    return draw

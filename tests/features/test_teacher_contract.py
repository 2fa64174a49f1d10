"""What every teacher promises, whatever library it runs on."""

from __future__ import annotations

import json
import pickle
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from features.registry import TEACHERS
from features.teacher import Teacher, probe
from tests.teacher_families import FAMILIES, SmallTeacher, family_params

Draw = Callable[[Teacher, int], Tensor]


@pytest.fixture(scope="module", params=family_params())
def family(request: pytest.FixtureRequest) -> SmallTeacher:
    return FAMILIES[request.param]


@pytest.fixture(scope="module")
def folder(family: SmallTeacher, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("family")
    family.prepare(made)
    return made


@pytest.fixture(scope="module")
def teacher(family: SmallTeacher, folder: Path) -> Teacher:
    return family.build(folder)


@pytest.fixture(scope="module")
def images(teacher: Teacher, random_images: Draw) -> Tensor:
    return random_images(teacher, 2)


@pytest.fixture(scope="module")
def outputs(teacher: Teacher, images: Tensor) -> dict[str, Tensor]:
    return teacher(images).arrays()


def random_states() -> tuple[bytes, str, str]:
    return torch.random.get_rng_state().numpy().tobytes(), repr(np.random.get_state()), repr(random.getstate())


@pytest.fixture(scope="module")
def second_build(family: SmallTeacher, folder: Path) -> tuple[Teacher, bool]:
    """The same teacher once more, and whether building it left the global random states alone."""
    before = random_states()
    again = family.build(folder)
    return again, random_states() == before


class TestEveryTeacher:
    def test_arrays_have_the_announced_names_and_shapes(self, teacher: Teacher, outputs: dict[str, Tensor]) -> None:
        assert {name: tuple(tensor.shape) for name, tensor in outputs.items()} == {
            name: (2, *shape) for name, shape in teacher.output_shapes.items()
        }

    def test_grid_agrees_with_the_arrays(
        self, family: SmallTeacher, teacher: Teacher, outputs: dict[str, Tensor]
    ) -> None:
        assert outputs.keys() == family.arrays
        grid = tuple(outputs["features"].shape[1:3]) if "features" in outputs else None
        assert teacher.patch_grid == grid

    def test_arrays_are_finite_contiguous_float32(self, outputs: dict[str, Tensor]) -> None:
        for tensor in outputs.values():
            assert tensor.dtype == torch.float32
            assert tensor.is_contiguous()
            assert tensor.isfinite().all()

    def test_output_can_be_the_target_of_a_loss(self, outputs: dict[str, Tensor]) -> None:
        for target in outputs.values():
            student = torch.zeros_like(target, requires_grad=True)
            F.mse_loss(student, target).backward()
            assert student.grad is not None
            assert not target.requires_grad

    def test_an_image_alone_gives_what_it_gives_in_a_batch(
        self, teacher: Teacher, images: Tensor, outputs: dict[str, Tensor]
    ) -> None:
        for name, tensor in teacher(images[1:2]).arrays().items():
            torch.testing.assert_close(tensor[0], outputs[name][1], rtol=1e-4, atol=1e-4)

    def test_output_does_not_follow_the_callers_precision(
        self, teacher: Teacher, images: Tensor, outputs: dict[str, Tensor]
    ) -> None:
        torch.set_float32_matmul_precision("medium")
        try:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                arrays = teacher(images).arrays()
            assert torch.get_float32_matmul_precision() == "medium"
        finally:
            torch.set_float32_matmul_precision("highest")
        for name, tensor in arrays.items():
            assert torch.equal(tensor, outputs[name])

    @pytest.mark.parametrize("wrong", ["float", "channels first", "another size", "one image"])
    def test_other_images_are_refused(self, teacher: Teacher, images: Tensor, wrong: str) -> None:
        found = {
            "float": images.float(),
            "channels first": images.permute(0, 3, 1, 2),
            "another size": images[:, :-1],
            "one image": images[0],
        }[wrong]
        with pytest.raises(ValueError, match=r"expected uint8 images \[B, .*, 3\], found torch\."):
            teacher(found)

    def test_identity_survives_json(self, teacher: Teacher) -> None:
        identity = teacher.identity()
        assert json.loads(json.dumps(identity, allow_nan=False)) == identity
        assert identity["spec"] == teacher.name
        assert json.loads(json.dumps(teacher.provenance()))["versions"].keys() >= {"torch", teacher.library}

    def test_two_builds_are_the_same_teacher(
        self, teacher: Teacher, images: Tensor, outputs: dict[str, Tensor], second_build: tuple[Teacher, bool]
    ) -> None:
        again, _ = second_build
        assert again.identity() == teacher.identity()
        for name, tensor in again(images).arrays().items():
            assert torch.equal(tensor, outputs[name])

    def test_building_leaves_the_global_random_states_alone(self, second_build: tuple[Teacher, bool]) -> None:
        assert second_build[1]

    def test_probe_is_small_and_stable(self, teacher: Teacher, second_build: tuple[Teacher, bool]) -> None:
        first, second = probe(teacher), probe(second_build[0])
        assert first.dtype == np.float32
        assert first.nbytes < 20_000
        assert first @ second / (np.linalg.norm(first) * np.linalg.norm(second)) > 0.99999

    def test_text_embeddings_are_in_the_space_of_what_is_compared_with_them(self, teacher: Teacher) -> None:
        assert (teacher.text_embeddings is None) == ("prompts" not in teacher.identity())
        if teacher.text_embeddings is not None:
            compared = teacher.output_shapes.get("embeddings") or teacher.output_shapes["features"]
            assert teacher.text_embeddings.shape == (20, compared[-1])
            assert teacher.text_embeddings.dtype == np.float32

    def test_input_is_plain_and_picklable(self, teacher: Teacher) -> None:
        assert pickle.loads(pickle.dumps(teacher.input)) == teacher.input

    def test_nothing_can_be_trained(self, teacher: Teacher) -> None:
        assert not teacher.module.training
        assert not any(parameter.requires_grad for parameter in teacher.module.parameters())

    def test_it_says_whether_it_is_untrained(self, family: SmallTeacher, teacher: Teacher) -> None:
        assert teacher.untrained == family.untrained
        assert (teacher.weights_source == "seed") == family.untrained

    def test_no_path_enters_the_identity(self, teacher: Teacher, folder: Path) -> None:
        assert str(folder) not in json.dumps(teacher.identity())


def test_every_line_of_the_registry_is_held_to_it() -> None:
    """Sizes apart: what builds one DINOv2 or CLIP builds the others."""
    held = {small.spec.partition("@")[0].partition(":") for small in FAMILIES.values()}
    families = {f"{name}:" for name, colon, _ in held if colon} | {name for name, colon, _ in held if not colon}
    modules = {entry.module for name, entry in TEACHERS.items() if name in families}
    assert modules == {entry.module for entry in TEACHERS.values()}
    assert families >= {name for name in TEACHERS if name.endswith(":")}

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from data.errors import TeacherError, UsageError
from features.patch_tokens import PatchTokenTeacher, input_for, layer_name, norm_name
from features.spec import TeacherOptions, parse_spec
from features.teacher import TeacherInput

_ZERO_TO_ONE = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}


def options(spec: str) -> TeacherOptions:
    return parse_spec(spec).options


def counting_teacher(num_tokens: int, grid: tuple[int, int] = (2, 3), num_prefix_tokens: int = 5) -> PatchTokenTeacher:
    """A teacher whose tokens are their own numbers: token k of image b is (k, 100·b)."""

    def count(module: nn.Module, pixels: Tensor) -> Tensor:
        numbers = torch.arange(float(num_tokens)).expand(len(pixels), -1)
        images = 100 * torch.arange(float(len(pixels)))[:, None].expand(-1, num_tokens)
        return torch.stack((numbers, images), dim=-1)

    return PatchTokenTeacher(
        name="counting",
        library="torch",
        architecture={},
        layer="",
        norm="",
        input=TeacherInput(size=(grid[0], grid[1]), resample="bicubic", **_ZERO_TO_ONE),
        patch_grid=grid,
        output_shapes={"features": (*grid, 2)},
        weights_digest="",
        weights_source="",
        untrained=True,
        module=nn.Linear(1, 1),
        num_prefix_tokens=num_prefix_tokens,
        read_tokens=count,
    )


def test_patches_behind_the_prefix_are_laid_out_row_by_row() -> None:
    features = counting_teacher(5 + 6)(torch.zeros(2, 2, 3, 3, dtype=torch.uint8)).arrays()["features"]
    assert features[0, :, :, 0].tolist() == [[5, 6, 7], [8, 9, 10]]
    assert features[1].tolist() == [[[5, 100], [6, 100], [7, 100]], [[8, 100], [9, 100], [10, 100]]]


@pytest.mark.parametrize("num_tokens", [5, 5 + 5, 5 + 7, 5 + 12])
def test_another_number_of_tokens_than_cells_is_refused(num_tokens: int) -> None:
    with pytest.raises(
        TeacherError,
        match=rf"counting: expected tokens \[B, 5 \+ 6, C\] for the 2×3 grid, found \[1, {num_tokens}, 2\]",
    ):
        counting_teacher(num_tokens)(torch.zeros(1, 2, 3, 3, dtype=torch.uint8))


@pytest.mark.parametrize(
    ("spec", "patch_size", "size", "grid"),
    [
        ("t", 14, (420, 420), (30, 30)),
        ("t", 16, (480, 480), (30, 30)),
        ("t@grid=37", 14, (518, 518), (37, 37)),
        ("t@grid=20x40", 14, (280, 560), (20, 40)),
        ("t@grid=64", 16, (1024, 1024), (64, 64)),
        ("t@grid=1x32", 32, (32, 1024), (1, 32)),
    ],
)
def test_input_is_the_grid_times_the_patch_size(
    spec: str, patch_size: int, size: tuple[int, int], grid: tuple[int, int]
) -> None:
    found = input_for(options(spec), patch_size, resample="bilinear", **_ZERO_TO_ONE, name=spec)
    assert found == (TeacherInput(size=size, resample="bilinear", **_ZERO_TO_ONE), grid)


@pytest.mark.parametrize(
    ("spec", "patch_size", "message"),
    [
        ("t@grid=20x40", 32, r"20×40 cells at patch size 32 needs an input of 640×1280 px;.*\n.*grid=32x32"),
        ("t@grid=61x5", 17, r"61×5 cells at patch size 17 needs an input of 1037×85 px;.*\n.*grid=60x60"),
        ("t", 40, r"30×30 cells at patch size 40 needs an input of 1200×1200 px; .* at most 1024 px.*\n.*grid=25x25"),
    ],
)
def test_a_grid_too_fine_for_the_patch_size_is_refused(spec: str, patch_size: int, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        input_for(options(spec), patch_size, resample="bicubic", **_ZERO_TO_ONE, name=spec)


@pytest.mark.parametrize(
    ("layer", "words"),
    [
        (None, "last block, patch tokens"),
        (12, "last block, patch tokens"),
        (1, "block 1 of 12, patch tokens"),
        (11, "block 11 of 12, patch tokens"),
    ],
)
def test_a_block_is_named_by_its_number_and_the_last_as_such(layer: int | None, words: str) -> None:
    assert layer_name(layer, 12, "t") == words


def test_a_layer_beyond_the_last_is_refused() -> None:
    with pytest.raises(
        UsageError, match=r"--teacher t@layer=13: expected a layer from 1 to 12, found 13: it has 12 blocks"
    ):
        layer_name(13, 12, "t@layer=13")


def test_norms_are_named() -> None:
    assert [norm_name(norm) for norm in (None, "final", "none")] == ["final LayerNorm", "final LayerNorm", "none"]

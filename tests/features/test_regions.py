from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from features.regions import region_logits

# Three classes along three axes: a logit is then scale × a component of the unit vector.
AXES = torch.eye(3)


def boxes(*corners: tuple[float, float, float, float]) -> Tensor:
    return torch.tensor(corners).reshape(-1, 4)


def sampled(features: Tensor, box: tuple[float, float, float, float]) -> Tensor:
    """The mean [D] of one map [Gh, Gw, D] at 14×14 points of a box, each by hand from its four nearest cells."""
    height, width = features.shape[:2]
    left, top, right, bottom = box
    total = torch.zeros(features.shape[2])
    for row in range(14):
        for column in range(14):
            # In cells; a cell's value stands at its centre, half a cell into it.
            y = (top + (row + 0.5) / 14 * (bottom - top)) * height / 480 - 0.5
            x = (left + (column + 0.5) / 14 * (right - left)) * width / 480 - 0.5
            y, x = min(max(y, 0.0), height - 1.0), min(max(x, 0.0), width - 1.0)
            y0, x0 = min(int(y), height - 2), min(int(x), width - 2)
            dy, dx = y - y0, x - x0
            total += (1 - dy) * ((1 - dx) * features[y0, x0] + dx * features[y0, x0 + 1])
            total += dy * ((1 - dx) * features[y0 + 1, x0] + dx * features[y0 + 1, x0 + 1])
    return total / 14**2


@pytest.mark.parametrize("grid", [(30, 30), (15, 15), (20, 40)])
def test_logits_are_the_cosines_of_the_boxs_mean_feature(grid: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(2)
    features = torch.randn(2, *grid, 8, generator=generator)
    text = F.normalize(torch.randn(5, 8, generator=generator), dim=-1)
    corners = [[(30.0, 40.0, 200.0, 110.0), (0.0, 0.0, 480.0, 480.0)], [(413.7, 101.2, 480.0, 333.3)]]
    expected = [
        23.0 * text @ F.normalize(sampled(features[image], box), dim=0) - 4.5
        for image, of_image in enumerate(corners)
        for box in of_image
    ]
    found = region_logits(features, [boxes(*of_image) for of_image in corners], text, logit_scale=23.0, logit_bias=-4.5)
    torch.testing.assert_close(found, torch.stack(expected), rtol=0, atol=1e-4)


def test_a_constant_map_gives_its_own_cosines() -> None:
    features = torch.tensor([0.0, 3.0, 4.0]).expand(1, 30, 30, 3)
    found = region_logits(features, [boxes((17.0, 33.0, 250.0, 99.0))], AXES, logit_scale=100.0)
    torch.testing.assert_close(found, torch.tensor([[0.0, 60.0, 80.0]]))


def test_a_box_over_two_halves_gives_their_average() -> None:
    features = torch.zeros(1, 30, 30, 3)
    features[:, :, :15, 0], features[:, :, 15:, 1] = 1.0, 1.0
    found = region_logits(features, [boxes((80.0, 160.0, 400.0, 320.0))], AXES, logit_scale=1.0)
    torch.testing.assert_close(found, torch.tensor([[0.5**0.5, 0.5**0.5, 0.0]]))


@pytest.mark.parametrize("grid", [(30, 30), (15, 15), (24, 40)])
def test_a_box_of_one_cell_reads_this_cell_and_not_half_of_its_neighbours(grid: tuple[int, int]) -> None:
    # Cell (i, j) holds (1, i, j): on such a ramp the mean of a box is the value at its middle.
    rows, columns = torch.meshgrid(torch.arange(float(grid[0])), torch.arange(float(grid[1])), indexing="ij")
    features = torch.stack([torch.ones(grid), rows, columns], dim=-1)[None]
    step_y, step_x = 480 / grid[0], 480 / grid[1]
    cells = [(5, 7), (1, 1), (grid[0] - 2, grid[1] - 2)]
    corners = boxes(*((j * step_x, i * step_y, (j + 1) * step_x, (i + 1) * step_y) for i, j in cells))
    found = region_logits(features, [corners], AXES, logit_scale=1.0)
    expected = F.normalize(torch.tensor([[1.0, i, j] for i, j in cells]), dim=-1)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_images_keep_their_order_and_may_have_no_boxes() -> None:
    features = torch.eye(3).view(3, 1, 1, 3).expand(3, 4, 4, 3)
    some = boxes((0.0, 0.0, 100.0, 100.0), (50.0, 60.0, 70.0, 90.0))
    found = region_logits(features, [some, boxes(), some[:1]], AXES, logit_scale=1.0)
    torch.testing.assert_close(found, torch.tensor([[1.0, 0.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]]))
    assert region_logits(features, [boxes()] * 3, AXES, logit_scale=1.0).shape == (0, 3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_any_float_dtype_is_computed_in_float32(dtype: torch.dtype) -> None:
    features = torch.randn(1, 30, 30, 3, generator=torch.Generator().manual_seed(4)).to(dtype)
    box = boxes((10.0, 20.0, 300.0, 400.0)).double()
    found = region_logits(features, [box], AXES.half(), logit_scale=100.0)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, region_logits(features.float(), [box.float()], AXES, logit_scale=100.0))


@pytest.mark.parametrize(
    ("features", "corners", "text", "message"),
    [
        (torch.zeros(1, 4, 4, 3, dtype=torch.int8), [boxes()], AXES, "expected float features"),
        (torch.zeros(4, 4, 3), [boxes()], AXES, r"expected float features \[B, Gh, Gw, D\]"),
        (torch.zeros(2, 4, 4, 3), [boxes()], AXES, r"expected boxes \[n, 4\] for each of 2 images"),
        (torch.zeros(1, 4, 4, 3), [torch.zeros(4)], AXES, r"expected boxes .*found \[\[4\]\]"),
        (torch.zeros(1, 4, 4, 8), [boxes()], AXES, r"expected text embeddings \[K, 8\], found \[3, 3\]"),
    ],
    ids=["int8", "one map", "boxes of one image", "one box", "text of another size"],
)
def test_shapes_that_do_not_belong_together_are_refused(
    features: Tensor, corners: list[Tensor], text: Tensor, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        region_logits(features, corners, text, logit_scale=1.0)

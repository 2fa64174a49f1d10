import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from data.geometry import cell_box
from students.losses.foreground_mse import foreground_mse, place_weights
from students.losses.pointwise import feature_mse
from tests.students.loss_inputs import randn

NO_BOXES = torch.zeros(0, 4)


def slow_weights(boxes: Tensor, grid: tuple[int, int]) -> np.ndarray:
    """Return the weights place by place: which boxes share an area with the cell, and how many cells each has."""

    def overlaps(box: list[float], i: int, j: int) -> bool:
        x1, y1, x2, y2 = cell_box(i, j, grid)
        return min(x2, box[2]) > max(x1, box[0]) and min(y2, box[3]) > max(y1, box[1])

    cells = [(i, j) for i in range(grid[0]) for j in range(grid[1])]
    areas = [sum(overlaps(box, i, j) for i, j in cells) for box in boxes.tolist()]
    weights = np.zeros(grid)
    for i, j in cells:
        mine = [area for box, area in zip(boxes.tolist(), areas, strict=True) if overlaps(box, i, j)]
        weights[i, j] = 1 / min(mine) if mine else 0
    background = weights == 0
    weights[background] = 1 / max(background.sum(), 1)
    return weights


def test_by_hand() -> None:
    # A 2×2 grid has cells of 240 px. The box takes the first; the errors are 1, 4, 9, 16.
    student, teacher = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]]), torch.zeros(1, 1, 2, 2)
    box = torch.tensor([[10.0, 20.0, 240.0, 200.0]])
    assert foreground_mse(student, teacher, [box]).item() == pytest.approx(1 + (4 + 9 + 16) / 3)
    # The left column, area 2, with a smaller box inside its first cell: weights 1 and 1/2, background 1/2 each.
    boxes = torch.tensor([[0.0, 0.0, 100.0, 480.0], [30.0, 30.0, 60.0, 60.0]])
    assert foreground_mse(student, teacher, [boxes]).item() == pytest.approx(1 + 9 / 2 + (4 + 16) / 2)
    # Two channels with errors of which the mean is taken; two images, the second all background.
    student, teacher = torch.cat([student, 2 * student], dim=1).expand(2, 2, 2, 2), torch.zeros(2, 2, 2, 2)
    expected = 2.5 * ((1 + (4 + 9 + 16) / 3) + (1 + 4 + 9 + 16) / 4) / 2
    assert foreground_mse(student, teacher, [box, NO_BOXES]).item() == pytest.approx(expected)


@st.composite
def boxes_xyxy(draw: st.DrawFn) -> Tensor:
    """Up to four boxes in the frame, borders on whole pixels, on cell borders or between."""
    edge = st.one_of(
        st.integers(0, 480).map(float), st.integers(0, 30).map(lambda i: 16.0 * i), st.floats(0, 480, width=32)
    )
    boxes = []
    for _ in range(draw(st.integers(0, 4))):
        x1, x2 = sorted([draw(edge), draw(edge)])
        y1, y2 = sorted([draw(edge), draw(edge)])
        if x2 - x1 > 0.5 and y2 - y1 > 0.5:
            boxes.append([x1, y1, x2, y2])
    return torch.tensor(boxes, dtype=torch.float64).reshape(-1, 4)


@given(boxes=boxes_xyxy(), grid=st.sampled_from([(5, 5), (4, 7), (30, 30)]))
def test_weights_match_a_slow_count_of_cells(boxes: Tensor, grid: tuple[int, int]) -> None:
    np.testing.assert_allclose(place_weights(boxes, grid).numpy(), slow_weights(boxes, grid), rtol=1e-12)


@given(boxes=boxes_xyxy())
def test_weights_are_at_most_one_and_the_background_sums_to_one(boxes: Tensor) -> None:
    weights = place_weights(boxes, (30, 30))
    assert weights.min() > 0
    assert weights.max() <= 1
    if len(boxes) == 1 and boxes[0].tolist() != [0, 0, 480, 480]:
        assert weights.sum().item() in (pytest.approx(1), pytest.approx(2))


def test_matches_loops_over_a_batch() -> None:
    student, teacher = randn(2, 3, 6, 5), randn(2, 3, 6, 5, seed=1)
    boxes = [torch.tensor([[33.0, 50.0, 300.0, 170.0], [250.0, 100.0, 400.0, 470.0]]), NO_BOXES]
    errors = ((student - teacher).double().numpy() ** 2).mean(axis=1)
    expected = np.mean([(slow_weights(b, (6, 5)) * e).sum() for b, e in zip(boxes, errors, strict=True)])
    assert foreground_mse(student, teacher, boxes).item() == pytest.approx(expected, rel=1e-5)


def test_without_boxes_is_the_plain_mse() -> None:
    student, teacher = randn(2, 3, 30, 30), randn(2, 3, 30, 30, seed=1)
    expected = feature_mse(student, teacher).item()
    assert foreground_mse(student, teacher, [NO_BOXES] * 2).item() == pytest.approx(expected, rel=1e-5)


def test_a_box_over_the_whole_frame_leaves_no_background() -> None:
    student, teacher = randn(1, 3, 30, 30), randn(1, 3, 30, 30, seed=1)
    loss = foreground_mse(student, teacher, [torch.tensor([[0.0, 0.0, 480.0, 480.0]])])
    assert loss.item() == pytest.approx(feature_mse(student, teacher).item(), rel=1e-5)


def test_a_box_outside_the_frame_counts_nowhere() -> None:
    outside = torch.tensor([[500.0, 20.0, 600.0, 90.0]])
    assert torch.equal(place_weights(outside, (30, 30)), place_weights(NO_BOXES, (30, 30)))


@pytest.mark.parametrize(
    ("boxes", "message"),
    [
        pytest.param([NO_BOXES], r"each of 2 images, found \[\[0, 4\]\]", id="one image's only"),
        pytest.param([NO_BOXES, torch.zeros(4)], r"found \[\[0, 4\], \[4\]\]", id="a box that is no row"),
        pytest.param([NO_BOXES, torch.zeros(3, 5)], r"found \[\[0, 4\], \[3, 5\]\]", id="five columns"),
    ],
)
def test_refuses(boxes: list[Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        foreground_mse(torch.zeros(2, 1, 3, 3), torch.zeros(2, 1, 3, 3), boxes)

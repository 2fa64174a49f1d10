import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.geometry import (
    FRAME_SIZE,
    VIEWS,
    Boxes,
    View,
    boxes_from_frame,
    boxes_to_frame,
    cell_box,
    cell_of_point,
    flip_boxes,
    scale_boxes,
)

image_sizes = st.tuples(st.integers(1, 2000), st.integers(1, 2000))
views = st.sampled_from(VIEWS)


@st.composite
def sized_boxes(draw: st.DrawFn) -> tuple[tuple[int, int], Boxes]:
    """An image size and up to five boxes of at least one pixel inside it."""
    height, width = draw(image_sizes)
    rows = []
    for _ in range(draw(st.integers(0, 5))):
        x1, y1 = draw(st.integers(0, width - 1)), draw(st.integers(0, height - 1))
        rows.append((x1, y1, draw(st.integers(x1 + 1, width)), draw(st.integers(y1 + 1, height))))
    return (height, width), np.array(rows, dtype=np.float32).reshape(-1, 4)


@given(sized_boxes(), views)
def test_boxes_come_back_from_the_frame(sized: tuple[tuple[int, int], Boxes], view: View) -> None:
    image_size, boxes = sized
    back = boxes_from_frame(boxes_to_frame(boxes, image_size, view), image_size, view)
    assert back.dtype == np.float32
    np.testing.assert_allclose(back, boxes, atol=2e-3)


@given(sized_boxes(), views)
def test_boxes_of_one_pixel_and_more_keep_an_area_inside_the_frame(
    sized: tuple[tuple[int, int], Boxes], view: View
) -> None:
    image_size, boxes = sized
    framed = boxes_to_frame(boxes, image_size, view)
    assert (framed[:, 2:] > framed[:, :2]).all()
    assert framed.size == 0 or (framed.min() >= 0 and framed.max() <= 480)


@given(sized_boxes())
def test_mirroring_twice_gives_the_boxes_back(sized: tuple[tuple[int, int], Boxes]) -> None:
    (_, width), boxes = sized
    twice = flip_boxes(flip_boxes(boxes, width, "hflip"), width, "hflip")
    np.testing.assert_array_equal(twice, boxes)


@given(sized_boxes(), image_sizes)
def test_mirroring_and_squashing_commute(sized: tuple[tuple[int, int], Boxes], to_size: tuple[int, int]) -> None:
    from_size, boxes = sized
    first = scale_boxes(flip_boxes(boxes, from_size[1], "hflip"), from_size, to_size)
    last = flip_boxes(scale_boxes(boxes, from_size, to_size), to_size[1], "hflip")
    np.testing.assert_allclose(first, last, atol=1e-3)


HAND_WORKED = {
    # 480/500 = 0.96 across and 480/375 = 1.28 down.
    "500×375": ((375, 500), "original", (100, 50, 250, 375), (96, 64, 240, 480)),
    "500×375 mirrored": ((375, 500), "hflip", (100, 50, 250, 375), (240, 64, 384, 480)),
    "240×960 mirrored": ((960, 240), "hflip", (0, 0, 1, 960), (478, 0, 480, 480)),
    "the frame's own size": ((480, 480), "original", (1, 2, 3, 4), (1, 2, 3, 4)),
}


@pytest.mark.parametrize(("image_size", "view", "box", "expected"), HAND_WORKED.values(), ids=HAND_WORKED)
def test_boxes_in_the_frame_by_hand(
    image_size: tuple[int, int], view: View, box: tuple[int, ...], expected: tuple[int, ...]
) -> None:
    framed = boxes_to_frame(np.array([box], dtype=np.float32), image_size, view)
    np.testing.assert_allclose(framed, [expected], rtol=1e-6)


@given(sized_boxes(), views)
def test_torchvision_moves_boxes_to_the_same_place(sized: tuple[tuple[int, int], Boxes], view: View) -> None:
    import torch
    from torchvision.transforms.v2 import functional
    from torchvision.tv_tensors import BoundingBoxes, BoundingBoxFormat

    image_size, boxes = sized
    theirs = BoundingBoxes(torch.from_numpy(boxes), format=BoundingBoxFormat.XYXY, canvas_size=image_size)
    if view == "hflip":
        theirs = functional.horizontal_flip(theirs)
    theirs = functional.resize(theirs, list(FRAME_SIZE))
    np.testing.assert_allclose(boxes_to_frame(boxes, image_size, view), theirs.numpy(), atol=2e-3)


@pytest.mark.parametrize("view", VIEWS)
def test_no_boxes_stay_no_boxes(view: View) -> None:
    assert boxes_to_frame(np.zeros((0, 4), dtype=np.float32), (375, 500), view).shape == (0, 4)


def test_moving_boxes_leaves_the_originals_alone() -> None:
    boxes = np.array([[1, 2, 3, 4]], dtype=np.float32)
    boxes_to_frame(boxes, (480, 480), "original")[:] = 0
    boxes_to_frame(boxes, (480, 480), "hflip")[:] = 0
    assert boxes.tolist() == [[1, 2, 3, 4]]


@given(st.sampled_from([(30, 30), (15, 15), (34, 34), (7, 20)]), st.data())
def test_the_middle_of_a_cell_is_in_that_cell(grid: tuple[int, int], data: st.DataObject) -> None:
    cell = data.draw(st.integers(0, grid[0] - 1)), data.draw(st.integers(0, grid[1] - 1))
    x1, y1, x2, y2 = cell_box(*cell, grid)
    assert cell_of_point((x1 + x2) / 2, (y1 + y2) / 2, grid) == cell


@given(st.floats(0, 480, exclude_max=True), st.floats(0, 480, exclude_max=True))
def test_every_point_of_the_frame_is_in_the_cell_that_covers_it(x: float, y: float) -> None:
    x1, y1, x2, y2 = cell_box(*cell_of_point(x, y))
    assert x1 <= x < x2
    assert y1 <= y < y2


def test_cells_by_hand() -> None:
    assert cell_box(0, 0) == (0, 0, 16, 16)
    assert cell_box(2, 29) == (464, 32, 480, 48)
    assert cell_box(14, 0, (15, 15)) == (0, 448, 32, 480)
    assert cell_of_point(x=15.9, y=16) == (1, 0)
    assert cell_of_point(x=479.5, y=0) == (0, 29)


@pytest.mark.parametrize(("x", "y"), [(-0.1, 0), (0, 480), (480, 0), (float("nan"), 0)])
def test_a_point_outside_the_frame_has_no_cell(x: float, y: float) -> None:
    with pytest.raises(ValueError, match="expected a point inside the 480×480 frame"):
        cell_of_point(x, y)


@pytest.mark.parametrize("cell", [(-1, 0), (30, 0), (0, 30)])
def test_a_cell_outside_the_grid_has_no_box(cell: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="expected a cell of the 30×30 grid"):
        cell_box(*cell)

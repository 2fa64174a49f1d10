"""The 480×480 frame, the patch grid on it, views, and the way back to the original image.

Every image is squashed to the frame (its aspect ratio is not kept) and boxes scale with it. Boxes are `xyxy`, 0-based,
half-open, float. Sizes are (H, W), height first. A grid of (Gh, Gw) on a frame of (H, W): cell (i, j) covers rows
i·H/Gh … (i+1)·H/Gh and columns j·W/Gw … (j+1)·W/Gw of the frame.
"""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

FRAME_SIZE: tuple[int, int] = (480, 480)
PATCH_GRID: tuple[int, int] = (30, 30)

# A closed list: a view is a named, exactly repeatable transform of the original image.
View = Literal["original", "hflip"]
VIEWS: tuple[View, ...] = get_args(View)

Boxes = NDArray[np.float32]


def boxes_to_frame(boxes_xyxy_orig: Boxes, image_size: tuple[int, int], view: View = "original") -> Boxes:
    """Return original-image boxes [n, 4] in frame pixels, as the given view shows them.

    image_size: (H, W) of the original image.
    """
    return flip_boxes(scale_boxes(boxes_xyxy_orig, image_size, FRAME_SIZE), FRAME_SIZE[1], view)


def boxes_from_frame(boxes_xyxy: Boxes, image_size: tuple[int, int], view: View = "original") -> Boxes:
    """Return a view's frame boxes [n, 4] in pixels of the original image: the inverse of `boxes_to_frame`."""
    return scale_boxes(flip_boxes(boxes_xyxy, FRAME_SIZE[1], view), FRAME_SIZE, image_size)


def scale_boxes(boxes_xyxy: Boxes, from_size: tuple[int, int], to_size: tuple[int, int]) -> Boxes:
    """Return boxes [n, 4] of an image of size `from_size` (H, W) as they lie after a squash to `to_size`."""
    scale_y, scale_x = to_size[0] / from_size[0], to_size[1] / from_size[1]
    return (boxes_xyxy * np.array([scale_x, scale_y, scale_x, scale_y], dtype=np.float64)).astype(np.float32)


def flip_boxes(boxes_xyxy: Boxes, width: int, view: View) -> Boxes:
    """Return boxes [n, 4] of an image `width` px wide as the view shows them: mirrored or not."""
    if view == "original":
        return boxes_xyxy
    flipped = boxes_xyxy.copy()
    flipped[:, 0] = width - boxes_xyxy[:, 2]
    flipped[:, 2] = width - boxes_xyxy[:, 0]
    return flipped


def cell_of_point(x: float, y: float, grid: tuple[int, int] = PATCH_GRID) -> tuple[int, int]:
    """Return the cell (row, column) of a grid (Gh, Gw) that holds the frame point (x, y), in px.

    Raises ValueError for a point outside the frame.
    """
    height, width = FRAME_SIZE
    if not (0 <= x < width and 0 <= y < height):
        raise ValueError(f"expected a point inside the {height}×{width} frame, found (x={x}, y={y})")
    return int(y * grid[0] // height), int(x * grid[1] // width)


def cell_box(row: int, column: int, grid: tuple[int, int] = PATCH_GRID) -> tuple[float, float, float, float]:
    """Return the frame pixels x1, y1, x2, y2 that the cell (row, column) of a grid (Gh, Gw) covers."""
    if not (0 <= row < grid[0] and 0 <= column < grid[1]):
        raise ValueError(f"expected a cell of the {grid[0]}×{grid[1]} grid, found ({row}, {column})")
    step_y, step_x = FRAME_SIZE[0] / grid[0], FRAME_SIZE[1] / grid[1]
    return column * step_x, row * step_y, (column + 1) * step_x, (row + 1) * step_y

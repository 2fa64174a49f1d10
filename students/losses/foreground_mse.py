"""Foreground-weighted mean squared error: the part of focal distillation (FGD) that ground-truth boxes decide."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from data.geometry import FRAME_SIZE

from .pairs import paired_maps


def foreground_mse(student: Tensor, teacher: Tensor, boxes_xyxy: Sequence[Tensor]) -> Tensor:
    """Return the mean over images of Σ over places of weight · (mean over channels of (student − teacher)²).

    A place that a box reaches into is foreground and weighs 1 / the number of places of its smallest box; all others
    are background and weigh 1 / their number. A box on its own thus counts as much as the whole background, whatever
    its size, and an image without boxes gives its plain mean squared error.

    student, teacher: [B, C, H, W], a grid over the 480×480 frame.  boxes_xyxy: for each image [n, 4] float xyxy in
    frame pixels, as the shown view has them; [0, 4] for none.

    Raises ValueError for shapes that do not belong together.

    Source: Yang et al. 2022, Focal and Global Knowledge Distillation for Detectors, section 3.1. Taken: the binary mask
    and the scale mask, with the smallest box where several overlap. Left out: the spatial and channel attention masks
    (all 1 here), the attention loss, the separate weights α and β of foreground and background (both 1 here), and the
    global distillation of section 3.2. Channels are averaged where the source sums them. A box's area is counted in
    whole places of the grid, so no weight exceeds 1.
    """
    student, teacher = paired_maps(student, teacher)
    if len(boxes_xyxy) != len(student) or any(boxes.ndim != 2 or boxes.shape[1] != 4 for boxes in boxes_xyxy):
        shapes = [list(boxes.shape) for boxes in boxes_xyxy]
        raise ValueError(f"expected boxes [n, 4] for each of {len(student)} images, found {shapes}")
    grid = (student.shape[2], student.shape[3])
    weights = torch.stack([place_weights(boxes.to(student), grid) for boxes in boxes_xyxy])
    errors = (student - teacher).square().mean(dim=1)
    return (weights * errors).sum(dim=(1, 2)).mean()


def place_weights(boxes_xyxy: Tensor, grid: tuple[int, int]) -> Tensor:
    """Return the weights [H, W] of an image's places in `foreground_mse`.

    boxes_xyxy: [n, 4] float xyxy in frame pixels; n may be 0.  grid: (H, W).
    """
    rows = _reached(boxes_xyxy[:, 1], boxes_xyxy[:, 3], grid[0], FRAME_SIZE[0])
    columns = _reached(boxes_xyxy[:, 0], boxes_xyxy[:, 2], grid[1], FRAME_SIZE[1])
    inside = (rows[:, :, None] & columns[:, None, :]).to(boxes_xyxy.dtype)
    areas = inside.sum(dim=(1, 2), keepdim=True).clamp(min=1)
    # A row of zeros stands for "no box": the maximum over no boxes at all would have no value.
    foreground = torch.cat([inside / areas, inside.new_zeros(1, *grid)]).amax(dim=0)
    background = (foreground == 0).to(foreground.dtype)
    return foreground + background / background.sum().clamp(min=1)


def _reached(starts: Tensor, ends: Tensor, num_cells: int, length_px: int) -> Tensor:
    """Return [n, num_cells] bool: whether the half-open interval of each box reaches into each cell of an axis."""
    cells = torch.arange(num_cells, device=starts.device)
    # In this order a border between cells that is a whole pixel comes out as a whole number, on any grid.
    first = (starts * num_cells / length_px).floor()
    beyond = (ends * num_cells / length_px).ceil()
    return (cells >= first[:, None]) & (cells < beyond[:, None])

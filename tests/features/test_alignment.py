"""A blob on the 480×480 frame answers in the cell that lies over it, whatever the family, its stride and its grid."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from data.geometry import FRAME_SIZE, cell_box
from data.images import squash
from features.teacher import Teacher
from tests.teacher_families import FAMILIES, SmallTeacher, family_params

Cell = tuple[int, int]


def response(teacher: Teacher, cells: list[Cell]) -> Tensor:
    """How much every cell changes, [n, Gh, Gw], when a bright blob fills one cell of a dull frame."""
    assert teacher.patch_grid is not None
    dull = np.full((*FRAME_SIZE, 3), 90, dtype=np.uint8)
    frames = [dull]
    for cell in cells:
        x1, y1, x2, y2 = (round(edge) for edge in cell_box(*cell, teacher.patch_grid))
        blob = dull.copy()
        blob[y1:y2, x1:x2] = (255, 230, 0)
        frames.append(blob)
    inputs = [squash(Image.fromarray(frame), teacher.input.size, teacher.input.resample) for frame in frames]
    features = teacher(torch.from_numpy(np.stack(inputs))).features
    assert features is not None
    return (features[1:] - features[0]).norm(dim=-1)


def strongest(responses: Tensor) -> list[Cell]:
    columns = responses.shape[2]
    return [divmod(int(index), columns) for index in responses.flatten(1).argmax(dim=1)]


def misplaced(found: list[Cell], cells: list[Cell], own_cell: bool) -> bool:
    """Whether a response moved by other steps than its blob, or, where it must be the blob's own, lies elsewhere."""
    steps = [(r - found[0][0], c - found[0][1]) for r, c in found]
    return steps != [(r - cells[0][0], c - cells[0][1]) for r, c in cells] or (own_cell and found[0] != cells[0])


@pytest.mark.parametrize("name", family_params(of_features=True))
def test_a_moved_blob_moves_the_response_by_as_many_cells(name: str, tmp_path: Path) -> None:
    small: SmallTeacher = FAMILIES[name]
    small.prepare(tmp_path)
    teacher = small.build(tmp_path)
    assert teacher.patch_grid is not None
    rows, columns = teacher.patch_grid
    start = (rows // 3, columns // 2)
    cells = [start, (start[0] + 1, start[1]), (start[0], start[1] + 2), (rows // 2, columns // 4)]
    if small.own_cell:  # random convolutions answer otherwise at the border, where they see padding
        cells += [(0, columns - 1), (rows - 1, 0)]
    responses = response(teacher, cells)
    found = strongest(responses)
    assert not misplaced(found, cells, small.own_cell), (found, cells)

    # The controls: rows and columns swapped, mirrored, one cell off.
    for wrong in (
        strongest(responses.transpose(1, 2).reshape(responses.shape)),
        strongest(responses.flip(2)),
        [(row, column + 1) for row, column in found] if small.own_cell else [(column, row) for row, column in found],
    ):
        assert misplaced(wrong, cells, small.own_cell)

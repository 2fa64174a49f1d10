"""What a file of detections says, row by row, and whether that can be scored.

Nothing is dropped, clipped or corrected: what cannot be scored is refused with its place in the file, and what merely
looks odd is scored as it is and told.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from data.errors import DetectionsError
from data.records import ImageRecord

from .detections import Detections

# Boxes that a detector clipped to its own frame come back to the original image with a rounding error.
_ROUNDING_PX = 0.01
_ANY_SCALE = "AP only uses the order of scores: pass logits through a sigmoid, or subtract their minimum"


@dataclass(frozen=True, eq=False)
class FileRows:
    """The n rows of one or more files, in their order.

    image_index: [n] int64.  labels: [n] int64 in 1..20.  scores: [n] float64.  boxes_xyxy_orig: [n, 4] float32.
    where: returns a row's place, as `comp4_det_test_cat.txt:17`.  box_text: returns a row's box as the file has it.
    """

    image_index: NDArray[np.int64]
    labels: NDArray[np.int64]
    scores: NDArray[np.float64]
    boxes_xyxy_orig: NDArray[np.float32]
    where: Callable[[int], str]
    box_text: Callable[[int], str]


def scorable(rows: FileRows, records: Sequence[ImageRecord], *, ordered: str) -> tuple[Detections, list[str]]:
    """Return the rows as detections of the records, and notes on what looks odd, a line each.

    ordered: what an inverted box violates, in the format's own terms.

    Raises DetectionsError with the place of the first row that has a score that is negative or no number, a box with
    such a coordinate, an inverted box, or one wholly outside its image.
    """
    sizes = np.array([record.image_size[::-1] for record in records], dtype=np.float64).reshape(-1, 2)[rows.image_index]
    with np.errstate(invalid="ignore"):
        wrong = list(_problems(rows, sizes, ordered))
    # The first row of the file that has any problem; of its problems, the first.
    firsts = [int(np.argmax(mask)) if mask.any() else len(mask) for mask, _, _ in wrong]
    row = min(firsts)
    if row < len(rows.scores):
        _, message, hint = wrong[firsts.index(row)]
        raise DetectionsError(f"{rows.where(row)}: {message(row)}", hint=hint)
    detections = Detections(
        image_ids=tuple(record.id for record in records),
        image_index=rows.image_index,
        labels=rows.labels,
        scores=rows.scores,
        boxes_xyxy_orig=rows.boxes_xyxy_orig,
    )
    return detections, [*_sticking_out(rows, sizes), *_images_without(rows, len(records))]


def _problems(
    rows: FileRows, sizes: NDArray[np.float64], ordered: str
) -> Iterator[tuple[NDArray[np.bool_], Callable[[int], str], str | None]]:
    """Yield which rows [n] have a problem, what to say of one, and what to do about it."""
    scores, boxes = rows.scores, rows.boxes_xyxy_orig
    yield ~np.isfinite(scores), lambda row: f"expected a finite score, found {scores[row]}", None
    yield scores < 0, lambda row: f"expected a score of 0 or more, found {scores[row]}", _ANY_SCALE
    yield np.any(~np.isfinite(boxes), axis=1), lambda row: f"expected a finite box, found {rows.box_text(row)}", None
    sides = boxes[:, 2:] - boxes[:, :2]
    yield (
        np.any(sides < 0, axis=1),
        lambda row: f"expected {ordered}, found the inverted box {rows.box_text(row)}",
        "write corners as the format has them; a centre or a size in their place looks like this",
    )
    inside = np.minimum(boxes[:, 2:], sizes) - np.maximum(boxes[:, :2], 0)
    # An empty box on the border may come of clipping; a box with an area there is outside.
    yield (
        np.any((inside < 0) | ((inside == 0) & (sides > 0)), axis=1),
        lambda row: (
            f"expected a box that overlaps its image, {sizes[row, 0]:.0f}×{sizes[row, 1]:.0f} px (width × height);"
            f" found {rows.box_text(row)}, wholly outside"
        ),
        "write boxes in pixels of the original image, not of a resized one",
    )


def _sticking_out(rows: FileRows, sizes: NDArray[np.float64]) -> Iterator[str]:
    boxes = rows.boxes_xyxy_orig.astype(np.float64)
    excess = np.maximum(-boxes[:, :2], boxes[:, 2:] - sizes).max(axis=1, initial=0)
    out = np.flatnonzero(excess > _ROUNDING_PX)
    if len(out):
        most = excess.max()
        cause = "1-based and 0-based numbers mixed up" if most <= 1 + _ROUNDING_PX else "pixels of a resized image"
        yield (
            f"note: {len(out):,} of {len(excess):,} boxes stick out of their image, by up to {most:.1f} px, first"
            f" {rows.where(int(out[0]))}; scored as they are ({cause} look like this)"
        )


def _images_without(rows: FileRows, num_images: int) -> Iterator[str]:
    if not len(rows.scores):
        yield f"note: no detections at all: nothing was found in any of {num_images:,} images"
        return
    without = num_images - len(np.unique(rows.image_index))
    if without:
        yield f"note: {without:,} of {num_images:,} images have no detection"

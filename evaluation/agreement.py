"""How close a student's feature map is to its teacher's: cosine of each cell, and linear CKA, over a set of images.

Both are gathered image by image, in memory that does not depend on how many there are.

Axes: Gh × Gw patch grid, C channels of the teacher, P channels of the student's own map.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from data.geometry import FRAME_SIZE, boxes_to_frame, cell_of_point
from data.records import VOC_CLASSES, ImageRecord

# Of cells: `objects` lie in the box of an object of any class, `background` in none.
REGIONS = ("all", "objects", "background", *VOC_CLASSES)
# Over −1 … 1: percentiles are right to half a bin, 5e-5.
_BINS = 20_000


@dataclass(frozen=True)
class RegionCosine:
    """Cosines of the cells of a region. shuffled: their mean against another image's teacher, the same cells."""

    cells: int
    mean: float
    p1: float
    p50: float
    shuffled: float | None

    def to_json(self) -> dict[str, Any]:
        """Return the fields by name."""
        return asdict(self)


def cell_cosines(student: NDArray[np.floating], teacher: NDArray[np.floating]) -> NDArray[np.float64]:
    """Return the cosine similarity [Gh, Gw] of two maps [Gh, Gw, C], cell by cell; 0 where a vector is zero."""
    if student.shape != teacher.shape or student.ndim != 3:
        raise ValueError(f"expected two maps [Gh, Gw, C], found {student.shape} and {teacher.shape}")
    one, other = student.astype(np.float64), teacher.astype(np.float64)
    lengths = np.linalg.norm(one, axis=2) * np.linalg.norm(other, axis=2)
    dots = np.einsum("ijc,ijc->ij", one, other)
    cosines = np.divide(dots, lengths, out=np.zeros_like(dots), where=lengths > 0)
    return np.asarray(cosines.clip(-1.0, 1.0))


def cell_regions(record: ImageRecord, grid: tuple[int, int]) -> NDArray[np.bool_]:
    """Return which cells of an image's grid (Gh, Gw) lie in each of REGIONS, [len(REGIONS), Gh, Gw].

    A cell lies in a box where its centre does; a box that holds no centre has the cell that holds the box's. A cell
    may lie in boxes of several classes. Those of difficult objects alone are in `all` only: they count neither way.
    """
    target = record.target
    rows, columns = ((np.arange(n) + 0.5) * size / n for n, size in zip(grid, FRAME_SIZE, strict=True))
    regions = np.zeros((len(REGIONS), *grid), dtype=np.bool_)
    anything = np.zeros(grid, dtype=np.bool_)
    boxes = boxes_to_frame(target.boxes_xyxy_orig, record.image_size)
    for (x1, y1, x2, y2), label, difficult in zip(boxes, target.labels, target.difficult, strict=True):
        inside = np.outer((rows >= y1) & (rows < y2), (columns >= x1) & (columns < x2))
        if not inside.any():
            inside[
                cell_of_point(min((x1 + x2) / 2, FRAME_SIZE[1] - 1), min((y1 + y2) / 2, FRAME_SIZE[0] - 1), grid)
            ] = True
        anything |= inside
        if not difficult:
            regions[REGIONS.index(VOC_CLASSES[label - 1])] |= inside
    regions[0] = True
    regions[1] = regions[3:].any(axis=0)
    regions[2] = ~anything
    return regions


class CosineCounts:
    """Cosines of cells by region, as a histogram of each."""

    def __init__(self) -> None:
        self._counts = np.zeros((len(REGIONS), _BINS), dtype=np.int64)
        self._sums = np.zeros(len(REGIONS))
        self._shuffled = np.zeros(len(REGIONS))
        self._is_shuffled = False

    def add(
        self,
        cosines: NDArray[np.float64],
        regions: NDArray[np.bool_],
        shuffled: NDArray[np.float64] | None,
    ) -> None:
        """Count an image.

        cosines: [Gh, Gw].  regions: as `cell_regions` gives them.  shuffled: [Gh, Gw], against another image's teacher.
        """
        bins = np.minimum(((cosines + 1) / 2 * _BINS).astype(np.int64), _BINS - 1)
        for number in np.flatnonzero(regions.any(axis=(1, 2))):
            inside = regions[number]
            self._counts[number] += np.bincount(bins[inside], minlength=_BINS)
            self._sums[number] += cosines[inside].sum()
            if shuffled is not None:
                self._shuffled[number] += shuffled[inside].sum()
        self._is_shuffled |= shuffled is not None

    def regions(self) -> dict[str, RegionCosine | None]:
        """Return the figures of every region; None for one without a cell."""
        return {name: self._region(number) for number, name in enumerate(REGIONS)}

    def _region(self, number: int) -> RegionCosine | None:
        cells = int(self._counts[number].sum())
        if cells == 0:
            return None
        cumulative = np.cumsum(self._counts[number])
        p1, p50 = (float((np.searchsorted(cumulative, share * cells) + 0.5) / _BINS * 2 - 1) for share in (0.01, 0.50))
        shuffled = float(self._shuffled[number] / cells) if self._is_shuffled else None
        return RegionCosine(cells, float(self._sums[number] / cells), p1, p50, shuffled)


class CkaMoments:
    """Linear centred kernel alignment of two maps over the cells of many images.

    CKA = ‖YᵀX‖² / (‖XᵀX‖ · ‖YᵀY‖), Frobenius norms, X [cells, P] and Y [cells, C] with their means taken off: 1 for
    maps that are one another's rotation and scaling, whatever their numbers of channels; no adapter is needed.

    Source: Kornblith et al. 2019, Similarity of Neural Network Representations Revisited, section 3 and equation 5.
    """

    def __init__(self, *, standardise: bool) -> None:
        """Start without a cell.

        standardise: give every channel of the teacher the variance 1 first. A few channels of a ViT may vary hundreds
        of times more than the others, and would be all that is compared.
        """
        self._standardise = standardise
        self._cells = 0
        self._shift: tuple[NDArray[np.float64], NDArray[np.float64]] | None = None
        # Σ over cells of z and z zᵀ, for z the student's channels, the teacher's, and those of the shuffled teacher.
        self._sums: list[NDArray[np.float64]] = []
        self._products: dict[str, NDArray[np.float64]] = {}

    def add(
        self,
        student: NDArray[np.floating],
        teacher: NDArray[np.floating],
        shuffled: NDArray[np.floating] | None,
    ) -> None:
        """Add an image's cells. student: [Gh, Gw, P].  teacher, shuffled: [Gh, Gw, C]; the latter another image's.

        Over all images, the shuffled ones must be the same as the others, in another order.
        """
        x, y = (map_.reshape(-1, map_.shape[2]).astype(np.float64) for map_ in (student, teacher))
        if self._shift is None:
            # Near the mean, so that sums of squares lose nothing when the mean is taken off in the end.
            self._shift = x.mean(axis=0), y.mean(axis=0)
            self._sums = [np.zeros(x.shape[1]), np.zeros(y.shape[1])]
        x, y = x - self._shift[0], y - self._shift[1]
        self._cells += len(x)
        self._sums[0] += x.sum(axis=0)
        self._sums[1] += y.sum(axis=0)
        pairs = {"xx": (x, x), "yy": (y, y), "yx": (y, x)}
        if shuffled is not None:
            pairs["zx"] = (shuffled.reshape(-1, shuffled.shape[2]) - self._shift[1], x)
        for name, (one, other) in pairs.items():
            # In single precision, an image at a time: that is a relative 1e-6, in half the time.
            found = one.astype(np.float32).T @ other.astype(np.float32)
            self._products[name] = self._products[name] + found if name in self._products else found.astype(np.float64)

    def value(self, of: Literal["teacher", "shuffled"] = "teacher") -> float | None:
        """Return the CKA in 0 … 1; None without cells, for maps that do not vary, or where nothing was shuffled."""
        cross = {"teacher": "yx", "shuffled": "zx"}[of]
        if cross not in self._products:
            return None
        sx, sy = self._sums
        centred = {
            "xx": self._products["xx"] - np.outer(sx, sx) / self._cells,
            "yy": self._products["yy"] - np.outer(sy, sy) / self._cells,
            # All shuffled maps together are all maps, so they have the same mean.
            cross: self._products[cross] - np.outer(sy, sx) / self._cells,
        }
        scale = np.ones(len(sy))
        if self._standardise:
            variance = np.diag(centred["yy"])
            moves = variance > 1e-12 * max(float(variance.max()), 0.0)
            scale = np.where(moves, 1 / np.sqrt(np.where(moves, variance, 1.0)), 0.0)
        cross_product = scale[:, None] * centred[cross]
        own = np.linalg.norm(centred["xx"]) * np.linalg.norm(scale[:, None] * centred["yy"] * scale)
        return float(min(1.0, (cross_product**2).sum() / own)) if own > 0 else None

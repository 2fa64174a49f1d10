"""Shows stored teacher features on the frame they are aligned with: without a teacher, and without torch.

Three looks at the same grid: the first three principal components as colours (parts of one kind share a colour), the
norm of each cell's vector (outlier tokens stand out), and each cell's cosine similarity to one marked cell, laid over
the image where that is at hand. A student's map stands beside its teacher's in the teacher's colours. The palettes,
viridis and cividis, are told apart with any kind of colour vision.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.patches import Rectangle
from matplotlib.ticker import ScalarFormatter
from numpy.typing import NDArray

from data.errors import TeachOnceError
from data.geometry import FRAME_SIZE, cell_box

from .agreement import cell_cosines
from .colour_basis import ColourBasis

_HEIGHT_PX, _WIDTH_PX = FRAME_SIZE
_EXTENT = (0, _WIDTH_PX, _HEIGHT_PX, 0)
_MARK = "#D55E00"
# Enough of the heat map to read its colours by the bar's, enough of the image to see what lies below.
_OPACITY = 0.75
_PANEL_INCHES = 3.5
_LETTERS_PER_INCH = 8


@dataclass(frozen=True, eq=False)
class HeatmapRow:
    """One sample of a picture.

    title: its id and what is marked.  features: [Gh, Gw, C] float.  image: [480, 480, 3] uint8, the frame in the same
    view, where it is at hand.  cell: (row, column) that the others are compared with, by default the central one.
    """

    title: str
    features: NDArray[np.floating]
    image: NDArray[np.uint8] | None = None
    cell: tuple[int, int] | None = None

    def checked(self) -> NDArray[np.float64]:
        """Return the features in double precision.

        Raises TeachOnceError for features that are not finite, ValueError for arrays of other shapes.
        """
        if self.features.ndim != 3 or not all(self.features.shape):
            raise ValueError(f"expected features [Gh, Gw, C], found {self.features.shape}")
        if self.image is not None and self.image.shape != (*FRAME_SIZE, 3):
            raise ValueError(f"expected an image {(*FRAME_SIZE, 3)}, found {self.image.shape}")
        values = self.features.astype(np.float64)
        if not np.isfinite(values).all():
            raise TeachOnceError(
                f"{self.title}: {np.count_nonzero(~np.isfinite(values)):,} of {values.size:,} features are NaN or"
                " infinite",
                hint="`python cli.py inspect-cache STORE --verify` tells whether the store is damaged",
            )
        return values


def heatmap_figure(rows: Sequence[HeatmapRow], title: str) -> bytes:
    """Return a PNG with a row of panels a sample, all of them aligned with the 480×480 frame.

    rows: at least one.  title: teacher and view.

    Raises TeachOnceError for features that are not finite, ValueError for arrays of other shapes.
    """
    values = [row.checked() for row in rows]
    panels = 4 if any(row.image is not None for row in rows) else 3
    width = (_PANEL_INCHES + 0.5) * panels
    figure = Figure(figsize=(width, (_PANEL_INCHES + 0.7) * len(rows) + 0.6), dpi=110, layout="compressed")
    figure.suptitle(_folded(title, 0.8 * width), fontsize=14, parse_math=False)
    grid = figure.subplots(len(rows), panels, squeeze=False)
    for row, features, axes in zip(rows, values, grid, strict=True):
        _draw_row(row, features, list(axes))
        _write_above(axes[0], _folded(row.title, 0.85 * width))
    for axis in grid[:, 1:].flat:
        axis.tick_params(labelleft=False)
    for axis in grid[:-1].flat:
        axis.tick_params(labelbottom=False)
    return _png(figure)


@dataclass(frozen=True, eq=False)
class PairedMaps:
    """A student's map beside its teacher's, of one image.

    teacher, student: [Gh, Gw, C], in one space.  image: [480, 480, 3] uint8, the frame.  cell: (row, column) that the
    others are compared with.
    """

    teacher: NDArray[np.floating]
    student: NDArray[np.floating]
    image: NDArray[np.uint8]
    cell: tuple[int, int]


def paired_figure(maps: PairedMaps, title: str) -> bytes:
    """Return a PNG: the frame, both maps in the teacher's colours, how like a marked cell the others are in each, and
    the cosine of the two maps cell by cell.

    title: image, teacher, student, and what is marked.

    Raises TeachOnceError for features that are not finite, ValueError for arrays of other shapes.
    """
    teacher, student = (
        HeatmapRow(name, features, maps.image).checked()
        for name, features in (("the teacher", maps.teacher), ("the student", maps.student))
    )
    agreement = cell_cosines(student, teacher)
    width = (_PANEL_INCHES + 0.5) * 3
    figure = Figure(figsize=(width, (_PANEL_INCHES + 0.4) * 2 + 0.7), dpi=110, layout="compressed")
    figure.suptitle(_folded(title, 0.8 * width), fontsize=14, parse_math=False)
    (frame, colours, likeness), (between, own_colours, own_likeness) = grid = figure.subplots(2, 3)
    basis = ColourBasis.of(teacher)
    _panel(frame, maps.image, "frame")
    _panel(colours, basis.colours(teacher), f"teacher: PCA 1–3 as RGB, {basis.explained:.0%} of variance")
    _panel(own_colours, basis.colours(student), "student, adapted: the same colours")
    # Of one range in every picture, so that pictures compare; below zero there is nothing to tell apart.
    _over(maps.image, between, agreement, f"cosine of student and teacher, mean {agreement.mean():.2f}", (0.0, 1.0))
    similar = [cosine_to_cell(features, maps.cell) for features in (teacher, student)]
    limits = (min(0.0, *(float(grid.min()) for grid in similar)), 1.0)
    for axis, name, found in zip((likeness, own_likeness), ("teacher", "student"), similar, strict=True):
        _over(maps.image, axis, found, f"{name}: cosine to the marked cell", limits)
    _mark(list(grid.flat), maps.cell, teacher.shape[:2])
    for axis in grid[:, 1:].flat:
        axis.tick_params(labelleft=False)
    for axis in grid[0]:
        axis.tick_params(labelbottom=False)
    return _png(figure)


def _png(figure: Figure) -> bytes:
    png = BytesIO()
    figure.savefig(png, format="png", bbox_inches="tight", metadata={"Software": None})
    return png.getvalue()


def _draw_row(row: HeatmapRow, features: NDArray[np.float64], axes: list[Axes]) -> None:
    cell = row.cell or (features.shape[0] // 2, features.shape[1] // 2)
    basis = ColourBasis.of(features)
    if len(axes) == 4:
        if row.image is None:
            axes[0].set_visible(False)
        else:
            _panel(axes[0], row.image, "frame")
    _panel(axes[-3], basis.colours(features), f"PCA 1–3 as RGB, {basis.explained:.0%} of variance")
    _scaled(axes[-2], np.linalg.norm(features, axis=2), "norm of each cell", "viridis")
    _over(row.image, axes[-1], cosine_to_cell(features, cell), f"cosine to cell {cell}")
    _mark(axes, cell, features.shape[:2])


def _over(
    image: NDArray[np.uint8] | None,
    axis: Axes,
    grid: NDArray[np.float64],
    title: str,
    limits: tuple[float, float] | None = None,
) -> None:
    """Draw a grid of cosines over the image, grey, where that is at hand."""
    if image is not None:
        axis.imshow(image.mean(axis=2), extent=_EXTENT, cmap="gray", vmin=0, vmax=255)
    _scaled(axis, grid, title, "cividis", 1.0 if image is None else _OPACITY, limits)


def _mark(axes: Sequence[Axes], cell: tuple[int, int], grid: tuple[int, int]) -> None:
    x1, y1, x2, y2 = cell_box(cell[0], cell[1], grid)
    for axis in axes:
        for colour, line in (("white", 3.5), (_MARK, 1.8)):
            axis.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor=colour, linewidth=line))


def cosine_to_cell(features: NDArray[np.float64], cell: tuple[int, int]) -> NDArray[np.float64]:
    """Return the cosine similarity [Gh, Gw] of every cell to the cell (row, column); 0 for zero vectors."""
    norms = np.linalg.norm(features, axis=2, keepdims=True)
    directions = np.divide(features, norms, out=np.zeros_like(features), where=norms > 0)
    return np.asarray(directions @ directions[cell])


def _write_above(axis: Axes, title: str) -> None:
    """Write a row's title above its first panel's own, over the other panels as far as it reaches."""
    # Blank lines keep the height free. The layout must not see the text, or it would make the panel as wide.
    axis.set_title("\n" * (title.count("\n") + 2) + " ", loc="left", fontsize=11)
    above_points = (0, 19)
    written = axis.annotate(
        title, (0, 1), above_points, xycoords="axes fraction", textcoords="offset points", va="bottom", fontsize=12,
        weight="bold", parse_math=False,
    )  # fmt: skip
    written.set_in_layout(False)


def _scaled(
    axis: Axes,
    grid: NDArray[np.float64],
    title: str,
    palette: str,
    opacity: float = 1.0,
    limits: tuple[float, float] | None = None,
) -> None:
    """Draw a grid of numbers with its colour bar. limits: of the colours, by default those of the numbers."""
    shown = _panel(axis, grid, title, palette, opacity)
    if limits is not None:
        shown.set_clim(*limits)
    # Of a mappable of its own, or the bar would be as transparent as the map.
    colours = ScalarMappable(shown.norm, shown.cmap)
    written = ScalarFormatter(useOffset=False)
    below, above = grid.min() < shown.norm.vmin, grid.max() > shown.norm.vmax
    extend = {(False, False): "neither", (True, False): "min", (False, True): "max", (True, True): "both"}[below, above]
    bar = axis.figure.colorbar(colours, ax=axis, fraction=0.046, pad=0.03, format=written, extend=extend)
    bar.ax.tick_params(labelsize=9)


def _panel(
    axis: Axes, values: NDArray[np.generic], title: str, palette: str | None = None, opacity: float = 1.0
) -> AxesImage:
    axis.set_title(title, fontsize=11)
    axis.set_xticks(range(0, _WIDTH_PX + 1, 120))
    axis.set_yticks(range(0, _HEIGHT_PX + 1, 120))
    axis.tick_params(labelsize=9)
    return axis.imshow(values, extent=_EXTENT, interpolation="nearest", cmap=palette, alpha=opacity)


def _folded(title: str, inches: float) -> str:
    """Return a title in as many lines as it takes."""
    return "\n".join(textwrap.wrap(title, max(10, int(inches * _LETTERS_PER_INCH))))

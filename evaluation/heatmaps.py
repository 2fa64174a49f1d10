"""Shows one image's stored teacher features on the frame they are aligned with: without a teacher, and without torch.

Three looks at the same grid: the first three principal components as colours (parts of one kind share a colour), the
norm of each cell's vector (outlier tokens stand out), and each cell's cosine similarity to one marked cell.
"""

from __future__ import annotations

from io import BytesIO

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.patches import Rectangle
from numpy.typing import NDArray

from data.errors import TeachOnceError
from data.geometry import FRAME_SIZE, cell_box

_HEIGHT_PX, _WIDTH_PX = FRAME_SIZE
_EXTENT = (0, _WIDTH_PX, _HEIGHT_PX, 0)
_MARK = "#D55E00"


def heatmap_figure(
    features: NDArray[np.floating],
    title: str,
    *,
    image: NDArray[np.uint8] | None = None,
    untrained: bool = False,
    cell: tuple[int, int] | None = None,
) -> bytes:
    """Return a PNG that shows a patch grid of features, aligned with the 480×480 frame.

    features: [Gh, Gw, C] float.  title: sample id, teacher and view.  image: [480, 480, 3] uint8, the frame in the
    same view, shown beside them.  untrained: said in the title.  cell: (row, column) that the others are compared
    with, by default the central one.

    Raises TeachOnceError for features that are not finite, ValueError for arrays of other shapes.
    """
    if features.ndim != 3 or not all(features.shape):
        raise ValueError(f"expected features [Gh, Gw, C], found {features.shape}")
    if image is not None and image.shape != (*FRAME_SIZE, 3):
        raise ValueError(f"expected an image {(*FRAME_SIZE, 3)}, found {image.shape}")
    values = features.astype(np.float64)
    if not np.isfinite(values).all():
        raise TeachOnceError(
            f"{title}: {np.count_nonzero(~np.isfinite(values)):,} of {values.size:,} features are NaN or infinite",
            hint="`python cli.py inspect-cache STORE --verify` tells whether the store is damaged",
        )
    row, column = cell or (values.shape[0] // 2, values.shape[1] // 2)

    norms = np.linalg.norm(values, axis=2)
    cosines = cosine_to_cell(values, (row, column))
    colours, explained = principal_colours(values)
    panels = 3 if image is None else 4
    figure = Figure(figsize=(4.1 * panels, 4.4), dpi=110, layout="compressed")
    figure.suptitle(f"{title} · untrained" if untrained else title, fontsize=13)
    axes = list(figure.subplots(1, panels, squeeze=False)[0])
    if image is not None:
        _panel(axes[0], image, "frame")
    _panel(axes[-3], colours, f"PCA 1–3 as RGB, {explained:.0%} of variance")
    for axis, grid, name, palette in (
        (axes[-2], norms, "norm of each cell", "viridis"),
        (axes[-1], cosines, "cosine to the marked cell", "cividis"),
    ):
        shown = _panel(axis, grid, name, palette)
        figure.colorbar(shown, ax=axis, fraction=0.046, pad=0.03).ax.tick_params(labelsize=8)
    x1, y1, x2, y2 = cell_box(row, column, values.shape[:2])
    for axis in axes:
        for colour, line in (("white", 3.5), (_MARK, 1.8)):
            axis.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor=colour, linewidth=line))
    png = BytesIO()
    figure.savefig(png, format="png", bbox_inches="tight", metadata={"Software": None})
    return png.getvalue()


def principal_colours(features: NDArray[np.float64]) -> tuple[NDArray[np.float64], float]:
    """Return the first three principal components as RGB [Gh, Gw, 3] in 0..1, and the share of variance they hold.

    features: [Gh, Gw, C]. Signs are fixed so that equal features give equal colours; each component is stretched
    between its 1st and 99th percentile, or outlier tokens would take the whole range. A component that features of
    lower rank do not have is mid-grey.
    """
    height, width, _ = features.shape
    flat = features.reshape(height * width, -1)
    left, strengths, directions = np.linalg.svd(flat - flat.mean(axis=0), full_matrices=False)
    colours = np.full((height * width, 3), 0.5)
    rank = int((strengths > 1e-9 * max(np.abs(flat).max(), 1e-300) * len(flat)).sum())
    for k in range(min(3, rank)):
        component = left[:, k] * np.sign(directions[k, np.abs(directions[k]).argmax()])
        low, high = np.percentile(component, [1, 99])
        if high > low:
            colours[:, k] = ((component - low) / (high - low)).clip(0, 1)
    power = strengths**2
    explained = float(power[:3].sum() / power.sum()) if rank else 1.0
    return colours.reshape(height, width, 3), explained


def cosine_to_cell(features: NDArray[np.float64], cell: tuple[int, int]) -> NDArray[np.float64]:
    """Return the cosine similarity [Gh, Gw] of every cell to the cell (row, column); 0 for zero vectors."""
    norms = np.linalg.norm(features, axis=2, keepdims=True)
    directions = np.divide(features, norms, out=np.zeros_like(features), where=norms > 0)
    return np.asarray(directions @ directions[cell])


def _panel(axis: Axes, values: NDArray[np.generic], title: str, palette: str | None = None) -> AxesImage:
    axis.set_title(title, fontsize=10)
    axis.set_xticks(range(0, _WIDTH_PX + 1, 120))
    axis.set_yticks(range(0, _HEIGHT_PX + 1, 120))
    axis.tick_params(labelsize=8)
    return axis.imshow(values, extent=_EXTENT, interpolation="nearest", cmap=palette)

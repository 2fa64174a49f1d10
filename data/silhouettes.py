"""What a synthetic object looks like: every VOC class has a silhouette, a hue and a pattern of its own.

A silhouette is a list of parts in the unit square (x right, y down), drawn one over the other, so that a detector can
tell the classes apart by form as well as by colour. Nothing here is random: the caller draws sizes and tints.
"""

from __future__ import annotations

import colorsys
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from .records import VOC_CLASSES

Pattern = Literal["plain", "rows", "columns", "checks"]
_PATTERNS: tuple[Pattern, ...] = ("plain", "rows", "columns", "checks")
_DARK = 0.6
_HUE_STEP = 7  # of 20: coprime, so that classes next to each other in the list are far apart in hue


class Part(NamedTuple):
    """A filled piece of a silhouette: `points` are a polygon's corners, or an ellipse's bounding box.

    hole: cut the piece out of what was drawn before it.
    """

    kind: Literal["ellipse", "polygon"]
    points: tuple[float, ...]
    hole: bool = False


class Silhouette(NamedTuple):
    """The form of one class: its usual width over height, and its parts in drawing order."""

    aspect: float
    parts: tuple[Part, ...]


def _oval(*box: float, hole: bool = False) -> Part:
    return Part("ellipse", box, hole)


def _poly(*points: float, hole: bool = False) -> Part:
    return Part("polygon", points, hole)


def _rect(x1: float, y1: float, x2: float, y2: float, hole: bool = False) -> Part:
    return Part("polygon", (x1, y1, x2, y1, x2, y2, x1, y2), hole)


SILHOUETTES: dict[str, Silhouette] = {
    "aeroplane": Silhouette(1.6, (
        _oval(0, 0.38, 1, 0.62), _poly(0.35, 0.5, 0.52, 0, 0.66, 0, 0.6, 0.5, 0.66, 1, 0.52, 1),
        _poly(0, 0.2, 0.1, 0.2, 0.2, 0.5, 0.1, 0.8, 0, 0.8))),
    "bicycle": Silhouette(1.6, (
        _oval(0, 0.35, 0.42, 1), _oval(0.09, 0.49, 0.33, 0.86, hole=True), _oval(0.58, 0.35, 1, 1),
        _oval(0.67, 0.49, 0.91, 0.86, hole=True), _poly(0.18, 0.72, 0.3, 0, 0.7, 0.1, 0.82, 0.72),
        _poly(0.3, 0.6, 0.38, 0.18, 0.62, 0.22, 0.68, 0.6, hole=True))),
    "bird": Silhouette(1.3, (
        _oval(0.15, 0.35, 0.85, 0.85), _oval(0.62, 0.08, 0.92, 0.5), _poly(0.88, 0.18, 1, 0.3, 0.88, 0.4),
        _poly(0, 0.15, 0.35, 0.5, 0.2, 0.7), _rect(0.46, 0.8, 0.54, 1))),
    "boat": Silhouette(1.2, (
        _poly(0, 0.68, 1, 0.68, 0.8, 1, 0.2, 1), _poly(0.46, 0, 0.46, 0.62, 0.05, 0.62),
        _poly(0.52, 0.1, 0.92, 0.62, 0.52, 0.62), _rect(0.46, 0.3, 0.52, 0.7))),
    "bottle": Silhouette(0.4, (
        _rect(0, 0.4, 1, 1), _oval(0, 0.25, 1, 0.55), _rect(0.32, 0, 0.68, 0.4))),
    "bus": Silhouette(1.8, (
        _rect(0, 0, 1, 0.85), _rect(0.06, 0.12, 0.28, 0.42, hole=True), _rect(0.37, 0.12, 0.59, 0.42, hole=True),
        _rect(0.68, 0.12, 0.9, 0.42, hole=True), _oval(0.12, 0.7, 0.3, 1), _oval(0.7, 0.7, 0.88, 1))),
    "car": Silhouette(2.0, (
        _poly(0, 0.45, 0.2, 0.4, 0.34, 0, 0.7, 0, 0.84, 0.4, 1, 0.5, 1, 0.82, 0, 0.82),
        _poly(0.3, 0.4, 0.4, 0.12, 0.64, 0.12, 0.74, 0.4, hole=True), _oval(0.12, 0.6, 0.34, 1),
        _oval(0.66, 0.6, 0.88, 1))),
    "cat": Silhouette(0.9, (
        _oval(0, 0.2, 1, 1), _poly(0.05, 0, 0.42, 0.25, 0.04, 0.55), _poly(0.95, 0, 0.58, 0.25, 0.96, 0.55),
        _oval(0.24, 0.45, 0.4, 0.6, hole=True), _oval(0.6, 0.45, 0.76, 0.6, hole=True))),
    "chair": Silhouette(0.7, (
        _rect(0, 0, 0.2, 1), _rect(0, 0.5, 1, 0.66), _rect(0.8, 0.5, 1, 1))),
    "cow": Silhouette(1.5, (
        _oval(0, 0.22, 0.8, 0.8), _rect(0.12, 0.6, 0.24, 1), _rect(0.54, 0.6, 0.66, 1), _oval(0.7, 0.12, 1, 0.55),
        _poly(0.72, 0, 0.8, 0.2, 0.74, 0.25), _poly(0.98, 0, 0.9, 0.2, 0.96, 0.25))),
    "diningtable": Silhouette(1.7, (
        _rect(0, 0, 1, 0.24), _rect(0.08, 0.2, 0.2, 1), _rect(0.8, 0.2, 0.92, 1))),
    "dog": Silhouette(1.3, (
        _rect(0.15, 0.4, 0.75, 0.7), _rect(0.15, 0.6, 0.28, 1), _rect(0.62, 0.6, 0.75, 1),
        _rect(0.62, 0.12, 1, 0.46), _poly(0.62, 0.12, 0.72, 0, 0.78, 0.14),
        _poly(0, 0.05, 0.1, 0.02, 0.28, 0.5, 0.15, 0.6))),
    "horse": Silhouette(1.1, (
        _oval(0.05, 0.35, 0.78, 0.7), _poly(0.55, 0.5, 0.7, 0.03, 0.88, 0.08, 0.76, 0.6),
        _poly(0.7, 0, 1, 0.22, 0.96, 0.34, 0.72, 0.22), _rect(0.12, 0.55, 0.2, 1), _rect(0.28, 0.6, 0.36, 1),
        _rect(0.52, 0.6, 0.6, 1), _rect(0.66, 0.55, 0.74, 1), _poly(0, 0.4, 0.1, 0.42, 0.05, 0.8, 0, 0.8))),
    "motorbike": Silhouette(1.6, (
        _oval(0, 0.45, 0.38, 1), _oval(0.62, 0.45, 1, 1),
        _poly(0.1, 0.62, 0.22, 0.25, 0.72, 0.25, 0.9, 0.62, 0.5, 0.8), _poly(0.6, 0, 0.76, 0, 0.8, 0.4, 0.7, 0.4))),
    "person": Silhouette(0.45, (
        _oval(0.25, 0, 0.75, 0.24), _poly(0, 0.27, 1, 0.27, 0.8, 0.66, 0.2, 0.66), _rect(0.22, 0.6, 0.46, 1),
        _rect(0.54, 0.6, 0.78, 1))),
    "pottedplant": Silhouette(0.7, (
        _poly(0.15, 0.62, 0.85, 0.62, 0.7, 1, 0.3, 1), _oval(0, 0.12, 0.55, 0.52), _oval(0.45, 0.12, 1, 0.52),
        _oval(0.3, 0, 0.7, 0.66))),
    "sheep": Silhouette(1.4, (
        _oval(0, 0.2, 0.4, 0.72), _oval(0.22, 0, 0.62, 0.6), _oval(0.48, 0.15, 0.85, 0.7),
        _oval(0.15, 0.35, 0.75, 0.82), _oval(0.74, 0.28, 1, 0.66), _rect(0.2, 0.7, 0.28, 1),
        _rect(0.56, 0.7, 0.64, 1))),
    "sofa": Silhouette(1.9, (
        _rect(0.1, 0, 0.9, 0.6), _rect(0, 0.35, 0.16, 1), _rect(0.84, 0.35, 1, 1), _rect(0.1, 0.55, 0.9, 0.9))),
    "train": Silhouette(2.6, (
        _rect(0, 0.05, 0.76, 0.85), _poly(0.76, 0.05, 1, 0.6, 1, 0.85, 0.76, 0.85), _rect(0.3, 0, 0.5, 0.1),
        _rect(0.06, 0.2, 0.2, 0.45, hole=True), _rect(0.3, 0.2, 0.44, 0.45, hole=True),
        _rect(0.54, 0.2, 0.68, 0.45, hole=True), _oval(0.05, 0.7, 0.17, 1), _oval(0.3, 0.7, 0.42, 1),
        _oval(0.55, 0.7, 0.67, 1), _oval(0.8, 0.7, 0.92, 1))),
    "tvmonitor": Silhouette(1.2, (
        _rect(0, 0, 1, 0.8), _rect(0.1, 0.11, 0.9, 0.68, hole=True), _rect(0.42, 0.78, 0.58, 0.92),
        _rect(0.22, 0.9, 0.78, 1))),
}  # fmt: skip


def draw_mask(name: str, size: tuple[int, int]) -> NDArray[np.bool_]:
    """Return the silhouette [H, W] of a class drawn to fill the size (H, W), with hard edges."""
    height, width = size
    mask = Image.new("L", (width, height))
    draw = ImageDraw.Draw(mask)
    for part in SILHOUETTES[name].parts:
        xs = [x * (width - 1) for x in part.points[0::2]]
        ys = [y * (height - 1) for y in part.points[1::2]]
        if part.kind == "ellipse":
            draw.ellipse((xs[0], ys[0], xs[1], ys[1]), fill=0 if part.hole else 255)
        else:
            draw.polygon(list(zip(xs, ys, strict=True)), fill=0 if part.hole else 255)
    return np.array(mask) > 0


def hue_of(name: str) -> float:
    """Return the hue of a class, in [0, 1): twenty hues, evenly apart."""
    index = VOC_CLASSES.index(name)
    return (index * _HUE_STEP % len(VOC_CLASSES)) / len(VOC_CLASSES)


def paint(name: str, size: tuple[int, int], hue_shift: float, saturation: float, value: float) -> NDArray[np.uint8]:
    """Return the class's paint [H, W, 3]: its hue, in its pattern of light and dark, lit from above.

    hue_shift: added to the class's hue.  saturation, value: in [0, 1].
    """
    height, width = size
    red_green_blue = np.array(colorsys.hsv_to_rgb((hue_of(name) + hue_shift) % 1, saturation, value))
    period = max(3, round(min(height, width) / 7))
    rows, columns = np.arange(height)[:, None] // period % 2, np.arange(width)[None, :] // period % 2
    dark = {
        "plain": np.zeros((1, 1), dtype=np.int64), "rows": rows, "columns": columns, "checks": rows ^ columns,
    }[_PATTERNS[VOC_CLASSES.index(name) % len(_PATTERNS)]]  # fmt: skip
    lit = np.linspace(1.0, 0.85, height)[:, None] * np.ones((1, width))
    shade: NDArray[np.float64] = np.where(dark, _DARK, 1.0) * lit
    painted: NDArray[np.float64] = shade[:, :, None] * (red_green_blue * 255)
    return painted.astype(np.uint8)

"""Renders one synthetic scene: a textured background with clutter, and objects that overlap and get cut.

A scene depends on (seed, index) alone, so the first ten images of a large devkit are the ten of a small one.
"""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from .silhouettes import SILHOUETTES, draw_mask, paint

# (H, W): what VOC's own images look like.
NATIVE_SIZES: tuple[tuple[int, int], ...] = (
    (375, 500),
    (500, 375),
    (500, 333),
    (333, 500),
    (320, 480),
    (400, 400),
)
MAX_OBJECTS = 6
# Fractions of an object's pixels inside the image that later objects leave visible.
HIDDEN_BELOW, DIFFICULT_BELOW, OCCLUDED_BELOW = 0.1, 0.4, 0.95
# No object leaves the image with more than this share of its width or height.
_MAX_OVERHANG = 0.3
_STACKED_SHARE = 0.4
BACKGROUND = -1


@dataclass(frozen=True)
class SceneObject:
    """One annotated object of a scene.

    box_xyxy: 0-based half-open pixels, tight around what was drawn inside the image, covered up or not.
    visible: share of those pixels that no later object covers.  truncated: the border cuts the object.
    number: the object's value in `Scene.owners`.
    """

    name: str
    box_xyxy: tuple[int, int, int, int]
    visible: float
    truncated: bool
    number: int

    @property
    def difficult(self) -> bool:
        """Whether so little is visible that a detector need not find it."""
        return self.visible < DIFFICULT_BELOW

    @property
    def occluded(self) -> bool:
        """Whether another object covers a part of this one."""
        return self.visible < OCCLUDED_BELOW


@dataclass(frozen=True, eq=False)
class Scene:
    """One rendered image and its ground truth.

    image: [H, W, 3] uint8.  owners: [H, W] int16, the number of the object a pixel shows, or BACKGROUND.
    """

    image: NDArray[np.uint8]
    owners: NDArray[np.int16]
    objects: tuple[SceneObject, ...]


@dataclass(frozen=True)
class _Placed:
    """One drawn object: `corner` is where the mask's first row and column lie, maybe outside the image."""

    name: str
    corner: tuple[int, int]
    mask: NDArray[np.bool_]


def render_scene(seed: int, index: int, classes: Sequence[str], empty: bool = False) -> Scene:
    """Return the scene number `index` of a seed, with 1 to 6 objects of the classes, or none.

    The object drawn last, which nothing covers, is of class `index` modulo their number: every class is seen.
    """
    rng = np.random.default_rng((seed, index))
    size = NATIVE_SIZES[int(rng.integers(len(NATIVE_SIZES)))]
    image = _background(rng, size)
    owners = np.full(size, BACKGROUND, dtype=np.int16)
    placed: list[_Placed] = []
    count = 0 if empty else int(rng.integers(1, MAX_OBJECTS + 1))
    for number in range(count):
        is_last = number == count - 1
        name = classes[index % len(classes)] if is_last else classes[int(rng.integers(len(classes)))]
        placed.append(_draw_object(rng, name, number, image, owners, placed))
    objects = (_annotate(thing, number, owners) for number, thing in enumerate(placed))
    return Scene(image, owners, tuple(found for found in objects if found.visible >= HIDDEN_BELOW))


def _muted(rng: np.random.Generator, low: float = 0.2, high: float = 0.9) -> NDArray[np.float32]:
    """Return a greyish colour [3] in 0..255: strong colours are left to objects."""
    red_green_blue = colorsys.hsv_to_rgb(rng.random(), rng.uniform(0, 0.3), rng.uniform(low, high))
    return np.array(red_green_blue, dtype=np.float32) * 255


def _background(rng: np.random.Generator, size: tuple[int, int]) -> NDArray[np.uint8]:
    """Return a slope between two muted colours, with soft blotches, clutter and grain."""
    height, width = size
    angle = rng.uniform(0, 2 * np.pi)
    across = np.cos(angle) * np.linspace(-0.5, 0.5, width)[None, :]
    slope = 0.5 + across + np.sin(angle) * np.linspace(-0.5, 0.5, height)[:, None]
    blotches = Image.fromarray(rng.integers(0, 256, (9, 12), dtype=np.uint8))
    soft = np.asarray(blotches.resize((width, height), Image.Resampling.BICUBIC), dtype=np.float32)
    first, second = _muted(rng), _muted(rng)
    canvas = np.clip(slope, 0, 1).astype(np.float32)[:, :, None] * (second - first) + first
    canvas += (soft * (40 / 255) - 20)[:, :, None]
    picture = Image.fromarray(np.clip(canvas, 0, 255).astype(np.uint8))
    _draw_clutter(rng, picture)
    grain = rng.integers(-7, 8, (height, width, 1), dtype=np.int16)
    return np.clip(np.asarray(picture) + grain, 0, 255).astype(np.uint8)


def _draw_clutter(rng: np.random.Generator, picture: Image.Image) -> None:
    """Draw greyish lines, boxes, ovals and triangles that are no objects."""
    draw = ImageDraw.Draw(picture)
    for _ in range(rng.integers(6, 15)):
        colour = tuple(int(channel) for channel in _muted(rng, 0.1, 1.0))
        x, y = rng.uniform(0, picture.width), rng.uniform(0, picture.height)
        w, h = rng.uniform(8, 110, 2)
        match rng.integers(4):
            case 0:
                draw.line(
                    (x - w, y - h, x + w, y + h * rng.uniform(-1, 1)),
                    fill=colour,
                    width=int(rng.integers(1, 7)),
                )
            case 1:
                draw.rectangle((x, y, x + w, y + h), fill=colour)
            case 2:
                draw.ellipse((x, y, x + w, y + h), fill=colour)
            case _:
                draw.polygon(((x, y), (x + w, y + h / 2), (x + w * rng.uniform(-1, 1), y + h)), fill=colour)


def _draw_object(
    rng: np.random.Generator,
    name: str,
    number: int,
    image: NDArray[np.uint8],
    owners: NDArray[np.int16],
    earlier: Sequence[_Placed],
) -> _Placed:
    """Draw one object over image and owners, in place; it may overhang the border."""
    size = _object_size(rng, name, owners.shape)
    corner = _corner(rng, size, owners.shape, earlier)
    mask = draw_mask(name, size)
    if rng.integers(2):
        mask = mask[:, ::-1]
    colours = paint(name, size, rng.uniform(-0.012, 0.012), rng.uniform(0.65, 0.95), rng.uniform(0.7, 1.0))
    inside, own = _overlap(corner, mask.shape, owners.shape)
    drawn = mask[own]
    image[inside][drawn] = colours[own][drawn]
    owners[inside][drawn] = number
    return _Placed(name, corner, mask)


def _object_size(rng: np.random.Generator, name: str, image_size: tuple[int, ...]) -> tuple[int, int]:
    """Return (H, W) of an object: its area even on a logarithmic scale, its aspect near the class's own."""
    side = min(image_size) * np.exp(rng.uniform(np.log(0.14), np.log(0.6)))
    aspect = SILHOUETTES[name].aspect * np.exp(rng.uniform(-0.2, 0.2))
    height, width = side / np.sqrt(aspect), side * np.sqrt(aspect)
    fit = min(1.0, 0.85 * image_size[0] / height, 0.85 * image_size[1] / width)
    return round(height * fit), round(width * fit)


def _corner(
    rng: np.random.Generator, size: tuple[int, int], image_size: tuple[int, ...], earlier: Sequence[_Placed]
) -> tuple[int, int]:
    """Return the row and column where an object begins: anywhere, or over a part of an earlier one."""
    stacked = bool(earlier) and rng.random() < _STACKED_SHARE
    corner = []
    for axis in range(2):
        low, high = -_MAX_OVERHANG * size[axis], image_size[axis] - (1 - _MAX_OVERHANG) * size[axis]
        start = rng.uniform(low, high)
        if stacked:
            other = earlier[-1]
            middle = other.corner[axis] + other.mask.shape[axis] / 2 - size[axis] / 2
            start = np.clip(middle + rng.uniform(-0.5, 0.5) * other.mask.shape[axis], low, high)
        corner.append(round(start))
    return corner[0], corner[1]


def _overlap(
    corner: tuple[int, int], size: tuple[int, ...], image_size: tuple[int, ...]
) -> tuple[tuple[slice, slice], tuple[slice, slice]]:
    """Return the part of the image that an object covers, and the same part in the object's own pixels."""
    rows, columns = ((max(0, corner[axis]), min(image_size[axis], corner[axis] + size[axis])) for axis in range(2))
    inside = slice(*rows), slice(*columns)
    own = (
        slice(rows[0] - corner[0], rows[1] - corner[0]),
        slice(columns[0] - corner[1], columns[1] - corner[1]),
    )
    return inside, own


def _annotate(thing: _Placed, number: int, owners: NDArray[np.int16]) -> SceneObject:
    inside, own = _overlap(thing.corner, thing.mask.shape, owners.shape)
    drawn = thing.mask[own]
    rows, columns = np.flatnonzero(drawn.any(axis=1)), np.flatnonzero(drawn.any(axis=0))
    top, left = inside[0].start, inside[1].start
    return SceneObject(
        name=thing.name,
        box_xyxy=(
            left + int(columns[0]),
            top + int(rows[0]),
            left + int(columns[-1]) + 1,
            top + int(rows[-1]) + 1,
        ),
        visible=float(np.count_nonzero(owners[inside][drawn] == number) / np.count_nonzero(drawn)),
        truncated=bool(np.count_nonzero(drawn) < np.count_nonzero(thing.mask)),
        number=number,
    )

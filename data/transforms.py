"""Photometric jitter of the student's image. Geometry is never touched here: views do that."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageEnhance

# Applied in this order, always: the order changes the result.
_ENHANCERS = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)


def jitter(image: NDArray[np.uint8], rng: np.random.Generator, strength: float) -> NDArray[np.uint8]:
    """Return the image [H, W, 3] uint8 with its brightness, then contrast, then saturation scaled.

    Each factor is uniform in [1 − strength, 1 + strength]; strength: in [0, 1), 0 returns the image itself. Three
    values are drawn from `rng` whatever the strength, so that it moves no other draw.

    Raises ValueError for a strength out of range.
    """
    if not 0 <= strength < 1:
        raise ValueError(f"expected a jitter strength in [0, 1), found {strength}")
    factors = rng.uniform(1 - strength, 1 + strength, len(_ENHANCERS))
    if strength == 0:
        return image
    picture = Image.fromarray(image)
    for enhancer, factor in zip(_ENHANCERS, factors, strict=True):
        picture = enhancer(picture).enhance(float(factor))
    return np.array(picture, dtype=np.uint8)

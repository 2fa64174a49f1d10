"""Decodes one image, shows it as a view, and squashes it by one antialiased resize.

`DECODER` names what is done here and is part of a store's identity: other bytes would come from other code.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from io import BytesIO
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from .errors import ImageError
from .geometry import FRAME_SIZE, View
from .records import ImageRecord

DECODER = "pillow-rgb"
Resample = Literal["bilinear", "bicubic"]
# What VOC and its conversions hold; Pillow's other readers are never let near untrusted bytes.
_FORMATS = ("JPEG", "PNG")
_RESTORE = "restore this file from the devkit"
_FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


def read_image_bytes(path: Path) -> bytes:
    """Return the file's bytes.

    Raises ImageError where it is missing or cannot be read.
    """
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise ImageError(
            f"{path}: the image is missing", hint="`python cli.py check-voc` lists everything a set lacks"
        ) from None
    except OSError as error:
        raise ImageError(f"{path}: cannot be read ({error.strerror})") from error


def image_digest(data: bytes) -> str:
    """Return the SHA-256 of an image file's bytes, in hex."""
    return hashlib.sha256(data).hexdigest()


def decode_image(record: ImageRecord, data: bytes | None = None) -> Image.Image:
    """Return the record's image, RGB, at its original size.

    data: the file's bytes where they were read already.

    Raises ImageError for a missing or truncated file, or one whose size disagrees with the annotation.
    """
    return decode_file(record.image_path, data, record.image_size)


def decode_file(path: Path, data: bytes | None = None, annotated_size: tuple[int, int] | None = None) -> Image.Image:
    """Return an image file, RGB, at its original size.

    data: the file's bytes where they were read already.  annotated_size: the (H, W) it must have, where that is known.

    Raises ImageError for a missing or truncated file, one that is neither JPEG nor PNG, or one of another size.
    """
    data = read_image_bytes(path) if data is None else data
    try:
        with Image.open(BytesIO(data), formats=_FORMATS) as opened:
            # Before decoding, so that a forged header cannot make us allocate more than the annotation allows.
            _check_size(opened.size, annotated_size, path)
            return opened.convert("RGB")
    except UnidentifiedImageError:
        raise ImageError(f"{path}: neither a JPEG nor a PNG image", hint=_RESTORE) from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ImageError(f"{path}: damaged image ({error})", hint=_RESTORE) from error


def _check_size(found: tuple[int, int], annotated_size: tuple[int, int] | None, path: Path) -> None:
    if annotated_size is None or found == annotated_size[::-1]:
        return
    height, width = annotated_size
    raise ImageError(
        f"{path}: expected {width}×{height} as its annotation says, found {found[0]}×{found[1]}",
        hint="image and annotation belong to different files: restore both from the devkit",
    )


def show_view(image: Image.Image, view: View) -> Image.Image:
    """Return the original image as the view shows it, before any resize."""
    return image if view == "original" else image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)


def squash(
    image: Image.Image, size: tuple[int, int] = FRAME_SIZE, resample: Resample = "bilinear"
) -> NDArray[np.uint8]:
    """Return the whole image [H, W, 3] uint8 at size (H, W), by one antialiased resize; aspect is lost."""
    resized = image.resize((size[1], size[0]), _FILTERS[resample])
    return np.array(resized, dtype=np.uint8)


def squash_views(
    image: Image.Image, views: Iterable[View], size: tuple[int, int], resample: Resample
) -> dict[View, NDArray[np.uint8]]:
    """Return what each view of the original image is after `squash`, from one resize.

    A symmetric filter resizes a mirrored image to the mirrored resize, to the bit (`tests/data/test_images.py`).
    """
    squashed = squash(image, size, resample)
    return {view: squashed if view == "original" else squashed[:, ::-1] for view in views}

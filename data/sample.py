"""One training or evaluation sample: a view of an image squashed to the frame, with its ground truth. No torch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from .geometry import View, boxes_to_frame
from .images import decode_image, show_view, squash
from .records import ImageRecord


@dataclass(frozen=True, eq=False)
class Sample:
    """One view of one image, in the frame.

    image: [480, 480, 3] uint8 RGB.  boxes_xyxy: [n, 4] float32, frame px.  labels: [n] int64 in 1..20.
    difficult: [n] bool.  image_size: (H, W) of the original image, to take boxes back to it.
    """

    id: str
    view: View
    image: NDArray[np.uint8]
    boxes_xyxy: NDArray[np.float32]
    labels: NDArray[np.int64]
    difficult: NDArray[np.bool_]
    image_size: tuple[int, int]


def load_sample(record: ImageRecord, view: View = "original", data: bytes | None = None) -> Sample:
    """Return the record's image as the view shows it, squashed to the frame by one resize, with its boxes.

    data: the image file's bytes where they were read already.

    Raises ImageError for an image that cannot be decoded or has another size than its annotation says.
    """
    return frame_sample(record, view, show_view(decode_image(record, data), view))


def frame_sample(record: ImageRecord, view: View, shown: Image.Image) -> Sample:
    """Return the sample of an image that was decoded before; shown: as the view shows it, at its original size."""
    return squashed_sample(record, view, squash(shown))


def squashed_sample(record: ImageRecord, view: View, image: NDArray[np.uint8]) -> Sample:
    """Return the sample of an image [480, 480, 3] that was squashed before, as the view shows it."""
    return Sample(
        id=record.id,
        view=view,
        image=image,
        boxes_xyxy=boxes_to_frame(record.target.boxes_xyxy_orig, record.image_size, view),
        labels=record.target.labels,
        difficult=record.target.difficult,
        image_size=record.image_size,
    )

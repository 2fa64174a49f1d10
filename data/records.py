"""What is known of one VOC image before it is decoded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

# The devkit's own order; labels are 1 + the index here, 0 is background.
VOC_CLASSES: tuple[str, ...] = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train",
    "tvmonitor",
)  # fmt: skip
NUM_CLASSES = len(VOC_CLASSES) + 1
LABEL_OF_CLASS: dict[str, int] = {name: index + 1 for index, name in enumerate(VOC_CLASSES)}


@dataclass(frozen=True, eq=False)
class Target:
    """Ground truth of one image, in pixels of the original image.

    boxes_xyxy_orig: [n, 4] float32, 0-based half-open (x1 = xmin − 1, x2 = xmax), inside the image.
    labels: [n] int64 in 1..20.  difficult: [n] bool.  n may be 0.
    """

    boxes_xyxy_orig: NDArray[np.float32]
    labels: NDArray[np.int64]
    difficult: NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True, eq=False)
class ImageRecord:
    """One image of a devkit: where its file is, its size by its annotation, and its ground truth.

    id: unique over joined devkits, `VOC2007/000005`.  image_size: (H, W) of the original image.
    """

    id: str
    image_path: Path
    annotation_path: Path
    image_size: tuple[int, int]
    target: Target

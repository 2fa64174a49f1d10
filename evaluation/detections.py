"""What a detector found in a set of images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from data.errors import DetectionsError
from data.records import NUM_CLASSES


class ImageDetections(NamedTuple):
    """Detections of one image: boxes_xyxy_orig [n, 4] px of the original image, labels [n] 1..20, scores [n]."""

    boxes_xyxy_orig: NDArray[np.float32]
    labels: NDArray[np.int64]
    scores: NDArray[np.floating]


@dataclass(frozen=True, eq=False)
class Detections:
    """Detections of a set of images, flat, in any order: figures do not depend on it (see `ranking`).

    image_ids: every evaluated image, also those where nothing was found, as `VOC2007/000005`, each once.
    image_index: [D] int64, the detection's place in image_ids.  labels: [D] int64 in 1..20.
    scores: [D] float32, or float64 as files give them; finite, 0 or more.  boxes_xyxy_orig: [D, 4] float32, finite,
    0-based half-open px of the original image.

    Raises ValueError for arrays of other shapes or dtypes, DetectionsError for values that cannot be scored.
    """

    image_ids: tuple[str, ...]
    image_index: NDArray[np.int64]
    labels: NDArray[np.int64]
    scores: NDArray[np.floating]
    boxes_xyxy_orig: NDArray[np.float32]

    def __post_init__(self) -> None:
        count = len(self.scores)
        score_dtype = "float64" if self.scores.dtype == np.float64 else "float32"
        layout = {"image_index": ((count,), "int64"), "labels": ((count,), "int64"), "scores": ((count,), score_dtype)}
        for name, (shape, dtype) in {**layout, "boxes_xyxy_orig": ((count, 4), "float32")}.items():
            found = getattr(self, name)
            if found.shape != shape or found.dtype != dtype:
                raise ValueError(f"{name}: expected {dtype} {shape}, found {found.dtype} {found.shape}")
        if len(set(self.image_ids)) != len(self.image_ids):
            raise ValueError("image_ids: expected each image once, found repeated ids")
        if count and not 0 <= self.image_index.min() <= self.image_index.max() < len(self.image_ids):
            raise ValueError(f"image_index: expected 0..{len(self.image_ids) - 1}, found values outside")
        boxes = self.boxes_xyxy_orig
        self._refuse(~np.isfinite(self.scores), "a finite score", self.scores)
        self._refuse(self.scores < 0, "a score of 0 or more", self.scores)
        self._refuse((self.labels < 1) | (self.labels >= NUM_CLASSES), "a label in 1..20", self.labels)
        self._refuse(np.any(~np.isfinite(boxes), axis=1), "a finite box", boxes)
        self._refuse(np.any(boxes[:, 2:] < boxes[:, :2], axis=1), "a box with x1 ≤ x2 and y1 ≤ y2", boxes)

    def _refuse(self, wrong: NDArray[np.bool_], expected: str, values: NDArray[np.generic]) -> None:
        if wrong.any():
            row = int(np.flatnonzero(wrong)[0])
            image_id = self.image_ids[self.image_index[row]]
            raise DetectionsError(f"detection {row} ({image_id}): expected {expected}, found {values[row].tolist()}")

    def __len__(self) -> int:
        return len(self.scores)

    @classmethod
    def from_images(cls, image_ids: Sequence[str], per_image: Sequence[ImageDetections]) -> Detections:
        """Return the detections of many images joined, in the order given; per_image[i] belongs to image_ids[i]."""
        if len(image_ids) != len(per_image):
            raise ValueError(f"expected detections of {len(image_ids)} images, found those of {len(per_image)}")
        counts = [len(found.scores) for found in per_image]
        return cls(
            image_ids=tuple(image_ids),
            image_index=np.repeat(np.arange(len(image_ids), dtype=np.int64), counts),
            labels=np.concatenate([np.zeros(0, np.int64), *(found.labels for found in per_image)]),
            scores=np.concatenate([np.zeros(0, np.float32), *(found.scores for found in per_image)]),
            boxes_xyxy_orig=np.concatenate(
                [np.zeros((0, 4), np.float32), *(found.boxes_xyxy_orig.reshape(-1, 4) for found in per_image)]
            ),
        )

    def of_image(self, image_id: str) -> ImageDetections:
        """Return one image's detections, in this object's order.

        Raises KeyError for an image that was not evaluated.
        """
        if image_id not in self.image_ids:
            raise KeyError(image_id)
        rows = np.flatnonzero(self.image_index == self.image_ids.index(image_id))
        return ImageDetections(self.boxes_xyxy_orig[rows], self.labels[rows], self.scores[rows])

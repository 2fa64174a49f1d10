"""The objects of a set of images joined, in the order in which detections number the images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from data.errors import DetectionsError
from data.records import ImageRecord, Target

from .detections import Detections


@dataclass(frozen=True, eq=False)
class GroundTruth:
    """Every object of the images, image by image.

    targets[i]: the objects of image i.  image_index: [G] int64, the object's image.  labels: [G] int64 in 1..20.
    difficult: [G] bool.  boxes_xyxy_orig: [G, 4] float32, as in `Target`.
    """

    targets: list[Target]
    image_index: NDArray[np.int64]
    labels: NDArray[np.int64]
    difficult: NDArray[np.bool_]
    boxes_xyxy_orig: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.labels)


def join_ground_truth(detections: Detections, records: Sequence[ImageRecord]) -> GroundTruth:
    """Return the records' objects, images in the order of detections.image_ids.

    Raises DetectionsError where the two do not cover the same images.
    """
    by_id = {record.id: record.target for record in records}
    differing = sorted(by_id.keys() ^ set(detections.image_ids))
    if differing:
        raise DetectionsError(
            f"expected detections of exactly the {len(by_id)} images to score, found those of"
            f" {len(detections.image_ids)}; {differing[0]} is in only one of the two",
            hint="name the image sets the detector was run on with --voc-set",
        )
    targets = [by_id[image_id] for image_id in detections.image_ids]
    return GroundTruth(
        targets=targets,
        image_index=np.repeat(np.arange(len(targets), dtype=np.int64), [len(target) for target in targets]),
        labels=np.concatenate([np.zeros(0, np.int64), *(target.labels for target in targets)]),
        difficult=np.concatenate([np.zeros(0, np.bool_), *(target.difficult for target in targets)]),
        boxes_xyxy_orig=np.concatenate([np.zeros((0, 4), np.float32), *(target.boxes_xyxy_orig for target in targets)]),
    )

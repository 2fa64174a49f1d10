"""Which objects of an image a detection overlaps, of whatever class."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .detections import Detections
from .ground_truth import GroundTruth
from .pairing import iou_of_pairs


@dataclass(frozen=True, eq=False)
class Overlaps:
    """The objects that n detections overlap most, of their own class and of all others.

    own, other: [n] int64, rows of the ground truth, −1 for none; the earliest wins a tie.
    own_iou, other_iou: [n] float64, 0 for none.
    """

    own: NDArray[np.int64]
    own_iou: NDArray[np.float64]
    other: NDArray[np.int64]
    other_iou: NDArray[np.float64]


def most_overlapped(detections: Detections, truth: GroundTruth, rows: NDArray[np.int64]) -> Overlaps:
    """Return what the detections of the given rows overlap most in their images."""
    found, iou = np.full((2, len(rows)), -1, dtype=np.int64), np.zeros((2, len(rows)))
    for left, objects, overlap in candidate_pairs(detections, truth, rows):
        side = (truth.labels[objects] != detections.labels[rows[left]]).astype(np.int64)
        better = overlap > iou[side, left]
        found[side[better], left[better]] = objects[better]
        iou[side[better], left[better]] = overlap[better]
    return Overlaps(own=found[0], own_iou=iou[0], other=found[1], other_iou=iou[1])


def candidate_pairs(
    detections: Detections, truth: GroundTruth, rows: NDArray[np.int64]
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]]:
    """Yield places in rows, objects of their images and the IoU of each pair: first objects first, each pair once."""
    counts = np.array([len(target) for target in truth.targets], dtype=np.int64)
    first = np.cumsum(counts) - counts
    image = detections.image_index[rows]
    boxes = truth.boxes_xyxy_orig.astype(np.float64)
    left, place = np.flatnonzero(counts[image] > 0), 0
    while len(left):
        objects = first[image[left]] + place
        yield left, objects, iou_of_pairs(detections.boxes_xyxy_orig[rows[left]].astype(np.float64), boxes[objects])
        place += 1
        left = left[counts[image[left]] > place]

"""Every detection beside the objects of its class and image: what both matching rules start from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from data.records import NUM_CLASSES, Target

from .detections import Detections
from .ranking import ranking


@dataclass(frozen=True, eq=False)
class Pairing:
    """D ranked detections, G objects, and the P pairs of both that overlap enough to matter.

    order: [D] int64, rows of the `Detections` as `ranking` orders them; all below goes by this order.
    labels: [D] int64.  group: [D] int64, one number for each class of each image.  areas: [D] float64, px².
    best_object: [D] int64, the object of its class and image that each overlaps most (the earliest of equals), −1 where
    it overlaps none.  best_iou: [D] float64.
    pair_detections, pair_objects: [P] int64.  pair_iou: [P] float64, at least the `least_iou` that was asked for.
    object_labels: [G] int64.  object_areas: [G] float64, px².  difficult: [G] bool.
    """

    order: NDArray[np.int64]
    labels: NDArray[np.int64]
    group: NDArray[np.int64]
    areas: NDArray[np.float64]
    best_object: NDArray[np.int64]
    best_iou: NDArray[np.float64]
    pair_detections: NDArray[np.int64]
    pair_objects: NDArray[np.int64]
    pair_iou: NDArray[np.float64]
    object_labels: NDArray[np.int64]
    object_areas: NDArray[np.float64]
    difficult: NDArray[np.bool_]


def pair(detections: Detections, targets: Sequence[Target], least_iou: float) -> Pairing:
    """Return the detections ranked and paired; targets[i]: the objects of the image detections.image_ids[i]."""
    if len(targets) != len(detections.image_ids):
        raise ValueError(f"expected targets of {len(detections.image_ids)} images, found {len(targets)}")
    object_labels = np.concatenate([np.zeros(0, np.int64), *(target.labels for target in targets)])
    object_boxes = np.concatenate([np.zeros((0, 4)), *(target.boxes_xyxy_orig for target in targets)])
    image = np.repeat(np.arange(len(targets)), [len(target) for target in targets])

    order = ranking(detections)
    group = detections.image_index[order] * NUM_CLASSES + detections.labels[order]
    boxes = detections.boxes_xyxy_orig[order].astype(np.float64)
    # Objects sorted by (image, class): those a detection competes for are `count` rows from `first` on.
    object_group = image * NUM_CLASSES + object_labels
    rows = np.argsort(object_group, kind="stable")
    sizes = np.bincount(object_group, minlength=len(targets) * NUM_CLASSES)
    first, count = (np.cumsum(sizes) - sizes)[group], sizes[group]

    best = np.full(len(detections), -1, dtype=np.int64)
    best_iou = np.zeros(len(detections))
    pairs = [(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0))]
    left, place = np.flatnonzero(count), 0
    while len(left):  # once for each object of the most crowded class of an image
        candidates = rows[first[left] + place]
        iou = iou_of_pairs(boxes[left], object_boxes[candidates])
        better = iou > best_iou[left]
        best[left[better]], best_iou[left[better]] = candidates[better], iou[better]
        near = (iou >= least_iou) & (iou > 0)
        pairs.append((left[near], candidates[near], iou[near]))
        place += 1
        left = left[count[left] > place]
    pair_detections, pair_objects, pair_iou = (np.concatenate(column) for column in zip(*pairs, strict=True))
    return Pairing(
        order=order,
        labels=detections.labels[order],
        group=group,
        areas=_areas(boxes),
        best_object=best,
        best_iou=best_iou,
        pair_detections=pair_detections,
        pair_objects=pair_objects,
        pair_iou=pair_iou,
        object_labels=object_labels,
        object_areas=_areas(object_boxes),
        difficult=np.concatenate([np.zeros(0, np.bool_), *(target.difficult for target in targets)]),
    )


def _areas(boxes: NDArray[np.float64]) -> NDArray[np.float64]:
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])


def iou_of_pairs(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the IoU [n] of boxes a[i] and b[i], each [n, 4] half-open; 0 for two empty boxes."""
    width = np.minimum(a[:, 2], b[:, 2]) - np.maximum(a[:, 0], b[:, 0])
    height = np.minimum(a[:, 3], b[:, 3]) - np.maximum(a[:, 1], b[:, 1])
    intersection = width.clip(min=0) * height.clip(min=0)
    union = _areas(a) + _areas(b) - intersection
    iou = np.zeros(len(a))
    np.divide(intersection, union, out=iou, where=union > 0)
    return iou

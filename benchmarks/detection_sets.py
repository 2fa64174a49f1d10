"""Detections to measure evaluators with: ground truth jittered, given other classes, and noise, 100 an image."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from data.records import NUM_CLASSES, ImageRecord
from evaluation.detections import Detections

PER_IMAGE = 100
# Of those near an object, how many are of its class; of all, how many are near one, where there are any.
RIGHT_CLASS = 0.8
NEAR = 0.5


def made_detections(records: Sequence[ImageRecord], seed: int = 0) -> Detections:
    """Return 100 detections of every image, inside it; scores are higher, the nearer a detection is to an object."""
    rng = np.random.default_rng(seed)
    boxes, labels, scores = zip(*(_of_image(record, rng) for record in records), strict=True)
    return Detections(
        image_ids=tuple(record.id for record in records),
        image_index=np.repeat(np.arange(len(records), dtype=np.int64), PER_IMAGE),
        labels=np.concatenate(labels),
        scores=np.concatenate(scores),
        boxes_xyxy_orig=np.concatenate(boxes),
    )


def _of_image(
    record: ImageRecord, rng: np.random.Generator
) -> tuple[NDArray[np.float32], NDArray[np.int64], NDArray[np.float32]]:
    height, width = record.image_size
    corners = rng.random((PER_IMAGE, 2, 2)) * (width, height)
    boxes = np.concatenate([corners.min(axis=1), corners.max(axis=1)], axis=1)
    labels = rng.integers(1, NUM_CLASSES, PER_IMAGE)
    scores = rng.beta(1, 12, PER_IMAGE)
    target = record.target
    if len(target):
        near = np.flatnonzero(rng.random(PER_IMAGE) < NEAR)
        source = rng.integers(0, len(target), len(near))
        objects = target.boxes_xyxy_orig[source].astype(np.float64)
        sides = np.tile(objects[:, 2:] - objects[:, :2], 2)
        spread = rng.gamma(1.5, 0.06, len(near))
        moved = objects + rng.normal(0, 1, objects.shape) * sides * spread[:, None]
        boxes[near] = np.concatenate(
            [np.minimum(moved[:, :2], moved[:, 2:]), np.maximum(moved[:, :2], moved[:, 2:])], axis=1
        )
        right = rng.random(len(near)) < RIGHT_CLASS
        labels[near[right]] = target.labels[source[right]]
        scores[near] = np.exp(-2 * spread) * rng.beta(3, 2, len(near))
    boxes = boxes.clip(0, (width, height, width, height))
    return boxes.astype(np.float32), labels, scores.astype(np.float32)

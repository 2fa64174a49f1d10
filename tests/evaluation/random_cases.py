"""Small crowded cases of detections and objects, drawn from a seed."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from data.records import ImageRecord, Target
from evaluation.detections import Detections, ImageDetections


def random_case(seed, *, distinct_scores=False, num_classes=3, difficult=0.25):
    """A few crowded images on a small grid: ties of scores and overlaps, duplicates, images without either side."""
    rng = np.random.default_rng(seed)
    targets, results = [], []
    for _ in range(rng.integers(1, 7)):
        count = int(rng.integers(0, 6))
        targets.append(
            Target(
                boxes_xyxy_orig=random_boxes(rng, count),
                labels=rng.integers(1, num_classes + 1, count),
                difficult=rng.random(count) < difficult,
            )
        )
        near = random_boxes(rng, 0)
        labels = rng.integers(1, num_classes + 2, 0)
        if count:
            source = rng.integers(0, count, rng.integers(0, 12))
            shift = rng.integers(-2, 3, (len(source), 4)) if rng.random() < 0.7 else rng.normal(0, 1, (len(source), 4))
            near = ordered(targets[-1].boxes_xyxy_orig[source] + shift)
            labels = targets[-1].labels[source]
        far = random_boxes(rng, int(rng.integers(0, 6)))
        boxes = np.concatenate([near, far])
        labels = np.concatenate([labels, rng.integers(1, num_classes + 2, len(far))])
        results.append(ImageDetections(boxes, labels, (rng.integers(1, 6, len(boxes)) / 5).astype(np.float32)))
    detections = Detections.from_images([f"VOC2007/{k:06d}" for k in range(len(targets))], results)
    if distinct_scores:
        scores = (rng.permutation(len(detections)) + 1).astype(np.float32) / 1000
        detections = replaced(detections, scores=scores)
    return detections, targets


def ordered(boxes):
    boxes = np.asarray(boxes, dtype=np.float32)
    return np.concatenate([np.minimum(boxes[:, :2], boxes[:, 2:]), np.maximum(boxes[:, :2], boxes[:, 2:]) + 1], axis=1)


def random_boxes(rng, count):
    corners = rng.integers(0, 12, (count, 2))
    return np.concatenate([corners, corners + rng.integers(2, 12, (count, 2))], axis=1).astype(np.float32)


def replaced(detections, **changes):
    names = ("image_ids", "image_index", "labels", "scores", "boxes_xyxy_orig")
    return Detections(**{name: changes.get(name, getattr(detections, name)) for name in names})


def subset(detections, rows):
    arrays = ("image_index", "labels", "scores", "boxes_xyxy_orig")
    return replaced(detections, **{name: getattr(detections, name)[rows] for name in arrays})


def as_records(targets):
    return [
        ImageRecord(f"VOC2007/{k:06d}", Path("image.jpg"), Path("image.xml"), (100, 100), target)
        for k, target in enumerate(targets)
    ]

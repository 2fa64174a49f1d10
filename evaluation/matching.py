"""The devkit's rule for which detection found which object.

Within a class, detections go by falling score. Each looks at the one object of its class and image that it overlaps
most. Where that overlap reaches the threshold, the detection is ignored if the object is difficult, a true positive if
the object is still free, and a false positive if a higher-scored detection has taken it; below the threshold it is a
false positive. Since a taken object never passes a detection on to the next best (as COCO's rule does), the object a
detection looks at is independent of all others, and everything here is computed for all images and classes at once.

The devkit counts inclusive pixels (width = xmax − xmin + 1); that is x2 − x1 of the half-open boxes used here.

Source: VOCevaldet.m of the VOC2007 development kit; Everingham et al., The Pascal VOC Challenge, IJCV 2010,
section 4.2.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from data.records import LABEL_OF_CLASS, NUM_CLASSES, Target

from .detections import Detections

# Divided, not added up: 55 / 100 is the very double that an overlap of 11 / 20 pixels gives.
IOU_THRESHOLDS: tuple[float, ...] = tuple(percent / 100 for percent in range(50, 100, 5))


@dataclass(frozen=True, eq=False)
class ClassMatches:
    """What became of one class's n detections at each of T IoU thresholds.

    num_positives: objects that are not difficult.  detections: [n] int64, rows of the `Detections`, by falling score.
    objects: [n] int64, the object each looked at, numbered over all targets joined; −1 where it overlaps none.
    true_positive, ignored: [T, n] bool; the rest are false positives.
    """

    num_positives: int
    detections: NDArray[np.int64]
    objects: NDArray[np.int64]
    true_positive: NDArray[np.bool_]
    ignored: NDArray[np.bool_]

    @property
    def false_positive(self) -> NDArray[np.bool_]:
        """[T, n] bool."""
        return ~(self.true_positive | self.ignored)


def match_detections(
    detections: Detections, targets: Sequence[Target], thresholds: Sequence[float] = IOU_THRESHOLDS
) -> dict[str, ClassMatches]:
    """Return the matches of every VOC class, by name in the devkit's order.

    targets[i]: the objects of the image detections.image_ids[i].
    """
    if len(targets) != len(detections.image_ids):
        raise ValueError(f"expected targets of {len(detections.image_ids)} images, found {len(targets)}")
    labels = np.concatenate([np.zeros(0, np.int64), *(target.labels for target in targets)])
    difficult = np.concatenate([np.zeros(0, np.bool_), *(target.difficult for target in targets)])
    objects, iou = _most_overlapped(detections, targets, labels)

    by_score = np.argsort(-detections.scores, kind="stable")
    # A stable sort of bytes is a radix sort; of int64 it is ten times slower.
    order = by_score[np.argsort(detections.labels[by_score].astype(np.uint8), kind="stable")]
    objects = objects[order]
    reaches = (iou[order] >= np.array(thresholds)[:, None]) & (objects >= 0)
    on_difficult = np.append(difficult, False)[objects]  # the appended one is read by −1
    ignored = reaches & on_difficult
    true_positive = np.zeros_like(reaches)
    for row, claims in zip(true_positive, reaches & ~on_difficult, strict=True):
        claimants = np.flatnonzero(claims)
        _, first = np.unique(objects[claimants], return_index=True)
        row[claimants[first]] = True

    ends = np.cumsum(np.bincount(detections.labels, minlength=NUM_CLASSES))
    positives = np.bincount(labels[~difficult], minlength=NUM_CLASSES)
    matches = {}
    for name, label in LABEL_OF_CLASS.items():
        part = slice(ends[label - 1], ends[label])
        matches[name] = ClassMatches(
            num_positives=int(positives[label]),
            detections=order[part],
            objects=objects[part],
            true_positive=true_positive[:, part],
            ignored=ignored[:, part],
        )
    return matches


def _most_overlapped(
    detections: Detections, targets: Sequence[Target], labels: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Return for each detection the object of its class and image with the highest IoU, and that IoU.

    The earliest object wins a tie; −1 and 0 where none overlaps at all.
    """
    boxes = np.concatenate([np.zeros((0, 4), np.float32), *(target.boxes_xyxy_orig for target in targets)])
    boxes = boxes.astype(np.float64)
    image = np.repeat(np.arange(len(targets)), [len(target) for target in targets])
    # Objects sorted by (image, class): those a detection competes for are `count` rows from `first` on.
    group = image * NUM_CLASSES + labels
    rows = np.argsort(group, kind="stable")
    sizes = np.bincount(group, minlength=len(targets) * NUM_CLASSES)
    wanted = detections.image_index * NUM_CLASSES + detections.labels
    first, count = (np.cumsum(sizes) - sizes)[wanted], sizes[wanted]

    best = np.full(len(detections), -1, dtype=np.int64)
    best_iou = np.zeros(len(detections))
    left = np.flatnonzero(count)
    place = 0
    while len(left):
        candidates = rows[first[left] + place]
        iou = _iou(detections.boxes_xyxy_orig[left].astype(np.float64), boxes[candidates])
        better = iou > best_iou[left]
        best[left[better]] = candidates[better]
        best_iou[left[better]] = iou[better]
        place += 1
        left = left[count[left] > place]
    return best, best_iou


def _iou(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the IoU [n] of boxes a[i] and b[i], each [n, 4] half-open; 0 for two empty boxes."""
    sides = np.minimum(a[:, 2:], b[:, 2:]) - np.maximum(a[:, :2], b[:, :2])
    intersection = sides.clip(min=0).prod(axis=1)
    union = (a[:, 2:] - a[:, :2]).prod(axis=1) + (b[:, 2:] - b[:, :2]).prod(axis=1) - intersection
    iou = np.zeros(len(a))
    np.divide(intersection, union, out=iou, where=union > 0)
    return iou

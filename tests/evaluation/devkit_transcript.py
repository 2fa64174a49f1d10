"""The devkit's rule and its two averages, slowly.

In the devkit's own 1-based inclusive boxes, one detection, one threshold at a time, with its recall and precision
arrays; nothing of it is shared with the code under test.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from data.records import Target
from evaluation.detections import Detections

# xmin, ymin, xmax, ymax.
Box = tuple[float, float, float, float]
Row = tuple[int, float, Box]
Objects = dict[int, list[tuple[Box, bool]]]

PERCENTS = range(50, 100, 5)


def devkit_boxes(boxes_xyxy_orig: NDArray[np.float32]) -> list[Box]:
    return [(x1 + 1, y1 + 1, x2, y2) for x1, y1, x2, y2 in np.asarray(boxes_xyxy_orig, dtype=np.float64).tolist()]


def devkit_match(detections: Sequence[Row], objects: Objects, threshold: float) -> str:
    """detections: [(image, score, box)]; objects: {image: [(box, difficult)]}. Returns the letters."""
    taken, letters = set(), []
    for image, _, box in sorted(detections, key=lambda row: (-row[1], row[0], row[2])):
        highest, which = -math.inf, -1
        for number, (other, _) in enumerate(objects[image]):
            width = min(box[2], other[2]) - max(box[0], other[0]) + 1
            height = min(box[3], other[3]) - max(box[1], other[1]) + 1
            if width > 0 and height > 0:
                areas = [(b[2] - b[0] + 1) * (b[3] - b[1] + 1) for b in (box, other)]
                iou = width * height / (sum(areas) - width * height)
                if iou > highest:
                    highest, which = iou, number
        if highest < threshold:
            letters.append("F")
        elif objects[image][which][1]:
            letters.append("-")
        elif (image, which) in taken:
            letters.append("F")
        else:
            taken.add((image, which))
            letters.append("T")
    return "".join(letters)


def devkit_curve(letters: str, positives: int) -> tuple[list[float], list[float]]:
    recall, precision, true, false = [], [], 0, 0
    for letter in letters:
        true, false = true + (letter == "T"), false + (letter == "F")
        recall.append(true / positives)
        precision.append(true / (true + false) if true + false else 0.0)
    return recall, precision


def devkit_area(letters: str, positives: int) -> float:
    recall, precision = devkit_curve(letters, positives)
    recall, precision = [0.0, *recall, 1.0], [0.0, *precision, 0.0]
    for k in reversed(range(len(precision) - 1)):
        precision[k] = max(precision[k], precision[k + 1])
    return sum((recall[k] - recall[k - 1]) * precision[k] for k in range(1, len(recall)))


def devkit_eleven_points(letters: str, positives: int) -> float:
    recall, precision = devkit_curve(letters, positives)
    # 1e-9 below each point: the devkit's own 0:0.1:1 misses a recall of exactly 3/10 by rounding.
    points = [[p for r, p in zip(recall, precision, strict=True) if r >= k / 10 - 1e-9] for k in range(11)]
    return sum(max(point, default=0.0) for point in points) / 11


def transcript(detections: Detections, targets: Sequence[Target], label: int) -> tuple[list[str], int]:
    """Return the letters at ten thresholds and the number of positives of one class."""
    boxes = devkit_boxes(detections.boxes_xyxy_orig)
    rows = [
        (int(detections.image_index[k]), float(detections.scores[k]), boxes[k])
        for k in np.flatnonzero(detections.labels == label)
    ]
    objects = {
        image: [
            (box, bool(hard))
            for box, lab, hard in zip(devkit_boxes(t.boxes_xyxy_orig), t.labels, t.difficult, strict=True)
            if lab == label
        ]
        for image, t in enumerate(targets)
    }
    positives = sum(not hard for image in objects.values() for _, hard in image)
    return [devkit_match(rows, objects, percent / 100) for percent in PERCENTS], positives

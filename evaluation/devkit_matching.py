"""The devkit's rule for which detection found which object.

Within a class, detections go by falling score. Each looks at the one object of its class and image that it overlaps
most. Where that overlap reaches the threshold, the detection is ignored if the object is, a true positive if the object
is still free, and a false positive if a higher-scored detection has taken it; below the threshold it is a false
positive. Since a taken object never passes a detection on to the next best (as COCO's rule does), the object a
detection looks at is independent of all others.

The devkit counts inclusive pixels (width = xmax − xmin + 1); that is x2 − x1 of the half-open boxes used here.

Source: VOCevaldet.m of the VOC2007 development kit; Everingham et al., The Pascal VOC Challenge, IJCV 2010,
section 4.2.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from .pairing import Pairing


def devkit_assignment(
    pairing: Pairing, ignored_objects: NDArray[np.bool_], thresholds: Sequence[float]
) -> NDArray[np.int32]:
    """Return which object each detection is matched with, −1 for none: [T, D] by threshold and rank.

    ignored_objects: [G] bool, objects that any number of detections may be matched with.
    """
    objects = pairing.best_object
    assigned = np.full((len(thresholds), len(objects)), -1, dtype=np.int32)
    for row, threshold in zip(assigned, thresholds, strict=True):
        claimants = np.flatnonzero((pairing.best_iou >= threshold) & (objects >= 0))
        wanted = objects[claimants]
        # Written from the lowest score up: what stays is each object's highest-scored claimant.
        finder = np.empty(len(ignored_objects), dtype=np.int64)
        finder[wanted[::-1]] = claimants[::-1]
        succeeds = ignored_objects[wanted] | (finder[wanted] == claimants)
        row[claimants[succeeds]] = wanted[succeeds]
    return assigned

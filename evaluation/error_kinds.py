"""Tells every detection and every object its kind: right, ignored, or which mistake.

The kinds are those of `error_breakdown`, where they are defined.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .detections import Detections
from .ground_truth import GroundTruth
from .matching import ClassMatches
from .overlaps import most_overlapped

FALSE_POSITIVES: tuple[str, ...] = ("classification", "localisation", "both", "duplicate", "background")
KINDS: tuple[str, ...] = ("true positive", "ignored", *FALSE_POSITIVES)
ERRORS: tuple[str, ...] = (*FALSE_POSITIVES, "missed")
TOTALS: tuple[str, ...] = ("false positive", "false negative")

_TRUE_POSITIVE, _IGNORED, _CLASSIFICATION, _LOCALISATION, _BOTH, _DUPLICATE, _BACKGROUND = range(len(KINDS))


@dataclass(frozen=True, eq=False)
class Judged:
    """Detections and objects with their kinds; the fields as in `ErrorBreakdown`.

    found: [G] bool, objects of the true positives.
    """

    detections: Detections
    truth: GroundTruth
    matches: dict[str, ClassMatches]
    kind: NDArray[np.int8]
    pointed: NDArray[np.int64]
    found: NDArray[np.bool_]
    missed: NDArray[np.bool_]

    @property
    def not_found(self) -> NDArray[np.bool_]:
        """[G] bool: objects to find that nothing found."""
        return ~self.truth.difficult & ~self.found


def judge(
    detections: Detections, truth: GroundTruth, matches: dict[str, ClassMatches], iou: float, background_iou: float
) -> Judged:
    """Return the kind of every detection and object; matches: at the one threshold `iou`."""
    # What a rule leaves out entirely, as COCO's does beyond an image's hundred, is ignored.
    kind = np.full(len(detections), _IGNORED, dtype=np.int8)
    pointed = np.full(len(detections), -1, dtype=np.int64)
    found = np.zeros(len(truth), dtype=np.bool_)
    false_positive = np.zeros(len(detections), dtype=np.bool_)
    for match in matches.values():
        true = match.true_positive[0]
        kind[match.detections[true]] = _TRUE_POSITIVE
        pointed[match.detections[true]] = match.matched[0][true]
        found[match.matched[0][true]] = True
        false_positive[match.detections[match.false_positive[0]]] = True
    rows = np.flatnonzero(false_positive)
    overlaps = most_overlapped(detections, truth, rows)
    localisation = (overlaps.own_iou >= background_iou) & (overlaps.own_iou < iou)
    classification = ~localisation & (overlaps.other_iou >= iou)
    duplicate = ~localisation & ~classification & (overlaps.own_iou >= iou)
    background = np.maximum(overlaps.own_iou, overlaps.other_iou) < background_iou
    kind[rows] = np.select(
        [localisation, classification, duplicate, background],
        [_LOCALISATION, _CLASSIFICATION, _DUPLICATE, _BACKGROUND],
        default=_BOTH,
    )
    pointed[rows] = np.where(classification, overlaps.other, np.where(localisation | duplicate, overlaps.own, -1))
    touched = np.zeros(len(truth), dtype=np.bool_)
    touched[pointed[rows[localisation | classification]]] = True
    return Judged(detections, truth, matches, kind, pointed, found, ~truth.difficult & ~found & ~touched)

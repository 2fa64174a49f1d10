"""Which classes a detector takes for which."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from data.records import NUM_CLASSES

from .detections import Detections
from .ground_truth import GroundTruth
from .overlaps import candidate_pairs


def confusion_matrix(
    detections: Detections, truth: GroundTruth, iou: float, score_threshold: float
) -> NDArray[np.int64]:
    """Return [21, 21] int64: row the object's class, 0 for none; column the detected class, 0 for nothing.

    Of the detections with at least that score, whatever their class, those that overlap an object by `iou` or more are
    given to objects by falling IoU, of equal ones the higher score first, one detection an object. A detection whose
    turn comes with a difficult object counts nowhere; difficult objects are in no row.
    """
    rows = np.flatnonzero(detections.scores >= detections.scores.dtype.type(score_threshold))
    rows = rows[np.argsort(-detections.scores[rows], kind="stable")]
    places, objects, overlaps = [], [], []
    for left, candidates, overlap in candidate_pairs(detections, truth, rows):
        near = overlap >= iou
        places.append(left[near])
        objects.append(candidates[near])
        overlaps.append(overlap[near])
    empty = np.zeros(0, np.int64)
    place, candidate = np.concatenate([empty, *places]), np.concatenate([empty, *objects])
    order = np.lexsort((place, -np.concatenate([np.zeros(0), *overlaps])))

    column_of_object = np.zeros(len(truth), dtype=np.int64)
    free = np.ones(len(rows), dtype=np.bool_)
    for row, target in zip(place[order].tolist(), candidate[order].tolist(), strict=True):
        if free[row] and not column_of_object[target]:
            free[row] = False
            if not truth.difficult[target]:
                column_of_object[target] = detections.labels[rows[row]]
    matrix = np.zeros((NUM_CLASSES, NUM_CLASSES), dtype=np.int64)
    counted = ~truth.difficult
    np.add.at(matrix, (truth.labels[counted], column_of_object[counted]), 1)
    matrix[0] += np.bincount(detections.labels[rows[free]], minlength=NUM_CLASSES)
    return matrix

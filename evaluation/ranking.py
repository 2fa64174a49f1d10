"""The order in which detections are judged: by class and falling score, and the same however their rows are ordered."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .detections import Detections


def ranking(detections: Detections) -> NDArray[np.int64]:
    """Return the rows [D] of the detections by class, then falling score; of equal scores, by image id, then box.

    Where scores tie, COCO's tools go by image, and within an image by the rows of the file; the devkit leaves it open.
    Here boxes (x1, y1, x2, y2) decide in place of rows: no shuffling of the input moves a figure.
    """
    by_score = np.argsort(-detections.scores)
    # A stable sort of bytes is a radix sort; of int64 it is ten times slower.
    order = by_score[np.argsort(detections.labels[by_score].astype(np.uint8), kind="stable")]
    scores, labels = detections.scores[order], detections.labels[order]
    begins = np.ones(len(order), dtype=np.bool_)
    begins[1:] = (scores[1:] != scores[:-1]) | (labels[1:] != labels[:-1])

    image_rank = np.empty(len(detections.image_ids), dtype=np.int64)
    image_rank[np.argsort(np.array(detections.image_ids, dtype=np.str_))] = np.arange(len(detections.image_ids))
    tied = _in_runs(begins)
    order[tied] = order[tied][np.lexsort((image_rank[detections.image_index[order[tied]]], np.cumsum(begins)[tied]))]
    images = detections.image_index[order]
    begins[1:] |= images[1:] != images[:-1]

    tied = _in_runs(begins)
    x1, y1, x2, y2 = detections.boxes_xyxy_orig[order[tied]].T
    order[tied] = order[tied][np.lexsort((y2, x2, y1, x1, np.cumsum(begins)[tied]))]
    return order


def _in_runs(begins: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Return the places that lie in runs of more than one; begins: [n] bool, whether a run begins here."""
    return np.flatnonzero(~(begins & np.append(begins[1:], True)))

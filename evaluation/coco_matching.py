"""COCO's rule for which detection found which object.

Within an image and class, the 100 highest-scored detections go by falling score. Each takes the free object that it
overlaps most, where that overlap reaches the threshold; only where no such object is left does it look at the ignored
ones, takes one of them likewise, and counts neither way. Of equal overlaps the later object is taken. A taken object is
passed over, so a detection may go on to the next best: unlike the devkit's rule, this one has to go rank by rank. Each
rank is done for all images, classes and thresholds at once, looking only at the pairs that overlap enough.

An ignored object is ignored as such, not a crowd: its IoU is the usual one, and it is taken by one detection only.

Source: COCOeval.evaluateImg of cocoapi's pycocotools; Lin et al., Microsoft COCO, ECCV 2014, section 5 and
https://cocodataset.org/#detection-eval.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .pairing import Pairing

MAX_DETECTIONS = 100


@dataclass(frozen=True, eq=False)
class RankedPairs:
    """The pairs of a `Pairing` by turn, then by detection, then as the detection prefers them.

    detections, objects: [P] int64.  iou: [P] float64.  turns: [R + 1] int64, turn r has the pairs turns[r] up to
    turns[r + 1]; in a turn there is at most one detection of each image and class.
    """

    detections: NDArray[np.int64]
    objects: NDArray[np.int64]
    iou: NDArray[np.float64]
    turns: NDArray[np.int64]


def kept_detections(pairing: Pairing) -> NDArray[np.bool_]:
    """Return which detections [D] are among the 100 highest-scored of their image and class."""
    kept = np.ones(len(pairing.group), dtype=np.bool_)
    sizes = np.bincount(pairing.group)
    crowded = np.flatnonzero((sizes > MAX_DETECTIONS)[pairing.group])
    kept[crowded] = _rank_in_group(pairing.group[crowded]) < MAX_DETECTIONS
    return kept


def rank_pairs(pairing: Pairing, kept: NDArray[np.bool_]) -> RankedPairs:
    """Return the pairs of the kept detections in the order that `coco_assignment` goes by."""
    near = np.flatnonzero(kept[pairing.pair_detections])
    by_preference = near[
        np.lexsort((-pairing.pair_objects[near], -pairing.pair_iou[near], pairing.pair_detections[near]))
    ]
    detections = pairing.pair_detections[by_preference]
    # Only detections with a pair take turns: at most as many as there are, mostly far fewer.
    with_pair, which = np.unique(detections, return_inverse=True)
    turn = _rank_in_group(pairing.group[with_pair])[which]
    by_turn = np.argsort(turn, kind="stable")
    ends = np.cumsum(np.bincount(turn, minlength=1))
    rows = by_preference[by_turn]
    return RankedPairs(
        detections[by_turn], pairing.pair_objects[rows], pairing.pair_iou[rows], np.concatenate([[0], ends])
    )


def coco_assignment(
    pairing: Pairing, pairs: RankedPairs, ignored_objects: NDArray[np.bool_], thresholds: Sequence[float]
) -> NDArray[np.int32]:
    """Return which object each detection is matched with, −1 for none: [T, D] by threshold and rank.

    ignored_objects: [G] bool, objects that are taken only by detections with no other left.
    """
    # As COCO's: an overlap that misses 1 by rounding alone still reaches a threshold of 1.
    levels = np.minimum(thresholds, 1 - 1e-10)[:, None]
    assigned = np.full((len(levels), len(pairing.order)), -1, dtype=np.int32)
    taken = np.zeros((len(levels), len(ignored_objects)), dtype=np.bool_)
    for start, end in zip(pairs.turns[:-1].tolist(), pairs.turns[1:].tolist(), strict=True):
        detections, objects = pairs.detections[start:end], pairs.objects[start:end]
        if not len(detections):
            continue
        free = (pairs.iou[start:end] >= levels) & ~taken[:, objects]
        # The first free pair of each detection, ignored objects after all others.
        count = end - start
        choice = np.arange(count) + count * ignored_objects[objects]
        choice = np.where(free, choice, 2 * count)
        firsts = np.flatnonzero(np.append(True, detections[1:] != detections[:-1]))
        chosen = np.minimum.reduceat(choice, firsts, axis=1)
        level, place = np.nonzero(chosen < 2 * count)
        found = objects[chosen[level, place] % count]
        assigned[level, detections[firsts[place]]] = found
        taken[level, found] = True
    return assigned


def _rank_in_group(group: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return how many earlier entries each entry [n] has in its group."""
    order = np.argsort(group, kind="stable")
    sizes = np.unique(group[order], return_counts=True)[1]
    rank = np.empty(len(group), dtype=np.int64)
    rank[order] = np.arange(len(group)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    return rank

"""Average precision as it would be without some kinds of mistakes."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
from numpy.typing import NDArray

from data.records import LABEL_OF_CLASS

from .average_precision import average_precision
from .error_kinds import FALSE_POSITIVES, KINDS, Judged
from .matching import Metric

_CORRECTED = ("classification", "localisation")


def average_after(judged: Judged, fixed: Collection[str], metric: Metric) -> float | None:
    """Return the mean AP over classes with these kinds put right, all at once; None where there is nothing to find.

    fixed: any of ERRORS and TOTALS, put right as `error_breakdown` defines.
    """
    gone = np.isin(judged.kind, [KINDS.index(kind) for kind in _false_positives(fixed)])
    corrected = _corrected(judged, [kind for kind in _CORRECTED if kind in fixed])
    removed = np.zeros(len(judged.truth), dtype=np.bool_)
    if "missed" in fixed:
        removed |= judged.missed
    if "false negative" in fixed:
        removed |= judged.not_found
    removed[judged.pointed[corrected]] = False

    scores = judged.detections.scores
    label_of_corrected = judged.truth.labels[judged.pointed[corrected]]
    removed_by_class = np.bincount(judged.truth.labels[removed], minlength=len(LABEL_OF_CLASS) + 1)
    averages = []
    for (name, match), label in zip(judged.matches.items(), LABEL_OF_CLASS.values(), strict=True):
        if not match.num_positives:
            continue
        left = match.num_positives - int(removed_by_class[label])
        stays = ~gone[match.detections]
        true, ignored = match.true_positive[0][stays], match.ignored[0][stays]
        gained = corrected[label_of_corrected == label]
        if len(gained):
            true = np.append(true, np.ones(len(gained), np.bool_))
            ignored = np.append(ignored, np.zeros(len(gained), np.bool_))
            order = np.argsort(-scores[np.append(match.detections[stays], gained)], kind="stable")
            true, ignored = true[order], ignored[order]
        assert int(true.sum()) <= left, name
        averages.append(float(average_precision(true[None], ignored[None], left, metric)[0]) if left else 1.0)
    return float(np.mean(averages)) if averages else None


def _false_positives(fixed: Collection[str]) -> Collection[str]:
    return FALSE_POSITIVES if "false positive" in fixed else [kind for kind in FALSE_POSITIVES if kind in fixed]


def _corrected(judged: Judged, kinds: Collection[str]) -> NDArray[np.int64]:
    """Return the detections that become true positives: the highest-scored of each object still to be found."""
    rows = np.flatnonzero(np.isin(judged.kind, [KINDS.index(kind) for kind in kinds]))
    rows = rows[judged.not_found[judged.pointed[rows]]]
    rows = rows[np.argsort(-judged.detections.scores[rows], kind="stable")]
    _, first = np.unique(judged.pointed[rows], return_index=True)
    return rows[first]

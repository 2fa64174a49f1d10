"""How well a logit teacher tells which classes an image shows: a check that needs no detector.

Wrong prompts, wrong preprocessing or an untrained teacher show at a glance as a low number.

Source: VOCevalcls.m of the VOC development kits (classification task; all-point area AP).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from data.records import VOC_CLASSES, ImageRecord

from .average_precision import average_precision

PRESENT, ABSENT, DIFFICULT_ONLY = 1, 0, -1


def presence_matrix(records: Sequence[ImageRecord]) -> NDArray[np.int8]:
    """Return [N, 20] int8: 1 where the image shows the class, 0 where not, −1 where only as difficult objects."""
    presence = np.full((len(records), len(VOC_CLASSES)), ABSENT, dtype=np.int8)
    for row, record in zip(presence, records, strict=True):
        target = record.target
        row[target.labels - 1] = DIFFICULT_ONLY
        row[target.labels[~target.difficult] - 1] = PRESENT
    return presence


def multilabel_map(
    logits: NDArray[np.floating], presence: NDArray[np.int8]
) -> tuple[float | None, dict[str, float | None]]:
    """Return the mean AP over classes and the AP of each, as fractions; None for a class no image shows.

    logits: [N, 20] float, column c − 1 for label c; only their order within a class matters, and of equal ones the
    earlier image ranks first.  presence: [N, 20] as `presence_matrix` gives; images at −1 count neither way.
    """
    if logits.shape != presence.shape or logits.ndim != 2 or logits.shape[1] != len(VOC_CLASSES):
        raise ValueError(f"expected logits and presence [N, 20], found {logits.shape} and {presence.shape}")
    if not np.isfinite(logits).all():
        raise ValueError("expected finite logits, found NaN or infinity")
    per_class: dict[str, float | None] = {}
    for name, scores, shown in zip(VOC_CLASSES, logits.T, presence.T, strict=True):
        ranked = shown[np.argsort(-scores.astype(np.float64), kind="stable")][None]
        positives = int((shown == PRESENT).sum())
        ap = average_precision(ranked == PRESENT, ranked == DIFFICULT_ONLY, positives)
        per_class[name] = float(ap[0]) if positives else None
    known = [ap for ap in per_class.values() if ap is not None]
    return (float(np.mean(known)) if known else None), per_class

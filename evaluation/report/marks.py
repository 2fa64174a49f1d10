"""What is drawn over the pictures of a gallery: every detection by its kind, and the objects that none found.

Detections keep their kind at every score threshold, since matching goes by falling score. Whether an object is missed
depends on the threshold; so its mark knows the score from which on it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from data.records import VOC_CLASSES, ImageRecord
from evaluation.detections import Detections
from evaluation.error_breakdown import ErrorBreakdown
from evaluation.error_kinds import FALSE_POSITIVES, KINDS

MISSED, DIFFICULT = "missed", "difficult"
# All that a mark can be, in the order of the legend.
MARK_KINDS: tuple[str, ...] = ("true positive", *FALSE_POSITIVES, MISSED, "ignored", DIFFICULT)
MOST_MARKS = 40


@dataclass(frozen=True)
class Mark:
    """A box over a picture.

    kind: one of MARK_KINDS.  class_name: what was detected, or is there.  box: x1, y1, x2, y2 in px of the original
    image.  score: of a detection; of an object, that of the true positive which finds it, 0 where none does.
    """

    kind: str
    class_name: str
    box: tuple[float, float, float, float]
    score: float

    @property
    def is_object(self) -> bool:
        """Whether it marks what is there, not what was detected."""
        return self.kind in (MISSED, DIFFICULT)

    def is_shown(self, threshold: float) -> bool:
        """Return whether it is there at a score threshold: what is detected from it on, what is missed by then."""
        if self.kind == DIFFICULT:
            return True
        return self.score < threshold if self.kind == MISSED else self.score >= threshold


class Marks:
    """The marks of one run, image by image."""

    def __init__(self, found: Detections, breakdown: ErrorBreakdown, records: Sequence[ImageRecord]) -> None:
        self._found = found
        self._kinds = breakdown.kind_of_detection
        self._place = {image_id: index for index, image_id in enumerate(found.image_ids)}
        by_id = {record.id: record.target for record in records}
        self._targets = [by_id[image_id] for image_id in found.image_ids]
        counts = np.array([0, *(len(target) for target in self._targets)])
        self._first_object = counts.cumsum()
        self._found_at = np.zeros(int(counts.sum()), dtype=np.float32)
        true = np.flatnonzero(self._kinds == KINDS.index("true positive"))
        self._found_at[breakdown.pointed_object[true]] = found.scores[true]
        order = np.argsort(-found.scores, kind="stable")
        self._rows = order[np.argsort(found.image_index[order], kind="stable")]
        self._first_row = np.append(0, np.bincount(found.image_index, minlength=len(found.image_ids)).cumsum())

    def of_image(self, image_id: str, least_score: float) -> list[Mark]:
        """Return an image's marks: detections with at least this score, the best MOST_MARKS of them, then objects."""
        place = self._place[image_id]
        rows = self._rows[self._first_row[place] : self._first_row[place + 1]]
        rows = rows[self._found.scores[rows] >= least_score][:MOST_MARKS]
        marks = [
            Mark(
                KINDS[self._kinds[row]],
                VOC_CLASSES[self._found.labels[row] - 1],
                _box(self._found.boxes_xyxy_orig[row]),
                float(self._found.scores[row]),
            )
            for row in rows
        ]
        target, first = self._targets[place], self._first_object[place]
        for offset, (label, box, hard) in enumerate(
            zip(target.labels, target.boxes_xyxy_orig, target.difficult, strict=True)
        ):
            kind = DIFFICULT if hard else MISSED
            marks.append(Mark(kind, VOC_CLASSES[label - 1], _box(box), float(self._found_at[first + offset])))
        return marks

    def errors(self, image_ids: Sequence[str], threshold: float) -> NDArray[np.int64]:
        """Return how many errors each image has at a score threshold: false positives and missed objects."""
        wrong = np.isin(self._kinds, [KINDS.index(kind) for kind in FALSE_POSITIVES])
        wrong &= self._found.scores >= threshold
        counts = np.bincount(self._found.image_index[wrong], minlength=len(self._targets))
        for place, target in enumerate(self._targets):
            found_at = self._found_at[self._first_object[place] : self._first_object[place + 1]]
            counts[place] += int(np.sum(~target.difficult & (found_at < threshold)))
        return counts[[self._place[image_id] for image_id in image_ids]].astype(np.int64)


def _box(box: NDArray[np.float32]) -> tuple[float, float, float, float]:
    x1, y1, x2, y2 = (float(value) for value in box)
    return x1, y1, x2, y2

"""How well a store's logit teachers classify the images they were run on: wrong prompts or weights show at a glance."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from cache.reader import TeacherStore
from data.records import ImageRecord
from evaluation.multilabel import multilabel_map, presence_matrix


def logit_teacher_maps(store: Path, records: Sequence[ImageRecord]) -> dict[str, float | None]:
    """Return each logit teacher's image-level multi-label mAP (a fraction), `original` view, over the records.

    A teacher whose logits are not all committed, one of an earlier run that was interrupted, is left out.
    """
    opened = TeacherStore(store)
    rows = [opened.row_of_id[record.id] for record in records]
    presence = presence_matrix(records)
    maps: dict[str, float | None] = {}
    for key, teacher in opened.catalog.teachers.items():
        if "original" in teacher.views and "logits" in teacher.views["original"].layouts:
            logits = opened.array(key, "original", "logits")
            if not logits.missing_rows(rows):
                maps[key] = multilabel_map(logits.gather(rows), presence)[0]
    return maps

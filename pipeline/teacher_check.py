"""How well a store's logit teachers classify the images they were run on: wrong prompts or weights show at a glance."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from cache.reader import TeacherStore
from cache.selection import Selection
from data.errors import StoreIncompleteError
from data.records import ImageRecord
from evaluation.multilabel import multilabel_map, presence_matrix


def logit_teacher_maps(stores: Path | Sequence[Path], records: Sequence[ImageRecord]) -> dict[str, float | None]:
    """Return each logit teacher's image-level multi-label mAP (a fraction), `original` view, over the records.

    stores: one, or several that are joined by image id.  A teacher whose logits are not all committed, one of an
    earlier run that was interrupted, is left out.

    Raises StoreStaleError for stores that contradict each other, else as `TeacherStore`.
    """
    paths = [stores] if isinstance(stores, Path) else stores
    selection = Selection([TeacherStore(path) for path in paths], [record.id for record in records])
    presence = presence_matrix(records)
    maps: dict[str, float | None] = {}
    for key in (key for key, names in selection.outputs.items() if "logits" in names):
        try:
            logits = selection.arrays(key, "logits", ("original",))["logits"]
        except StoreIncompleteError:
            continue
        maps[key] = multilabel_map(logits.gather(range(len(records)), ["original"] * len(records)), presence)[0]
    return maps

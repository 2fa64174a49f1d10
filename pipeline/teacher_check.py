"""How well a store's logit teachers classify the images they were run on: wrong prompts or weights show at a glance."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from cache.reader import ArrayReader, TeacherStore
from cache.selection import Selection
from cache.writer import StoreWriter
from data.errors import StoreIncompleteError
from data.records import ImageRecord
from evaluation.multilabel import multilabel_map, presence_matrix

# Its name in the provenance of a teacher's arrays.
MULTILABEL_MAP = "multilabel_map"


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


def note_logit_maps(writer: StoreWriter, records: Sequence[ImageRecord]) -> None:
    """Note the image-level multi-label mAP of each logit teacher in the provenance of a store that is held for writing.

    It belongs to the targets as their cost does.  records: the store's images. A teacher whose `original` logits are
    not all committed, or that has them noted, is left alone, and so are images without any object.
    """
    for teacher in writer.plan.teachers:
        view = writer.catalog.teacher(teacher.key).views.get("original")
        layout = None if view is None else view.layouts.get("logits")
        if layout is None:
            continue
        storage = writer.catalog.storage.array(layout)
        if len(storage.read_ledger()) < layout.num_shards:
            continue
        logits = ArrayReader(storage).gather(range(len(records)))
        found = multilabel_map(logits, presence_matrix(records))[0]
        if found is not None and all(note.get(MULTILABEL_MAP) != found for note in storage.read_provenance()):
            writer.note_provenance(teacher.key, "original", {MULTILABEL_MAP: found})

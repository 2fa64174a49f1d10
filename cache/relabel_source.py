"""What new logits can be made from, and what may not be asked: told before any teacher is built."""

from __future__ import annotations

import shlex
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cache.canonical import Json, canonical_json, differences
from cache.catalog import Catalog, StoredTeacher
from cache.commands import relabelled_from, writing_command
from cache.compatibility import refuse_other_teacher
from cache.hdf5_storage import Hdf5Storage
from cache.layout import TEXT_EMBEDDINGS
from cache.plan import TeacherPlan
from cache.reader import ArrayReader, read_constant
from data.errors import StoreCorruptError, StoreIncompleteError, StoreStaleError, StoreWriteError, UsageError
from data.geometry import View

_MAX_SHOWN = 8


def find_source(catalog: Catalog, key: str | None) -> StoredTeacher:
    """Return the teacher whose embeddings new logits are made from: the named one, else the only one that can be.

    Raises UsageError, listing what there is, for a teacher that cannot be, or where several could.
    """
    path = catalog.path
    having = [name for name, teacher in catalog.teachers.items() if _can_be_relabelled(teacher)]
    listed = ", ".join(having) or "none"
    if key is None:
        if not having:
            raise UsageError(
                f"{path}: expected a teacher with embeddings of images and of prompts, found none"
                f" (teachers: {', '.join(catalog.teachers) or 'none'})",
                hint=f"extract one first: python cli.py extract-teachers … --out {path} --teacher clip_vitb32",
            )
        if len(having) > 1:
            raise UsageError(
                f"{path}: {len(having)} teachers can be relabelled: {listed}", hint="choose one: --teacher KEY"
            )
        return catalog.teachers[having[0]]
    if key not in catalog.teachers:
        raise UsageError(f"{path}: no teacher {key!r} in this store (those that can be relabelled: {listed})")
    found = catalog.teachers[key]
    if key not in having:
        origin = relabelled_from(catalog, found)
        raise UsageError(
            f"{path}: teacher {key} has no embeddings to make logits from (those that can be relabelled: {listed})",
            hint=None if origin is None else f"its logits were made from {origin}: --teacher {origin}",
        )
    return found


def _can_be_relabelled(teacher: StoredTeacher) -> bool:
    arrays = [set(view.layouts) for view in teacher.views.values()]
    return bool(arrays) and TEXT_EMBEDDINGS in teacher.constants and all("embeddings" in names for names in arrays)


def refuse_source(catalog: Catalog, source: StoredTeacher, key: str) -> None:
    """Raise unless new logits under this key can be made from the source: told before anything is loaded.

    Raises UsageError for the key of a teacher that was extracted; StoreWriteError for an HDF5 store that lacks the
    teacher; StoreIncompleteError naming each array of embeddings that lacks samples, and the command that writes them.
    """
    taken = catalog.teachers.get(key)
    if taken is not None and relabelled_from(catalog, taken) is None:
        raise UsageError(
            f"{catalog.path}: {key} is a teacher of this store that relabel-logits did not make",
            hint="give the new logits another key: --as KEY",
        )
    if taken is None and isinstance(catalog.storage, Hdf5Storage):
        convert = ["python", "cli.py", "convert-cache", str(catalog.path), str(catalog.path.with_suffix(".zarr"))]
        raise StoreWriteError(
            f"{catalog.path}: an HDF5 store takes no further teacher, and {key} is not in it",
            hint=f"make a Zarr store of it, and relabel that one: {shlex.join(convert)}",
        )
    readers = [embeddings_of(catalog, source, view) for view in source.views]
    lacking = [
        f"  {reader.layout.path}: {reader.num_missing} of {reader.layout.num_samples} missing"
        for reader in readers
        if reader.num_missing
    ]
    if lacking:
        finish = writing_command(catalog, [source.manifest.key])
        raise StoreIncompleteError(
            "\n".join([f"{catalog.path}: embeddings that logits are to be made from are not committed:", *lacking]),
            hint=f"finish this store first, it resumes: {finish}",
        )


def refuse_other_identity(
    catalog: Catalog, source: StoredTeacher, found: Mapping[str, Any], but: Collection[str]
) -> None:
    """Raise StoreStaleError, naming every field, unless a teacher is the stored one in all fields but those named."""
    stored, other = ({n: v for n, v in fields.items() if n not in but} for fields in (source.manifest.identity, found))
    changed = list(differences(stored, other, source.manifest.key))
    if not changed:
        return
    shown = [f"  {field}: stored {_show(old)}, found {_show(new)}" for field, old, new in changed[:_MAX_SHOWN]]
    if len(changed) > _MAX_SHOWN:
        shown.append(f"  … and {len(changed) - _MAX_SHOWN} more")
    spec = source.manifest.identity.get("spec", source.manifest.key)
    raise StoreStaleError(
        "\n".join([f"{catalog.path}: the prompts would be embedded by another teacher than the stored one:", *shown]),
        hint=f"give the weights that the store was made with (--weights {spec}=PATH), or extract a new store",
    )


def _show(value: Json) -> str:
    text = value if isinstance(value, str) else canonical_json(value).decode("ascii")
    return text if len(text) <= 100 else f"{text[:97]}…"


def stored_text_embeddings(
    catalog: Catalog, key: str, identity: dict[str, Any], *, repair: bool
) -> NDArray[np.float32] | None:
    """Return the text embeddings [K, D] of a teacher that an earlier run began, None where there is no such teacher.

    repair: None, too, where they are damaged.

    Raises StoreStaleError for a teacher of another identity under the key, StoreCorruptError for damaged embeddings.
    """
    stored = catalog.teachers.get(key)
    if stored is None:
        return None
    untrained, probe = stored.manifest.untrained, stored.manifest.probe.values
    refuse_other_teacher(catalog.path, stored, TeacherPlan(key, identity, untrained, probe, outputs={}))
    try:
        return read_constant(catalog.storage, stored, TEXT_EMBEDDINGS)
    except StoreCorruptError:
        if repair:
            return None
        raise


def embeddings_of(catalog: Catalog, source: StoredTeacher, view: View) -> ArrayReader:
    """Return the reader of a source's image embeddings [N, D] of one view."""
    return ArrayReader(catalog.storage.array(source.views[view].layouts["embeddings"]))

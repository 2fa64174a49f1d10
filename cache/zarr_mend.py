"""Writes a Zarr store's damaged metadata anew, where what a plan implies is provably what was written.

Proof is what is still there: a manifest's digest or its content, the digest that a sound manifest holds of samples and
constants, the layout that it implies. What cannot be proven is left alone; reading the store then refuses it by name.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from cache.canonical import Json
from cache.catalog import StoredTeacher, read_manifest
from cache.files import make_folders, read_json, read_regular, sync_folder, write_new
from cache.layout import SAMPLES_FILE, ArrayLayout, constant_array, group_attributes, group_metadata
from cache.manifest import RootManifest, TeacherManifest, TeacherParts, ViewManifest
from cache.plan import view_layouts
from cache.reader import read_constant
from cache.zarr_create import ZarrBuilder, metadata_text, write_constant
from cache.zarr_storage import ZarrStorage
from data.errors import StoreError, StoreStaleError

_Manifest = TypeVar("_Manifest", RootManifest, TeacherManifest, ViewManifest)


def mend(storage: ZarrStorage, root: RootManifest, samples: bytes, teachers: Sequence[TeacherParts]) -> None:
    """Mend what can be mended of the root, of `samples.jsonl`, and of the given teachers' metadata and constants."""
    root = _mend_group(storage, "", root)
    if hashlib.sha256(samples).hexdigest() == root.dataset.samples_sha256 != _digest(storage, SAMPLES_FILE):
        _replace(storage.path / SAMPLES_FILE, samples)
    for parts in teachers:
        key = parts.manifest.key
        if (storage.path / key).is_dir():
            _mend_teacher(storage, root, parts)


def _mend_teacher(storage: ZarrStorage, root: RootManifest, parts: TeacherParts) -> None:
    key = parts.manifest.key
    manifest = _mend_group(storage, key, parts.manifest)
    for name, (shape, sha256) in manifest.constants.items():
        layout = constant_array(key, name, shape)
        _mend_array(storage, layout)
        values = parts.constants.get(name)
        if values is None or hashlib.sha256(values.astype("<f4").tobytes()).hexdigest() != sha256:
            continue
        try:
            read_constant(storage, StoredTeacher(manifest, {}, {name: layout}), name)
        except StoreError:
            storage.array(layout).sweep()  # what a killed repair left of it
            write_constant(storage.path, layout, values)
    for view, planned in parts.views.items():
        if (storage.path / key / view).is_dir():
            stored = _mend_group(storage, f"{key}/{view}", planned)
            for layout in view_layouts(root, key, stored).values():
                _mend_array(storage, layout)


def _mend_group(storage: ZarrStorage, group: str, planned: _Manifest) -> _Manifest:
    """Return the manifest that stands in the store now: the stored one if it is sound, the planned one otherwise.

    Raises what reading it raises where the planned one cannot be proven to be it.
    """
    kind = type(planned)
    try:
        return read_manifest(storage, group, kind)
    except StoreStaleError:  # of a newer format: sound, and not ours to change
        raise
    except StoreError:
        attributes = group_attributes(planned.written())
        path = storage.path / group / "zarr.json"
        if not _proves(path, storage, group, attributes):
            raise
        _replace(path, metadata_text(group_metadata(attributes)))
        return read_manifest(storage, group, kind)


def _proves(path: Path, storage: ZarrStorage, group: str, attributes: dict[str, Json]) -> bool:
    """Return whether what is left of a group's file shows that these were its attributes."""
    name = f"{group}/zarr.json" if group else "zarr.json"
    try:
        left = read_regular(storage.path, name)
    except (FileNotFoundError, StoreError):
        return False
    if attributes["teachonce_sha256"].encode("ascii") in left:
        return True
    with contextlib.suppress(StoreError, TypeError, KeyError):
        return bool(read_json(storage.path, name)["attributes"]["teachonce"] == attributes["teachonce"])
    return False


def _mend_array(storage: ZarrStorage, layout: ArrayLayout) -> None:
    try:
        storage.check_array(layout)
    except StoreError:
        folder = storage.path / layout.path
        if folder.is_dir():
            _replace(folder / "zarr.json", metadata_text(layout.metadata()))
        else:
            ZarrBuilder(storage.path).add_array(layout)
    for shard in range(layout.num_shards):
        make_folders(storage.path / layout.path / layout.shard_folder(shard))


def _digest(storage: ZarrStorage, name: str) -> str:
    try:
        return hashlib.sha256(read_regular(storage.path, name)).hexdigest()
    except (FileNotFoundError, StoreError):
        return ""


def _replace(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".tmp-{path.name}")
    temporary.unlink(missing_ok=True)
    write_new(temporary, content)
    temporary.rename(path)
    sync_folder(path.parent)

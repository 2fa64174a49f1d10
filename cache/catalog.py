"""Reads what a store says of itself: manifests, layouts, samples. Distrusts all of it, opens no shard.

A store is untrusted input: only regular files are read, every `zarr.json` must equal what its manifest implies, and
every fingerprint is computed again.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TypeVar

from pydantic import ValidationError

from cache.canonical import Json
from cache.layout import FORMAT_VERSION, SAMPLES_FILE, TEACHER_KEY, ArrayLayout, constant_array, group_attributes
from cache.manifest import (
    RootManifest,
    TeacherManifest,
    ViewManifest,
    array_fingerprint,
    store_fingerprint,
)
from cache.open_storage import find_storage
from cache.plan import view_layouts
from cache.samples import SampleEntry, decode_samples, samples_digest
from cache.storage import Storage
from data.errors import StoreCorruptError, StoreIncompleteError, StoreMissingError, StoreStaleError
from data.geometry import VIEWS, View

_Manifest = TypeVar("_Manifest", RootManifest, TeacherManifest, ViewManifest)


@dataclass(frozen=True)
class StoredView:
    """One view of a teacher: its manifest and its arrays' layouts by name, in commit order."""

    manifest: ViewManifest
    layouts: dict[str, ArrayLayout]


@dataclass(frozen=True)
class StoredTeacher:
    """One teacher of a store. constants: layouts of `text_embeddings` and `pca` where it has them."""

    manifest: TeacherManifest
    views: dict[View, StoredView]
    constants: dict[str, ArrayLayout]

    def view(self, view: View) -> StoredView:
        """Return one view; raises StoreIncompleteError where the store lacks it."""
        if view not in self.views:
            raise StoreIncompleteError(
                f"teacher {self.manifest.key}: view {view!r} is not in the store (it has {', '.join(self.views)})",
                hint=f"add it: python cli.py extract-teachers … --teacher {self.manifest.key} --view {view}",
            )
        return self.views[view]


@dataclass(frozen=True)
class Catalog:
    """A store's whole description. Nothing here depends on which shards are committed."""

    storage: Storage
    root: RootManifest
    teachers: dict[str, StoredTeacher]

    @property
    def path(self) -> Path:
        """Where the store lies."""
        return self.storage.path

    @cached_property
    def samples(self) -> list[SampleEntry]:
        """The rows, in order; raises StoreCorruptError where they are not those of the root manifest."""
        path = self.storage.describe(SAMPLES_FILE)
        encoded = self.storage.samples()
        found = samples_digest(encoded)
        if found != self.root.dataset.samples_sha256:
            expected = self.root.dataset.samples_sha256
            raise StoreCorruptError(f"{path}: expected SHA-256 {expected}, found {found}: the file was edited")
        samples = decode_samples(encoded, path)
        if len(samples) != self.root.dataset.samples:
            raise StoreCorruptError(f"{path}: expected {self.root.dataset.samples} samples, found {len(samples)}")
        return samples

    @cached_property
    def fingerprints(self) -> dict[str, str]:
        """The fingerprint of every array by its path."""
        return {
            layout.path: view.manifest.arrays[name].fingerprint
            for teacher in self.teachers.values()
            for view in teacher.views.values()
            for name, layout in view.layouts.items()
        }

    @property
    def fingerprint(self) -> str:
        """The store's fingerprint."""
        return store_fingerprint(self.fingerprints)

    def layouts(self) -> list[ArrayLayout]:
        """Return every sample array's layout, teacher by teacher."""
        return [
            layout
            for teacher in self.teachers.values()
            for view in teacher.views.values()
            for layout in view.layouts.values()
        ]

    def teacher(self, key: str) -> StoredTeacher:
        """Return one teacher; raises StoreIncompleteError where the store lacks it."""
        if key not in self.teachers:
            raise StoreIncompleteError(
                f"{self.path}: no teacher {key!r} in this store (it has {', '.join(self.teachers)})",
                hint=f"add it: python cli.py extract-teachers … --out {self.path} --teacher {key}",
            )
        return self.teachers[key]


def read_catalog(path: Path) -> Catalog:
    """Return the description of the store at a path.

    Raises StoreMissingError where there is none, StoreStaleError for a newer format, StoreCorruptError for anything
    that contradicts itself.
    """
    if sys.byteorder != "little":
        raise StoreStaleError("stores hold little-endian data, which this big-endian machine cannot map")
    storage = find_storage(path)
    if storage is None:
        raise _missing(path)
    root = read_manifest(storage, "", RootManifest)
    keys = [name for name in storage.groups("") if TEACHER_KEY.fullmatch(name)]
    return Catalog(storage, root, {key: _read_teacher(storage, root, key) for key in keys})


def _missing(path: Path) -> StoreMissingError:
    candidates = [p for suffix in ("zarr", "h5", "hdf5") for p in path.parent.glob(f"*.{suffix}")]
    near = sorted(str(candidate) for candidate in candidates if find_storage(candidate))
    found = f"; stores beside it: {', '.join(near)}" if near else ""
    what = "is not a store (no zarr.json, no HDF5 file)" if path.exists() else "does not exist"
    return StoreMissingError(
        f"{path} {what}{found}",
        hint=f"check the path, or make the store: python cli.py extract-teachers --out {path}",
    )


def read_manifest(storage: Storage, group: str, kind: type[_Manifest]) -> _Manifest:
    """Return the manifest of a group.

    Raises StoreCorruptError for anything but one that was written so, StoreStaleError for a newer format.
    """
    where = storage.describe(group)
    attributes = storage.attributes(group)
    content = attributes.get("teachonce") if isinstance(attributes, dict) else None
    if not isinstance(content, dict):
        raise StoreCorruptError(f"{where}: expected the manifest of a part of this store, found none")
    _refuse_newer(where, content)
    try:
        manifest = kind.model_validate(content)
        expected = group_attributes(manifest.written())
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"]) or "manifest"
        raise StoreCorruptError(f"{where}: {field}: {first['msg']}") from error
    except (ValueError, RecursionError) as error:
        raise StoreCorruptError(f"{where}: {error}") from error
    # As a whole: nothing may stand there that nobody reads, and no value may be another than the one written.
    if attributes != expected:
        raise StoreCorruptError(f"{where}: the manifest is not the one that was written: it was edited or damaged")
    return manifest


def _refuse_newer(where: str, manifest: Json) -> None:
    version = manifest.get("format_version", FORMAT_VERSION)
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise StoreStaleError(
            f"{where}: expected format version {FORMAT_VERSION}, found the newer {version}",
            hint="update TeachOnce, or read the store with the version that wrote it",
        )


def _read_teacher(storage: Storage, root: RootManifest, key: str) -> StoredTeacher:
    manifest = read_manifest(storage, key, TeacherManifest)
    if manifest.key != key:
        raise StoreCorruptError(
            f"{storage.describe(key)}: expected the manifest of {key!r}, found that of {manifest.key!r}"
        )
    present = storage.groups(key)
    views = {view: _read_view(storage, root, manifest, view) for view in VIEWS if view in present}
    constants = {name: constant_array(key, name, shape) for name, (shape, _) in manifest.constants.items()}
    for layout in constants.values():
        storage.check_array(layout)
    return StoredTeacher(manifest, views, constants)


def _read_view(storage: Storage, root: RootManifest, teacher: TeacherManifest, view: View) -> StoredView:
    group = f"{teacher.key}/{view}"
    manifest = read_manifest(storage, group, ViewManifest)
    if manifest.view != view:
        raise StoreCorruptError(
            f"{storage.describe(group)}: expected the manifest of view {view}, found {manifest.view}"
        )
    features = manifest.arrays.get("features")
    for name, array in manifest.arrays.items():
        expected = array_fingerprint(root, teacher, view, name, array, None if features is None else features.dtype)
        if expected != array.fingerprint:
            raise StoreCorruptError(
                f"{storage.path}/{group}/{name}: expected fingerprint {expected}, found {array.fingerprint}:"
                " a manifest was edited"
            )
    layouts = view_layouts(root, teacher.key, manifest)
    for layout in layouts.values():
        storage.check_array(layout)
    return StoredView(manifest, layouts)

"""Reads what a store says of itself: manifests, layouts, samples. Distrusts all of it, opens no shard.

A store is untrusted input: only regular files are read, every `zarr.json` must equal what its manifest implies, and
every fingerprint is computed again.
"""

from __future__ import annotations

import os
import re
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from cache.canonical import Json
from cache.files import read_json, read_regular
from cache.layout import (
    FORMAT_VERSION,
    SAMPLES_FILE,
    TEACHER_KEY,
    ArrayLayout,
    group_metadata,
    text_embeddings_array,
)
from cache.manifest import (
    RootManifest,
    TeacherManifest,
    ViewManifest,
    array_fingerprint,
    store_fingerprint,
)
from cache.plan import view_layouts
from cache.samples import SampleEntry, decode_samples, samples_digest
from data.errors import StoreCorruptError, StoreIncompleteError, StoreMissingError, StoreStaleError
from data.geometry import VIEWS, View

_Manifest = TypeVar("_Manifest", bound=BaseModel)


@dataclass(frozen=True)
class StoredView:
    """One view of a teacher: its manifest and its arrays' layouts by name, in commit order."""

    manifest: ViewManifest
    layouts: dict[str, ArrayLayout]


@dataclass(frozen=True)
class StoredTeacher:
    """One teacher of a store."""

    manifest: TeacherManifest
    views: dict[View, StoredView]
    text_embeddings: ArrayLayout | None

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

    path: Path
    root: RootManifest
    teachers: dict[str, StoredTeacher]

    @cached_property
    def samples(self) -> list[SampleEntry]:
        """The rows, in order; raises StoreCorruptError where they are not those of the root manifest."""
        path = self.path / SAMPLES_FILE
        try:
            encoded = read_regular(self.path, SAMPLES_FILE)
        except FileNotFoundError:
            raise StoreCorruptError(f"{path}: missing") from None
        found = samples_digest(encoded)
        if found != self.root.dataset.samples_sha256:
            expected = self.root.dataset.samples_sha256
            raise StoreCorruptError(f"{path}: expected SHA-256 {expected}, found {found}: the file was edited")
        samples = decode_samples(encoded, str(path))
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


def is_store(path: Path) -> bool:
    """Return whether something that calls itself a Zarr group lies at the path."""
    return (path / "zarr.json").is_file()


def read_catalog(path: Path) -> Catalog:
    """Return the description of the store at a path.

    Raises StoreMissingError where there is none, StoreStaleError for a newer format, StoreCorruptError for anything
    that contradicts itself.
    """
    if sys.byteorder != "little":
        raise StoreStaleError("stores hold little-endian data, which this big-endian machine cannot map")
    if not is_store(path):
        raise _missing(path)
    root = _read_manifest(path, "", RootManifest)
    teachers = {}
    for name in _folders(path):
        if TEACHER_KEY.fullmatch(name):
            teachers[name] = _read_teacher(path, root, name)
    return Catalog(path, root, teachers)


def _missing(path: Path) -> StoreMissingError:
    near = sorted(str(p) for p in path.parent.glob("*.zarr") if is_store(p)) if path.parent.is_dir() else []
    found = f"; stores beside it: {', '.join(near)}" if near else ""
    what = "is not a store (it has no zarr.json)" if path.exists() else "does not exist"
    return StoreMissingError(
        f"{path} {what}{found}",
        hint=f"check the path, or make the store: python cli.py extract-teachers --out {path}",
    )


def _read_manifest(store: Path, group: str, kind: type[_Manifest]) -> _Manifest:
    path = store / group / "zarr.json"
    metadata = read_json(store, f"{group}/zarr.json" if group else "zarr.json")
    attributes = metadata.get("attributes") if isinstance(metadata, dict) else None
    content = attributes.get("teachonce") if isinstance(attributes, dict) else None
    if not isinstance(content, dict) and group:
        raise StoreCorruptError(f"{path}: expected the manifest of a part of this store, found none")
    if not isinstance(content, dict):
        raise StoreMissingError(
            f"{path}: a Zarr file, but not of a TeachOnce store",
            hint="give the path of a store that `python cli.py extract-teachers` made",
        )
    _refuse_newer(path, content)
    try:
        manifest = kind.model_validate(content)
        expected = group_metadata(manifest.model_dump(mode="json", exclude_unset=True))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "manifest"
        raise StoreCorruptError(f"{path}: {where}: {first['msg']}") from error
    except (ValueError, RecursionError) as error:
        raise StoreCorruptError(f"{path}: {error}") from error
    # As a whole: nothing may stand there that nobody reads, and no value may be another than the one written.
    if metadata != expected:
        raise StoreCorruptError(f"{path}: the manifest is not the one that was written: it was edited or damaged")
    return manifest


def _refuse_newer(path: Path, manifest: Json) -> None:
    version = manifest.get("format_version", FORMAT_VERSION)
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise StoreStaleError(
            f"{path}: expected format version {FORMAT_VERSION}, found the newer {version}",
            hint="update TeachOnce, or read the store with the version that wrote it",
        )


def _read_teacher(store: Path, root: RootManifest, key: str) -> StoredTeacher:
    folder = store / key
    manifest = _read_manifest(store, key, TeacherManifest)
    if manifest.key != key:
        raise StoreCorruptError(f"{folder}/zarr.json: expected the manifest of {key!r}, found that of {manifest.key!r}")
    views = {view: _read_view(store, root, manifest, view) for view in VIEWS if (folder / view).is_dir()}
    text = None
    if manifest.text_embeddings_shape is not None:
        text = text_embeddings_array(key, *manifest.text_embeddings_shape)
        _check_metadata(store, text)
    return StoredTeacher(manifest, views, text)


def _read_view(store: Path, root: RootManifest, teacher: TeacherManifest, view: View) -> StoredView:
    folder = store / teacher.key / view
    manifest = _read_manifest(store, f"{teacher.key}/{view}", ViewManifest)
    if manifest.view != view:
        raise StoreCorruptError(f"{folder}/zarr.json: expected the manifest of view {view}, found {manifest.view}")
    for name, array in manifest.arrays.items():
        expected = array_fingerprint(root, teacher.identity, view, name, array.sample_shape, array.dtype)
        if expected != array.fingerprint:
            raise StoreCorruptError(
                f"{folder}/{name}: expected fingerprint {expected}, found {array.fingerprint}: a manifest was edited"
            )
    layouts = view_layouts(root, teacher.key, manifest)
    for layout in layouts.values():
        _check_metadata(store, layout)
    return StoredView(manifest, layouts)


def _check_metadata(store: Path, layout: ArrayLayout) -> None:
    name = f"{layout.path}/zarr.json"
    if read_json(store, name) != layout.metadata():
        raise StoreCorruptError(
            f"{store / name}: is not what the manifests imply: the file was edited or belongs elsewhere"
        )


def _folders(folder: Path) -> list[str]:
    with os.scandir(folder) as found:
        return sorted(entry.name for entry in found if entry.is_dir(follow_symlinks=False))


def is_staging_of(name: str, store_name: str) -> bool:
    """Return whether a sibling's name is that of an unfinished build of the store."""
    return re.fullmatch(re.escape(store_name) + r"\.new-\d+", name) is not None

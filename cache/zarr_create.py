"""Creates Zarr stores, teachers and views: built whole beside the store, flushed, then renamed into place.

So a folder that exists holds complete metadata, whatever the moment of a kill. The `zarr.json` files are written from
`ArrayLayout.metadata`, the very dictionary the reader insists on; zarr-python is the referee in the tests.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cache.canonical import Json
from cache.files import sync_folder, write_new
from cache.layout import SAMPLES_FILE, ArrayLayout, constant_array, group_attributes, group_metadata
from cache.manifest import RootManifest, TeacherParts, ViewManifest
from cache.plan import view_layouts
from cache.shard import check_shard_data
from cache.storage import StoreBuilder
from cache.zarr_storage import ZarrArray
from data.errors import StoreWriteError


class ZarrBuilder(StoreBuilder):
    """Builds below `STORE.new-<pid>`, then renames."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._staged = path.with_name(f"{path.name}.new-{os.getpid()}")

    def create(self, root: RootManifest, samples: bytes, teachers: Sequence[TeacherParts]) -> None:
        """Create the store; an existing empty folder is taken over."""
        if self._path.exists() and (not self._path.is_dir() or any(self._path.iterdir())):
            raise StoreWriteError(
                f"{self._path}: something that is not a store is already there",
                hint="give another --out, or move it away",
            )
        _write_group(self._staged, root.written())
        write_new(self._staged / SAMPLES_FILE, samples)
        for teacher in teachers:
            _write_teacher(self._staged, teacher, root)
        _install(self._staged, self._path)

    def add_teacher(self, root: RootManifest, teacher: TeacherParts) -> None:
        """Build the teacher's folder, then rename it into the store."""
        self._staged.mkdir()
        _write_teacher(self._staged, teacher, root)
        key = teacher.manifest.key
        _install(self._staged / key, self._path / key)
        self._staged.rmdir()

    def add_view(self, root: RootManifest, teacher: str, view: ViewManifest) -> None:
        """Build the view's folder, then rename it into the teacher's."""
        _write_view(self._staged, teacher, root, view)
        _install(self._staged / teacher / view.view, self._path / teacher / view.view)
        shutil.rmtree(self._staged)

    def add_array(self, layout: ArrayLayout) -> None:
        """Build an array's empty folder, then rename it into the store."""
        (self._staged / layout.path).parent.mkdir(parents=True)
        _write_array(self._staged, layout)
        _install(self._staged / layout.path, self._path / layout.path)
        shutil.rmtree(self._staged)

    def sweep(self) -> None:
        """Remove every `STORE.new-<pid>`."""
        for sibling in self._path.parent.iterdir() if self._path.parent.is_dir() else ():
            if re.fullmatch(re.escape(self._path.name) + r"\.new-\d+", sibling.name):
                shutil.rmtree(sibling)

    def finish(self, *, complete: bool) -> None:
        """Nothing: a Zarr store lies at its final name from the start."""


def write_constant(store: Path, layout: ArrayLayout, values: NDArray[np.float32]) -> None:
    """Write the one chunk of a teacher's constant; an old one is replaced.

    Raises StoreWriteError where a value is not finite.
    """
    values = np.ascontiguousarray(values, dtype="<f4")
    if check_shard_data(layout, 0, values) is not None:
        raise StoreWriteError(f"{store}: {layout.path} holds values that are not finite: check the teacher's weights")
    ZarrArray(store, layout).write_shard(0, values, rank=0)


def _write_array(store: Path, layout: ArrayLayout) -> None:
    """Write an array's metadata and the empty folders of its shards."""
    folder = store / layout.path
    folder.mkdir()
    write_metadata(folder, layout.metadata())
    # All of them now: a shard's commit then needs to flush one folder, not a chain of new ones.
    for shard in range(layout.num_shards):
        (folder / layout.shard_folder(shard)).mkdir(parents=True, exist_ok=True)


def write_metadata(folder: Path, metadata: dict[str, Json]) -> None:
    """Write a new `zarr.json`, flushed."""
    write_new(folder / "zarr.json", metadata_text(metadata))


def metadata_text(metadata: dict[str, Json]) -> bytes:
    """Return the bytes of a `zarr.json`."""
    return json.dumps(metadata, indent=2, allow_nan=False).encode("utf-8")


def _install(staged: Path, final: Path) -> None:
    for folder, _, _ in os.walk(staged, topdown=False):
        sync_folder(Path(folder))
    staged.rename(final)
    sync_folder(final.parent)


def _write_group(folder: Path, manifest: dict[str, Json]) -> None:
    folder.mkdir(parents=True)
    write_metadata(folder, group_metadata(group_attributes(manifest)))


def _write_teacher(store: Path, teacher: TeacherParts, root: RootManifest) -> None:
    key = teacher.manifest.key
    _write_group(store / key, teacher.manifest.written())
    for name, values in teacher.constants.items():
        layout = constant_array(key, name, (values.shape[0], values.shape[1]))
        _write_array(store, layout)
        write_constant(store, layout, values)
    for view in teacher.views.values():
        _write_view(store, key, root, view)


def _write_view(store: Path, teacher: str, root: RootManifest, view: ViewManifest) -> None:
    _write_group(store / teacher / view.view, view.written())
    for layout in view_layouts(root, teacher, view).values():
        _write_array(store, layout)

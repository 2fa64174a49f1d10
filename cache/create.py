"""Creates stores, teachers and views: built whole beside the store, flushed, then renamed into place.

So a folder that exists holds complete metadata, whatever the moment of a kill. The `zarr.json` files are written from
`ArrayLayout.metadata`, the very dictionary the reader insists on; zarr-python is the referee in the tests.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from cache.canonical import Json
from cache.catalog import is_staging_of
from cache.files import sync_folder, write_new
from cache.layout import SAMPLES_FILE, ArrayLayout, group_metadata, text_embeddings_array
from cache.manifest import RootManifest, ViewManifest
from cache.plan import StorePlan, TeacherPlan, view_layouts
from cache.samples import encode_samples
from cache.shard import check_shard_data, write_shard
from data.errors import StoreWriteError
from data.geometry import View

Views = dict[View, ViewManifest]


def create_store(path: Path, plan: StorePlan, root: RootManifest, views: dict[str, Views]) -> None:
    """Create a new store with all its teachers and views; an existing empty folder is taken over.

    Raises StoreWriteError where something else lies at the path, OSError where the disk refuses.
    """
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise StoreWriteError(
            f"{path}: something that is not a store is already there",
            hint="give another --out, or move it away",
        )
    staged = _stage(path)
    _write_group(staged, root.model_dump(mode="json"))
    write_new(staged / SAMPLES_FILE, encode_samples(plan.samples))
    for teacher in plan.teachers:
        _write_teacher(staged, teacher, root, views[teacher.key])
    _install(staged, path)


def add_teacher(path: Path, root: RootManifest, teacher: TeacherPlan, views: Views) -> None:
    """Add a teacher to an existing store; touches nothing that is there."""
    staged = _stage(path)
    staged.mkdir()
    _write_teacher(staged, teacher, root, views)
    _install(staged / teacher.key, path / teacher.key)
    staged.rmdir()


def add_view(path: Path, root: RootManifest, teacher: TeacherPlan, manifest: ViewManifest) -> None:
    """Add a view to a teacher of an existing store; touches nothing that is there."""
    staged = _stage(path)
    _write_view(staged, teacher.key, root, manifest)
    _install(staged / teacher.key / manifest.view, path / teacher.key / manifest.view)
    shutil.rmtree(staged)


def sweep(path: Path, layouts: Sequence[ArrayLayout]) -> None:
    """Remove what killed runs left: unfinished builds beside the store and unfinished shards in it."""
    for sibling in path.parent.iterdir() if path.parent.is_dir() else ():
        if is_staging_of(sibling.name, path.name):
            shutil.rmtree(sibling)
    for layout in layouts:
        for leftover in (path / layout.path).glob(".tmp-*"):
            leftover.unlink()


def _stage(path: Path) -> Path:
    return path.with_name(f"{path.name}.new-{os.getpid()}")


def _install(staged: Path, final: Path) -> None:
    for folder, _, _ in os.walk(staged, topdown=False):
        sync_folder(Path(folder))
    staged.rename(final)
    sync_folder(final.parent)


def _write_group(folder: Path, manifest: dict[str, Json]) -> None:
    folder.mkdir(parents=True)
    _write_metadata(folder, group_metadata(manifest))


def _write_metadata(folder: Path, metadata: dict[str, Json]) -> None:
    text = json.dumps(metadata, indent=2, allow_nan=False)
    write_new(folder / "zarr.json", text.encode("utf-8"))


def _write_teacher(store: Path, teacher: TeacherPlan, root: RootManifest, views: Views) -> None:
    _write_group(store / teacher.key, teacher.manifest().model_dump(mode="json"))
    if teacher.text_embeddings is not None:
        values = np.ascontiguousarray(teacher.text_embeddings, dtype="<f4")
        layout = text_embeddings_array(teacher.key, *values.shape)
        _write_array(store, layout)
        if check_shard_data(layout, 0, values) is not None:
            raise StoreWriteError(
                f"{store}: {layout.path} holds values that are not finite: check the teacher's weights"
            )
        write_shard(store / layout.path, layout, 0, values, ".tmp-0")
    for manifest in views.values():
        _write_view(store, teacher.key, root, manifest)


def _write_view(store: Path, teacher: str, root: RootManifest, manifest: ViewManifest) -> None:
    _write_group(store / teacher / manifest.view, manifest.model_dump(mode="json"))
    for layout in view_layouts(root, teacher, manifest).values():
        _write_array(store, layout)


def _write_array(store: Path, layout: ArrayLayout) -> None:
    folder = store / layout.path
    folder.mkdir()
    _write_metadata(folder, layout.metadata())
    # All of them now: a shard's commit then needs to flush one folder, not a chain of new ones.
    for shard in range(layout.num_shards):
        (folder / layout.shard_folder(shard)).mkdir(parents=True, exist_ok=True)

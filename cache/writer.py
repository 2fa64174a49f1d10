"""Writes a store: creates or resumes it, refuses what does not belong, commits shards.

Arrays commit independently; within a view the small ones go first, features last.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cache.canonical import Json, canonical_json
from cache.catalog import Catalog, StoredTeacher, is_store, read_catalog
from cache.compatibility import refuse_other_dataset, refuse_other_teacher, refuse_other_view
from cache.create import Views, add_teacher, add_view, create_store, sweep
from cache.files import append_line, writing
from cache.layout import ArrayLayout
from cache.ledger import LedgerEntry, merge_ledgers, read_ledgers
from cache.lock import exclusive
from cache.manifest import ViewManifest
from cache.plan import StorePlan, TeacherPlan
from cache.shard import check_shard_data, check_shard_file, write_shard
from data.errors import StoreCorruptError, StoreWriteError, TeachOnceError
from data.geometry import View

DEFAULT_BATCH_SIZE = 16


@dataclass(frozen=True)
class MissingShard:
    """One range of samples of one view that is not (wholly) committed.

    arrays: the names still to be written, in commit order.
    """

    teacher: str
    view: View
    shard: int
    first: int
    count: int
    arrays: tuple[str, ...]


class StoreWriter:
    """A store held for writing. Made by `open_writer`."""

    def __init__(self, catalog: Catalog, plan: StorePlan) -> None:
        self.catalog = catalog
        self.plan = plan
        self._committed = {layout.path: _recover(catalog.path, layout) for layout in self._layouts()}

    def batch_size(self, teacher: str, view: View) -> int:
        """Return the recorded batch size: batches lie on a grid that starts anew at each shard."""
        return self.catalog.teacher(teacher).view(view).manifest.layout.batch_size

    def missing(self) -> list[MissingShard]:
        """Return what the plan asks for and the store lacks, shard by shard, so that images are read in order."""
        found = []
        for teacher in self.plan.teachers:
            for view in self.plan.views:
                layouts = self.catalog.teacher(teacher.key).view(view).layouts
                any_layout = next(iter(layouts.values()))
                for shard in range(any_layout.num_shards):
                    names = tuple(n for n, layout in layouts.items() if shard not in self._committed[layout.path])
                    if names:
                        first, count = any_layout.shard_range(shard)
                        found.append(MissingShard(teacher.key, view, shard, first, count, names))
        return sorted(found, key=lambda missing: missing.first)

    def commit(self, missing: MissingShard, outputs: dict[str, NDArray[np.floating]]) -> None:
        """Write and commit one missing shard's arrays.

        outputs: [count, …] float32, or already of the stored dtype, by array name: all that the teacher puts out.
        Moments are computed here.

        Raises StoreWriteError naming the image whose values are not finite in the stored dtype, before anything is
        written; StoreWriteError where the disk refuses, and then the array in question lacks the shard and the store
        stays resumable; ValueError for outputs of other shapes.
        """
        layouts = self.catalog.teacher(missing.teacher).view(missing.view).layouts
        stored = {name: _cast(values, layouts[name]) for name, values in outputs.items()}
        for name, values in stored.items():
            self._refuse_non_finite(layouts[name], missing.shard, values)
        if "features" in stored:
            stored["moments"] = feature_moments(stored["features"])
        for name in missing.arrays:
            self._commit_array(layouts[name], missing.shard, stored[name])

    def _refuse_non_finite(self, layout: ArrayLayout, shard: int, values: NDArray[np.generic]) -> None:
        row = check_shard_data(layout, shard, values)
        if row is not None:
            raise StoreWriteError(
                f"{layout.path}: {self.plan.samples[row].id} (sample {row}) has values that are not finite in"
                f" {layout.dtype}",
                hint="extract in float32 (--dtype float32) into a new store, or check the teacher's weights",
            )

    def _commit_array(self, layout: ArrayLayout, shard: int, values: NDArray[np.generic]) -> None:
        folder = self.catalog.path / layout.path
        with writing(str(folder)):
            entry = write_shard(folder, layout, shard, values, f".tmp-0-{os.getpid()}-{shard}")
            append_line(folder / "ledger-0.jsonl", entry.line())
        self._committed[layout.path][shard] = entry

    def note_provenance(self, teacher: str, view: View, facts: dict[str, Json]) -> None:
        """Append one line to the provenance of every array of a view: who, when, with what, at what cost."""
        line = canonical_json({"time": datetime.now(UTC).isoformat(timespec="seconds"), **facts}) + b"\n"
        for layout in self.catalog.teacher(teacher).view(view).layouts.values():
            path = self.catalog.path / layout.path / "provenance.jsonl"
            with writing(str(path)):
                append_line(path, line)

    def finish(self) -> None:
        """Merge the ledgers: each array's `ledger.jsonl` then holds all its lines, sorted."""
        for layout in self._layouts():
            folder = self.catalog.path / layout.path
            with writing(str(folder)):
                entries, to_merge = read_ledgers(folder)
                if to_merge:
                    merge_ledgers(folder, entries.values())

    def _layouts(self) -> Iterator[ArrayLayout]:
        for teacher in self.plan.teachers:
            for view in self.plan.views:
                yield from self.catalog.teacher(teacher.key).view(view).layouts.values()


@contextmanager
def open_writer(path: Path, plan: StorePlan) -> Iterator[StoreWriter]:
    """Hold the store at a path for writing: created where there is none, else resumed, teachers and views added.

    Raises StoreLockedError where another process writes it, StoreStaleError naming every field in which a stored
    identity or layout differs from the plan's, StoreCorruptError where committed bytes are damaged, StoreWriteError
    where the disk refuses or the path cannot be a store's.
    """
    if path.name in ("", ".."):
        raise StoreWriteError(
            f"{path}: expected a folder to create, found one that is there", hint="give the store a name"
        )
    if path.is_symlink():
        path = path.resolve()  # one lock, and one place to build, whatever name the store is called by
    with exclusive(path):
        with writing(str(path)):
            sweep(path, [])
            try:
                if is_store(path):
                    _extend(path, plan)
                else:
                    _create(path, plan)
            except BaseException:
                with suppress(OSError):  # what cannot be swept now is swept by the next run
                    sweep(path, [])
                raise
            catalog = read_catalog(path)
            sweep(path, catalog.layouts())
        writer = StoreWriter(catalog, plan)
        with writing(str(path)):
            writer.finish()
        try:
            yield writer
        except BaseException:
            with suppress(TeachOnceError):  # a full disk must not hide what went wrong first
                writer.finish()
            raise
        writer.finish()


def feature_moments(features: NDArray[np.generic]) -> NDArray[np.float32]:
    """Return each sample's channel sums and sums of squares over its cells, [n, 2, C] float32.

    features: [n, Gh, Gw, C] as stored, so that the statistics are those of what a student will read.
    """
    cells = features.reshape(len(features), -1, features.shape[-1])
    moments = np.empty((len(features), 2, features.shape[-1]), dtype="<f4")
    for row, sample in enumerate(cells):  # one at a time: a float64 copy of a whole shard would be 180 MB
        values = sample.astype(np.float64)
        moments[row, 0] = values.sum(axis=0)
        moments[row, 1] = np.einsum("ij,ij->j", values, values)
    return moments


def _cast(values: NDArray[np.floating], layout: ArrayLayout) -> NDArray[np.generic]:
    with np.errstate(over="ignore"):  # an overflow becomes infinite, which the shard writer refuses by sample
        return values.astype(layout.numpy_dtype, copy=False)


def _create(path: Path, plan: StorePlan) -> None:
    root = plan.root_manifest()
    batch_size = plan.batch_size or DEFAULT_BATCH_SIZE
    views: dict[str, Views] = {
        t.key: {v: plan.view_manifest(root, t, v, batch_size) for v in plan.views} for t in plan.teachers
    }
    _check_space(path, plan)
    create_store(path, plan, root, views)


def _extend(path: Path, plan: StorePlan) -> None:
    catalog = read_catalog(path)
    refuse_other_dataset(catalog, plan)
    root = catalog.root
    new_views: list[tuple[TeacherPlan, ViewManifest]] = []
    new_teachers: list[tuple[TeacherPlan, Views]] = []
    for teacher in plan.teachers:
        stored = catalog.teachers.get(teacher.key)
        if stored is not None:
            refuse_other_teacher(path, stored, teacher)
        views = {view: plan.view_manifest(root, teacher, view, _batch_size(plan, stored, view)) for view in plan.views}
        if stored is None:
            new_teachers.append((teacher, views))
            continue
        for manifest in views.values():
            refuse_other_view(path, stored, manifest)
        new_views.extend((teacher, manifest) for view, manifest in views.items() if view not in stored.views)
    # Only now that nothing is refused is anything made.
    for teacher, manifest in new_views:
        add_view(path, root, teacher, manifest)
    for teacher, views in new_teachers:
        add_teacher(path, root, teacher, views)


def _batch_size(plan: StorePlan, stored: StoredTeacher | None, view: View) -> int:
    views = {} if stored is None else stored.views
    recorded = views.get(view) or next(iter(views.values()), None)
    return plan.batch_size or (DEFAULT_BATCH_SIZE if recorded is None else recorded.manifest.layout.batch_size)


def _recover(store: Path, layout: ArrayLayout) -> dict[int, LedgerEntry]:
    folder = store / layout.path
    entries, _ = read_ledgers(folder)
    for entry in entries.values():
        for problem in check_shard_file(folder, layout, entry):
            raise StoreCorruptError(
                f"{layout.path}: shard {entry.shard}: {problem.problem}",
                hint=f"see all of it: python cli.py inspect-cache {store} --verify; then extract into a new store",
            )
    return entries


def _check_space(path: Path, plan: StorePlan) -> None:
    need = planned_bytes(plan)
    parent = next(folder for folder in path.absolute().parents if folder.exists())
    free = shutil.disk_usage(parent).free
    if need > free:
        raise StoreWriteError(
            f"{path}: the store needs {need / 1e9:.1f} GB, but {parent} has {free / 1e9:.1f} GB free",
            hint="give another --out, fewer views or --limit",
        )


def planned_bytes(plan: StorePlan) -> int:
    """Return the bytes of all sample arrays of the complete store."""
    sample = sum(
        int(np.prod(shape)) * np.dtype(plan.dtype_of(name)).itemsize
        for teacher in plan.teachers
        for name, shape in teacher.array_shapes().items()
    )
    return sample * len(plan.views) * len(plan.samples)

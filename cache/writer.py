"""Writes a store: creates or resumes it, refuses what does not belong, commits shards.

Arrays commit independently; within a view the small ones go first, features last. Several ranks may write one store:
rank 0 alone locks, creates, sweeps and merges, and every rank commits a share of the missing ranges.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cache.canonical import Json
from cache.catalog import Catalog, StoredTeacher, read_catalog
from cache.compatibility import refuse_other_dataset, refuse_other_teacher, refuse_other_view
from cache.encoding import NotStorableError, decode, encode
from cache.fidelity import Fidelity, FidelityMeter
from cache.files import writing
from cache.image_arrays import refuse_mixing
from cache.layout import ArrayLayout
from cache.lock import exclusive
from cache.manifest import RootManifest, TeacherParts, ViewManifest
from cache.open_storage import builder_for, find_storage
from cache.plan import StorePlan, TeacherPlan
from cache.ranks import ALONE, Ranks, by_first, exchange
from cache.repair import Repair, drop_damaged_shards
from cache.samples import encode_samples
from cache.shard import check_shard, check_shard_data
from cache.storage import ArrayStorage, StoreBuilder
from cache.zarr_mend import mend
from cache.zarr_storage import ZarrStorage
from data.errors import StoreCorruptError, StoreWriteError, TeachOnceError
from data.geometry import View

# Enough for a percentile over tokens, few enough for the meter to stay small.
_MAX_METERED_SAMPLES = 256
Dropped = dict[tuple[str, int], str | None]


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


@dataclass(frozen=True)
class _Opened:
    """What rank 0 found when it opened the store, for every rank. dropped: damaged shards, to be written again."""

    catalog: Catalog
    committed: dict[str, set[int]]
    dropped: Dropped


class StoreWriter:
    """A store held for writing. Made by `open_writer`.

    repaired: the damaged shards that this process wrote again.
    """

    def __init__(self, opened: _Opened, plan: StorePlan, ranks: Ranks = ALONE) -> None:
        self.catalog = opened.catalog
        self.plan = plan
        self.ranks = ranks
        self.repaired: list[Repair] = []
        self._dropped = opened.dropped
        self._committed = {path: set(shards) for path, shards in opened.committed.items()}
        self._meters: dict[tuple[str, View], FidelityMeter] = {}
        self._metered: dict[tuple[str, View], int] = {}
        # The ranges are dealt out once: what this rank commits must not change another's share.
        ranges = sorted({missing.first for missing in self._all_missing()})
        self._mine = set(ranges[ranks.rank :: ranks.size])

    def batch_size(self, teacher: str, view: View) -> int:
        """Return the recorded batch size: batches lie on a grid that starts anew at each shard."""
        return self.catalog.teacher(teacher).view(view).manifest.layout.batch_size

    def missing(self) -> list[MissingShard]:
        """Return what the plan asks for and the store lacks, shard by shard, so that images are read in order.

        Of several ranks, each gets its own share of the ranges.
        """
        return [missing for missing in self._all_missing() if missing.first in self._mine]

    def _all_missing(self) -> list[MissingShard]:
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

    def commit(self, missing: MissingShard, outputs: Mapping[str, NDArray[np.floating]]) -> None:
        """Write and commit one missing shard's arrays.

        outputs: [count, …] float16 or float32 by array name: all that the teacher puts out. Moments and scales are
        computed here.

        Raises StoreWriteError naming the image whose values are not finite in the stored dtype, before anything is
        written; StoreWriteError where the disk refuses, and then the array in question lacks the shard and the store
        stays resumable; ValueError for outputs of other shapes.
        """
        stored = self.encode(missing, outputs)
        if "scale_token" in stored:
            self._meter(missing, outputs["features"], stored)
        self.commit_stored(missing, stored)

    def encode(
        self, missing: MissingShard, outputs: Mapping[str, NDArray[np.floating]]
    ) -> dict[str, NDArray[np.generic]]:
        """Return outputs as they are stored, without committing them.

        Raises StoreWriteError naming the image whose features int8 cannot hold.
        """
        layouts = self.catalog.teacher(missing.teacher).view(missing.view).layouts
        try:
            return encode(outputs, layouts)
        except NotStorableError as error:
            raise self._not_finite(layouts["features"], missing.first + error.row) from None

    def commit_stored(self, missing: MissingShard, stored: Mapping[str, NDArray[np.generic]]) -> None:
        """Write and commit one missing shard's arrays, given as they are stored; raises as `commit`."""
        layouts = self.catalog.teacher(missing.teacher).view(missing.view).layouts
        for name in reversed(layouts):  # features first: what follows from them is told by them
            row = check_shard_data(layouts[name], missing.shard, stored[name])
            if row is not None:
                raise self._not_finite(layouts[name], row)
        for name in missing.arrays:
            self._commit_array(layouts[name], missing.shard, stored[name])

    def _not_finite(self, layout: ArrayLayout, row: int) -> StoreWriteError:
        return StoreWriteError(
            f"{layout.path}: {self.plan.samples[row].id} (sample {row}) has values that are not finite in"
            f" {layout.dtype}",
            hint="store float32 (--dtype float32) in a new store, or check the teacher's weights",
        )

    def _meter(
        self, missing: MissingShard, features: NDArray[np.floating], stored: Mapping[str, NDArray[np.generic]]
    ) -> None:
        """Compare one sample of the range with what a student will read of it."""
        target, row = (missing.teacher, missing.view), missing.count // 2
        if self._metered.get(target, 0) < _MAX_METERED_SAMPLES:
            restored = decode({name: values[row : row + 1] for name, values in stored.items()})
            self._meters.setdefault(target, FidelityMeter()).update(features[row : row + 1], restored)
            self._metered[target] = self._metered.get(target, 0) + 1

    def _commit_array(self, layout: ArrayLayout, shard: int, values: NDArray[np.generic]) -> None:
        storage = self.catalog.storage.array(layout)
        with writing(storage.where(shard)):
            entry = storage.write_shard(shard, values, self.ranks.rank)
            storage.append_to_ledger(entry, self.ranks.rank)
        self._committed[layout.path].add(shard)
        if (layout.path, shard) in self._dropped:
            was = self._dropped[layout.path, shard]
            self.repaired.append(Repair(layout.path, shard, was, entry.sha256))

    def note_provenance(
        self, teacher: str, view: View, facts: Mapping[str, Json], *, fidelity: Fidelity | None = None
    ) -> None:
        """Append one note to the provenance of every array of a view: who, when, with what, at what cost.

        To the given facts come the shards that were repaired with other bytes and, for features, their fidelity: the
        given one, else what was measured while int8 features were committed.
        """
        if fidelity is None and (teacher, view) in self._meters:
            fidelity = self._meters[teacher, view].result()
        for name, layout in self.catalog.teacher(teacher).view(view).layouts.items():
            note = {"time": datetime.now(UTC).isoformat(timespec="seconds"), **facts}
            if name == "features" and fidelity is not None:
                note["fidelity"] = fidelity.model_dump()
            repaired = [repair for repair in self.repaired if repair.array == layout.path]
            if repaired:
                note["repaired"] = [{"shard": r.shard, "was": r.sha256_was, "is": r.sha256_is} for r in repaired]
            with writing(f"{self.catalog.path}: provenance of {layout.path}"):
                self.catalog.storage.array(layout).append_provenance(note)

    def settle(self) -> None:
        """Merge the ledgers of the plan's arrays: each then holds all its lines, sorted. Rank 0's alone to do."""
        for storage in _storages(self.catalog, self.plan):
            with writing(storage.layout.path):
                storage.settle_ledger()


@contextmanager
def open_writer(
    path: Path,
    plan: StorePlan,
    *,
    ranks: Ranks = ALONE,
    repair: bool = False,
    progress: Callable[[int], None] = lambda _: None,
) -> Iterator[StoreWriter]:
    """Hold the store at a path for writing: created where there is none, else resumed, teachers and views added.

    ranks: the processes that write it together; all of them open it with equal arguments.  repair: verify what is
    committed first and take back the commit of damaged shards, so that they are missing again.  progress: told the
    bytes of every shard that this verification has read.

    Raises StoreLockedError where another process writes it, StoreStaleError naming every field in which a stored
    identity or layout differs from the plan's, StoreCorruptError where committed bytes are damaged, StoreWriteError
    where the disk refuses or the path cannot be a store's; on every rank what rank 0 met.
    """
    path = _checked(path)
    with ExitStack() as held:

        def opening() -> _Opened:
            held.enter_context(exclusive(path))
            with writing(str(path)):
                return _open(path, plan, repair, progress)

        writer = StoreWriter(by_first(ranks, opening), plan, ranks)
        try:
            yield writer
        except BaseException as error:
            with suppress(TeachOnceError):  # a full disk must not hide what went wrong first
                _leave(writer, path, f"{type(error).__name__}: {error}")
            raise
        _leave(writer, path, None)


def refuse_other_images(path: Path, plan: StorePlan) -> None:
    """Raise StoreStaleError where a store of other images lies at the path: told before any teacher is built.

    Reads nothing but the store's description; raises StoreCorruptError where that contradicts itself.
    """
    if find_storage(path) is not None:
        catalog = read_catalog(path)
        refuse_mixing(catalog, plan)
        refuse_other_dataset(catalog, plan)


def _checked(path: Path) -> Path:
    if path.name in ("", ".."):
        raise StoreWriteError(
            f"{path}: expected a folder to create, found one that is there", hint="give the store a name"
        )
    # One lock, and one place to build, whatever name the store is called by.
    return path.resolve() if path.is_symlink() else path


def _open(path: Path, plan: StorePlan, repair: bool, progress: Callable[[int], None]) -> _Opened:
    storage = find_storage(path)
    builder = builder_for(path, storage, plan.format)
    builder.sweep()
    try:
        if storage is None:
            _create(path, plan, builder)
        else:
            if repair and isinstance(storage, ZarrStorage):
                mend(storage, plan.root_manifest(), encode_samples(plan.samples), _all_parts(plan))
            _extend(path, plan, builder)
    except BaseException:
        with suppress(OSError):  # what cannot be swept now is swept by the next run
            builder.sweep()
        raise
    catalog = read_catalog(path)
    for layout in [*catalog.layouts(), *(c for t in catalog.teachers.values() for c in t.constants.values())]:
        catalog.storage.array(layout).sweep()
    storages = list(_storages(catalog, plan))
    dropped = drop_damaged_shards(storages, progress) if repair else {}
    committed = {storage.layout.path: _recover(catalog, storage) for storage in storages}
    if isinstance(catalog.storage, ZarrStorage):  # an HDF5 file has had its room from the start
        _check_space(path, _missing_bytes(storages, committed))
    return _Opened(catalog, committed, dropped)


def _leave(writer: StoreWriter, path: Path, failure: str | None) -> None:
    """Merge once all ranks are done; where one failed, the others fail too, after the merge."""
    try:
        failures = exchange(writer.ranks, failure)
    finally:
        if writer.ranks.rank == 0:
            writer.settle()
    if writer.ranks.rank == 0:
        complete = all(_is_complete(storage) for storage in map(writer.catalog.storage.array, writer.catalog.layouts()))
        with writing(str(path)):
            builder_for(path, writer.catalog.storage, writer.plan.format).finish(complete=complete)
    exchange(writer.ranks, None)
    others = [f"rank {rank}: {said}" for rank, said in enumerate(failures) if said is not None]
    if others and failure is None:
        raise StoreWriteError(
            f"{path}: {'; '.join(others)}", hint="what was committed is intact: run the same command again to resume"
        )


def _is_complete(storage: ArrayStorage) -> bool:
    return len(storage.read_ledger()) == storage.layout.num_shards


def _storages(catalog: Catalog, plan: StorePlan) -> Iterator[ArrayStorage]:
    for teacher in plan.teachers:
        for view in plan.views:
            for layout in catalog.teacher(teacher.key).view(view).layouts.values():
                yield catalog.storage.array(layout)


def _parts(plan: StorePlan, root: RootManifest, teacher: TeacherPlan, stored: StoredTeacher | None) -> TeacherParts:
    views = {
        view: plan.view_manifest(root, teacher, view, _batch_size(plan, teacher, stored, view)) for view in plan.views
    }
    return TeacherParts(teacher.manifest(), teacher.constants(), views)


def _all_parts(plan: StorePlan) -> list[TeacherParts]:
    root = plan.root_manifest()
    return [_parts(plan, root, teacher, None) for teacher in plan.teachers]


def _create(path: Path, plan: StorePlan, builder: StoreBuilder) -> None:
    _check_space(path, plan.planned_bytes())
    builder.create(plan.root_manifest(), encode_samples(plan.samples), _all_parts(plan))


def _extend(path: Path, plan: StorePlan, builder: StoreBuilder) -> None:
    catalog = read_catalog(path)
    refuse_mixing(catalog, plan)
    refuse_other_dataset(catalog, plan)
    root = catalog.root
    new_views: list[tuple[str, ViewManifest]] = []
    new_teachers: list[TeacherParts] = []
    for teacher in plan.teachers:
        stored = catalog.teachers.get(teacher.key)
        if stored is not None:
            refuse_other_teacher(path, stored, teacher)
        parts = _parts(plan, root, teacher, stored)
        if stored is None:
            new_teachers.append(parts)
            continue
        for manifest in parts.views.values():
            refuse_other_view(path, stored, manifest)
        new_views.extend((teacher.key, view) for name, view in parts.views.items() if name not in stored.views)
    # Only now that nothing is refused is anything made.
    for key, manifest in new_views:
        builder.add_view(root, key, manifest)
    for parts in new_teachers:
        builder.add_teacher(root, parts)


def _batch_size(plan: StorePlan, teacher: TeacherPlan, stored: StoredTeacher | None, view: View) -> int:
    views = {} if stored is None else stored.views
    recorded = views.get(view) or next(iter(views.values()), None)
    asked = teacher.batch_size or plan.batch_size
    return asked or (plan.default_batch_size if recorded is None else recorded.manifest.layout.batch_size)


def _recover(catalog: Catalog, storage: ArrayStorage) -> set[int]:
    """Return the committed shards of an array, its ledger settled.

    Raises StoreCorruptError where a committed shard's file is not there, or not of its size and index.
    """
    entries = storage.read_ledger()
    for entry in entries.values():
        for problem in check_shard(storage, entry):
            raise StoreCorruptError(
                f"{storage.layout.path}: shard {entry.shard}: {problem.problem}",
                hint=f"see all of it: python cli.py inspect-cache {catalog.path} --verify; then write the damaged"
                " shards again: the same command with --repair",
            )
    storage.settle_ledger()
    return set(entries)


def _missing_bytes(storages: list[ArrayStorage], committed: dict[str, set[int]]) -> int:
    return sum(
        storage.layout.shard_file_bytes(shard)
        for storage in storages
        for shard in range(storage.layout.num_shards)
        if shard not in committed[storage.layout.path]
    )


def _check_space(path: Path, need: int) -> None:
    parent = next(folder for folder in path.absolute().parents if folder.exists())
    free = shutil.disk_usage(parent).free
    if need > free:
        raise StoreWriteError(
            f"{path}: what is to be written needs {_size(need)}, but {parent} has {_size(free)} free",
            hint="free some space, or give another --out, fewer views, --limit or --dtype int8",
        )


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.3f} MB"

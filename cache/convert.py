"""Writes a store that is derived from another: int8, fewer dimensions, some of its teachers, another container.

Shard by shard: this thread reads the source and projects, the commit thread encodes and writes. So memory does not
depend on the number of samples, and what is committed stays: the same command again resumes.
"""

from __future__ import annotations

import platform
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from cache.canonical import Json
from cache.catalog import Catalog, read_catalog
from cache.commands import writing_command
from cache.commit_queue import CommitQueue, Outputs
from cache.derive import (
    ConvertRequest,
    DerivedTeacher,
    ShowProgress,
    Tick,
    check_destination,
    refuse_incomplete,
    select,
    silently,
    store_plans,
    with_basis,
)
from cache.fidelity import Fidelity, FidelityMeter
from cache.manifest import PcaManifest
from cache.plan import StorePlan
from cache.repair import Repair
from cache.source import ViewReader, fit_rows, reading
from cache.writer import MissingShard, StoreWriter, open_writer
from data.geometry import View

MEASURED_SAMPLES = 512

Target = tuple[str, View]  # a teacher's key and a view


@dataclass(frozen=True)
class ConvertedView:
    """One view of a teacher in both stores. bytes_before, bytes_after: of its arrays on disk.

    fidelity: of what is read from the derived store to what is read from the source; None without features.
    """

    teacher: str
    view: View
    bytes_before: int
    bytes_after: int
    fidelity: Fidelity | None


@dataclass(frozen=True)
class Conversion:
    """What a conversion did. written: teacher × view × sample that this run wrote.

    bases: the PCA of each teacher that was projected.  repairs: the damaged shards that were written again.
    """

    source: Path
    out: Path
    sets: tuple[str, ...]
    limit: int | None
    samples: int
    written: int
    seconds: float
    views: list[ConvertedView]
    bases: dict[str, PcaManifest]
    repairs: list[Repair]


def convert(request: ConvertRequest, show: ShowProgress = silently) -> Conversion:
    """Make or resume the derived store that was asked for.

    Raises UsageError for what cannot be asked of the source; StoreIncompleteError naming each array that lacks samples;
    StoreCorruptError naming the store that is damaged; else as `open_writer`. Whatever was committed stays.
    """
    start = time.monotonic()
    source = read_catalog(request.source)
    check_destination(source.path, request.out)
    teachers = select(source, request)
    rows = fit_rows(source, request.fit_ids) if request.components is not None else []
    finish = writing_command(source, [teacher.key for teacher in teachers])
    refuse_incomplete(source, teachers, rows, finish)
    teachers = [with_basis(source, teacher, request, rows, show) for teacher in teachers]
    views: dict[Target, ConvertedView] = {}
    repairs: list[Repair] = []
    written = 0
    for plan in store_plans(source, teachers, request):
        with _opened(request, plan, show) as writer:
            run = _Run(source, teachers, writer, request)
            written += run.fill(show)
            views.update(run.conclude(show, start))
            repairs += writer.repaired
    return Conversion(
        source=request.source,
        out=request.out,
        sets=source.root.dataset.sets,
        limit=source.root.dataset.limit,
        samples=source.root.dataset.samples,
        written=written,
        seconds=time.monotonic() - start,
        views=[views[teacher.key, view] for teacher in teachers for view in teacher.views],
        bases={teacher.key: teacher.basis.manifest for teacher in teachers if teacher.basis is not None},
        repairs=repairs,
    )


@contextmanager
def _opened(request: ConvertRequest, plan: StorePlan, show: ShowProgress) -> Iterator[StoreWriter]:
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        before, done = done, done + count
        tick(done // 1_000_000 - before // 1_000_000)

    with ExitStack() as verifying:
        shown = show if request.repair else silently
        tick = verifying.enter_context(shown("verifying", max(1, plan.planned_bytes() // 1_000_000), "MB"))
        with open_writer(request.out, plan, repair=request.repair, progress=advance) as writer:
            verifying.close()
            yield writer


class _Commits:
    """What the commit queue calls in its thread: encodes what is derived and takes copies as they are stored."""

    def __init__(self, writer: StoreWriter, teachers: Mapping[str, DerivedTeacher]) -> None:
        self._writer = writer
        self._teachers = teachers

    def commit(self, missing: MissingShard, outputs: Outputs) -> None:
        """Commit one missing shard; raises as `StoreWriter.commit`."""
        teacher = self._teachers[missing.teacher]
        derived = {name: values for name, values in outputs.items() if not teacher.copies(name)}
        self._writer.commit_stored(missing, {**outputs, **self._writer.encode(missing, derived)})


class _Run:
    """One pass that fills what the derived store lacks, measures what came of it and notes both."""

    def __init__(
        self, source: Catalog, teachers: list[DerivedTeacher], writer: StoreWriter, request: ConvertRequest
    ) -> None:
        self._source = source
        self._writer = writer
        self._command = request.command
        self._teachers = {teacher.key: teacher for teacher in teachers}
        plan = writer.plan
        targets: list[Target] = [(teacher.key, view) for teacher in plan.teachers for view in plan.views]
        self._readers = {target: ViewReader(source, *target) for target in targets}
        self._missing = writer.missing()

    def fill(self, show: ShowProgress) -> int:
        """Write what is missing and return how many samples of a teacher's view that was."""
        total = sum(shard.count for shard in self._missing)
        if not total:
            return 0
        for target in self._readers:
            if not self._notes(target):  # from the start, so that a killed run's store says how to finish it
                self._writer.note_provenance(*target, self._origin(target))
        commits_of = _Commits(self._writer, self._teachers)
        with show("converting", total, "targets") as tick, CommitQueue(commits_of, depth=1) as commits:
            for shard in self._missing:
                commits.submit(shard, self._outputs(shard))
                tick(shard.count)
        return total

    def _outputs(self, shard: MissingShard) -> Outputs:
        """Return a range's copied arrays as they are stored, and its derived features as numbers."""
        teacher, reader = self._teachers[shard.teacher], self._readers[shard.teacher, shard.view]
        rows = range(shard.first, shard.first + shard.count)
        with reading(self._source):
            reader.prefetch(rows)
            outputs: Outputs = {name: reader.stored(name, rows) for name in reader.arrays if teacher.copies(name)}
            if not teacher.copies("features"):
                outputs["features"] = self._features(teacher, reader, rows)
        return outputs

    def _features(self, teacher: DerivedTeacher, reader: ViewReader, rows: range) -> NDArray[np.floating]:
        pca = None if teacher.basis is None else teacher.basis.pca
        first = reader.features(rows[0])
        channels = first.shape[-1] if pca is None else len(pca.components)
        dtype = first.dtype if pca is None else np.dtype(np.float32)
        features = np.empty((len(rows), *first.shape[:-1], channels), dtype=dtype)
        # One at a time: as numbers, a whole shard of the source would be up to four times what is stored.
        for place, row in enumerate(rows):
            values = reader.features(row)
            features[place] = values if pca is None else pca.project(values)
        return features

    def conclude(self, show: ShowProgress, start: float) -> dict[Target, ConvertedView]:
        """Return what became of each view: measured, and noted, where this run wrote to it or an earlier one could not.

        start: when the run began, by the monotonic clock.
        """
        wrote = {(shard.teacher, shard.view) for shard in self._missing}
        to_note = [t for t in self._readers if t in wrote or not any("bytes_after" in n for n in self._notes(t))]
        done = {target: self._result(target, self._noted_fidelity(target)) for target in self._readers}
        rows = self._measured_rows()
        with_features = [target for target in to_note if self._teachers[target[0]].features is not None]
        if with_features:
            with show("measuring", len(with_features) * len(rows), "samples") as tick:
                for target in with_features:
                    done[target] = self._result(target, self._measure(target, rows, tick))
        for target in to_note:
            facts = {
                **self._origin(target),
                "bytes_before": done[target].bytes_before,
                "bytes_after": done[target].bytes_after,
                "samples": sum(shard.count for shard in self._missing if (shard.teacher, shard.view) == target),
                "seconds_all_views": round(time.monotonic() - start, 3),
            }
            self._writer.note_provenance(*target, facts, fidelity=done[target].fidelity)
        return done

    def _measured_rows(self) -> list[int]:
        """Return the rows that are compared, evenly spaced over the store."""
        num_samples = len(self._source.samples)
        spaced = np.linspace(0, num_samples - 1, min(num_samples, MEASURED_SAMPLES))
        return [round(row) for row in spaced]

    def _measure(self, target: Target, rows: list[int], tick: Tick) -> Fidelity:
        """Compare what a student reads of the derived store, brought back to all channels, with the source."""
        basis = self._teachers[target[0]].basis
        pca = None if basis is None else basis.pca
        before, after = self._readers[target], ViewReader(self._writer.catalog, *target)
        meter = FidelityMeter()
        for row in rows:
            with reading(self._source):
                original = before.features(row)
            with reading(self._writer.catalog):
                restored = after.features(row)
            restored = restored if pca is None else pca.reconstruct(restored)
            meter.update(original[np.newaxis], restored[np.newaxis])
            tick(1)
        return meter.result()

    def _result(self, target: Target, fidelity: Fidelity | None) -> ConvertedView:
        after = ViewReader(self._writer.catalog, *target)
        return ConvertedView(*target, self._readers[target].num_bytes(), after.num_bytes(), fidelity)

    def _origin(self, target: Target) -> dict[str, Json]:
        content = {name: array.content_digest for name, array in self._readers[target].arrays.items()}
        return {
            "command": self._command,
            "source": {"store": str(self._source.path), "content": content},
            "host": socket.gethostname(),
            "versions": {"numpy": np.__version__, "python": platform.python_version()},
        }

    def _notes(self, target: Target) -> list[Json]:
        layouts = self._writer.catalog.teacher(target[0]).view(target[1]).layouts
        return self._writer.catalog.storage.array(next(reversed(layouts.values()))).read_provenance()

    def _noted_fidelity(self, target: Target) -> Fidelity | None:
        for note in reversed(self._notes(target)):
            try:
                return Fidelity.model_validate(note["fidelity"])
            except (KeyError, ValidationError):
                continue
        return None

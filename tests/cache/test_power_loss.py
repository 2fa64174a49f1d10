"""The power goes at any moment of a writer: what is left resumes to the bytes of an uninterrupted run."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from cache.catalog import read_catalog
from cache.reader import TeacherStore
from cache.verify import find_problems
from cache.writer import open_writer
from data.errors import StoreMissingError, TeachOnceError
from tests.cache.conftest import TinyStores
from tests.cache.power_loss import Flush, Moment, Recorder, Tree, folder_in_memory, moments, write_tree

if TYPE_CHECKING:
    from cache.plan import StoreFormat, StorePlan


@dataclass(frozen=True)
class Runs:
    """Runs that write one store, each up to so many ranges, None for all; the last one completes it."""

    store: str
    format: StoreFormat
    changes: tuple[tuple[dict[str, Any], int | None], ...]

    def plans(self, stores: TinyStores) -> list[StorePlan]:
        """Two shards of one sample."""
        return [stores.plan(2, shard_samples=1, format=self.format, **change) for change, _ in self.changes]


ONE: dict[str, Any] = {"teachers": ["dino"], "views": ["original"]}
RUNS = {
    # A new store, the rest of it, a view more, a teacher more (with text embeddings).
    "zarr": Runs("store.zarr", "zarr", ((ONE, 1), (ONE, None), ({"teachers": ["dino"]}, None), ({}, None))),
    # Nothing can be added to one of these.
    "hdf5": Runs("store.h5", "hdf5", (({}, 3), ({}, 2), ({}, None))),
}


def write(stores: TinyStores, recorder: Recorder, runs: Runs, below: str = "") -> None:
    """Write the store; promise what each step has made."""
    for plan, (_, limit) in zip(runs.plans(stores), runs.changes, strict=True):
        with open_writer(stores.folder / below / runs.store, plan) as writer:
            recorder.promise(*((teacher.key, view) for teacher in plan.teachers for view in plan.views))
            for missing in writer.missing()[:limit]:
                writer.commit(missing, stores.outputs(missing))
                rows = range(missing.first, missing.first + missing.count)
                recorder.promise(*((missing.teacher, missing.view, a, row) for a in missing.arrays for row in rows))


class Referee:
    """The uninterrupted store, and what is wrong with what a power cut left of another one."""

    def __init__(self, folder: Path, runs: Runs, below: str = "") -> None:
        self.folder = folder / "state"
        self.store = f"{below}{runs.store}"
        self.plan = runs.plans(TinyStores(folder))[-1]
        whole = TinyStores(folder).build(self.plan, f"whole-{runs.store}")
        assert find_problems(read_catalog(whole), verify=True) == []
        self.files = files_of(whole)
        self.values = {
            layout.path: TeacherStore(whole).array(*layout.path.split("/")).gather(range(2))  # type: ignore[arg-type]
            for layout in read_catalog(whole).layouts()
        }
        self.seen: set[tuple[Any, ...]] = set()

    def fault(self, tree: Tree, promised: frozenset[Any]) -> str | None:
        """Return what is wrong with a tree, None where it keeps every promise and resumes; each is judged once."""
        key = (promised, *sorted(tree.items()))
        if key in self.seen:
            return None
        self.seen.add(key)
        write_tree(tree, self.folder)
        try:
            return self._broken_promise(promised) or self._fault_of_resumed()
        except TeachOnceError as error:
            return str(error)
        finally:
            shutil.rmtree(self.folder)

    def _broken_promise(self, promised: frozenset[Any]) -> str | None:
        found: set[Any] = set()
        try:
            opened = TeacherStore(self.folder / self.store)
        except StoreMissingError:
            return f"gone: {promised}" if promised else None
        problems = find_problems(opened.catalog, verify=True)
        for layout in opened.catalog.layouts():
            teacher, view, name = layout.path.split("/")
            found.add((teacher, view))
            reader = opened.array(teacher, view, name)  # type: ignore[arg-type]
            for row in {0, 1}.difference(reader.missing_rows([0, 1])):
                if not np.array_equal(reader.read(row), self.values[layout.path][row]):
                    return f"{layout.path}: row {row} is served with other values"
                found.add((teacher, view, name, row))
        lost = promised - found
        return f"problems: {problems}" if problems else f"lost: {lost}" if lost else None

    def _fault_of_resumed(self) -> str | None:
        path = TinyStores(self.folder).build(self.plan, self.store)
        if files_of(path) != self.files:
            return "the resumed store is another one than that of an uninterrupted run"
        left = sorted(entry.name for entry in path.parent.iterdir())
        return None if left == [path.name, f"{path.name}.lock"] else f"left behind: {left}"


def files_of(store: Path) -> Tree:
    if store.is_file():
        return {"": store.read_bytes()}
    return {str(p.relative_to(store)): p.read_bytes() if p.is_file() else None for p in store.rglob("*")}


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setattr(os, "fsync", lambda _: None)
    with folder_in_memory() as folder:
        yield folder


@pytest.fixture(params=list(RUNS.values()), ids=list(RUNS))
def runs(request: pytest.FixtureRequest) -> Runs:
    found: Runs = request.param
    return found


@pytest.fixture
def referee(memory: Path, runs: Runs) -> Referee:
    return Referee(memory, runs)


def record(folder: Path, runs: Runs, below: str = "") -> Recorder:
    recorder = Recorder(folder)
    with recorder.recording():
        write(TinyStores(folder), recorder, runs, below)
    return recorder


@pytest.fixture(scope="module")
def recorders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Recorder]:
    return {runs.format: record(tmp_path_factory.mktemp("recorded"), runs) for runs in RUNS.values()}


def faults(referee: Referee, found: Iterable[Moment], limit: int) -> Iterator[str]:
    for moment in found:
        for tree in moment.trees(limit, seed=0):
            if fault := referee.fault(tree, moment.promised):
                yield f"after {moment.label}: {fault}"


def test_a_writer_loses_nothing_that_it_promised_and_resumes(
    referee: Referee, recorders: dict[str, Recorder], runs: Runs
) -> None:
    found = list(moments(recorders[runs.format]))
    assert len(found) > 100
    assert next(faults(referee, found[:: len(found) // 50], 3), None) is None
    assert len(referee.seen) > 40


@pytest.mark.slow
def test_a_writer_loses_nothing_at_any_moment(referee: Referee, recorders: dict[str, Recorder], runs: Runs) -> None:
    assert next(faults(referee, moments(recorders[runs.format]), 150), None) is None
    assert len(referee.seen) > {"zarr": 2000, "hdf5": 90}[runs.format]


@pytest.mark.slow
def test_the_power_may_go_again_while_a_store_is_resumed(
    referee: Referee, recorders: dict[str, Recorder], runs: Runs, tmp_path: Path
) -> None:
    generator = random.Random(0)
    for number, moment in enumerate(generator.sample(list(moments(recorders[runs.format])), 60)):
        folder = tmp_path / str(number)
        write_tree(list(moment.trees(40, seed=1))[-1], folder)
        again = Recorder(folder)
        again.promise(*moment.promised)
        with again.recording():
            TinyStores(folder).build(referee.plan, runs.store)
        found = list(moments(again))
        assert next(faults(referee, generator.sample(found, min(len(found), 15)), 5), None) is None
    assert len(referee.seen) > {"zarr": 1000, "hdf5": 300}[runs.format]


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


# What may have happened to a complete store before it is repaired.
DAMAGE: dict[str, tuple[str, Callable[[Path], object]]] = {
    "a sample": ("zarr", lambda store: flip(store / "dino/original/features/c/1/0/0/0", 7)),
    "a shard's file": ("zarr", lambda store: (store / "clip/hflip/logits/c/0/0").unlink()),
    "a shard's folder": ("zarr", lambda store: shutil.rmtree(store / "dino/hflip/features/c/0")),
    "an array's folder": ("zarr", lambda store: shutil.rmtree(store / "dino/hflip/features")),
    "a ledger's line": ("zarr", lambda store: flip(store / "dino/original/moments/ledger.jsonl", 9)),
    "an array's metadata": ("zarr", lambda store: flip(store / "dino/original/features/zarr.json", 30)),
    "a teacher's manifest": ("zarr", lambda store: flip(store / "clip/zarr.json", 2)),
    "text embeddings": ("zarr", lambda store: flip(store / "clip/text_embeddings/c/0/0", 5)),
    "the samples": ("zarr", lambda store: flip(store / "samples.jsonl", 5)),
    "a line in HDF5": ("hdf5", lambda store: flip(store, store.read_bytes().index(b'{"bytes"') + 20)),
    "a sample in HDF5": ("hdf5", lambda store: flip(store, store.read_bytes().index(sample()) + 3)),
}


def sample() -> bytes:
    return TinyStores(Path()).values("dino", "original", "features", [1]).astype("<f2").tobytes()


def repair(path: Path, plan: StorePlan) -> None:
    with open_writer(path, plan, repair=True) as writer:
        TinyStores(path.parent).fill(writer)


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_repair_that_loses_power_is_made_good_by_the_next(
    memory: Path, recorders: dict[str, Recorder], tmp_path: Path, damage: str
) -> None:
    kind, apply = DAMAGE[damage]
    runs = RUNS[kind]
    referee = Referee(memory, runs)
    path = TinyStores(tmp_path).build(referee.plan, runs.store)
    apply(path)
    recorder = Recorder(tmp_path)
    with recorder.recording():
        repair(path, referee.plan)
    assert files_of(path) == referee.files
    for moment in list(moments(recorder))[::3]:
        for tree in moment.trees(4, seed=0):
            write_tree(tree, referee.folder)
            repair(referee.folder / runs.store, referee.plan)
            assert files_of(referee.folder / runs.store) == referee.files, moment.label
            shutil.rmtree(referee.folder)


# What a writer may forget to flush. Each must show as damage or as a broken promise, or the model is blind.
FLUSHES: dict[str, dict[str, Callable[[Flush], bool]]] = {
    "zarr": {
        "any file": lambda flush: not flush.is_folder,
        "any folder": lambda flush: flush.is_folder,
        "a shard": lambda flush: flush.path.name.startswith(".tmp-"),
        "a shard's folder": lambda flush: flush.is_folder and "c" in flush.path.parts and not is_new(flush),
        "a ledger's line": lambda flush: flush.path.name.startswith("ledger-"),
        "the folder of a new ledger": lambda flush: flush.path.name in ("moments", "features") and not is_new(flush),
        "the merged ledger": lambda flush: flush.path.name == "ledger.jsonl.tmp",
        "metadata": lambda flush: flush.path.name == "zarr.json",
        "the samples": lambda flush: flush.path.name == "samples.jsonl",
        "the folders of what is new": lambda flush: flush.is_folder and is_new(flush),
        "the folder that holds the store": lambda flush: flush.path.name.startswith("recorded"),
        "the store's own folder": lambda flush: flush.path.name == "store.zarr",
        "the folder of a new view": lambda flush: flush.path.name == "dino" and not is_new(flush),
    },
    "hdf5": {
        "any file": lambda flush: not flush.is_folder,
        "any folder": lambda flush: flush.is_folder,
        "what is new": lambda flush: is_new(flush),
        "samples and lines": lambda flush: flush.path.name == "store.h5.partial",
    },
}


def is_new(flush: Flush) -> bool:
    return ".new-" in str(flush.path)


@pytest.mark.parametrize(
    ("runs", "what"), [(RUNS[name], what) for name, all_of in FLUSHES.items() for what in all_of], indirect=["runs"]
)
def test_a_flush_that_does_not_happen_is_noticed(
    referee: Referee, recorders: dict[str, Recorder], runs: Runs, what: str
) -> None:
    # Where most is promised, most can be lost.
    found = reversed(list(moments(recorders[runs.format], FLUSHES[runs.format][what])))
    assert next(faults(referee, found, 4), None) is not None


def test_every_second_flush_of_an_hdf5_file_is_needed(memory: Path, recorders: dict[str, Recorder]) -> None:
    """A shard's samples are flushed before its line is written: else the line may be kept without them."""
    flushes = [operation for operation in recorders["hdf5"].operations if isinstance(operation, Flush)]
    of_samples = {id(flush) for flush in [f for f in flushes if f.path.name == "store.h5.partial"][::2]}
    found = moments(recorders["hdf5"], lambda flush: id(flush) in of_samples)
    assert next(faults(Referee(memory, RUNS["hdf5"]), found, 12), None) is not None


def test_new_folders_above_the_store_are_flushed_too(memory: Path, runs: Runs, tmp_path: Path) -> None:
    found = list(moments(record(tmp_path, runs, "new/folders/")))
    assert next(faults(Referee(memory, runs, "new/folders/"), found[::10], 3), None) is None

"""What holds for a store in either container, a Zarr folder or an HDF5 file."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import multiprocessing
import os
import pickle
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import cache.hdf5_storage
import cache.zarr_storage
from cache.catalog import read_catalog
from cache.encoding import decode
from cache.open_storage import find_storage
from cache.plan import StoreFormat, StorePlan
from cache.reader import ArrayReader, TeacherStore
from cache.summary import summarise
from cache.verify import find_problems
from cache.writer import open_writer
from data.errors import (
    StoreCorruptError,
    StoreError,
    StoreIncompleteError,
    StoreLockedError,
    StoreStaleError,
    StoreWriteError,
)
from data.geometry import VIEWS, View

if TYPE_CHECKING:
    from tests.cache.conftest import TinyStores

ROOT = Path(__file__).parents[2]
FEATURES, MOMENTS, LOGITS = "dino/original/features", "dino/original/moments", "clip/hflip/logits"


@dataclass(frozen=True)
class Container:
    """One of the two containers, with what a test must know of its insides."""

    format: StoreFormat
    suffix: str

    def build(
        self, stores: TinyStores, plan: StorePlan | None = None, limit: int | None = None, name: str = "store"
    ) -> Path:
        plan = dataclasses.replace(plan or stores.plan(), format=self.format)
        return stores.build(plan, name + self.suffix, limit)

    def content(self, store: Path) -> dict[str, bytes]:
        """Everything that two equal stores share, by file: all but the provenance."""
        if store.is_dir():
            files = [path for path in sorted(store.rglob("*")) if path.is_file() and path.name != "provenance.jsonl"]
            return {str(path.relative_to(store)): path.read_bytes() for path in files}
        files = [path for path in (store, store.with_name(f"{store.name}.partial")) if path.exists()]
        return {path.name: self._without_provenance(path) for path in files}

    def _without_provenance(self, path: Path) -> bytes:
        data = bytearray(path.read_bytes())
        for parts in json.loads(data.split(b"\n", 2)[1])["arrays"].values():
            start, size = parts.get("provenance", (0, 0))
            data[start : start + size] = bytes(size)
        return bytes(data)

    def place(self, store: Path, array: str, shard: int, what: str, sample: int = 0) -> tuple[Path, int]:
        """The file and the offset of a byte of a sample's payload, of its checksum, or of a shard's ledger line."""
        layout = next(layout for layout in read_catalog(store).layouts() if layout.path == array)
        storage = find_storage(store)
        assert storage is not None
        if what == "ledger":
            return self._ledger_place(store, array, shard)
        descriptor, extents = storage.array(layout).open_shard(shard)
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        os.close(descriptor)
        return path, extents.samples[sample] + 1 if what == "payload" else extents.checksums[sample]

    def _ledger_place(self, store: Path, array: str, shard: int) -> tuple[Path, int]:
        if store.is_dir():
            path = store / array / "ledger.jsonl"
            return path, path.read_bytes().index(b'"shard":%d}' % shard) + 8
        header = json.loads(store.read_bytes().split(b"\n", 2)[1])
        return store, header["arrays"][array]["ledger"][0] + 256 * shard + 20


CONTAINERS = {"zarr": Container("zarr", ".zarr"), "hdf5": Container("hdf5", ".h5")}


@pytest.fixture(params=CONTAINERS.values(), ids=CONTAINERS)
def container(request: pytest.FixtureRequest) -> Container:
    found: Container = request.param
    return found


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, stores_class: type[TinyStores]) -> dict[str, Path]:
    """A complete store of each format. Read only."""
    stores = stores_class(tmp_path_factory.mktemp("finished"))
    return {name: container.build(stores) for name, container in CONTAINERS.items()}


@pytest.fixture(scope="module")
def stores_class(whole_store: Path) -> Any:
    return runpy.run_path(str(Path(__file__).with_name("conftest.py")))["TinyStores"]


@pytest.fixture
def whole(finished: dict[str, Path], container: Container) -> Path:
    """A complete store, read only."""
    return finished[container.format]


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    """A copy of the complete store, to damage."""
    if whole.is_dir():
        return Path(shutil.copytree(whole, tmp_path / f"copy{whole.suffix}"))
    return Path(shutil.copy(whole, tmp_path / f"copy{whole.suffix}"))


def flip(place: tuple[Path, int]) -> None:
    path, offset = place
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 0x10]))


def features_of(store: Path, **options: Any) -> ArrayReader:
    return TeacherStore(store, **options).array("dino", "original", "features")


class TestReading:
    @pytest.mark.parametrize("dtype", ["float16", "float32"])
    def test_every_array_is_what_was_written(self, container: Container, stores: TinyStores, dtype: Any) -> None:
        store = TeacherStore(container.build(stores, stores.plan(feature_dtype=dtype)))
        for teacher, name in (("dino", "features"), ("clip", "logits"), ("clip", "embeddings")):
            for view in VIEWS:
                stored = dtype if name == "features" else "float32"
                found = store.array(teacher, view, name).gather(range(7))
                np.testing.assert_array_equal(found, stores.values(teacher, view, name, range(7)).astype(stored))
                assert found.dtype == np.dtype(stored)
        np.testing.assert_array_equal(
            store.text_embeddings("clip"), stores.values("clip", "original", "text", range(4), (6,))
        )

    def test_int8_features_come_with_their_scales(self, container: Container, stores: TinyStores) -> None:
        store = TeacherStore(container.build(stores, stores.plan(teachers=["dino"], feature_dtype="int8")))
        names = ("features", "scale_channel", "scale_token")
        for view in VIEWS:
            stored = {name: store.array("dino", view, name).gather(range(7)) for name in names}
            assert stored["features"].dtype == np.int8
            # In token scales times channel scales, the step of int8: half of it is the most that rounding may cost.
            step = stored["scale_token"][..., None] * stored["scale_channel"][:, None, None, :]
            restored = stored["features"] * step
            expected = stores.values("dino", view, "features", range(7))
            assert (np.abs(restored - expected) <= 0.51 * step).all()
            np.testing.assert_allclose(decode(stored), restored, rtol=1e-5)

    @pytest.mark.parametrize("view", VIEWS)
    def test_rows_are_gathered_and_prefetched_in_any_order(self, whole: Path, stores: TinyStores, view: View) -> None:
        reader = TeacherStore(whole).array("dino", view, "features")
        rows = [6, 0, 0, 3, 5]
        reader.prefetch(rows)
        out = np.empty((5, 3, 2, 5), "<f2")
        assert reader.gather(rows, out=out) is out
        np.testing.assert_array_equal(out, stores.values("dino", view, "features", rows).astype("<f2"))

    def test_shards_are_populated(self, whole: Path, stores: TinyStores) -> None:
        reader = TeacherStore(whole).array("dino", "hflip", "features")
        assert [reader.populate(shard) for shard in range(3)] == [reader.storage.shard_bytes(k) for k in range(3)]
        np.testing.assert_array_equal(
            reader.gather(range(7)), stores.values("dino", "hflip", "features", range(7)).astype("<f2")
        )

    def test_samples_are_aligned_views_of_the_file(self, whole: Path) -> None:
        for teacher, name in (("dino", "features"), ("dino", "moments"), ("clip", "logits"), ("clip", "embeddings")):
            sample = TeacherStore(whole).array(teacher, "hflip", name).read(4)
            assert not sample.flags.writeable
            assert not sample.flags.owndata
            assert sample.flags.aligned
            assert sample.flags.c_contiguous

    def test_a_row_outside_the_array_is_an_index_error(self, whole: Path) -> None:
        for row in (-1, 7):
            with pytest.raises(IndexError, match=f"expected a row in 0 … 6, found {row}"):
                features_of(whole).read(row)

    def test_readers_pickle_small_and_read_on(self, container: Container, stores: TinyStores) -> None:
        plan = stores.plan(2048, teachers=["clip"], shard_samples=64)
        reader = TeacherStore(container.build(stores, plan, limit=2)).array("clip", "original", "logits")
        expected = reader.gather(range(64))
        pickled = pickle.dumps(reader)
        assert len(pickled) < 5_000
        np.testing.assert_array_equal(pickle.loads(pickled).gather(range(64)), expected)

    def test_no_descriptor_stays_open(self, container: Container, whole: Path, copy: Path) -> None:
        def open_descriptors() -> list[str]:
            return sorted(path.name for path in Path("/proc/self/fd").iterdir())

        flip(container.place(copy, FEATURES, 0, "payload"))
        before = open_descriptors()
        for _ in range(10):
            reader = features_of(whole)
            reader.prefetch(range(7))
            reader.gather(range(7))
            reader.close()
            with pytest.raises(StoreCorruptError):
                features_of(copy).read(0)
            find_problems(read_catalog(copy), verify=True)
        assert open_descriptors() == before

    @pytest.mark.parametrize(
        "method", sorted({"fork", "spawn", "forkserver"} & set(multiprocessing.get_all_start_methods()))
    )
    def test_workers_read_what_the_parent_reads(
        self, whole: Path, stores: TinyStores, tmp_path: Path, method: str
    ) -> None:
        script = tmp_path / "workers.py"
        script.write_text(WORKERS)
        done = subprocess.run(
            [sys.executable, "-W", "error", str(script), str(whole), method],
            capture_output=True, text=True, timeout=120, env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin"},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        expected = [stores.values("dino", VIEWS[row % 2], "features", [row])[0] for row in (6, 0, 3, 5)]
        assert done.stdout.strip() == hashlib.sha256(np.stack(expected).astype("<f2").tobytes()).hexdigest()


# A process of its own: no other test's threads are forked, and spawned workers need not import the test suite.
WORKERS = """
import hashlib, multiprocessing, sys
from pathlib import Path
from cache.reader import TeacherStore
from data.geometry import VIEWS, View

ROWS = [6, 0, 3, 5]

def work(readers, queue, rows):
    samples = b"".join(readers[row % 2].gather([row]).tobytes() for row in rows)
    queue.put(hashlib.sha256(samples).hexdigest())

if __name__ == "__main__":
    context = multiprocessing.get_context(sys.argv[2])
    store = TeacherStore(Path(sys.argv[1]))
    readers = [store.array("dino", view, "features") for view in VIEWS]
    for touched_before in (False, True):  # maps that are open in the parent must serve its children too
        queue = context.Queue()
        workers = [context.Process(target=work, args=(readers, queue, ROWS)) for _ in range(2)]
        for worker in workers:
            worker.start()
        said = [queue.get(timeout=60) for _ in workers]
        for worker in workers:
            worker.join()
            assert worker.exitcode == 0
        work(readers, queue, ROWS)
        assert {*said, queue.get(timeout=60)} == {said[0]}
    assert not {"zarr", "h5py", "torch"} & set(sys.modules)
    print(said[0])
"""


class TestIncomplete:
    def test_what_is_committed_is_served_and_nothing_else(self, container: Container, stores: TinyStores) -> None:
        store = container.build(stores, stores.plan(teachers=["dino"], views=["original"]), limit=2)
        reader = features_of(store)
        np.testing.assert_array_equal(
            reader.gather(range(6)), stores.values("dino", "original", "features", range(6)).astype("<f2")
        )
        assert reader.num_missing == 1
        assert reader.missing_rows([0, 6, 5]) == [6]
        calls: list[Callable[[int], Any]] = [reader.read, lambda row: reader.gather([0, row])]
        for call in (*calls, lambda row: reader.prefetch([row])):
            with pytest.raises(StoreIncompleteError, match=r"samples 6 … 6 \(shard 2\) are not committed"):
                call(6)

    def test_a_store_without_any_sample_is_sound_and_incomplete(self, container: Container, stores: TinyStores) -> None:
        catalog = read_catalog(container.build(stores, limit=0))
        assert find_problems(catalog, verify=True) == []
        assert summarise(catalog, [], verified=True)["status"] == "incomplete"
        assert TeacherStore(catalog.path).text_embeddings("clip").shape == (4, 6)

    @pytest.mark.parametrize("limit", [0, 1, 5, 11])
    def test_a_resumed_store_has_the_bytes_of_an_uninterrupted_one(
        self, container: Container, whole: Path, stores: TinyStores, limit: int
    ) -> None:
        store = container.build(stores, limit=limit)
        assert container.content(store) != container.content(whole)
        container.build(stores)
        assert container.content(store) == container.content(whole)

    def test_a_resumed_run_is_asked_only_for_what_lacks(self, container: Container, stores: TinyStores) -> None:
        store = container.build(stores, limit=5)
        with open_writer(store, stores.plan(format=container.format)) as writer:
            found = [(m.first, m.teacher, m.view) for m in writer.missing()]
        assert found[:3] == [(3, "dino", "hflip"), (3, "clip", "original"), (3, "clip", "hflip")]
        assert len(found) == 12 - 5

    def test_a_complete_store_is_not_touched(self, copy: Path, container: Container, stores: TinyStores) -> None:
        def state() -> dict[Path, tuple[int, int]]:
            files = [copy, *copy.rglob("*")] if copy.is_dir() else [copy]
            return {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in files}

        before = state()
        for repair in (False, True):
            with open_writer(copy, stores.plan(format=container.format), repair=repair) as writer:
                assert writer.missing() == []
            if not repair:
                assert state() == before
        assert find_problems(read_catalog(copy), verify=True) == []

    def test_other_images_are_refused(self, copy: Path, container: Container, stores: TinyStores) -> None:
        before = container.content(copy)
        with (
            pytest.raises(StoreStaleError, match="other images"),
            open_writer(copy, stores.plan(6, format=container.format)),
        ):
            pass
        assert container.content(copy) == before

    def test_the_other_format_is_refused(self, copy: Path, container: Container, stores: TinyStores) -> None:
        before = container.content(copy)
        asked: StoreFormat = "hdf5" if container.format == "zarr" else "zarr"
        message = f"expected a store of format {asked}, found one of format {container.format}"
        with pytest.raises(StoreStaleError, match=message), open_writer(copy, stores.plan(format=asked)):
            pass
        assert container.content(copy) == before

    def test_what_a_failing_run_committed_is_kept(self, container: Container, stores: TinyStores) -> None:
        store = stores.folder / f"store{container.suffix}"

        def interrupted() -> None:
            with open_writer(store, stores.plan(format=container.format)) as writer:
                stores.fill(writer, limit=4)
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            interrupted()
        assert find_problems(read_catalog(store), verify=True) == []
        for view in VIEWS:
            np.testing.assert_array_equal(
                TeacherStore(store).array("clip", view, "logits").gather(range(3)),
                stores.values("clip", view, "logits", range(3)),
            )


class TestProvenance:
    def test_notes_are_kept_in_order_for_every_array_of_the_view(
        self, container: Container, stores: TinyStores
    ) -> None:
        store = container.build(stores, limit=0)
        with open_writer(store, stores.plan(format=container.format)) as writer:
            for device in ("cpu", "gpu"):
                writer.note_provenance("clip", "hflip", {"device": device})
        catalog = read_catalog(store)
        for layout in catalog.layouts():
            notes = catalog.storage.array(layout).read_provenance()
            expected = ["cpu", "gpu"] if layout.path.startswith("clip/hflip/") else []
            assert [note["device"] for note in notes] == expected
            assert all(note["time"].endswith("+00:00") for note in notes)


class TestDamage:
    @pytest.mark.parametrize("what", ["payload", "checksum"])
    def test_a_flipped_byte_is_refused_and_named(
        self, container: Container, copy: Path, stores: TinyStores, what: str
    ) -> None:
        flip(container.place(copy, FEATURES, 0, what, sample=1))
        expected = stores.values("dino", "original", "features", range(7)).astype("<f2")
        reader = features_of(copy)
        for _ in range(2):  # a refusal is not forgotten
            with pytest.raises(StoreCorruptError, match=f"{FEATURES}: shard 0, sample 1: checksum fails"):
                reader.read(1)
        for row in (0, 2, 6):
            np.testing.assert_array_equal(reader.read(row), expected[row])
        unchecked = features_of(copy, check=False).read(1)
        assert (unchecked != expected[1]).sum() == (what == "payload")

    @pytest.mark.parametrize(
        ("array", "what", "sample", "message"),
        [
            (FEATURES, "payload", 4, "the sample fails its checksum"),
            (FEATURES, "checksum", 4, "the sample fails its checksum"),
            (LOGITS, "payload", None, "fails its checksum"),
            (LOGITS, "ledger", None, "damaged"),
        ],
    )
    def test_verification_names_array_and_shard(
        self, container: Container, copy: Path, array: str, what: str, sample: int | None, message: str
    ) -> None:
        assert find_problems(read_catalog(copy), verify=True) == []
        flip(container.place(copy, array, 1, what, sample=1 if sample else 0))
        (problem,) = find_problems(read_catalog(copy), verify=True)
        assert problem.array == array
        assert problem.shard == (None if what == "ledger" else 1)
        if sample is not None:
            assert problem.sample == sample
        assert message in problem.problem
        assert bool(find_problems(read_catalog(copy), verify=False)) == (what == "ledger")

    def test_exchanged_shards_are_found(self, container: Container, copy: Path) -> None:
        """Every sample has its right checksum then; only the ledger's digest tells."""
        (a, at_a), (b, at_b) = (container.place(copy, FEATURES, shard, "payload") for shard in (0, 1))
        if container.format == "zarr":
            first, second = a.read_bytes(), b.read_bytes()
            a.write_bytes(second)
            b.write_bytes(first)
        else:
            header = json.loads(copy.read_bytes().split(b"\n", 2)[1])
            crc32c = header["arrays"][FEATURES]["crc32c"][0]
            data = bytearray(copy.read_bytes())
            for start, other, size in ((at_a - 1, at_b - 1, 180), (crc32c, crc32c + 12, 12)):
                data[start : start + size], data[other : other + size] = (
                    data[other : other + size], data[start : start + size],
                )  # fmt: skip
            copy.write_bytes(data)
        found = find_problems(read_catalog(copy), verify=True)
        assert [(problem.array, problem.shard, problem.sample) for problem in found] == [
            (FEATURES, 0, None), (FEATURES, 1, None),
        ]  # fmt: skip

    def test_repair_writes_exactly_the_damaged_shards_again(
        self, container: Container, copy: Path, stores: TinyStores, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        before = container.content(copy)
        damaged = [(FEATURES, 1, "payload"), (FEATURES, 2, "checksum"), (LOGITS, 0, "payload"), (MOMENTS, 2, "ledger")]
        for array, shard, what in damaged:
            flip(container.place(copy, array, shard, what))
        plan = stores.plan(format=container.format)
        with pytest.raises(StoreError, match="damaged"), open_writer(copy, plan):
            pass
        written: list[tuple[str, int]] = []
        for kind in (cache.zarr_storage.ZarrArray, cache.hdf5_storage.Hdf5Array):

            def spying(storage: Any, shard: int, data: Any, rank: int, real: Any = kind.write_shard) -> Any:
                written.append((storage.layout.path, shard))
                return real(storage, shard, data, rank)

            monkeypatch.setattr(kind, "write_shard", spying)
        with open_writer(copy, plan, repair=True) as writer:
            stores.fill(writer)
        assert sorted(written) == sorted((array, shard) for array, shard, _ in damaged)
        assert all(repair.same_bytes for repair in writer.repaired)
        assert {(repair.array, repair.shard) for repair in writer.repaired} >= {
            (FEATURES, 1),
            (FEATURES, 2),
            (LOGITS, 0),
        }
        assert container.content(copy) == before

    def test_damaged_text_embeddings_are_refused(self, container: Container, copy: Path) -> None:
        if container.format == "zarr":
            flip((copy / "clip/text_embeddings/c/0/0", 9))
        else:
            header = json.loads(copy.read_bytes().split(b"\n", 2)[1])
            flip((copy, header["arrays"]["clip/text_embeddings"]["samples"][0] + 9))
        with pytest.raises(StoreCorruptError, match="text_embeddings: checksum fails"):
            TeacherStore(copy).text_embeddings("clip")
        (problem,) = find_problems(read_catalog(copy), verify=True)
        assert (problem.array, problem.problem) == ("clip/text_embeddings", "checksum fails")

    def test_damaged_samples_are_refused(self, container: Container, copy: Path) -> None:
        path = copy / "samples.jsonl" if container.format == "zarr" else copy
        path.write_bytes(path.read_bytes().replace(b"VOC2007/000004", b"VOC2007/000009"))
        with pytest.raises(StoreCorruptError, match=r"samples\.jsonl: expected SHA-256"):
            _ = read_catalog(copy).samples
        (problem,) = find_problems(read_catalog(copy), verify=True)
        assert problem.array == "samples.jsonl"


class TestPlace:
    def test_a_second_writer_is_refused_at_once(self, container: Container, stores: TinyStores) -> None:
        store = stores.folder / f"store{container.suffix}"
        refused = pytest.raises(StoreLockedError, match=f"pid {os.getpid()}")
        with open_writer(store, stores.plan(format=container.format)), refused:
            container.build(stores)
        container.build(stores)

    def test_something_else_at_the_path_is_left_alone(self, container: Container, stores: TinyStores) -> None:
        path = stores.folder / f"store{container.suffix}"
        path.write_bytes(b"a file")
        with pytest.raises(StoreWriteError, match="something that is not a store is already there"):
            container.build(stores)
        assert path.read_bytes() == b"a file"
        path.unlink()
        path.mkdir()
        (path / "notes.txt").write_bytes(b"x")
        with pytest.raises(StoreWriteError, match="something that is not a store is already there"):
            container.build(stores)
        assert [entry.name for entry in path.iterdir()] == ["notes.txt"]

    def test_a_store_behind_a_link_is_the_same_store_with_the_same_lock(
        self, container: Container, stores: TinyStores
    ) -> None:
        (stores.folder / "disk").mkdir()
        link = stores.folder / f"link{container.suffix}"
        link.symlink_to(stores.folder / "disk" / f"store{container.suffix}")
        store = container.build(stores, limit=3, name="disk/store")
        assert features_of(link).num_missing > 0
        container.build(stores, name="link")
        assert link.is_symlink()
        assert features_of(store).num_missing == features_of(link).num_missing == 0
        assert not link.with_name(f"{link.name}.lock").exists()
        with open_writer(store, stores.plan(format=container.format)), pytest.raises(StoreLockedError):
            container.build(stores, name="link")

"""What holds for a store in an HDF5 file alone; what both containers share is in test_store_contract.py."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import google_crc32c
import h5py
import numpy as np
import pytest
import zarr

from cache.catalog import read_catalog
from cache.hdf5_create import Hdf5Builder
from cache.hdf5_header import PROVENANCE_BYTES, Header, encode_header, metadata_sha256
from cache.hdf5_storage import Hdf5Array, Hdf5Storage
from cache.open_storage import find_storage
from cache.plan import StorePlan
from cache.reader import ArrayReader, TeacherStore
from cache.verify import find_problems
from cache.writer import open_writer
from data.errors import StoreCorruptError, StoreError, StoreMissingError, StoreStaleError, StoreWriteError

if TYPE_CHECKING:
    from tests.cache.conftest import TinyStores

ROOT = Path(__file__).parents[2]
FEATURES = "dino/original/features"


def plan_of(stores: TinyStores, **changes: Any) -> StorePlan:
    """Seven samples of one teacher and one view."""
    return stores.plan(**{"teachers": ["dino"], "views": ["original"], "format": "hdf5", **changes})


def build(stores: TinyStores, name: str = "store.h5", limit: int | None = None, **changes: Any) -> Path:
    return stores.build(plan_of(stores, **changes), name, limit)


def features_of(store: Path, **options: Any) -> ArrayReader:
    return TeacherStore(store, **options).array("dino", "original", "features")


def storage_of(store: Path, array: str = FEATURES) -> Hdf5Array:
    catalog = read_catalog(store)
    storage = catalog.storage.array(next(layout for layout in catalog.layouts() if layout.path == array))
    assert isinstance(storage, Hdf5Array)
    return storage


def header_of(file: Path) -> dict[str, Any]:
    """The header as anyone would read it: the file's second line."""
    header: dict[str, Any] = json.loads(file.read_bytes().split(b"\n", 2)[1])
    return header


def overwrite(file: Path, offset: int, data: bytes) -> None:
    with file.open("r+b") as stream:
        stream.seek(offset)
        stream.write(data)


def datasets(file: Path) -> dict[str, np.ndarray[Any, Any]]:
    """Every dataset of an HDF5 file, read by h5py."""
    found: dict[str, np.ndarray[Any, Any]] = {}
    with h5py.File(file, "r") as opened:
        opened.visititems(lambda name, it: found.update({name: it[()]}) if isinstance(it, h5py.Dataset) else None)
    return found


class TestReferee:
    """h5py, which wrote the skeleton but none of its contents, reads all of it, and zarr-python the same in Zarr."""

    @pytest.mark.parametrize("dtype", ["float16", "float32", "int8"])
    def test_h5py_reads_what_zarr_python_reads_from_a_zarr_store_of_the_same_plan(
        self, stores: TinyStores, dtype: Any
    ) -> None:
        found = datasets(stores.build(stores.plan(format="hdf5", feature_dtype=dtype), "store.h5"))
        root = zarr.open_group(stores.build(stores.plan(feature_dtype=dtype)), mode="r")
        shown = {name: values for name, values in found.items() if not name.startswith(("_records/", "samples"))}
        assert len(shown) == {"int8": 13, "float16": 9, "float32": 9}[dtype]
        for name, values in shown.items():
            expected = root[name]
            assert isinstance(expected, zarr.Array)
            np.testing.assert_array_equal(values, expected[:])
            assert values.dtype == expected.dtype
        assert found["samples.jsonl"].tobytes() == (stores.folder / "store.zarr/samples.jsonl").read_bytes()

    def test_groups_carry_their_manifests_and_axes_their_names(self, stores: TinyStores) -> None:
        store = stores.build(stores.plan(format="hdf5"), "store.h5")
        stores.build()
        with h5py.File(store, "r") as file:
            for group in ("", "dino", "clip", "dino/original", "clip/hflip"):
                attributes = json.loads((stores.folder / "store.zarr" / group / "zarr.json").read_text())["attributes"]
                assert json.loads(file[group or "/"].attrs["teachonce"]) == attributes["teachonce"]
                assert file[group or "/"].attrs["teachonce_sha256"] == attributes["teachonce_sha256"]
                digest = hashlib.sha256(file[group or "/"].attrs["teachonce"].encode("ascii")).hexdigest()
                assert digest == attributes["teachonce_sha256"]
            labels = [dimension.label for dimension in file[FEATURES].dims]
            assert labels == ["sample", "row", "column", "channel"]
            assert [dimension.label for dimension in file["clip/text_embeddings"].dims] == ["class", "embedding"]

    def test_every_dataset_is_contiguous_and_lies_where_the_header_says(self, stores: TinyStores) -> None:
        store = stores.build(stores.plan(format="hdf5"), "store.h5")
        header = header_of(store)
        with h5py.File(store, "r") as file:
            for array, parts in header["arrays"].items():
                for part, (start, size) in parts.items():
                    dataset = file[array if part == "samples" else f"_records/{array}/{part}"]
                    assert (dataset.id.get_offset(), dataset.id.get_storage_size()) == (start, size)
                    assert (dataset.chunks, dataset.compression, dataset.external) == (None, None, None)
                    assert start % 512 == 0

    def test_checksums_and_ledger_are_those_of_the_datasets(self, stores: TinyStores) -> None:
        found = datasets(stores.build(stores.plan(format="hdf5"), "store.h5"))
        arrays = [name.removeprefix("_records/").removesuffix("/ledger") for name in found if name.endswith("/ledger")]
        assert len(arrays) == 8
        for array in arrays:
            values, crc32c = found[array], found[f"_records/{array}/crc32c"]
            assert crc32c.tolist() == [google_crc32c.value(sample.tobytes()) for sample in values]
            for shard, slot in enumerate(found[f"_records/{array}/ledger"]):
                line = json.loads(slot.tobytes())
                rows = slice(3 * shard, 3 * shard + 3)
                content = values[rows].tobytes() + crc32c[rows].tobytes()
                assert (line["shard"], line["first"], line["count"]) == (shard, 3 * shard, len(values[rows]))
                assert (line["bytes"], line["sha256"]) == (len(content), hashlib.sha256(content).hexdigest())

    def test_a_file_costs_little_more_than_its_payload(self, stores: TinyStores) -> None:
        """Four bytes a sample, 256 a shard, and some 20 KiB an array: its notes and what HDF5 needs."""
        plan = stores.plan(600, format="hdf5", shard_samples=64)
        stores.build(plan, "store.h5", limit=0)
        file = stores.folder / "store.h5.partial"
        found = {name: values.nbytes for name, values in datasets(file).items() if not name.startswith("_records/")}
        assert sum(found.values()) - found["samples.jsonl"] - found["clip/text_embeddings"] == plan.planned_bytes()
        overhead = file.stat().st_size - sum(found.values())
        assert overhead < 8 * (600 * 4 + 10 * 256 + 20 * 1024)

    def test_a_manifest_may_be_longer_than_an_attribute_of_old_files(self, stores: TinyStores) -> None:
        prompts = [f"a photo of number {n}" for n in range(20_000)]
        teacher = stores.teacher("dino", identity={"spec": "dino", "prompts": prompts})
        store = build(stores, teachers=[teacher])
        assert read_catalog(store).teacher("dino").manifest.identity["prompts"] == prompts
        with h5py.File(store, "r") as file:
            assert json.loads(file["dino"].attrs["teachonce"])["identity"]["prompts"] == prompts

    def test_the_reader_of_the_decision_record_reads_every_sample(self, stores: TinyStores) -> None:
        document = (ROOT / "docs/cache-format-hdf5.md").read_text(encoding="utf-8")
        (code,) = re.findall(r"```python\n(.*?)```", document, flags=re.DOTALL)
        namespace: dict[str, Any] = {}
        exec(compile(code, "cache-format-hdf5.md", "exec"), namespace)
        stores.build(stores.plan(format="hdf5"), "store.h5", limit=6)
        file = stores.folder / "store.h5.partial"
        for array, dtype in ((FEATURES, "<f2"), ("clip/hflip/embeddings", "<f4")):
            expected = stores.values(*array.split("/"), range(7)).astype(dtype)
            committed = 6 if array == FEATURES else 3
            for row in range(committed):
                found = namespace["read_sample"](file, array, row)
                assert found.dtype == np.dtype(dtype)
                np.testing.assert_array_equal(found, expected[row])
            with pytest.raises(KeyError, match=f"sample {committed} is not committed"):
                namespace["read_sample"](file, array, committed)

    def test_reading_imports_no_h5py(self, stores: TinyStores) -> None:
        store = build(stores)
        code = """
import sys
from pathlib import Path
from cache.reader import TeacherStore
from cache.verify import find_problems
store = TeacherStore(Path(sys.argv[1]))
store.array("dino", "original", "features").gather([0, 6])
assert find_problems(store.catalog, verify=True) == []
print(*{m.split(".")[0] for m in sys.modules})
"""
        done = subprocess.run(
            [sys.executable, "-c", code, str(store)], capture_output=True, text=True, check=True, cwd=ROOT
        )
        assert not {"zarr", "h5py", "torch"} & set(done.stdout.split())


class TestNames:
    def test_a_file_is_called_partial_until_it_is_complete(self, stores: TinyStores) -> None:
        store = build(stores, limit=2)
        assert sorted(p.name for p in stores.folder.iterdir()) == ["store.h5.lock", "store.h5.partial"]
        assert features_of(store).num_missing == 1
        build(stores)
        assert sorted(p.name for p in stores.folder.iterdir()) == ["store.h5", "store.h5.lock"]

    @pytest.mark.parametrize("name", ["store", "store.zarr", "store.hdf5", "a.b.c"])
    def test_any_name_will_do(self, stores: TinyStores, name: str) -> None:
        store = build(stores, name, limit=1)
        assert features_of(store).num_missing == 4
        assert features_of(build(stores, name)).num_missing == 0

    def test_a_reader_that_opened_the_partial_file_reads_the_finished_one(self, stores: TinyStores) -> None:
        opened = TeacherStore(build(stores, limit=2))
        build(stores)
        reader = opened.array("dino", "original", "features")
        np.testing.assert_array_equal(
            reader.gather(range(7)), stores.values("dino", "original", "features", range(7)).astype("<f2")
        )

    def test_a_store_that_loses_samples_is_partial_again(self, stores: TinyStores) -> None:
        store = build(stores)
        overwrite(store, header_of(store)["arrays"][FEATURES]["samples"][0], b"\1\2\3")
        with open_writer(store, plan_of(stores), repair=True) as writer:
            assert [(missing.shard, missing.arrays) for missing in writer.missing()] == [(0, ("features",))]
        assert not store.exists()
        assert features_of(store).num_missing == 3
        assert find_problems(read_catalog(build(stores)), verify=True) == []
        assert store.exists()

    def test_two_stores_of_one_name_are_refused(self, stores: TinyStores) -> None:
        store = build(stores)
        partial = Path(shutil.copy(store, stores.folder / "store.h5.partial"))
        message = f"expected one store of that name, found {re.escape(str(store))} and {re.escape(str(partial))}"
        with pytest.raises(StoreCorruptError, match=message):
            read_catalog(store)
        with pytest.raises(StoreCorruptError, match=message), open_writer(store, plan_of(stores)):
            pass
        (stores.folder / "other.h5.partial").write_bytes(b"a download")  # of someone else: no store
        store.rename(stores.folder / "other.h5")
        assert features_of(stores.folder / "other.h5").num_missing == 0

    def test_a_folder_and_an_unfinished_file_of_one_name_are_refused(self, stores: TinyStores) -> None:
        build(stores, limit=1)
        store = stores.build(name="other")
        (stores.folder / "store.h5.partial").rename(stores.folder / "other.partial")
        with pytest.raises(StoreCorruptError, match="expected one store of that name"):
            read_catalog(store)

    def test_an_unfinished_file_is_read_but_not_written_under_its_own_name(self, stores: TinyStores) -> None:
        build(stores, limit=2)
        partial = stores.folder / "store.h5.partial"
        assert features_of(partial).num_missing == 1
        with pytest.raises(StoreWriteError, match=r"(?s)partial is what the unfinished.*store\.h5$"):
            build(stores, partial.name)

    @pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo, lambda path: path.write_bytes(b"a download")])
    def test_something_else_at_the_unfinished_files_place_is_left_alone(
        self, stores: TinyStores, make: Callable[[Path], Any]
    ) -> None:
        partial = stores.folder / "store.h5.partial"
        make(partial)
        with pytest.raises(StoreWriteError, match=r"store\.h5\.partial: something that is not a store is already"):
            build(stores)
        assert sorted(p.name for p in stores.folder.iterdir()) == ["store.h5.lock", "store.h5.partial"]

    def test_a_file_that_comes_in_the_finished_files_place_is_left_alone(self, stores: TinyStores) -> None:
        store = build(stores, limit=2)
        store.write_bytes(b"notes")
        with pytest.raises(StoreWriteError, match=r"store\.h5: something that is not a store is already there"):
            Hdf5Builder(store).finish(complete=True)
        with pytest.raises(StoreCorruptError, match="expected one store of that name"):
            build(stores)
        assert store.read_bytes() == b"notes"
        store.unlink()
        assert features_of(build(stores)).num_missing == 0

    def test_anything_but_a_regular_file_is_no_store_and_never_waited_for(self, stores: TinyStores) -> None:
        for name, make in (("pipe", os.mkfifo), ("folder", Path.mkdir), ("loop", lambda p: p.symlink_to(p))):
            make(stores.folder / name)
            assert find_storage(stores.folder / name) is None
            with pytest.raises(StoreMissingError):
                read_catalog(stores.folder / name)

    def test_an_unfinished_file_behind_a_link_is_refused(self, stores: TinyStores) -> None:
        build(stores, limit=1)
        partial = stores.folder / "store.h5.partial"
        partial.rename(stores.folder / "elsewhere")
        partial.symlink_to(stores.folder / "elsewhere")
        with pytest.raises(StoreCorruptError, match="symbolic link"):
            read_catalog(stores.folder / "store.h5")

    def test_leftovers_of_killed_builds_are_swept(self, stores: TinyStores) -> None:
        (stores.folder / "store.h5.partial.new-123").write_bytes(b"half")
        (stores.folder / "store.h5.partial.new-old").write_bytes(b"not ours")
        build(stores)
        assert sorted(p.name for p in stores.folder.iterdir()) == [
            "store.h5", "store.h5.lock", "store.h5.partial.new-old",
        ]  # fmt: skip


class TestExtend:
    @pytest.mark.parametrize(
        ("changes", "what"),
        [({"teachers": ["dino", "clip"]}, "teacher clip"), ({"views": ["original", "hflip"]}, "view hflip of dino")],
    )
    @pytest.mark.parametrize("limit", [1, None])
    def test_a_teacher_or_view_is_not_added_and_nothing_is_touched(
        self, stores: TinyStores, changes: dict[str, Any], what: str, limit: int | None
    ) -> None:
        build(stores, limit=limit)
        (file,) = (path for path in stores.folder.iterdir() if path.suffix != ".lock")
        before = file.read_bytes(), file.stat().st_mtime_ns
        with pytest.raises(StoreWriteError, match=f"(?s){what} is not in this HDF5 store.*store of its own.*convert-"):
            build(stores, **changes)
        assert (file.read_bytes(), file.stat().st_mtime_ns) == before


class TestCommit:
    def test_samples_and_checksums_are_flushed_before_the_line(
        self, stores: TinyStores, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        steps: list[str] = []
        pwrite, fsync = os.pwrite, os.fsync
        store = build(stores, limit=0)
        parts = header_of(stores.folder / "store.h5.partial")["arrays"][FEATURES]

        def name(offset: int) -> str:
            return next(part for part, (start, size) in parts.items() if start <= offset < start + size)

        with open_writer(store, plan_of(stores)) as writer:
            missing = writer.missing()[0]
            values = {name: stores.outputs(missing)[name] for name in ("features",)}
            layouts = writer.catalog.teacher("dino").view("original").layouts
            storage = writer.catalog.storage.array(layouts["features"])
            monkeypatch.setattr(os, "fsync", lambda fd: (steps.append("sync"), fsync(fd))[1])
            monkeypatch.setattr(os, "pwrite", lambda fd, data, at: (steps.append(name(at)), pwrite(fd, data, at))[1])
            entry = storage.write_shard(0, values["features"].astype("<f2"), rank=0)
            assert storage.read_ledger() == {}
            storage.append_to_ledger(entry, rank=0)
            monkeypatch.undo()
        assert steps == ["samples", "crc32c", "sync", "ledger", "sync"]
        assert list(storage.read_ledger()) == [0]

    def test_a_line_that_was_written_only_in_part_commits_nothing(
        self, stores: TinyStores, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        whole = build(stores, "whole.h5").read_bytes()
        real = os.pwrite

        def half(descriptor: int, data: Any, offset: int) -> int:
            return real(descriptor, data[: len(data) // 2] if bytes(data[:9]) == b'{"bytes":' else data, offset)

        with monkeypatch.context() as patch:
            patch.setattr(os, "pwrite", half)
            with pytest.raises(StoreWriteError, match="No space left"):
                build(stores)
        assert features_of(stores.folder / "store.h5").num_missing == 7
        assert build(stores).read_bytes() == whole

    def test_no_prefix_of_a_line_commits_a_shard(self, store_of_one: Path) -> None:
        start = header_of(store_of_one)["arrays"][FEATURES]["ledger"][0]
        slot = store_of_one.read_bytes()[start : start + 256]
        storage = storage_of(store_of_one)
        assert list(storage.read_ledger()) == [0]
        for kept in range(256):
            overwrite(store_of_one, start, slot[:kept].ljust(256, b"\0"))
            assert storage.read_ledger() == {}

    def test_two_processes_commit_their_shards_at_the_same_time(self, stores: TinyStores) -> None:
        whole = build(stores, "whole.h5", num_samples=60, shard_samples=1)
        store = build(stores, limit=0, num_samples=60, shard_samples=1)
        script = """
import runpy, sys
from pathlib import Path
from cache.catalog import read_catalog
from cache.encoding import encode
stores = runpy.run_path(sys.argv[1])["TinyStores"](Path(sys.argv[2]))
rank, catalog = int(sys.argv[3]), read_catalog(Path(sys.argv[2]) / "store.h5")
layouts = catalog.teacher("dino").view("original").layouts
for shard in range(rank, 60, 2):
    stored = encode({"features": stores.values("dino", "original", "features", [shard])}, layouts)
    for name, layout in layouts.items():
        storage = catalog.storage.array(layout)
        storage.append_to_ledger(storage.write_shard(shard, stored[name], rank), rank)
        storage.append_provenance({"rank": rank, "shard": shard})
"""
        conftest = str(Path(__file__).with_name("conftest.py"))
        ranks = [
            subprocess.Popen([sys.executable, "-c", script, conftest, str(stores.folder), str(rank)], cwd=ROOT)
            for rank in range(2)
        ]
        assert [rank.wait(timeout=60) for rank in ranks] == [0, 0]
        notes = storage_of(store).read_provenance()
        assert sorted((note["shard"], note["rank"]) for note in notes) == [(n, n % 2) for n in range(60)]
        with open_writer(store, plan_of(stores, num_samples=60, shard_samples=1)) as writer:
            assert writer.missing() == []
        found, expected = datasets(store), datasets(whole)
        for name in expected:
            if not name.endswith("/provenance"):
                np.testing.assert_array_equal(found[name], expected[name])


@pytest.fixture
def store_of_one(stores: TinyStores) -> Path:
    """A complete store of one sample."""
    return build(stores, num_samples=1)


class TestProvenance:
    def test_the_oldest_notes_go_where_there_is_no_room(self, store_of_one: Path) -> None:
        before = store_of_one.read_bytes()
        storage = storage_of(store_of_one)
        for number in range(100):
            storage.append_provenance({"run": number, "host": "h" * 200})
        runs = [note["run"] for note in storage.read_provenance()]
        assert runs == list(range(100 - len(runs), 100))
        length = len(json.dumps({"run": 99, "host": "h" * 200}, separators=(",", ":"))) + 1
        assert len(runs) == PROVENANCE_BYTES // length
        after = store_of_one.read_bytes()
        start, size = header_of(store_of_one)["arrays"][FEATURES]["provenance"]
        assert (after[:start], after[start + size :]) == (before[:start], before[start + size :])
        assert find_problems(read_catalog(store_of_one), verify=True) == []

    def test_a_note_that_is_too_long_loses_its_longest_fields_and_says_so(self, store_of_one: Path) -> None:
        storage = storage_of(store_of_one)
        storage.append_provenance({"time": "now", "repaired": ["x"] * 9000, "versions": "v" * 12_000, "device": "cpu"})
        (note,) = storage.read_provenance()
        assert note == {"time": "now", "device": "cpu", "left_out": ["repaired"], "versions": "v" * 12_000}

    def test_a_note_that_was_written_only_in_part_does_not_spoil_the_next(self, store_of_one: Path) -> None:
        storage = storage_of(store_of_one)
        storage.append_provenance({"run": 1})
        start = header_of(store_of_one)["arrays"][FEATURES]["provenance"][0]
        overwrite(store_of_one, start + len('{"run":1}\n'), b'{"ru')
        storage.append_provenance({"run": 2})
        assert [note["run"] for note in storage.read_provenance()] == [1, 2]


def read_everything(store: Path) -> dict[str, bytes]:
    """Everything that a reader is given of the store of one sample."""
    catalog = read_catalog(store)
    readers = [ArrayReader(catalog.storage.array(layout)) for layout in catalog.layouts()]
    assert [sample.id for sample in catalog.samples] == ["VOC2007/000001"]
    return {reader.layout.path: reader.read(0).tobytes() for reader in readers}


def parts_of(file: Path) -> Iterator[tuple[str, range]]:
    header = header_of(file)
    yield "samples.jsonl", range(header["samples"][0], sum(header["samples"]))
    for parts in header["arrays"].values():
        yield from ((part, range(start, start + size)) for part, (start, size) in parts.items())


class TestDamage:
    def test_a_flipped_bit_in_any_byte_of_header_or_metadata_is_refused(self, store_of_one: Path) -> None:
        data = store_of_one.read_bytes()
        inside = set(itertools.chain.from_iterable(places for _, places in parts_of(store_of_one)))
        outside = [offset for offset in range(len(data)) if offset not in inside]
        assert len(outside) > 5_000
        for offset in outside:
            overwrite(store_of_one, offset, bytes([data[offset] ^ 1 << offset % 8]))
            with pytest.raises(StoreError):
                Hdf5Storage(store_of_one).attributes("")
            overwrite(store_of_one, offset, data[offset : offset + 1])
        read_everything(store_of_one)

    def test_a_flipped_bit_in_any_byte_of_a_dataset_is_refused_unless_it_is_a_note(self, store_of_one: Path) -> None:
        data, expected = store_of_one.read_bytes(), read_everything(store_of_one)
        for part, places in parts_of(store_of_one):
            for offset in places if part != "provenance" else places[::997]:
                overwrite(store_of_one, offset, bytes([data[offset] ^ 1 << offset % 8]))
                if part == "provenance":
                    assert read_everything(store_of_one) == expected
                else:
                    with pytest.raises(StoreError):
                        read_everything(store_of_one)
                    assert find_problems(read_catalog(store_of_one), verify=True) != []
                overwrite(store_of_one, offset, data[offset : offset + 1])
        assert read_everything(store_of_one) == expected

    @pytest.mark.parametrize("change", [-1, -100_000, 1, 4096])
    def test_a_file_of_another_size_is_refused(self, store_of_one: Path, change: int) -> None:
        opened = TeacherStore(store_of_one)
        size = store_of_one.stat().st_size
        os.truncate(store_of_one, max(600, size + change))
        with pytest.raises(StoreError):
            read_catalog(store_of_one)
        with pytest.raises(StoreCorruptError, match=f"expected {size} bytes, found"):
            opened.array("dino", "original", "features").read(0)

    def test_an_empty_or_short_file_is_no_store(self, store_of_one: Path) -> None:
        for size in (60, 0):
            os.truncate(store_of_one, size)
            with pytest.raises(StoreError):
                read_catalog(store_of_one)

    def test_another_store_in_its_place_is_noticed(self, stores: TinyStores) -> None:
        store = build(stores)
        reader = features_of(store)
        other = build(stores, "other.h5", teachers=[stores.teacher("dino", identity={"spec": "diNO"})])
        assert other.stat().st_size != 0
        other.rename(store)
        with pytest.raises(StoreCorruptError, match=r"another file has come in its place|expected \d+ bytes"):
            reader.read(0)

    def test_a_file_that_h5py_wrote_to_is_refused(self, store_of_one: Path) -> None:
        with h5py.File(store_of_one, "r+") as file:
            file["dino"].attrs["note"] = "mine"
        with pytest.raises(StoreCorruptError, match="written to by another program"):
            read_catalog(store_of_one)

    def test_an_hdf5_file_of_others_is_no_store_and_left_alone(self, stores: TinyStores) -> None:
        path = stores.folder / "store.h5"
        with h5py.File(path, "w") as file:
            file["data"] = [1, 2, 3]
        before = path.read_bytes()
        with pytest.raises(StoreMissingError, match="an HDF5 file, but not of a TeachOnce store"):
            read_catalog(path)
        with pytest.raises(StoreMissingError, match="an HDF5 file, but not of a TeachOnce store"):
            build(stores)
        assert path.read_bytes() == before

    def test_a_newer_header_is_told_apart_from_damage(self, store_of_one: Path) -> None:
        overwrite(store_of_one, 0, b"TeachOnce HDF5 2 in some other way")
        with pytest.raises(StoreStaleError, match="expected header version 1, found the newer 2"):
            read_catalog(store_of_one)

    def test_a_line_in_another_shards_slot_is_damage(self, stores: TinyStores) -> None:
        store = build(stores)
        start = header_of(store)["arrays"][FEATURES]["ledger"][0]
        overwrite(store, start + 256, store.read_bytes()[start : start + 256])
        with pytest.raises(StoreCorruptError, match=f"{FEATURES}/ledger: the line of shard 1 is damaged"):
            storage_of(store).read_ledger()
        assert sorted(storage_of(store).read_ledger(salvage=True)) == [0, 2]


def swap(header: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {**header, **changes}


def with_part(header: dict[str, Any], part: str, extent: Any, array: str = FEATURES) -> dict[str, Any]:
    parts = {name: value for name, value in header["arrays"][array].items() if name != part}
    if extent is not None:
        parts[part] = extent
    return swap(header, arrays={**header["arrays"], array: parts})


def extent(header: dict[str, Any], part: str, array: str = FEATURES) -> list[int]:
    found: list[int] = header["arrays"][array][part]
    return found


FORGED: dict[str, tuple[Callable[[dict[str, Any]], dict[str, Any]], str]] = {
    "samples outside the file": (
        lambda h: with_part(h, "samples", [h["file_bytes"] - 4, extent(h, "samples")[1]]), "outside the file",
    ),
    "samples inside the header": (lambda h: with_part(h, "samples", [0, extent(h, "samples")[1]]), "overlap"),
    "samples in another array's place": (
        lambda h: with_part(h, "samples", [extent(h, "samples", "dino/original/moments")[0], extent(h, "samples")[1]]),
        "overlap",
    ),
    "a ledger in the checksums' place": (
        lambda h: with_part(h, "ledger", [extent(h, "crc32c")[0], extent(h, "ledger")[1]]), "overlap",
    ),
    "an offset below zero": (lambda h: with_part(h, "samples", [-512, extent(h, "samples")[1]]), "greater than or"),
    "an offset beyond any file": (lambda h: with_part(h, "samples", [2**70, 60]), "overlap or lie outside the file"),
    "an offset that is a text": (lambda h: with_part(h, "samples", ["512", 60]), "valid integer"),
    "too small a part": (
        lambda h: with_part(h, "samples", [extent(h, "samples")[0], extent(h, "samples")[1] - 1]), "expected parts of",
    ),
    "too large a part": (
        lambda h: with_part(h, "provenance", [extent(h, "provenance")[0], extent(h, "provenance")[1] + 1]),
        "expected parts of|overlap",
    ),
    "no checksums": (lambda h: with_part(h, "crc32c", None), "expected parts of"),
    "no ledger": (lambda h: with_part(h, "ledger", None), "expected parts of"),
    "a part more": (lambda h: with_part(h, "index", [extent(h, "samples")[0] + 60, 4]), "expected parts of"),
    "an array too few": (
        lambda h: swap(h, arrays={name: parts for name, parts in h["arrays"].items() if name != FEATURES}),
        "expected parts of",
    ),
    "a field more": (lambda h: swap(h, note="mine"), "Extra inputs"),
    "a group's attributes": (
        lambda h: swap(h, groups={**h["groups"], "dino": {"teachonce": {}}}), "Field required|missing",
    ),
    "no groups": (lambda h: swap(h, groups={}), "missing"),
    "groups nested beyond sense": (
        lambda h: swap(h, groups=json.loads('{"": ' * 150 + "{}" + "}" * 150)), "recursion|expected the manifest",
    ),
}  # fmt: skip


class TestForgery:
    """Headers that somebody made, digests and all."""

    @pytest.mark.parametrize(("forge", "message"), FORGED.values(), ids=FORGED)
    def test_a_header_that_no_store_can_have_is_refused(
        self, store_of_one: Path, forge: Callable[[dict[str, Any]], dict[str, Any]], message: str
    ) -> None:
        data = store_of_one.read_bytes()
        first_line, line, _ = data.split(b"\n", 2)
        block_bytes = int(first_line.split()[3])
        forged = forge(json.loads(line))
        with store_of_one.open("r+b") as file:
            try:  # the digest of what the forged header leaves to HDF5, where it can have one
                header = Header.model_validate_json(json.dumps(forged))
                forged["metadata_sha256"] = metadata_sha256(file.fileno(), header, block_bytes, "forged")
            except (StoreError, ValueError):
                pass
            rest = json.dumps(forged).encode("ascii").ljust(block_bytes - len(first_line) - 1, b"\0")
            digest = hashlib.sha256(rest).hexdigest().encode("ascii")
            file.write(b" ".join([*first_line.split()[:4], digest]) + b"\n" + rest)
        with pytest.raises(StoreCorruptError, match=message):
            read_everything(store_of_one)

    def test_the_forgery_of_an_honest_header_is_the_header(self, store_of_one: Path) -> None:
        """So the refusals above are of what was forged, not of how."""
        data = store_of_one.read_bytes()
        header = Header.model_validate(header_of(store_of_one) | {
            "arrays": {name: {part: tuple(e) for part, e in parts.items()}
                       for name, parts in header_of(store_of_one)["arrays"].items()},
            "samples": tuple(header_of(store_of_one)["samples"]),
        })  # fmt: skip
        block_bytes = int(data.split()[3])
        assert encode_header(header, block_bytes) == data[:block_bytes]

    def test_a_block_of_any_claimed_size_is_refused(self, store_of_one: Path) -> None:
        for size in (b"00000000", b"00000091", b"00000512", b"99999999"):
            overwrite(store_of_one, 17, size)
            with pytest.raises(StoreCorruptError):
                read_catalog(store_of_one)


class TestFullDisk:
    def test_a_disk_that_refuses_h5py_is_told_in_plain_words(self, stores: TinyStores) -> None:
        """At any size of the file: h5py fails at creating, at writing, or only at closing it."""
        script = """
import os, resource, runpy, signal, sys
from pathlib import Path
from data.errors import StoreWriteError
stores = runpy.run_path(sys.argv[1])["TinyStores"](Path(sys.argv[2]))
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
plan = stores.plan(format="hdf5")
size = stores.build(plan, "whole.h5").stat().st_size
for limit in (1000, 9000, size // 2, size - 10_000, size - 1):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        stores.build(plan, "store.h5")
        raise SystemExit(f"{limit}: nothing was refused")
    except StoreWriteError as error:
        assert "store.h5: cannot write: File too large" in error.message, error.message
    assert sorted(os.listdir(sys.argv[2])) == ["store.h5.lock", "whole.h5", "whole.h5.lock"]
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
assert stores.build(plan, "store.h5").read_bytes() == stores.build(plan, "whole.h5").read_bytes()
"""
        conftest = str(Path(__file__).with_name("conftest.py"))
        done = subprocess.run(
            [sys.executable, "-c", script, conftest, str(stores.folder)], capture_output=True, text=True, cwd=ROOT
        )
        assert done.returncode == 0, done.stderr

from __future__ import annotations

import os
import pickle
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import google_crc32c
import numpy as np
import pytest

import cache.reader
from cache.layout import sample_array
from cache.reader import TargetReader, TeacherStore
from data.errors import StoreCorruptError, StoreError, StoreIncompleteError, StoreStaleError
from data.geometry import VIEWS

if TYPE_CHECKING:
    from tests.cache.conftest import TinyStores

ROOT = Path(__file__).parents[2]
CHUNK = 3 * 2 * 5 * 2 + 4  # one sample of `dino` features and its checksum
SHARD_0 = "dino/original/features/c/0/0/0/0"


@pytest.fixture
def features(stores: TinyStores) -> np.ndarray[Any, Any]:
    """What the store must hold: [7, 3, 2, 5] float16."""
    return stores.values("dino", "original", "features", range(7)).astype("<f2")


def reader_of(store: Path, name: str = "features", **options: Any) -> cache.reader.ArrayReader:
    teacher = "dino" if name in ("features", "moments") else "clip"
    return TeacherStore(store, **options).array(teacher, "original", name)


def open_descriptors() -> list[str]:
    return sorted(path.name for path in Path("/proc/self/fd").iterdir())


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


class TestRead:
    def test_every_sample_is_what_was_committed(self, whole_store: Path, stores: TinyStores) -> None:
        store = TeacherStore(whole_store)
        for teacher, name, dtype in (
            ("dino", "features", "<f2"),
            ("clip", "logits", "<f4"),
            ("clip", "embeddings", "<f4"),
        ):
            for view in VIEWS:
                reader = store.array(teacher, view, name)
                expected = stores.values(teacher, view, name, range(7)).astype(dtype)
                for row in range(7):
                    np.testing.assert_array_equal(reader.read(row), expected[row])
                    assert reader.read(row).dtype == np.dtype(dtype)

    def test_a_sample_is_a_read_only_view_of_the_map(self, whole_store: Path) -> None:
        reader = reader_of(whole_store)
        first, again = reader.read(4), reader.read(4)
        assert not first.flags.owndata
        assert not first.flags.writeable
        assert first.flags.aligned
        assert first.flags.c_contiguous
        assert first.__array_interface__["data"][0] == again.__array_interface__["data"][0]

    def test_a_view_outlives_its_reader(self, whole_store: Path, features: np.ndarray[Any, Any]) -> None:
        reader = reader_of(whole_store)
        sample = reader.read(0)
        reader.close()
        del reader
        np.testing.assert_array_equal(sample, features[0])

    @pytest.mark.parametrize("row", [-1, 7, 10**12])
    def test_a_row_outside_the_array_is_an_index_error(self, whole_store: Path, row: int) -> None:
        reader = reader_of(whole_store)
        for call in (reader.read, lambda row: reader.gather([0, row]), lambda row: reader.prefetch([row])):
            with pytest.raises(IndexError, match=f"expected a row in 0 … 6, found {row}"):
                call(row)
        with pytest.raises(IndexError):
            reader.missing_rows([row])

    def test_rows_may_be_numpy_integers(self, whole_store: Path, features: np.ndarray[Any, Any]) -> None:
        rows = np.array([6, 0, 3])
        np.testing.assert_array_equal(reader_of(whole_store).gather(rows), features[rows])  # type: ignore[arg-type]

    def test_prefetching_changes_nothing(self, whole_store: Path, features: np.ndarray[Any, Any]) -> None:
        for name in ("features", "logits"):
            reader = reader_of(whole_store, name)
            reader.prefetch(range(7))
            before = reader.gather(range(7))
            np.testing.assert_array_equal(before, reader_of(whole_store, name).gather(range(7)))


class TestGather:
    def test_rows_come_in_the_order_asked_for(self, whole_store: Path, features: np.ndarray[Any, Any]) -> None:
        rows = [6, 0, 0, 5, 2]
        np.testing.assert_array_equal(reader_of(whole_store).gather(rows), features[rows])

    def test_a_buffer_is_filled_and_returned(self, whole_store: Path, features: np.ndarray[Any, Any]) -> None:
        out = np.full((2, 3, 2, 5), -1, dtype="<f2")
        assert reader_of(whole_store).gather([5, 1], out=out) is out
        np.testing.assert_array_equal(out, features[[5, 1]])

    @pytest.mark.parametrize("shape", [(3, 3, 2, 5), (2, 3, 2, 4), (2, 30), (1, 3, 2, 5)])
    def test_a_buffer_of_another_shape_is_refused(self, whole_store: Path, shape: tuple[int, ...]) -> None:
        store = TeacherStore(whole_store)
        message = r"expected out of shape \(2, 3, 2, 5\), found"
        with pytest.raises(ValueError, match=message):
            store.array("dino", "original", "features").gather([0, 1], out=np.zeros(shape, "<f2"))
        with pytest.raises(ValueError, match=message):
            store.targets("dino", "features", VIEWS).gather([0, 1], list(VIEWS), out=np.zeros(shape, "<f2"))

    def test_every_row_may_come_from_another_view(self, whole_store: Path, stores: TinyStores) -> None:
        targets = TeacherStore(whole_store).targets("dino", "features", VIEWS)
        views = ["hflip", "original", "hflip"]
        out = np.empty((3, 3, 2, 5), dtype="<f2")
        targets.prefetch([4, 4, 0], views)  # type: ignore[arg-type]
        assert targets.gather([4, 4, 0], views, out=out) is out  # type: ignore[arg-type]
        expected = [
            stores.values("dino", view, "features", [row])[0] for row, view in zip([4, 4, 0], views, strict=True)
        ]
        np.testing.assert_array_equal(out, np.stack(expected).astype("<f2"))
        assert targets.sample_shape == (3, 2, 5)
        assert targets.dtype == np.dtype("<f2")

    def test_a_view_for_every_row_is_needed(self, whole_store: Path) -> None:
        with pytest.raises(ValueError, match="shorter"):
            TeacherStore(whole_store).targets("dino", "features", VIEWS).gather([0, 1], ["original"])

    def test_views_of_different_dtypes_are_not_mixed(self, whole_store: Path, stores: TinyStores) -> None:
        wide = stores.build(stores.plan(feature_dtype="float32"), "wide.zarr")
        readers = {
            "original": TeacherStore(whole_store).array("dino", "original", "features"),
            "hflip": TeacherStore(wide).array("dino", "hflip", "features"),
        }
        with pytest.raises(StoreStaleError, match="float32"):
            TargetReader(readers)  # type: ignore[arg-type]


class TestIncomplete:
    def test_a_shard_that_is_not_committed_is_never_served(self, stores: TinyStores) -> None:
        store = stores.build(stores.plan(teachers=["dino"], views=["original"]), limit=2)
        reader = reader_of(store)
        assert reader.num_missing == 1
        assert reader.missing_rows([0, 6, 5]) == [6]
        for call in (reader.read, lambda row: reader.gather([0, row]), lambda row: reader.prefetch([row])):
            with pytest.raises(StoreIncompleteError, match=r"samples 6 … 6 \(shard 2\) are not committed"):
                call(6)

    def test_a_file_without_a_ledger_line_is_not_data(self, store: Path) -> None:
        (store / "dino/original/features/ledger.jsonl").unlink()
        with pytest.raises(StoreIncompleteError):
            reader_of(store).read(0)

    def test_a_line_of_a_running_writer_counts(self, store: Path, features: np.ndarray[Any, Any]) -> None:
        folder = store / "dino/original/features"
        (folder / "ledger.jsonl").rename(folder / "ledger-0.jsonl")
        np.testing.assert_array_equal(reader_of(store).read(6), features[6])

    def test_an_array_that_the_teacher_lacks_is_named(self, whole_store: Path) -> None:
        with pytest.raises(StoreIncompleteError, match=r"teacher clip has no features \(it has logits, embeddings\)"):
            TeacherStore(whole_store).array("clip", "original", "features")
        with pytest.raises(StoreIncompleteError, match="teacher dino has no text embeddings"):
            TeacherStore(whole_store).text_embeddings("dino")


class TestDamage:
    def test_a_flipped_byte_of_a_sample_is_refused_and_named(self, store: Path, features: np.ndarray[Any, Any]) -> None:
        flip(store / SHARD_0, CHUNK + 7)
        reader = reader_of(store)
        np.testing.assert_array_equal(reader.read(0), features[0])
        for _ in range(2):  # a refusal is not forgotten
            with pytest.raises(StoreCorruptError, match="dino/original/features: shard 0, sample 1: checksum fails"):
                reader.read(1)
        np.testing.assert_array_equal(reader.read(2), features[2])

    def test_a_flipped_byte_of_a_checksum_is_refused(self, store: Path) -> None:
        flip(store / SHARD_0, CHUNK - 1)
        with pytest.raises(StoreCorruptError, match="sample 0"):
            reader_of(store).read(0)

    def test_a_flipped_byte_of_a_chunk_is_refused_for_all_its_samples(self, store: Path) -> None:
        flip(store / "clip/original/logits/c/1/0", 0)
        reader = reader_of(store, "logits")
        reader.read(0)
        for row in (3, 4, 5):
            with pytest.raises(StoreCorruptError, match=f"shard 1, sample {row}: checksum fails"):
                reader.read(row)

    def test_unchecked_reading_serves_what_is_there(self, store: Path, features: np.ndarray[Any, Any]) -> None:
        flip(store / SHARD_0, 0)
        assert (reader_of(store, check=False).read(0) != features[0]).sum() == 1

    def test_the_index_is_checked_even_unchecked(self, store: Path) -> None:
        flip(store / SHARD_0, 3 * CHUNK)
        with pytest.raises(StoreCorruptError, match="index fails its checksum"):
            reader_of(store, check=False).read(0)

    def test_a_sample_is_checked_once_a_process(self, whole_store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        checked: list[int] = []
        real = cache.reader._MappedShard.matches_checksum

        def counted(mapped: Any, position: int) -> bool:
            checked.append(position)
            return real(mapped, position)

        monkeypatch.setattr(cache.reader._MappedShard, "matches_checksum", counted)
        monkeypatch.setattr(cache.reader, "_MAX_MAPS", 1)
        reader = reader_of(whole_store)
        for row in (0, 6, 1, 3, 0, 6, 1):  # every shard is mapped anew, no sample is checked anew
            reader.read(row)
        assert checked == [0, 0, 1, 0]

    @pytest.mark.parametrize("size", [0, 10, -1])
    def test_a_truncated_file_is_refused(self, store: Path, size: int) -> None:
        path = store / SHARD_0
        os.truncate(path, size if size >= 0 else path.stat().st_size + size)
        with pytest.raises(StoreCorruptError, match=r"features/c/0/0/0/0: expected \d+ bytes, found"):
            reader_of(store).read(0)

    def test_a_missing_file_is_refused(self, store: Path) -> None:
        (store / SHARD_0).unlink()
        with pytest.raises(StoreCorruptError, match="shard 0 is committed, but its file is missing"):
            reader_of(store).read(0)

    @pytest.mark.parametrize("make", [os.mkfifo, Path.mkdir, lambda path: path.symlink_to("/dev/zero")])
    def test_anything_but_a_regular_file_is_refused_without_waiting(self, store: Path, make: Any) -> None:
        (store / SHARD_0).unlink()
        make(store / SHARD_0)
        with pytest.raises(StoreCorruptError, match="expected a regular file"):
            reader_of(store).read(0)

    @pytest.mark.parametrize("part", [SHARD_0, "dino/original/features/c/0", "dino/original/features/c"])
    def test_a_link_is_refused_even_where_it_leads_to_the_right_bytes(
        self, store: Path, tmp_path: Path, part: str
    ) -> None:
        (store / part).rename(tmp_path / "outside")
        (store / part).symlink_to(tmp_path / "outside")
        with pytest.raises(StoreCorruptError, match="symbolic link"):
            reader_of(store).read(0)

    def test_a_shard_of_another_number_of_samples_is_refused(self, store: Path) -> None:
        shutil.copy(store / SHARD_0, store / "dino/original/features/c/2/0/0/0")
        with pytest.raises(StoreCorruptError, match="expected"):
            reader_of(store).read(6)

    def test_samples_in_another_order_are_read_right(self, store: Path, features: np.ndarray[Any, Any]) -> None:
        """Inner chunks may stand in any order, and zarr-python's own order depends on the shape: the index says."""
        for order in ([2, 1, 0], [1, 2, 0], [0, 2, 1]):
            index = [0] * 6
            content = b""
            for row in order:
                index[2 * row : 2 * row + 2] = [len(content), CHUNK]
                payload = features[row].tobytes()
                content += payload + struct.pack("<I", google_crc32c.value(payload))
            table = struct.pack("<6Q", *index)
            (store / SHARD_0).write_bytes(content + table + struct.pack("<I", google_crc32c.value(table)))
            np.testing.assert_array_equal(reader_of(store).gather(range(7)), features)

    def test_damaged_text_embeddings_are_refused(self, store: Path) -> None:
        path = store / "clip/text_embeddings/c/0/0"
        good = path.read_bytes()
        for position in (0, len(good) - 1):
            path.write_bytes(good)
            flip(path, position)
            with pytest.raises(StoreCorruptError, match="text_embeddings: checksum fails"):
                TeacherStore(store).text_embeddings("clip")
        other = np.zeros((4, 6), "<f4").tobytes()
        path.write_bytes(other + struct.pack("<I", google_crc32c.value(other)))
        with pytest.raises(StoreCorruptError, match="not the text embeddings of the manifest"):
            TeacherStore(store).text_embeddings("clip")


class TestMoments:
    def test_statistics_are_those_of_the_stored_values_of_the_given_rows(
        self, whole_store: Path, features: np.ndarray[Any, Any]
    ) -> None:
        for rows in (range(7), [5, 0, 3], [2]):
            cells = features[list(rows)].astype(np.float64).reshape(-1, 5)
            mean, std = TeacherStore(whole_store).channel_statistics("dino", rows)
            assert mean.dtype == std.dtype == np.float32
            np.testing.assert_allclose(mean, cells.mean(axis=0), rtol=1e-6, atol=1e-7)
            np.testing.assert_allclose(std, cells.std(axis=0), rtol=1e-6)

    def test_stored_moments_are_sums_over_a_samples_cells(
        self, whole_store: Path, features: np.ndarray[Any, Any]
    ) -> None:
        reader = reader_of(whole_store, "moments")
        cells = features[6].astype(np.float64).reshape(-1, 5)
        np.testing.assert_allclose(reader.read(6), [cells.sum(axis=0), (cells**2).sum(axis=0)], rtol=1e-6, atol=1e-6)


class TestResources:
    def test_maps_are_dropped_beyond_the_limit(
        self, whole_store: Path, features: np.ndarray[Any, Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(cache.reader, "_MAX_MAPS", 2)
        reader = reader_of(whole_store)
        descriptors = len(open_descriptors())
        kept = reader.read(0)
        for row in [*range(7)] * 3:
            np.testing.assert_array_equal(reader.read(row), features[row])
            assert len(open_descriptors()) <= descriptors + 3  # two maps, and the one that `kept` holds
        np.testing.assert_array_equal(kept, features[0])

    def test_no_descriptor_stays_open(self, whole_store: Path, store: Path) -> None:
        descriptors = open_descriptors()
        for _ in range(20):
            reader = reader_of(whole_store)
            reader.prefetch(range(7))
            reader.gather(range(7))
            reader.close()
        flip(store / SHARD_0, 3 * CHUNK)
        for _ in range(20):
            with pytest.raises(StoreCorruptError):
                reader_of(store).read(0)
        assert open_descriptors() == descriptors

    def test_a_failing_map_is_told_in_plain_words(self, whole_store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(*_: Any, **__: Any) -> None:
            raise OSError(12, "Cannot allocate memory")

        monkeypatch.setattr(cache.reader.mmap, "mmap", refuse)
        with pytest.raises(StoreError, match="cannot be mapped: Cannot allocate memory"):
            reader_of(whole_store).read(0)

    def test_readers_pickle_small_and_read_on(self, stores: TinyStores) -> None:
        """At 16,551 samples too: neither maps nor anything that grows with the samples travels."""
        plan = stores.plan(16_551, teachers=["clip"], shard_samples=1024)
        targets = TeacherStore(stores.build(plan, limit=2)).targets("clip", "logits", VIEWS)
        expected = targets.gather([0, 1], list(VIEWS))
        pickled = pickle.dumps(targets)
        assert len(pickled) < 20_000
        np.testing.assert_array_equal(pickle.loads(pickled).gather([0, 1], list(VIEWS)), expected)

    def test_importing_the_reader_imports_no_heavy_library(self) -> None:
        code = "import sys, cache.reader, cache.summary, cache.verify; print(*{m.split('.')[0] for m in sys.modules})"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
        assert not {"zarr", "h5py", "torch", "PIL", "filelock"} & set(done.stdout.split())


def test_the_layout_of_every_array_is_known_without_opening_a_shard(whole_store: Path) -> None:
    reader = reader_of(whole_store)
    assert reader.layout == sample_array("dino/original/features", 7, (3, 2, 5), "float16", 3)

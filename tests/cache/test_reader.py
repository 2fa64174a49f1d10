from __future__ import annotations

import ctypes
import gc
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

import cache.file_map
import cache.mapped_shard
import cache.reader
from cache.file_map import num_maps
from cache.int8 import quantise
from cache.layout import sample_array
from cache.reader import TeacherStore, read_features
from data.errors import StoreCorruptError, StoreError, StoreIncompleteError
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
        real = cache.mapped_shard.MappedShard.matches_checksum

        def counted(mapped: Any, position: int) -> bool:
            checked.append(position)
            return real(mapped, position)

        monkeypatch.setattr(cache.mapped_shard.MappedShard, "matches_checksum", counted)
        monkeypatch.setattr(cache.reader, "MAX_MAPS", 0)
        reader = reader_of(whole_store)
        for row in (0, 6, 1, 3, 0, 6, 1):  # every shard is mapped anew, no sample is checked anew
            reader.read(row)
        assert checked == [0, 0, 1, 0]

    def test_a_copied_sample_is_checked_too(self, store: Path) -> None:
        flip(store / SHARD_0, CHUNK + 7)
        with pytest.raises(StoreCorruptError, match="shard 0, sample 1: checksum fails"):
            reader_of(store).gather([0, 2, 1])

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
        gc.collect()
        before = num_maps()
        monkeypatch.setattr(cache.reader, "MAX_MAPS", before + 2)
        reader = reader_of(whole_store)
        kept = reader.read(0)
        for row in [*range(7)] * 3:
            np.testing.assert_array_equal(reader.read(row), features[row])
            assert num_maps() <= before + 3  # two maps, and the one that `kept` holds
        np.testing.assert_array_equal(kept, features[0])
        del kept
        reader.close()
        assert num_maps() == before

    def test_a_store_of_far_more_shards_than_maps_is_served(
        self, stores: TinyStores, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """In random order, every shard again and again."""
        store = stores.build(stores.plan(40, teachers=["dino"], views=["original"], shard_samples=1))
        expected = stores.values("dino", "original", "features", range(40)).astype("<f2")
        gc.collect()
        before = num_maps()
        monkeypatch.setattr(cache.reader, "MAX_MAPS", before + 4)
        reader = reader_of(store)
        rows = np.random.default_rng(0).integers(0, 40, 500).tolist()
        np.testing.assert_array_equal(reader.gather(rows), expected[rows])
        assert num_maps() <= before + 4

    def test_maps_hold_no_descriptor(self, whole_store: Path) -> None:
        """Else a store of many shards would need more of them than a process may usually open."""
        descriptors = open_descriptors()
        reader = reader_of(whole_store)
        reader.gather(range(7))
        assert open_descriptors() == descriptors
        mapped = Path("/proc/self/maps").read_text()
        assert all(f"features/c/{shard}/0/0/0" in mapped for shard in range(3))
        reader.close()
        assert str(whole_store) not in Path("/proc/self/maps").read_text()

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
        def refuse(*_: Any) -> None:
            ctypes.set_errno(12)

        monkeypatch.setattr(cache.file_map, "_MMAP", refuse)
        with pytest.raises(StoreError, match="cannot be mapped: Cannot allocate memory"):
            reader_of(whole_store).read(0)

    def test_readers_pickle_small_and_read_on(self, stores: TinyStores, whole_store: Path) -> None:
        """At 16,551 samples too: neither maps nor anything that grows with samples or shards travels."""
        plan = stores.plan(16_551, teachers=["clip"], views=["original"], shard_samples=64)
        store = TeacherStore(stores.build(plan, limit=2))
        reader = store.array("clip", "original", "logits")
        expected = reader.gather([0, 1])
        assert len(store.row_of_id) == 16_551
        for opened in (reader, store):
            assert len(pickle.dumps(opened)) < 10_000
        of_seven = reader_of(whole_store, "logits")
        of_seven.gather([0, 1])
        assert abs(len(pickle.dumps(reader)) - len(pickle.dumps(of_seven))) < 100
        np.testing.assert_array_equal(pickle.loads(pickle.dumps(reader)).gather([0, 1]), expected)
        again = pickle.loads(pickle.dumps(store))
        np.testing.assert_array_equal(again.array("clip", "original", "logits").gather([0, 1]), expected)

    def test_reading_imports_no_heavy_library(self, whole_store: Path) -> None:
        code = (
            "import sys; from pathlib import Path; import cache.summary, cache.verify, cache.residency\n"
            "from cache.reader import TeacherStore, read_features; from cache.selection import Selection\n"
            f"store = TeacherStore(Path({str(whole_store)!r})); read_features(store, 'dino', 'hflip', 3)\n"
            "selection = Selection([store], ['VOC2007/000001']); selection.channel_statistics('dino')\n"
            "print(*{m.split('.')[0] for m in sys.modules})"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
        assert not {"zarr", "h5py", "torch", "PIL", "filelock"} & set(done.stdout.split())


class TestFeaturesAsNumbers:
    @pytest.mark.parametrize("dtype", ["float16", "float32"])
    def test_floats_are_what_they_are(self, stores: TinyStores, dtype: str) -> None:
        store = TeacherStore(stores.build(stores.plan(2, teachers=["dino"], feature_dtype=dtype)))
        found = read_features(store, "dino", "hflip", 1)
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, stores.values("dino", "hflip", "features", [1])[0].astype(dtype))

    def test_int8_is_multiplied_by_its_scales(self, stores: TinyStores) -> None:
        store = TeacherStore(stores.build(stores.plan(4, teachers=["dino"], feature_dtype="int8")))
        said = stores.values("dino", "original", "features", [3])
        q, channel, token = (values[0] for values in quantise(said))
        found = read_features(store, "dino", "original", 3)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, said[0], atol=0.02)
        for i, j, c in np.ndindex(found.shape):
            assert found[i, j, c] == np.float32(np.float32(q[i, j, c]) * token[i, j]) * channel[c]


def test_the_layout_of_every_array_is_known_without_opening_a_shard(whole_store: Path) -> None:
    reader = reader_of(whole_store)
    assert reader.layout == sample_array("dino/original/features", 7, (3, 2, 5), "float16", 3)

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pytest

from cache.layout import ArrayLayout, sample_array
from cache.ledger import LedgerEntry
from cache.shard import check_shard, check_shard_data, verify_shard
from cache.zarr_storage import ZarrArray
from data.errors import StoreCorruptError

FEATURES = sample_array("t/original/features", 5, (2, 2, 3), "float16", 3)
LOGITS = sample_array("t/original/logits", 5, (4,), "float32", 3)
CHUNK = 2 * 2 * 3 * 2 + 4  # a sample of FEATURES and its checksum


def values(layout: ArrayLayout) -> np.ndarray[Any, Any]:
    return np.random.default_rng(0).normal(size=layout.shape).astype(layout.numpy_dtype)


def written(folder: Path, layout: ArrayLayout, shard: int = 0) -> LedgerEntry:
    first, count = layout.shard_range(shard)
    (array_of(folder, layout).folder / layout.shard_folder(shard)).mkdir(parents=True)
    return array_of(folder, layout).write_shard(shard, values(layout)[first : first + count], rank=0)


def array_of(folder: Path, layout: ArrayLayout) -> ZarrArray:
    return ZarrArray(folder, layout)


def file_of(folder: Path, layout: ArrayLayout, shard: int = 0) -> Path:
    return Path(array_of(folder, layout).where(shard))


def crc(data: bytes) -> bytes:
    return struct.pack("<I", google_crc32c.value(data))


def test_a_shard_is_samples_with_checksums_then_the_index_with_its_own(tmp_path: Path) -> None:
    """Put together by hand."""
    written(tmp_path, FEATURES, shard=1)
    samples = [sample.tobytes() for sample in values(FEATURES)[3:]]
    index = struct.pack("<6Q", 0, CHUNK, CHUNK, CHUNK, 2**64 - 1, 2**64 - 1)
    expected = b"".join(sample + crc(sample) for sample in samples) + index + crc(index)
    assert file_of(tmp_path, FEATURES, 1).read_bytes() == expected


def test_a_small_array_is_one_chunk_padded_with_nan(tmp_path: Path) -> None:
    written(tmp_path, LOGITS, shard=1)
    payload = values(LOGITS)[3:].tobytes() + np.full(4, np.nan, "<f4").tobytes()
    assert file_of(tmp_path, LOGITS, 1).read_bytes() == payload + crc(payload)


def test_nothing_but_the_shard_is_left(tmp_path: Path) -> None:
    written(tmp_path, FEATURES)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["0"]


def test_the_temporary_file_goes_when_the_disk_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "writev", refuse)
    with pytest.raises(OSError, match="No space"):
        written(tmp_path, FEATURES)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_file_that_is_already_being_written_is_not_taken_over(tmp_path: Path) -> None:
    other = array_of(tmp_path, FEATURES).folder / f".tmp-0-{os.getpid()}-0"
    other.parent.mkdir(parents=True)
    other.write_bytes(b"of another process")
    with pytest.raises(FileExistsError):
        written(tmp_path, FEATURES)
    assert other.read_bytes() == b"of another process"


BAD_DATA = {
    "too few samples": np.zeros((2, 2, 2, 3), "<f2"),
    "another shape": np.zeros((3, 2, 3, 2), "<f2"),
    "another dtype": np.zeros((3, 2, 2, 3), "<f4"),
    "big-endian": np.zeros((3, 2, 2, 3), ">f2"),
}


@pytest.mark.parametrize("data", BAD_DATA.values(), ids=BAD_DATA)
def test_data_of_another_shape_or_dtype_is_refused(data: np.ndarray[Any, Any]) -> None:
    with pytest.raises(ValueError, match=r"t/original/features: shard 0: expected \(3, 2, 2, 3\) float16, found"):
        check_shard_data(FEATURES, 0, data)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_the_first_sample_that_is_not_finite_is_found_by_its_row(value: float) -> None:
    data = values(FEATURES)[3:]
    assert check_shard_data(FEATURES, 1, data) is None
    data[1, 1, 1, 2] = value
    assert check_shard_data(FEATURES, 1, data) == 4


A = 2**64 - 1
INDICES = {
    "an offset past the end": ([0, CHUNK, CHUNK, CHUNK, 2**40, CHUNK], "offsets or lengths"),
    "an offset below zero, as signed": ([0, CHUNK, CHUNK, CHUNK, 2**63 + 5, CHUNK], "offsets or lengths"),
    "two samples at one place": ([0, CHUNK, CHUNK, CHUNK, CHUNK, CHUNK], "offsets or lengths"),
    "samples that overlap": ([0, CHUNK, CHUNK, CHUNK, CHUNK + 4, CHUNK], "offsets or lengths"),
    "a sample in the index": ([0, CHUNK, CHUNK, CHUNK, 3 * CHUNK, CHUNK], "offsets or lengths"),
    "a short sample": ([0, CHUNK, CHUNK, CHUNK - 4, 2 * CHUNK, CHUNK], "offsets or lengths"),
    "a vast sample": ([0, CHUNK, CHUNK, 2**62, 2 * CHUNK, CHUNK], "offsets or lengths"),
    "a sample that is absent": ([0, CHUNK, A, A, 2 * CHUNK, CHUNK], "says that sample 1 was never written"),
    "half an absent sample": ([0, CHUNK, A, CHUNK, 2 * CHUNK, CHUNK], "offsets or lengths"),
}


def write_index(path: Path, numbers: list[int]) -> None:
    index = struct.pack(f"<{len(numbers)}Q", *numbers)
    data = path.read_bytes()[: -len(index) - 4]
    path.write_bytes(data + index + crc(index))


def open_index(folder: Path, layout: ArrayLayout, shard: int = 0) -> list[int]:
    descriptor, extents = array_of(folder, layout).open_shard(shard)
    os.close(descriptor)
    return extents.samples


@pytest.mark.parametrize(("numbers", "message"), INDICES.values(), ids=INDICES)
def test_a_hostile_index_with_a_valid_checksum_is_refused(tmp_path: Path, numbers: list[int], message: str) -> None:
    entry = written(tmp_path, FEATURES)
    write_index(file_of(tmp_path, FEATURES), numbers)
    with pytest.raises(StoreCorruptError, match=message):
        open_index(tmp_path, FEATURES)
    (problem,) = check_shard(array_of(tmp_path, FEATURES), entry)
    assert message in problem.problem


def test_a_sample_past_the_arrays_end_is_refused(tmp_path: Path) -> None:
    written(tmp_path, FEATURES, shard=1)
    write_index(file_of(tmp_path, FEATURES, 1), [0, CHUNK, CHUNK, CHUNK, 0, CHUNK])
    with pytest.raises(StoreCorruptError, match="past the end"):
        open_index(tmp_path, FEATURES, shard=1)


def test_samples_may_stand_in_any_order(tmp_path: Path) -> None:
    written(tmp_path, FEATURES)
    write_index(file_of(tmp_path, FEATURES), [2 * CHUNK, CHUNK, 0, CHUNK, CHUNK, CHUNK])
    assert open_index(tmp_path, FEATURES) == [2 * CHUNK, 0, CHUNK]


@pytest.mark.parametrize("layout", [FEATURES, LOGITS], ids=["sharded", "one chunk"])
@pytest.mark.parametrize("change", [-1, 1], ids=["cut", "longer"])
def test_a_file_of_another_size_is_refused(tmp_path: Path, layout: ArrayLayout, change: int) -> None:
    written(tmp_path, layout)
    path = file_of(tmp_path, layout)
    size = path.stat().st_size
    os.truncate(path, size + change)
    with pytest.raises(StoreCorruptError, match=f"expected {size} bytes, found {size + change}"):
        open_index(tmp_path, layout)


@pytest.mark.parametrize("layout", [FEATURES, LOGITS], ids=["sharded", "one chunk"])
def test_every_flipped_byte_of_a_shard_is_found_and_the_sample_named(tmp_path: Path, layout: ArrayLayout) -> None:
    entry = written(tmp_path, layout)
    path = file_of(tmp_path, layout)
    good = path.read_bytes()
    assert verify_shard(array_of(tmp_path, layout), entry) == []
    for position in range(len(good)):
        path.write_bytes(good[:position] + bytes([good[position] ^ 0x10]) + good[position + 1 :])
        (problem,) = verify_shard(array_of(tmp_path, layout), entry)
        if layout.sharded and position < 3 * CHUNK:
            assert (problem.sample, problem.problem) == (position // CHUNK, "the sample fails its checksum")
        elif layout.sharded:
            assert (problem.sample, problem.problem) == (None, "the shard index fails its checksum")
        else:
            assert (problem.sample, problem.problem) == (None, "the shard's one chunk fails its checksum")


def test_another_file_with_valid_checksums_is_told_by_its_digest(tmp_path: Path) -> None:
    entry = written(tmp_path, FEATURES)
    data = file_of(tmp_path, FEATURES).read_bytes()
    swapped = data[CHUNK : 2 * CHUNK] + data[:CHUNK] + data[2 * CHUNK :]
    file_of(tmp_path, FEATURES).write_bytes(swapped)
    assert check_shard(array_of(tmp_path, FEATURES), entry) == []
    (problem,) = verify_shard(array_of(tmp_path, FEATURES), entry)
    assert "SHA-256 differs" in problem.problem


LINES = {
    "a shard that the array lacks": ({"shard": 2}, "commits shard 2 of an array of 2"),
    "a shard below zero": ({"shard": -1}, "commits shard -1"),
    "another first sample": ({"first": 1}, "expected first, count, bytes (0, 3, 136), found (1, 3, 136)"),
    "another count": ({"count": 2}, "found (0, 2, 136)"),
    "another size": ({"num_bytes": 7}, "found (0, 3, 7)"),
}


@pytest.mark.parametrize(("changes", "message"), LINES.values(), ids=LINES)
def test_a_ledger_line_that_the_array_cannot_have_is_a_problem(
    tmp_path: Path, changes: dict[str, int], message: str
) -> None:
    entry = written(tmp_path, FEATURES)
    line = LedgerEntry(**{**{name: getattr(entry, name) for name in LedgerEntry.__slots__}, **changes})
    (problem,) = check_shard(array_of(tmp_path, FEATURES), line)
    assert message in problem.problem

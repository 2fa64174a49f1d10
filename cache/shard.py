"""One shard file: written with checksums and flushed; opened with its index checked; checked whole."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from cache.files import open_regular, sync_file, sync_folder
from cache.layout import ABSENT, CRC_BYTES, ArrayLayout
from cache.ledger import LedgerEntry
from data.errors import StoreCorruptError, StoreError

# The fallback in pure Python is three orders of magnitude slower: no store would be read in time.
if google_crc32c.implementation != "c":
    raise ImportError("google-crc32c has no compiled implementation here; reinstall it for this platform")


@dataclass(frozen=True)
class ShardProblem:
    """What is wrong in a shard; sample is the row in the store, None where it concerns the whole file."""

    sample: int | None
    problem: str


def write_shard(
    array_folder: Path, layout: ArrayLayout, shard: int, data: NDArray[np.generic], temporary: str
) -> LedgerEntry:
    """Write one shard to its final name, flushed, and return its ledger line's content; not yet committed.

    data: as for `check_shard_data`, which is the caller's to run.  temporary: name of the file until it is whole, in
    the array's folder.

    Raises OSError where the disk refuses.
    """
    first, count = layout.shard_range(shard)
    path = array_folder / temporary
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    try:
        with os.fdopen(descriptor, "wb", buffering=0) as file:
            sha256 = _write_and_hash(file.fileno(), _encode(layout, np.ascontiguousarray(data)))
            size = os.fstat(file.fileno()).st_size
            if size != layout.shard_file_bytes(shard):
                raise OSError(f"{path}: expected {layout.shard_file_bytes(shard)} bytes, found {size} written")
        path.rename(array_folder / layout.shard_file(shard))
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    sync_folder(array_folder / layout.shard_folder(shard))
    return LedgerEntry(shard=shard, first=first, count=count, num_bytes=size, sha256=sha256)


def check_shard_data(layout: ArrayLayout, shard: int, data: NDArray[np.generic]) -> int | None:
    """Return the row in the store of the first sample that holds a value that is not finite, None where all are.

    data: [count, *sample_shape] of the layout's dtype.

    Raises ValueError for another shape or dtype.
    """
    first, count = layout.shard_range(shard)
    if data.shape != (count, *layout.sample_shape) or data.dtype != layout.numpy_dtype:
        raise ValueError(
            f"{layout.path}: shard {shard}: expected {(count, *layout.sample_shape)} {layout.numpy_dtype},"
            f" found {data.shape} {data.dtype}"
        )
    finite = np.isfinite(data.reshape(count, -1)).all(axis=1)
    return None if finite.all() else first + int(np.argmin(finite))


def _encode(layout: ArrayLayout, data: NDArray[np.generic]) -> Iterator[memoryview | bytes]:
    if not layout.sharded:
        padded = np.full(layout.chunk_shape, np.nan, dtype=layout.numpy_dtype)
        padded[: len(data)] = data
        yield padded.data.cast("B")
        yield _crc(padded)
        return
    index = np.full((layout.shard_samples, 2), ABSENT, dtype="<u8")
    for row, sample in enumerate(data):
        index[row] = row * layout.chunk_bytes, layout.chunk_bytes
        yield sample.data.cast("B")
        yield _crc(sample)
    yield index.data.cast("B")
    yield _crc(index)


def _crc(payload: NDArray[np.generic] | bytes) -> bytes:
    return int(google_crc32c.value(payload)).to_bytes(CRC_BYTES, "little")


def _write_and_hash(descriptor: int, pieces: Iterator[memoryview | bytes]) -> str:
    # SHA-256 (1 to 1.5 GB/s) is about as slow as a disk; both release the GIL, so one runs beside the other.
    sha256 = hashlib.sha256()
    with ThreadPoolExecutor(max_workers=1) as hasher:
        for piece in pieces:
            hasher.submit(sha256.update, piece)
            view = memoryview(piece)
            while view.nbytes:
                view = view[os.write(descriptor, view) :]
        sync_file(descriptor)
    return sha256.hexdigest()


def read_index(descriptor: int, layout: ArrayLayout, shard: int, where: Path) -> NDArray[np.int64]:
    """Return the offset of every sample's payload in an open shard file, [count] int64.

    Raises StoreCorruptError unless the file has its exact size, the index its checksum, every committed sample its
    exact length inside the data, and no two samples overlap.
    """
    size, expected = os.fstat(descriptor).st_size, layout.shard_file_bytes(shard)
    if size != expected:
        raise StoreCorruptError(f"{where}: expected {expected} bytes, found {size}")
    first, count = layout.shard_range(shard)
    if not layout.sharded:
        return np.arange(count, dtype=np.int64) * layout.sample_bytes
    tail = os.pread(descriptor, layout.index_bytes + CRC_BYTES, size - layout.index_bytes - CRC_BYTES)
    if _crc(tail[:-CRC_BYTES]) != tail[-CRC_BYTES:]:
        raise StoreCorruptError(f"{where}: the shard index fails its checksum")
    index = np.frombuffer(tail, dtype="<u8", count=layout.shard_samples * 2).reshape(-1, 2)
    _check_index(index, layout, first, count, where)
    offsets: NDArray[np.int64] = index[:count, 0].astype(np.int64)
    return offsets


def _check_index(index: NDArray[np.uint64], layout: ArrayLayout, first: int, count: int, where: Path) -> None:
    absent = (index == ABSENT).all(axis=1)
    if absent[:count].any():
        row = first + int(np.argmax(absent[:count]))
        raise StoreCorruptError(f"{where}: the shard index says that sample {row} was never written")
    if not absent[count:].all():
        raise StoreCorruptError(f"{where}: the shard index names samples past the end of the array")
    length = layout.chunk_bytes
    expected = np.arange(count, dtype=np.uint64) * np.uint64(length)
    if (index[:count, 1] != length).any() or not np.array_equal(np.sort(index[:count, 0]), expected):
        raise StoreCorruptError(f"{where}: the shard index has offsets or lengths that its samples cannot have")


def check_shard_file(array_folder: Path, layout: ArrayLayout, entry: LedgerEntry) -> list[ShardProblem]:
    """Return what is wrong with a committed shard as far as its line, size and index show; reads no payload."""
    if not 0 <= entry.shard < layout.num_shards:
        return [ShardProblem(None, f"the ledger commits shard {entry.shard} of an array of {layout.num_shards}")]
    first, count = layout.shard_range(entry.shard)
    expected = (first, count, layout.shard_file_bytes(entry.shard))
    found = (entry.first, entry.count, entry.num_bytes)
    if found != expected:
        return [ShardProblem(None, f"ledger: expected first, count, bytes {expected}, found {found}")]
    path = array_folder / layout.shard_file(entry.shard)
    try:
        descriptor = open_regular(array_folder, layout.shard_file(entry.shard))
        try:
            read_index(descriptor, layout, entry.shard, path)
        finally:
            os.close(descriptor)
    except FileNotFoundError:
        return [ShardProblem(None, "committed, but its file is missing")]
    except StoreError as error:
        return [ShardProblem(None, error.message.removeprefix(f"{path}: "))]
    return []


def verify_shard(array_folder: Path, layout: ArrayLayout, entry: LedgerEntry) -> list[ShardProblem]:
    """Return everything wrong with a committed shard: its line, size, index, every sample's checksum, the digest."""
    problems = check_shard_file(array_folder, layout, entry)
    if problems:
        return problems
    name = layout.shard_file(entry.shard)
    with os.fdopen(open_regular(array_folder, name), "rb", buffering=0) as file:
        offsets = read_index(file.fileno(), layout, entry.shard, array_folder / name)
        for row, offset in enumerate(offsets.tolist() if layout.sharded else [0]):
            chunk = os.pread(file.fileno(), layout.chunk_bytes, offset)
            if _crc(chunk[:-CRC_BYTES]) != chunk[-CRC_BYTES:]:
                sample = entry.first + row if layout.sharded else None
                what = "the sample" if layout.sharded else "the shard's one chunk"
                problems.append(ShardProblem(sample, f"{what} fails its checksum"))
        if not problems and hashlib.file_digest(file, "sha256").hexdigest() != entry.sha256:
            problems.append(ShardProblem(None, "the file is not the one that was committed (its SHA-256 differs)"))
    return problems

"""A store as a Zarr v3 group: folders, one file a shard, `ledger.jsonl` beside each array's metadata."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cache.canonical import Json, canonical_json
from cache.files import (
    append_line,
    in_large_writes,
    open_regular,
    read_json,
    read_regular,
    sync_file,
    sync_folder,
    write_all,
)
from cache.layout import ABSENT, CRC_BYTES, SAMPLES_FILE, ArrayLayout, group_metadata
from cache.ledger import LedgerEntry, merge_ledgers, read_ledgers
from cache.shard import crc32c
from cache.storage import AbsentSampleError, ArrayStorage, ShardExtents, Storage
from data.errors import StoreCorruptError, StoreMissingError

PROVENANCE_FILE = "provenance.jsonl"


class ZarrArray(ArrayStorage):
    """One array's folder."""

    def __init__(self, store: Path, layout: ArrayLayout) -> None:
        self.layout = layout
        self.folder = store / layout.path

    def shard_bytes(self, shard: int) -> int:
        """Return the size of a shard's file."""
        return self.layout.shard_file_bytes(shard)

    def where(self, shard: int) -> str:
        """Return the path of a shard's file."""
        return str(self.folder / self.layout.shard_file(shard))

    def open_shard(self, shard: int) -> tuple[int, ShardExtents]:
        """Open a shard's file and read its index."""
        descriptor = open_regular(self.folder, self.layout.shard_file(shard))
        try:
            return descriptor, self._extents(descriptor, shard)
        except BaseException:
            os.close(descriptor)
            raise

    def _extents(self, descriptor: int, shard: int) -> ShardExtents:
        layout = self.layout
        offsets = read_index(descriptor, layout, shard, self.where(shard))
        payload = layout.chunk_bytes - CRC_BYTES
        checksums = (offsets + payload).tolist() if layout.sharded else [payload]
        hashed = [(0, layout.shard_file_bytes(shard))]
        return ShardExtents(offsets.tolist(), checksums, payload, hashed, one_chunk=not layout.sharded)

    def write_shard(self, shard: int, data: NDArray[np.generic], rank: int) -> LedgerEntry:
        """Write a shard's file under a temporary name, flush it and rename it to its chunk key."""
        layout = self.layout
        path = self.folder / f".tmp-{rank}-{os.getpid()}-{shard}"
        sha256 = write_and_hash(path, _encode(layout, np.ascontiguousarray(data)), layout.shard_file_bytes(shard))
        try:
            path.rename(self.folder / layout.shard_file(shard))
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        sync_folder(self.folder / layout.shard_folder(shard))
        first, count = layout.shard_range(shard)
        return LedgerEntry(shard, first, count, layout.shard_file_bytes(shard), sha256)

    def read_ledger(self, *, salvage: bool = False) -> dict[int, LedgerEntry]:
        """Return the committed shards, whichever rank's ledger they stand in."""
        return read_ledgers(self.folder, salvage=salvage)[0]

    def append_to_ledger(self, entry: LedgerEntry, rank: int) -> None:
        """Append one line to the rank's ledger."""
        append_line(self.folder / f"ledger-{rank}.jsonl", entry.line())

    def settle_ledger(self) -> None:
        """Merge the ranks' ledgers."""
        entries, to_merge = read_ledgers(self.folder)
        if to_merge:
            merge_ledgers(self.folder, entries.values())

    def replace_ledger(self, entries: Iterable[LedgerEntry]) -> None:
        """Write `ledger.jsonl` anew and remove the ranks' ledgers."""
        merge_ledgers(self.folder, entries)

    def sweep(self) -> None:
        """Remove unfinished shard files."""
        for leftover in self.folder.glob(".tmp-*"):
            leftover.unlink()

    def read_provenance(self) -> list[Json]:
        """Return the lines of `provenance.jsonl`."""
        try:
            lines = read_regular(self.folder, PROVENANCE_FILE).split(b"\n")
        except (FileNotFoundError, StoreCorruptError):
            return []
        return [note for note in map(_parsed, lines) if isinstance(note, dict)]

    def append_provenance(self, note: dict[str, Json]) -> None:
        """Append one line to `provenance.jsonl`."""
        append_line(self.folder / PROVENANCE_FILE, canonical_json(note) + b"\n")


class ZarrStorage(Storage):
    """The folder of a store."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def attributes(self, group: str) -> Json:
        """Return the attributes of a group's `zarr.json`."""
        metadata = read_json(self.path, f"{group}/zarr.json" if group else "zarr.json")
        attributes = metadata.get("attributes") if isinstance(metadata, dict) else None
        if not group and not (isinstance(attributes, dict) and isinstance(attributes.get("teachonce"), dict)):
            raise StoreMissingError(
                f"{self.describe('')}: a Zarr file, but not of a TeachOnce store",
                hint="give the path of a store that `python cli.py extract-teachers` made",
            )
        # As a whole: nothing may stand there that nobody reads.
        if metadata != group_metadata(attributes):
            raise StoreCorruptError(
                f"{self.describe(group)}: the manifest is not the one that was written: it was edited or damaged"
            )
        return attributes

    def groups(self, parent: str) -> list[str]:
        """Return the names of the folders in a group's folder."""
        with os.scandir(self.path / parent) as found:
            # Links too: they are refused when they are read, not passed over as if nothing were there.
            return sorted(entry.name for entry in found if entry.is_dir() or entry.is_symlink())

    def samples(self) -> bytes:
        """Return the bytes of `samples.jsonl`."""
        try:
            return read_regular(self.path, SAMPLES_FILE)
        except FileNotFoundError:
            raise StoreCorruptError(f"{self.path / SAMPLES_FILE}: missing") from None

    def check_array(self, layout: ArrayLayout) -> None:
        """Compare the array's `zarr.json`, parsed, with what its layout implies."""
        name = f"{layout.path}/zarr.json"
        if read_json(self.path, name) != layout.metadata():
            raise StoreCorruptError(
                f"{self.path / name}: is not what the manifests imply: the file was edited or belongs elsewhere"
            )

    def array(self, layout: ArrayLayout) -> ZarrArray:
        """Return the storage of one array."""
        return ZarrArray(self.path, layout)

    def describe(self, name: str) -> str:
        """Return the path of a group's `zarr.json`, or of the file `samples.jsonl`."""
        return str(self.path / name if name == SAMPLES_FILE else self.path / name / "zarr.json")


def write_and_hash(path: Path, pieces: Iterable[memoryview | bytes], num_bytes: int) -> str:
    """Write a new file, flushed, and return the SHA-256 of its bytes; nothing is left where that fails.

    Raises OSError where the disk refuses or the file has another size in the end.
    """
    # SHA-256 (1 to 1.5 GB/s) is about as slow as a disk; both release the GIL, so one runs beside the other.
    sha256 = hashlib.sha256()
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    try:
        with os.fdopen(descriptor, "wb", buffering=0), ThreadPoolExecutor(max_workers=1) as hasher:
            for group in in_large_writes(pieces):
                for piece in group:
                    hasher.submit(sha256.update, piece)
                write_all(descriptor, group)
            sync_file(descriptor)
            size = os.fstat(descriptor).st_size
        if size != num_bytes:
            raise OSError(f"{path}: expected {num_bytes} bytes, found {size} written")
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    return sha256.hexdigest()


def _encode(layout: ArrayLayout, data: NDArray[np.generic]) -> Iterator[memoryview | bytes]:
    if not layout.sharded:
        padded = np.full(layout.chunk_shape, np.nan, dtype=layout.numpy_dtype)
        padded[: len(data)] = data
        yield padded.data.cast("B")
        yield crc32c(padded)
        return
    index = np.full((layout.shard_samples, 2), ABSENT, dtype="<u8")
    for row, sample in enumerate(data):
        index[row] = row * layout.chunk_bytes, layout.chunk_bytes
        yield sample.data.cast("B")
        yield crc32c(sample)
    yield index.data.cast("B")
    yield crc32c(index)


def read_index(descriptor: int, layout: ArrayLayout, shard: int, where: str) -> NDArray[np.int64]:
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
    if crc32c(tail[:-CRC_BYTES]) != tail[-CRC_BYTES:]:
        raise StoreCorruptError(f"{where}: the shard index fails its checksum")
    index = np.frombuffer(tail, dtype="<u8", count=layout.shard_samples * 2).reshape(-1, 2)
    _check_index(index, layout, first, count, where)
    offsets: NDArray[np.int64] = index[:count, 0].astype(np.int64)
    return offsets


def _check_index(index: NDArray[np.uint64], layout: ArrayLayout, first: int, count: int, where: str) -> None:
    absent = (index == ABSENT).all(axis=1)
    if absent[:count].any():
        row = first + int(np.argmax(absent[:count]))
        raise AbsentSampleError(f"{where}: the shard index says that sample {row} was never written", row=row)
    if not absent[count:].all():
        raise StoreCorruptError(f"{where}: the shard index names samples past the end of the array")
    length = layout.chunk_bytes
    expected = np.arange(count, dtype=np.uint64) * np.uint64(length)
    if (index[:count, 1] != length).any() or not np.array_equal(np.sort(index[:count, 0]), expected):
        raise StoreCorruptError(f"{where}: the shard index has offsets or lengths that its samples cannot have")


def _parsed(line: bytes) -> Json:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None

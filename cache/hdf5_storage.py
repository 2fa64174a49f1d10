"""A store as one HDF5 file: contiguous datasets whose place the header tells, a slot a shard for the ledger's lines.

All bytes are read and written by our own code at those places, without h5py. A shard is flushed before its slot gets
its line, and the line is the commit: what lies in the place of a shard without one is not data.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cache.canonical import Json, canonical_json
from cache.files import sync_file
from cache.hdf5_file import StoreFile, open_file, write_at
from cache.hdf5_header import (
    MAX_READ_BYTES,
    SLOT_BYTES,
    Extent,
    Header,
    array_parts,
    part_bytes,
    read_first_line,
    read_header,
)
from cache.layout import CRC_BYTES, SAMPLES_FILE, ArrayLayout
from cache.ledger import LedgerEntry, parse_line
from cache.shard import crc32c
from cache.storage import ArrayStorage, ShardExtents, Storage
from data.errors import StoreCorruptError, StoreError

_SLOTS_AT_ONCE = 4096


class Hdf5Array(ArrayStorage):
    """One array's places in the file. parts: the extent of each."""

    def __init__(self, file: StoreFile, layout: ArrayLayout, parts: dict[str, Extent]) -> None:
        self.layout = layout
        self._file = file
        self._parts = parts

    def shard_bytes(self, shard: int) -> int:
        """Return the bytes of a shard's samples and their checksums."""
        return self.layout.shard_range(shard)[1] * (self.layout.sample_bytes + CRC_BYTES)

    def where(self, shard: int) -> str:
        """Return the path of the array, as if the file were a folder."""
        return str(self._file.path / self.layout.path)

    def open_shard(self, shard: int) -> tuple[int, ShardExtents]:
        """Open the file."""
        return self._file.open(), self._extents(shard)

    def _extents(self, shard: int) -> ShardExtents:
        hashed = self._hashed(shard)
        count, size = self.layout.shard_range(shard)[1], self.layout.sample_bytes
        samples = range(hashed[0][0], hashed[0][0] + count * size, size)
        checksums = range(hashed[1][0], hashed[1][0] + count * CRC_BYTES, CRC_BYTES)
        return ShardExtents(list(samples), list(checksums), size, hashed, one_chunk=False)

    def _hashed(self, shard: int) -> list[Extent]:
        first, count = self.layout.shard_range(shard)
        sizes = {"samples": self.layout.sample_bytes, "crc32c": CRC_BYTES}
        return [(self._parts[part][0] + first * size, count * size) for part, size in sizes.items()]

    def write_shard(self, shard: int, data: NDArray[np.generic], rank: int) -> LedgerEntry:
        """Write a shard's samples and checksums to their places and flush the file."""
        data = np.ascontiguousarray(data)
        payload, checksums = data.data.cast("B"), b"".join(map(crc32c, data))
        (samples_start, _), (checksums_start, _) = self._hashed(shard)
        # SHA-256 is about as slow as a disk; both release the GIL, so one runs beside the other.
        with ThreadPoolExecutor(max_workers=1) as hasher, self._file.opened(os.O_RDWR) as descriptor:
            sha256 = hasher.submit(hashlib.sha256, payload)
            write_at(descriptor, payload, samples_start)
            write_at(descriptor, checksums, checksums_start)
            sync_file(descriptor)
        digest = sha256.result()
        digest.update(checksums)
        first, count = self.layout.shard_range(shard)
        return LedgerEntry(shard, first, count, self.shard_bytes(shard), digest.hexdigest())

    def read_ledger(self, *, salvage: bool = False) -> dict[int, LedgerEntry]:
        """Return the committed shards; a slot that is empty or was written only in part commits nothing."""
        entries = {}
        for shard, slot in enumerate(self._slots()):
            if slot.endswith(b"\0"):
                continue
            entry = _parse_slot(slot)
            if entry is not None and entry.shard == shard:
                entries[shard] = entry
            elif not salvage:
                raise StoreCorruptError(f"{self.where(shard)}/ledger: the line of shard {shard} is damaged")
        return entries

    def _slots(self) -> Iterator[bytes]:
        start, num_bytes = self._parts["ledger"]
        with self._file.opened() as descriptor:
            for offset in range(start, start + num_bytes, _SLOTS_AT_ONCE * SLOT_BYTES):
                some = os.pread(descriptor, min(_SLOTS_AT_ONCE * SLOT_BYTES, start + num_bytes - offset), offset)
                yield from (some[slot : slot + SLOT_BYTES] for slot in range(0, len(some), SLOT_BYTES))

    def append_to_ledger(self, entry: LedgerEntry, rank: int) -> None:
        """Write the line to the shard's slot by a single call."""
        with self._file.opened(os.O_RDWR) as descriptor:
            self._write_slot(descriptor, entry.shard, _encode_slot(entry))
            sync_file(descriptor)

    def _write_slot(self, descriptor: int, shard: int, slot: bytes) -> None:
        if os.pwrite(descriptor, slot, self._parts["ledger"][0] + shard * SLOT_BYTES) != SLOT_BYTES:
            raise OSError(errno.ENOSPC, "a line was written only in part", str(self._file.path))

    def settle_ledger(self) -> None:
        """Nothing: every shard has its own slot, whichever rank writes it."""

    def replace_ledger(self, entries: Iterable[LedgerEntry]) -> None:
        """Write the slots that differ; a kill leaves each of them as it was or as it shall be."""
        wanted = {entry.shard: _encode_slot(entry) for entry in entries}
        slots = [wanted.get(shard, bytes(SLOT_BYTES)) for shard in range(self.layout.num_shards)]
        changed = {shard: slots[shard] for shard, old in enumerate(self._slots()) if slots[shard] != old}
        if changed:
            with self._file.opened(os.O_RDWR) as descriptor:
                for shard, slot in changed.items():
                    self._write_slot(descriptor, shard, slot)
                sync_file(descriptor)

    def sweep(self) -> None:
        """Nothing: what an unfinished shard has left is overwritten in its place."""

    def read_provenance(self) -> list[Json]:
        """Return the notes that are there."""
        try:
            with self._file.opened() as descriptor:
                text = self._provenance(descriptor)
        except StoreError:
            return []
        return [note for note in map(_parsed, text.split(b"\n")) if isinstance(note, dict)]

    def append_provenance(self, note: dict[str, Json]) -> None:
        """Append one line; where there is no room left, the oldest lines go."""
        import fcntl  # reading a store needs none of it

        start, capacity = self._parts["provenance"]
        line = _fitted(note, capacity)
        with self._file.opened(os.O_RDWR) as descriptor:
            fcntl.lockf(descriptor, fcntl.LOCK_EX, capacity, start)  # ranks note at the same time
            old = self._provenance(descriptor)
            new = old + b"\n" + line if old and not old.endswith(b"\n") else old + line
            while len(new) > capacity:
                new = new.partition(b"\n")[2]
            kept = len(old) if new.startswith(old) else 0
            write_at(descriptor, new[kept:].ljust(len(old) - kept, b"\0"), start + kept)
            sync_file(descriptor)

    def _provenance(self, descriptor: int) -> bytes:
        start, capacity = self._parts["provenance"]
        return os.pread(descriptor, capacity, start).rstrip(b"\0")


class Hdf5Storage(Storage):
    """The file of a store."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @cached_property
    def _opened(self) -> tuple[Header, StoreFile]:
        descriptor = open_file(self.path)
        try:
            header = read_header(descriptor, str(self.path))
            return header, StoreFile(self.path, read_first_line(descriptor), header.file_bytes)
        except OSError as error:
            raise StoreError(f"{self.path}: cannot be read: {error.strerror}") from error
        finally:
            os.close(descriptor)

    def attributes(self, group: str) -> Json:
        """Return what the header says of a group."""
        header, _ = self._opened
        if group not in header.groups:
            raise StoreCorruptError(f"{self.describe(group)}: missing")
        return header.groups[group]

    def groups(self, parent: str) -> list[str]:
        """Return the names of the groups in a group."""
        below = f"{parent}/" if parent else ""
        names = (group.removeprefix(below) for group in self._opened[0].groups if group.startswith(below))
        return sorted(name for name in names if name and "/" not in name)

    def samples(self) -> bytes:
        """Return the bytes of the dataset `samples.jsonl`."""
        header, file = self._opened
        start, num_bytes = header.samples
        if num_bytes > MAX_READ_BYTES:
            raise StoreCorruptError(f"{self.describe(SAMPLES_FILE)}: far larger than it can be")
        with file.opened() as descriptor:
            return os.pread(descriptor, num_bytes, start)

    def check_array(self, layout: ArrayLayout) -> None:
        """Compare the sizes of the array's parts with what its layout implies."""
        expected = {part: part_bytes(*stored_as) for part, stored_as in array_parts(layout).items()}
        found = {part: extent[1] for part, extent in self._opened[0].arrays.get(layout.path, {}).items()}
        if found != expected:
            raise StoreCorruptError(f"{self.path / layout.path}: expected parts of {expected} bytes, found {found}")

    def array(self, layout: ArrayLayout) -> Hdf5Array:
        """Return the storage of one array."""
        header, file = self._opened
        return Hdf5Array(file, layout, header.arrays[layout.path])

    def describe(self, name: str) -> str:
        """Return the path of a group or dataset, as if the file were a folder."""
        return str(self.path / name)


def _encode_slot(entry: LedgerEntry) -> bytes:
    # Padded before its newline: a slot that was written only in part ends in a zero, one with a flipped byte does not.
    return entry.line()[:-1].ljust(SLOT_BYTES - 1) + b"\n"


def _parse_slot(slot: bytes) -> LedgerEntry | None:
    entry = parse_line(slot.rstrip())
    return entry if entry is not None and _encode_slot(entry) == slot else None


def _fitted(note: dict[str, Json], capacity: int) -> bytes:
    """Return the note's line; where it is too long, without its longest fields, which it then names."""
    left_out: Sequence[str] = ()
    kept = note
    while len(line := canonical_json(kept) + b"\n") > capacity:
        longest = max(kept.keys() - {"left_out"}, key=lambda name: len(canonical_json(kept[name])))
        left_out = [*left_out, longest]
        kept = {**{name: value for name, value in kept.items() if name != longest}, "left_out": left_out}
    return line


def _parsed(line: bytes) -> Json:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None

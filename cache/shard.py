"""What holds for a shard in any container: which data it takes, and how it is checked."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from cache.layout import CRC_BYTES, ArrayLayout
from cache.ledger import LedgerEntry
from cache.storage import ArrayStorage
from data.errors import StoreError

# The fallback in pure Python is three orders of magnitude slower: no store would be read in time.
if google_crc32c.implementation != "c":
    raise ImportError("google-crc32c has no compiled implementation here; reinstall it for this platform")
_HASHED_AT_ONCE = 1 << 22


@dataclass(frozen=True)
class ShardProblem:
    """What is wrong in a shard; sample is the row in the store, None where it concerns the whole file."""

    sample: int | None
    problem: str


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


def crc32c(payload: NDArray[np.generic] | bytes) -> bytes:
    """Return the checksum of a payload as it stands on disk: four bytes, little-endian."""
    return int(google_crc32c.value(payload)).to_bytes(CRC_BYTES, "little")


def check_shard(storage: ArrayStorage, entry: LedgerEntry) -> list[ShardProblem]:
    """Return what is wrong with a committed shard as far as its line, size and index show; reads no payload."""
    layout = storage.layout
    if not 0 <= entry.shard < layout.num_shards:
        return [ShardProblem(None, f"the ledger commits shard {entry.shard} of an array of {layout.num_shards}")]
    first, count = layout.shard_range(entry.shard)
    expected = (first, count, storage.shard_bytes(entry.shard))
    found = (entry.first, entry.count, entry.num_bytes)
    if found != expected:
        return [ShardProblem(None, f"ledger: expected first, count, bytes {expected}, found {found}")]
    try:
        os.close(storage.open_shard(entry.shard)[0])
    except FileNotFoundError:
        return [ShardProblem(None, "committed, but its file is missing")]
    except StoreError as error:
        return [ShardProblem(None, error.message.removeprefix(f"{storage.where(entry.shard)}: "))]
    return []


def verify_shard(storage: ArrayStorage, entry: LedgerEntry) -> list[ShardProblem]:
    """Return everything wrong with a committed shard: its line, size, index, every sample's checksum, the digest."""
    problems = check_shard(storage, entry)
    if problems:
        return problems
    descriptor, extents = storage.open_shard(entry.shard)
    try:
        for number, checksum in enumerate(extents.checksums):
            chunk = os.pread(descriptor, extents.chunk_bytes, extents.samples[number])
            if crc32c(chunk) != os.pread(descriptor, CRC_BYTES, checksum):
                what = "the shard's one chunk" if extents.one_chunk else "the sample"
                row = None if extents.one_chunk else entry.first + number
                problems.append(ShardProblem(row, f"{what} fails its checksum"))
        if not problems and _sha256(descriptor, extents.hashed) != entry.sha256:
            problems.append(ShardProblem(None, "the file is not the one that was committed (its SHA-256 differs)"))
    finally:
        os.close(descriptor)
    return problems


def _sha256(descriptor: int, extents: list[tuple[int, int]]) -> str:
    sha256 = hashlib.sha256()
    for start, num_bytes in extents:
        for offset in range(start, start + num_bytes, _HASHED_AT_ONCE):
            sha256.update(os.pread(descriptor, min(_HASHED_AT_ONCE, start + num_bytes - offset), offset))
    return sha256.hexdigest()

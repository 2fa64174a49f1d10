"""What holds for a shard in any container: which data it takes, and how it is checked."""

from __future__ import annotations

import hashlib
import os
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from cache.layout import CRC_BYTES, ArrayLayout
from cache.ledger import LedgerEntry
from cache.storage import AbsentSampleError, ArrayStorage, ShardExtents
from data.errors import StoreCorruptError, StoreError

# The fallback in pure Python is three orders of magnitude slower: no store would be read in time.
if google_crc32c.implementation != "c":
    raise ImportError("google-crc32c has no compiled implementation here; reinstall it for this platform")
_READ_AT_ONCE = 1 << 22


@dataclass(frozen=True)
class ShardProblem:
    """What is wrong in a shard; sample is the row in the store, None where it concerns the whole file.

    sha256: of the file as it is, where that is all that is wrong with it: it may be another shard's.
    """

    sample: int | None
    problem: str
    sha256: str | None = None


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
    return next((first + row for row, sample in enumerate(data) if not _is_finite(sample)), None)


def _is_finite(sample: NDArray[np.generic]) -> bool:
    if sample.dtype == np.float16:  # all bits of the exponent set: seven times quicker than isfinite
        return bool((sample.view("<u2") & 0x7FFF).max() < 0x7C00)
    return bool(np.isfinite(sample).all())


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
        row = error.row if isinstance(error, AbsentSampleError) else None
        return [ShardProblem(row, error.message.removeprefix(f"{storage.where(entry.shard)}: "))]
    return []


def verify_shard(storage: ArrayStorage, entry: LedgerEntry) -> list[ShardProblem]:
    """Return everything wrong with a committed shard: its line, size, index, every sample's checksum, the digest.

    Every byte is read once, a sample at a time: for its checksum and for the digest.  Raises OSError where the disk
    cannot read it.
    """
    problems = check_shard(storage, entry)
    if problems:
        return problems
    descriptor, extents = storage.open_shard(entry.shard)
    try:
        failed, sha256 = _read_through(descriptor, extents)
    finally:
        os.close(descriptor)
    what = "the shard's one chunk" if extents.one_chunk else "the sample"
    for number in failed:
        row = None if extents.one_chunk else entry.first + number
        problems.append(ShardProblem(row, f"{what} fails its checksum"))
    if not problems and sha256 != entry.sha256:
        what = "the file is not the one that was committed (its SHA-256 differs)"
        problems.append(ShardProblem(None, what, sha256))
    return problems


def read_shard(storage: ArrayStorage, shard: int) -> NDArray[np.generic]:
    """Return a copy of a committed shard's samples, [count, *sample_shape], checksums verified.

    Read, not mapped: a failing disk raises, where a map would end the process. All of it at once: for small arrays.

    Raises StoreCorruptError where size, index or a checksum is wrong, FileNotFoundError where there is no file, OSError
    where the disk cannot read it.
    """
    layout = storage.layout
    _, count = layout.shard_range(shard)
    descriptor, extents = storage.open_shard(shard)
    try:
        pieces = [(start, os.pread(descriptor, num_bytes, start)) for start, num_bytes in extents.hashed]
    finally:
        os.close(descriptor)

    def read(offset: int, num_bytes: int) -> bytes:
        held = ((start, piece) for start, piece in pieces if start <= offset < start + len(piece))
        start, piece = next(held, (offset, b""))  # a file that was cut while it was read fails its checksum
        return piece[offset - start : offset - start + num_bytes]

    chunks = [read(start, extents.chunk_bytes) for start in extents.samples[: len(extents.checksums)]]
    for chunk, checksum in zip(chunks, extents.checksums, strict=True):
        if crc32c(chunk) != read(checksum, CRC_BYTES):
            raise StoreCorruptError(f"{storage.where(shard)}: a checksum fails")
    values = np.frombuffer(b"".join(chunks), layout.numpy_dtype)
    return values.reshape(-1, *layout.sample_shape)[:count]  # without the padding of a last chunk


def _read_through(descriptor: int, extents: ShardExtents) -> tuple[list[int], str]:
    """Return the numbers of the chunks that fail their checksum, and the SHA-256 of all that is hashed, in hex."""
    number_at = {start: number for number, start in enumerate(extents.samples[: len(extents.checksums)])}
    failed = []
    sha256 = hashlib.sha256()
    for start, num_bytes in _pieces(extents):
        piece = os.pread(descriptor, num_bytes, start)
        sha256.update(piece)
        number = number_at.pop(start, None)
        if number is not None and crc32c(piece) != os.pread(descriptor, CRC_BYTES, extents.checksums[number]):
            failed.append(number)
    assert not number_at, "the digest runs over every chunk"
    return sorted(failed), sha256.hexdigest()


def _pieces(extents: ShardExtents) -> Iterator[tuple[int, int]]:
    """Yield (offset, bytes) of all that is hashed, in order, cut so that every chunk is a piece of its own."""
    chunks = sorted(extents.samples[: len(extents.checksums)])
    for start, num_bytes in extents.hashed:
        position, end = start, start + num_bytes
        for chunk in chunks[bisect_left(chunks, start) : bisect_left(chunks, end)]:
            yield from _blocks(position, chunk)
            yield chunk, extents.chunk_bytes
            position = chunk + extents.chunk_bytes
        yield from _blocks(position, end)


def _blocks(start: int, end: int) -> Iterator[tuple[int, int]]:
    for offset in range(start, end, _READ_AT_ONCE):
        yield offset, min(_READ_AT_ONCE, end - offset)

"""The header of an HDF5 store: where every array lies in the file, and the digest that shows a changed byte.

It stands in the user block, the bytes before the HDF5 superblock that HDF5 leaves to applications. So a store is read
without h5py, and no byte of a file that nobody vouches for ever reaches the HDF5 library. A header is one line with
version, block size and the SHA-256 of the rest of the block; then one line of canonical JSON; then zeros.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator
from math import prod
from typing import Any, Final

import numpy as np
from pydantic import BaseModel, ConfigDict, NonNegativeInt, PositiveInt, ValidationError

from cache.canonical import Json, canonical_json
from cache.layout import CONSTANT_DIMENSIONS, SAMPLES_FILE, ArrayLayout
from data.errors import StoreCorruptError, StoreMissingError, StoreStaleError

HEADER_VERSION: Final = 1
# An upper bound for whatever is read as a whole: a larger one is not ours and would only cost memory.
MAX_READ_BYTES = 1 << 30
SLOT_BYTES: Final = 256
# Notes of some twenty runs; the rest of it is a hole in the file.
PROVENANCE_BYTES: Final = 12_288
# Below this group lies what vouches for the samples; no teacher's key starts with an underscore.
RECORDS: Final = "_records"
_MAX_BLOCK_BYTES = 1 << 26
_VERSION = re.compile(rb"TeachOnce HDF5 (\d{1,9}) ")
_FIRST_LINE = re.compile(rb"TeachOnce HDF5 1 (\d{8}) ([0-9a-f]{64})\n")
_FIRST_LINE_BYTES = 91
_SIGNATURE = b"\x89HDF\r\n\x1a\n"
_HASHED_AT_ONCE = 1 << 22
Extent = tuple[NonNegativeInt, PositiveInt]  # offset in the file, bytes


class Header(BaseModel):
    """What the header says.

    file_bytes: size of the file.  metadata_sha256: over all bytes behind the block that belong to no extent: what
    HDF5 keeps for itself.  groups: the attributes of every group, "" for the root.  arrays: the extents of every
    array's parts.  samples: that of `samples.jsonl`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    file_bytes: PositiveInt
    metadata_sha256: str
    groups: dict[str, Any]
    arrays: dict[str, dict[str, Extent]]
    samples: Extent

    def content(self) -> bytes:
        """Return the header's JSON line."""
        return canonical_json(self.model_dump(mode="json")) + b"\n"


def array_parts(layout: ArrayLayout) -> dict[str, tuple[tuple[int, ...], np.dtype[Any]]]:
    """Return shape and dtype of everything an array consists of; constants are committed by their manifest.

    samples: [N, …].  crc32c: of every sample, [N] uint32.  ledger: one line a shard, [shards, 256] uint8.
    provenance: lines, [12288] uint8.
    """
    parts: dict[str, tuple[tuple[int, ...], np.dtype[Any]]] = {
        "samples": (layout.shape, layout.numpy_dtype),
        "crc32c": ((layout.num_samples,), np.dtype("<u4")),
    }
    if layout.path.rpartition("/")[2] not in CONSTANT_DIMENSIONS:
        parts["ledger"] = ((layout.num_shards, SLOT_BYTES), np.dtype("u1"))
        parts["provenance"] = ((PROVENANCE_BYTES,), np.dtype("u1"))
    return parts


def part_path(array: str, part: str) -> str:
    """Return the HDF5 path of a part of an array: the samples are the array, the rest lies below `_records`."""
    return array if part == "samples" else f"{RECORDS}/{array}/{part}"


def block_bytes_for(groups: Json, layouts: list[ArrayLayout]) -> int:
    """Return the user block's size: a power of two, as HDF5 asks for, that holds the header whatever its numbers."""
    widest = (10**18, 10**18)
    arrays = {layout.path: dict.fromkeys(array_parts(layout), widest) for layout in layouts}
    header = Header(file_bytes=10**18, metadata_sha256="0" * 64, groups=groups, arrays=arrays, samples=widest)
    need = _FIRST_LINE_BYTES + len(header.content())
    return max(512, 1 << (need - 1).bit_length())


def encode_header(header: Header, block_bytes: int) -> bytes:
    """Return the user block."""
    rest = header.content().ljust(block_bytes - _FIRST_LINE_BYTES, b"\0")
    digest = hashlib.sha256(rest).hexdigest()
    return b"TeachOnce HDF5 %d %08d %s\n" % (HEADER_VERSION, block_bytes, digest.encode("ascii")) + rest


def is_hdf5(descriptor: int) -> bool:
    """Return whether a file starts like one of our stores, or is an HDF5 file of any kind."""
    starts = (0, *(1 << power for power in range(9, _MAX_BLOCK_BYTES.bit_length())))
    ours = _VERSION.match(read_first_line(descriptor)) is not None
    return ours or any(os.pread(descriptor, len(_SIGNATURE), start) == _SIGNATURE for start in starts)


def read_first_line(descriptor: int) -> bytes:
    """Return the line that identifies the file: it holds the digest of all else."""
    return os.pread(descriptor, _FIRST_LINE_BYTES, 0)


def read_header(descriptor: int, where: str) -> Header:
    """Return the header of an open file once its digest, its extents and the digest of HDF5's metadata are proven.

    Raises StoreMissingError for a file without one, StoreStaleError for a newer one, StoreCorruptError for one that
    was changed or that no store can have.
    """
    block_bytes, sha256 = _parse_first_line(read_first_line(descriptor), where)
    rest = os.pread(descriptor, block_bytes - _FIRST_LINE_BYTES, _FIRST_LINE_BYTES)
    if hashlib.sha256(rest).hexdigest() != sha256:
        raise _changed(where, "the header is not the one that was written")
    try:
        header = Header.model_validate_json(rest.rstrip(b"\0"))
    except ValidationError as error:
        raise _changed(where, f"the header is none: {error.errors()[0]['msg']}") from error
    size = os.fstat(descriptor).st_size
    if size != header.file_bytes:
        raise _changed(where, f"expected {header.file_bytes} bytes, found {size}")
    if metadata_sha256(descriptor, header, block_bytes, where) != header.metadata_sha256:
        raise _changed(where, "the HDF5 metadata are not those that were written")
    return header


def metadata_sha256(descriptor: int, header: Header, block_bytes: int, where: str) -> str:
    """Return the SHA-256 over the bytes behind the block that belong to no extent.

    Raises StoreCorruptError where extents overlap, lie outside the file, or leave far too much to HDF5.
    """
    gaps = list(_gaps(header, block_bytes, where))
    if sum(end - start for start, end in gaps) > MAX_READ_BYTES:
        raise _changed(where, "the header leaves more bytes to HDF5 than its metadata can have")
    sha256 = hashlib.sha256()
    for start, end in gaps:
        for offset in range(start, end, _HASHED_AT_ONCE):
            sha256.update(os.pread(descriptor, min(_HASHED_AT_ONCE, end - offset), offset))
    return sha256.hexdigest()


def part_bytes(shape: tuple[int, ...], dtype: np.dtype[Any]) -> int:
    """Return the bytes of a part of an array."""
    return prod(shape) * dtype.itemsize


def _parse_first_line(line: bytes, where: str) -> tuple[int, str]:
    """Return the block's size and the digest of its rest."""
    version = _VERSION.match(line)
    if version is None:
        raise StoreMissingError(
            f"{where}: an HDF5 file, but not of a TeachOnce store, or its first line is damaged",
            hint="give the path of a store that `python cli.py extract-teachers` made",
        )
    if int(version[1]) > HEADER_VERSION:
        raise StoreStaleError(
            f"{where}: expected header version {HEADER_VERSION}, found the newer {int(version[1])}",
            hint="update TeachOnce, or read the store with the version that wrote it",
        )
    match = _FIRST_LINE.match(line)
    if match is None or not _FIRST_LINE_BYTES < int(match[1]) <= _MAX_BLOCK_BYTES:
        raise _changed(where, "the header's first line is not the one that was written")
    return int(match[1]), match[2].decode("ascii")


def _gaps(header: Header, block_bytes: int, where: str) -> Iterator[tuple[int, int]]:
    """Yield start and end of all that lies behind the block and between the extents."""
    reached = block_bytes
    for start, num_bytes in sorted([header.samples, *(e for parts in header.arrays.values() for e in parts.values())]):
        if start < reached or start + num_bytes > header.file_bytes:
            raise _changed(where, f"{SAMPLES_FILE} or arrays overlap or lie outside the file")
        if start > reached:
            yield reached, start
        reached = start + num_bytes
    if reached < header.file_bytes:
        yield reached, header.file_bytes


def _changed(where: str, problem: str) -> StoreCorruptError:
    return StoreCorruptError(
        f"{where}: {problem}: the file was damaged, or written to by another program",
        hint="the header of an HDF5 store cannot be mended: write the store anew under another name (--out)",
    )

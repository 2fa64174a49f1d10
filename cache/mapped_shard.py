"""One shard of an array, mapped: where its samples and checksums lie in the map."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cache.file_map import FileMap
from cache.layout import CRC_BYTES, ArrayLayout
from cache.shard import crc32c
from cache.storage import ArrayStorage, ShardExtents
from data.errors import StoreCorruptError, StoreError

FIND_DAMAGE = "find all damage with `python cli.py inspect-cache STORE --verify`"


class MappedShard:
    """One committed shard, mapped read-only for as long as this or a sample of it lives.

    Raises StoreCorruptError where its file is missing or contradicts the layout, StoreError where it cannot be mapped.
    """

    def __init__(self, storage: ArrayStorage, shard: int) -> None:
        self._where = storage.where(shard)
        try:
            descriptor, extents = storage.open_shard(shard)
        except FileNotFoundError:
            raise StoreCorruptError(
                f"{self._where}: shard {shard} is committed, but its file is missing", hint=FIND_DAMAGE
            ) from None
        try:
            self._maps = [FileMap(descriptor, start, end - start) for start, end in _ranges(extents)]
        except OSError as error:
            raise StoreError(f"{self._where}: cannot be mapped: {error.strerror}") from error
        finally:
            os.close(descriptor)
        # Arrays, which the maps do not refer to: maps must go as soon as nobody looks into them.
        self._bytes: NDArray[np.uint8] = np.asarray(self._maps[0])
        self._sums: NDArray[np.uint8] = np.asarray(self._maps[-1])
        self._samples = _compact([offset - self._maps[0].offset for offset in extents.samples])
        self._checksums = _compact([offset - self._maps[-1].offset for offset in extents.checksums])
        self._chunk_bytes = extents.chunk_bytes
        self.one_chunk = extents.one_chunk

    def sample(self, position: int, layout: ArrayLayout) -> NDArray[Any]:
        """Return the sample at a position in the shard, [*sample_shape], a read-only view into the map."""
        return np.ndarray(layout.sample_shape, layout.numpy_dtype, self._bytes, self._samples[position])

    def matches_checksum(self, position: int) -> bool:
        """Return whether the chunk of the sample at a position is what its checksum says."""
        number = 0 if self.one_chunk else position
        start, stored = self._samples[number], self._checksums[number]
        chunk = self._bytes[start : start + self._chunk_bytes]
        return crc32c(chunk) == self._sums[stored : stored + CRC_BYTES].tobytes()

    def prefetch(self, position: int, num_bytes: int) -> None:
        """Ask the kernel to read the sample at a position from the disk, in the background."""
        self._maps[0].will_need(self._samples[position], num_bytes)

    def populate(self) -> None:
        """Read the whole shard into the page cache and the page table; raises StoreError where it cannot be read."""
        try:
            for each in self._maps:
                each.populate()
        except OSError as error:
            raise StoreError(f"{self._where}: cannot be read: {error.strerror}", hint=FIND_DAMAGE) from error


def _ranges(extents: ShardExtents) -> list[tuple[int, int]]:
    """Return the range of offsets of a shard's samples, and that of its checksums unless one range holds both.

    In a file of its own, a checksum follows its chunk; in HDF5, checksums are another dataset, gigabytes away.
    """
    chunks = extents.samples[: len(extents.checksums)]
    samples = min(chunks), max(chunks) + extents.chunk_bytes
    checksums = min(extents.checksums), max(extents.checksums) + CRC_BYTES
    if checksums[0] <= samples[1] and samples[0] <= checksums[1]:
        return [(min(samples[0], checksums[0]), max(samples[1], checksums[1]))]
    return [samples, checksums]


def _compact(offsets: list[int]) -> Sequence[int]:
    """Return the offsets as a range where they are one, as those of every shard of ours are: a list takes kilobytes."""
    step = offsets[1] - offsets[0] if len(offsets) > 1 else 1
    even = range(offsets[0], offsets[0] + step * len(offsets), step) if step else range(0)
    return even if list(even) == offsets else offsets

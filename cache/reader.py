"""Reads targets through memory maps: no copy until one is asked for, and never a sample that is not committed.

The metadata is parsed here, so neither zarr nor h5py is imported. Samples are views into maps of shard files; their
checksum is verified at the first touch in each process. Pages belong to the kernel and are shared by all processes.
"""

from __future__ import annotations

import hashlib
import mmap
import resource
from collections import OrderedDict
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cache.catalog import Catalog, StoredTeacher, read_catalog
from cache.layout import CRC_BYTES, TEXT_EMBEDDINGS, ArrayLayout
from cache.ledger import content_digest
from cache.shard import crc32c
from cache.storage import ArrayStorage, Storage
from data.errors import StoreCorruptError, StoreIncompleteError, StoreStaleError
from data.geometry import View

Array = NDArray[Any]
# Every map holds a descriptor, and a run reads several arrays: stay far below what the process may open.
_MAX_MAPS = max(8, min(1024, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 16))
_FIND_DAMAGE = "find all damage with `python cli.py inspect-cache STORE --verify`"


class ArrayReader:
    """One array of a store, [N, …], read sample by sample.

    Pickles small (maps are opened again where it arrives); safe to use after a fork; not from two threads at once.
    """

    def __init__(self, storage: ArrayStorage, *, check: bool = True) -> None:
        self.layout = storage.layout
        self.storage = storage
        self._check = check
        self._forget()

    def _forget(self) -> None:
        self._maps: OrderedDict[int, _MappedShard] = OrderedDict()
        # By sample, not by map: a shard that is mapped again is not checked again.
        self._checked = np.zeros(self.layout.num_samples, dtype=np.bool_)

    @cached_property
    def committed(self) -> NDArray[np.bool_]:
        """Which shards were committed when this reader first looked, [num_shards] bool."""
        flags = np.zeros(self.layout.num_shards, dtype=np.bool_)
        flags[[shard for shard in self.storage.read_ledger() if 0 <= shard < len(flags)]] = True
        return flags

    @property
    def content_digest(self) -> str:
        """The SHA-256 over the merged ledger, so over every committed byte."""
        return content_digest(self.storage.read_ledger().values())

    @property
    def num_missing(self) -> int:
        """Number of samples whose shard is not committed."""
        return sum(self.layout.shard_range(int(shard))[1] for shard in np.flatnonzero(~self.committed))

    def missing_rows(self, rows: Sequence[int]) -> list[int]:
        """Return those of the given rows whose shard is not committed; raises IndexError outside 0 … N−1."""
        return [row for row in rows if not self.committed[self._place(row)[0]]]

    def read(self, row: int) -> Array:
        """Return one sample [*sample_shape] as a read-only view into the map; copy it to keep or change it.

        Raises StoreIncompleteError for a row that is not committed, StoreCorruptError where a checksum fails,
        IndexError outside 0 … N−1.
        """
        shard, position = self._place(row)
        mapped = self._mapped(shard)
        if self._check and not self._checked[row]:
            self._check_sample(mapped, shard, position)
        return mapped.sample(position, self.layout)

    def gather(self, rows: Sequence[int], out: Array | None = None) -> Array:
        """Return the given rows, copied, as [len(rows), *sample_shape]; into `out` where one is given.

        Raises ValueError for an `out` of another shape, else as `read`.
        """
        out = _buffer(self.layout, len(rows), out)
        for position, row in enumerate(rows):
            out[position] = self.read(row)
        return out

    def prefetch(self, rows: Sequence[int]) -> None:
        """Ask the kernel to read the given rows from the disk, in the background; returns at once."""
        for row in rows:
            shard, position = self._place(row)
            self._mapped(shard).prefetch(position, self.layout.sample_bytes)

    def close(self) -> None:
        """Forget every map; views that are still in use keep theirs alive."""
        self._forget()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_maps", "_checked")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    def _place(self, row: int) -> tuple[int, int]:
        if not 0 <= row < self.layout.num_samples:
            raise IndexError(f"{self.layout.path}: expected a row in 0 … {self.layout.num_samples - 1}, found {row}")
        return divmod(row, self.layout.shard_samples)

    def _mapped(self, shard: int) -> _MappedShard:
        mapped = self._maps.get(shard)
        if mapped is not None:
            self._maps.move_to_end(shard)
            return mapped
        first, count = self.layout.shard_range(shard)
        if not self.committed[shard]:
            raise StoreIncompleteError(
                f"{self.layout.path}: samples {first} … {first + count - 1} (shard {shard}) are not committed",
                hint="run the same extract-teachers command again: it resumes",
            )
        mapped = self._maps[shard] = _MappedShard(self.storage, shard)
        if len(self._maps) > _MAX_MAPS:
            self._maps.popitem(last=False)
        return mapped

    def _check_sample(self, mapped: _MappedShard, shard: int, position: int) -> None:
        first, count = self.layout.shard_range(shard)
        if not mapped.matches_checksum(position):
            raise StoreCorruptError(
                f"{self.layout.path}: shard {shard}, sample {first + position}: checksum fails", hint=_FIND_DAMAGE
            )
        # Where a shard is one chunk, one checksum vouches for all its samples.
        checked = slice(first, first + count) if mapped.one_chunk else slice(first + position, first + position + 1)
        self._checked[checked] = True


class _MappedShard:
    """One shard, mapped read-only, and where its samples lie in the map."""

    def __init__(self, storage: ArrayStorage, shard: int) -> None:
        try:
            self._map, self._extents = storage.map_shard(shard)
        except FileNotFoundError:
            raise StoreCorruptError(
                f"{storage.where(shard)}: shard {shard} is committed, but its file is missing", hint=_FIND_DAMAGE
            ) from None
        self._samples = self._extents.samples
        self.one_chunk = self._extents.one_chunk

    def sample(self, position: int, layout: ArrayLayout) -> Array:
        return np.ndarray(layout.sample_shape, layout.numpy_dtype, self._map, self._samples[position])

    def matches_checksum(self, position: int) -> bool:
        extents = self._extents
        number = 0 if extents.one_chunk else position
        chunk = np.frombuffer(self._map, np.uint8, extents.chunk_bytes, extents.samples[number])
        stored = self._map[extents.checksums[number] : extents.checksums[number] + CRC_BYTES]
        return crc32c(chunk) == stored

    def prefetch(self, position: int, num_bytes: int) -> None:
        # The kernel turns this into posix_fadvise(WILLNEED), which would need a descriptor of its own.
        start = self._samples[position] // mmap.PAGESIZE * mmap.PAGESIZE
        self._map.madvise(mmap.MADV_WILLNEED, start, self._samples[position] + num_bytes - start)


def _buffer(layout: ArrayLayout, count: int, out: Array | None) -> Array:
    shape = (count, *layout.sample_shape)
    if out is None:
        return np.empty(shape, dtype=layout.numpy_dtype)
    if out.shape != shape:
        raise ValueError(f"{layout.path}: expected out of shape {shape}, found {out.shape}")
    return out


class TargetReader:
    """One teacher's array over several views, so that every row of a batch may come from another view."""

    def __init__(self, readers: dict[View, ArrayReader]) -> None:
        self._readers = readers
        self._layout = next(iter(readers.values())).layout
        for reader in readers.values():
            if (reader.layout.sample_shape, reader.layout.dtype) != (self._layout.sample_shape, self._layout.dtype):
                raise StoreStaleError(
                    f"expected {reader.layout.path} to be like {self._layout.path}, found"
                    f" {reader.layout.sample_shape} {reader.layout.dtype} and"
                    f" {self._layout.sample_shape} {self._layout.dtype}",
                    hint="extract both views anew with one --dtype (--out)",
                )

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """All axes but the first."""
        return self._layout.sample_shape

    @property
    def dtype(self) -> np.dtype[Any]:
        """The stored dtype."""
        return self._layout.numpy_dtype

    def gather(self, rows: Sequence[int], views: Sequence[View], out: Array | None = None) -> Array:
        """Return row rows[i] of view views[i] for every i, copied, as [len(rows), *sample_shape].

        out: a buffer of that shape to fill instead of a new one.  Raises as `ArrayReader.gather`.
        """
        out = _buffer(self._layout, len(rows), out)
        for position, (row, view) in enumerate(zip(rows, views, strict=True)):
            out[position] = self._readers[view].read(row)
        return out

    def prefetch(self, rows: Sequence[int], views: Sequence[View]) -> None:
        """Ask the kernel to read these rows of these views in the background."""
        for view, reader in self._readers.items():
            reader.prefetch([row for row, wanted in zip(rows, views, strict=True) if wanted == view])


class TeacherStore:
    """A store opened for reading."""

    def __init__(self, path: Path, *, check: bool = True) -> None:
        """Open the store at a path; `check=False` skips the checksums.

        Raises StoreMissingError, StoreStaleError (newer format) or StoreCorruptError.
        """
        self.catalog: Catalog = read_catalog(path)
        self._check = check

    @cached_property
    def row_of_id(self) -> dict[str, int]:
        """The row of every image id."""
        return {sample.id: row for row, sample in enumerate(self.catalog.samples)}

    def array(self, teacher: str, view: View, name: str) -> ArrayReader:
        """Return the reader of one array; raises StoreIncompleteError where the store lacks it."""
        layouts = self.catalog.teacher(teacher).view(view).layouts
        if name not in layouts:
            raise StoreIncompleteError(
                f"{self.catalog.path}: teacher {teacher} has no {name} (it has {', '.join(layouts)})"
            )
        return ArrayReader(self.catalog.storage.array(layouts[name]), check=self._check)

    def targets(self, teacher: str, name: str, views: Sequence[View]) -> TargetReader:
        """Return the reader of one array over the given views; raises StoreIncompleteError where one is lacking."""
        return TargetReader({view: self.array(teacher, view, name) for view in views})

    def text_embeddings(self, teacher: str) -> NDArray[np.float32]:
        """Return a logit teacher's text embeddings [K, D]; raises StoreIncompleteError for a teacher without."""
        stored = self.catalog.teacher(teacher)
        if TEXT_EMBEDDINGS not in stored.constants:
            raise StoreIncompleteError(f"{self.catalog.path}: teacher {teacher} has no text embeddings")
        return read_constant(self.catalog.storage, stored, TEXT_EMBEDDINGS)

    def channel_statistics(self, teacher: str, rows: Sequence[int]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Return the mean and standard deviation of a teacher's channels, each [C], over all cells of the given rows.

        They are those of the `original` view, so that every view is standardised alike.
        """
        grid = self.array(teacher, "original", "features").layout.sample_shape[:2]
        moments = self.array(teacher, "original", "moments")
        total = np.zeros(moments.layout.sample_shape, dtype=np.float64)
        for row in rows:
            total += moments.read(row)
        mean, mean_square = total / (len(rows) * grid[0] * grid[1])
        variance = np.maximum(mean_square - mean**2, 0.0)
        return mean.astype(np.float32), np.sqrt(variance).astype(np.float32)


def read_constant(storage: Storage, teacher: StoredTeacher, name: str) -> NDArray[np.float32]:
    """Return one of the constants that a teacher has, [rows, width]: `text_embeddings` or `pca`.

    Raises StoreCorruptError where the file is missing, fails its checksum or is not the manifest's.
    """
    layout = teacher.constants[name]
    mapped = _MappedShard(storage.array(layout), 0)
    values = np.stack([mapped.sample(row, layout) for row in range(layout.num_samples)])
    if not all(mapped.matches_checksum(row) for row in range(layout.num_samples)):
        raise StoreCorruptError(f"{layout.path}: checksum fails", hint=_FIND_DAMAGE)
    if hashlib.sha256(values.tobytes()).hexdigest() != teacher.manifest.constants[name][1]:
        raise StoreCorruptError(f"{layout.path}: not the {name.replace('_', ' ')} of the manifest", hint=_FIND_DAMAGE)
    return values

"""Reads targets through memory maps: no copy until one is asked for, and never a sample that is not committed.

The metadata is parsed here, so neither zarr nor h5py is imported. Samples are views into maps of shard files; their
checksum is verified at the first touch in each process. Pages belong to the kernel and are shared by all processes.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cache.catalog import Catalog, StoredTeacher, read_catalog
from cache.encoding import decode
from cache.file_map import MAX_MAPS, num_maps
from cache.layout import SCALES, TEXT_EMBEDDINGS, ArrayLayout
from cache.ledger import content_digest
from cache.mapped_shard import FIND_DAMAGE, MappedShard
from cache.storage import ArrayStorage, Storage
from data.errors import StoreCorruptError, StoreIncompleteError
from data.geometry import View

Array = NDArray[Any]


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
        self._maps: OrderedDict[int, MappedShard] = OrderedDict()
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
        if out is None and len(rows):
            self.read(rows[0])  # a store may claim any shape: no memory before a file has shown that size
        out = buffer(self.layout, len(rows), out)
        for position, row in enumerate(rows):
            self.copy(row, out, position)
        return out

    def copy(self, row: int, out: Array, position: int) -> None:
        """Copy one sample to out[position]; raises as `read`, after the copy where it is a checksum that fails."""
        shard, place = self._place(row)
        mapped = self._mapped(shard)
        # Copied before it is checked: numpy lets other threads run while the disk is read, the checksum does not.
        out[position] = mapped.sample(place, self.layout)
        if self._check and not self._checked[row]:
            self._check_sample(mapped, shard, place)

    def prefetch(self, rows: Sequence[int]) -> None:
        """Ask the kernel to read the given rows from the disk, in the background; returns at once."""
        for row in rows:
            shard, position = self._place(row)
            self._mapped(shard).prefetch(position, self.layout.sample_bytes)

    def populate(self, shard: int) -> int:
        """Read a whole shard into the page cache and this process's page table and return its bytes; raises as `read`.

        Nothing is copied, so processes that read one store share its pages.
        """
        self._mapped(shard).populate()
        return self.storage.shard_bytes(shard)

    def close(self) -> None:
        """Forget every map; views that are still in use keep theirs alive."""
        self._forget()

    def __getstate__(self) -> dict[str, Any]:
        # What another process can find out for itself does not travel: maps, and flags that grow with the samples.
        return {name: value for name, value in self.__dict__.items() if name not in ("_maps", "_checked", "committed")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    def _place(self, row: int) -> tuple[int, int]:
        if not 0 <= row < self.layout.num_samples:
            raise IndexError(f"{self.layout.path}: expected a row in 0 … {self.layout.num_samples - 1}, found {row}")
        return divmod(row, self.layout.shard_samples)

    def _mapped(self, shard: int) -> MappedShard:
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
        mapped = self._maps[shard] = MappedShard(self.storage, shard)
        if num_maps() > MAX_MAPS and len(self._maps) > 1:
            self._maps.popitem(last=False)
        return mapped

    def _check_sample(self, mapped: MappedShard, shard: int, position: int) -> None:
        first, count = self.layout.shard_range(shard)
        if not mapped.matches_checksum(position):
            raise StoreCorruptError(
                f"{self.layout.path}: shard {shard}, sample {first + position}: checksum fails", hint=FIND_DAMAGE
            )
        # Where a shard is one chunk, one checksum vouches for all its samples.
        checked = slice(first, first + count) if mapped.one_chunk else slice(first + position, first + position + 1)
        self._checked[checked] = True


def buffer(layout: ArrayLayout, count: int, out: Array | None) -> Array:
    """Return `out`, or a new array of that many samples where it is None; raises ValueError for another shape."""
    shape = (count, *layout.sample_shape)
    if out is None:
        return np.empty(shape, dtype=layout.numpy_dtype)
    if out.shape != shape:
        raise ValueError(f"{layout.path}: expected out of shape {shape}, found {out.shape}")
    return out


class TeacherStore:
    """A store opened for reading."""

    def __init__(self, path: Path, *, check: bool = True) -> None:
        """Open the store at a path; `check=False` skips the checksums.

        Raises StoreMissingError, StoreStaleError (newer format) or StoreCorruptError.
        """
        self.catalog: Catalog = read_catalog(path)
        self._check = check

    def __reduce__(self) -> tuple[Any, ...]:
        # Opened again where it arrives: rows and manifests stay here.
        return partial(TeacherStore, check=self._check), (self.catalog.path,)

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

    def text_embeddings(self, teacher: str) -> NDArray[np.float32]:
        """Return a logit teacher's text embeddings [K, D]; raises StoreIncompleteError for a teacher without."""
        stored = self.catalog.teacher(teacher)
        if TEXT_EMBEDDINGS not in stored.constants:
            raise StoreIncompleteError(f"{self.catalog.path}: teacher {teacher} has no text embeddings")
        return read_constant(self.catalog.storage, stored, TEXT_EMBEDDINGS)

    def rows_of(self, ids: Sequence[str]) -> tuple[NDArray[np.int64], dict[str, str]]:
        """Return the row of every image, [len(ids)] int64, −1 where the store lacks it, and the digests of the others.

        Unlike `row_of_id`, nothing that grows with the store is kept.
        """
        entries = {entry.id: (row, entry.sha256) for row, entry in enumerate(replace(self.catalog).samples)}
        found = {image_id: entries[image_id] for image_id in ids if image_id in entries}
        rows = [found[image_id][0] if image_id in found else -1 for image_id in ids]
        return np.array(rows, dtype=np.int64), {image_id: sha256 for image_id, (_, sha256) in found.items()}


def read_features(store: TeacherStore, teacher: str, view: View, row: int) -> NDArray[np.float32]:
    """Return one sample's features as numbers, [Gh, Gw, C] float32, whatever dtype they are stored in.

    Features that were projected on a PCA basis stay so.  Raises as `TeacherStore.array` and `ArrayReader.read`.
    """
    layout = store.array(teacher, view, "features").layout
    names = ["features", *(SCALES if layout.dtype == "int8" else ())]
    stored = {name: store.array(teacher, view, name).read(row) for name in names}
    return decode(stored).astype(np.float32, copy=False)


def read_constant(storage: Storage, teacher: StoredTeacher, name: str) -> NDArray[np.float32]:
    """Return one of the constants that a teacher has, [rows, width]: `text_embeddings` or `pca`.

    Raises StoreCorruptError where the file is missing, fails its checksum or is not the manifest's.
    """
    layout = teacher.constants[name]
    mapped = MappedShard(storage.array(layout), 0)
    values = np.stack([mapped.sample(row, layout) for row in range(layout.num_samples)])
    if not all(mapped.matches_checksum(row) for row in range(layout.num_samples)):
        raise StoreCorruptError(f"{layout.path}: checksum fails", hint=FIND_DAMAGE)
    if hashlib.sha256(values.tobytes()).hexdigest() != teacher.manifest.constants[name][1]:
        raise StoreCorruptError(f"{layout.path}: not the {name.replace('_', ' ')} of the manifest", hint=FIND_DAMAGE)
    return values

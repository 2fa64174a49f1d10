"""What every container of a store can do, whether it is a Zarr folder or an HDF5 file.

A store is groups with a manifest each, arrays below them, and the rows' `samples.jsonl`. Array bytes are read and
written through `ArrayStorage`, shard by shard: a shard is a range of samples that one ledger line commits.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cache.canonical import Json
from cache.layout import ArrayLayout
from cache.ledger import LedgerEntry
from cache.manifest import RootManifest, TeacherParts, ViewManifest
from data.errors import StoreCorruptError


class AbsentSampleError(StoreCorruptError):
    """A committed shard lacks one of its samples; row: its row in the store."""

    def __init__(self, message: str, *, row: int | None = None, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.row = row


@dataclass(frozen=True)
class ShardExtents:
    """Where a shard's bytes lie in its file, as offsets.

    samples: of each sample's payload.  checksums: of each chunk's crc32c. Chunk i starts where sample i does.
    chunk_bytes: what one checksum covers.  hashed: (offset, bytes) of what the ledger's SHA-256 runs over, in order.
    one_chunk: one checksum covers all samples of the shard.
    """

    samples: list[int]
    checksums: list[int]
    chunk_bytes: int
    hashed: list[tuple[int, int]]
    one_chunk: bool


class ArrayStorage(ABC):
    """Where one array's bytes lie and how they get there. Pickles small."""

    layout: ArrayLayout

    @abstractmethod
    def shard_bytes(self, shard: int) -> int:
        """Return the bytes of a shard on disk, checksums included: what its ledger line says."""

    @abstractmethod
    def where(self, shard: int) -> str:
        """Return the name of a shard's file for messages."""

    @abstractmethod
    def open_shard(self, shard: int) -> tuple[int, ShardExtents]:
        """Return a read-only descriptor, the caller's to close, and where the shard's bytes lie in it.

        Raises FileNotFoundError where there is no file, StoreCorruptError where size or index contradict the layout.
        """

    @abstractmethod
    def write_shard(self, shard: int, data: NDArray[np.generic], rank: int) -> LedgerEntry:
        """Write a shard's samples, flushed, and return its ledger line's content; not yet committed.

        data: [count, *sample_shape] of the layout's dtype, finite.  Raises OSError where the disk refuses.
        """

    @abstractmethod
    def read_ledger(self, *, salvage: bool = False) -> dict[int, LedgerEntry]:
        """Return the committed shards by number.

        salvage: leave out lines that are damaged or contradict each other instead of raising StoreCorruptError.
        """

    @abstractmethod
    def append_to_ledger(self, entry: LedgerEntry, rank: int) -> None:
        """Commit a shard that was written: one flushed line."""

    @abstractmethod
    def settle_ledger(self) -> None:
        """Merge what the ranks wrote into one sorted ledger, where there is anything to merge."""

    @abstractmethod
    def replace_ledger(self, entries: Iterable[LedgerEntry]) -> None:
        """Replace the ledger as a whole; a kill at any point leaves the old one or the new one."""

    @abstractmethod
    def sweep(self) -> None:
        """Remove what killed runs left of unfinished shards."""

    @abstractmethod
    def read_provenance(self) -> list[Json]:
        """Return the notes of all runs that wrote the array, oldest first; damaged ones are left out."""

    @abstractmethod
    def append_provenance(self, note: dict[str, Json]) -> None:
        """Append one note."""


class Storage(ABC):
    """A store's container: its manifests and its arrays."""

    path: Path

    @abstractmethod
    def attributes(self, group: str) -> Json:
        """Return the attributes of a group, "" for the root.

        Raises StoreCorruptError where there is no such group, or anything stands beside its attributes.
        """

    @abstractmethod
    def groups(self, parent: str) -> list[str]:
        """Return the names of what lies in a group and may be a group itself, sorted."""

    @abstractmethod
    def samples(self) -> bytes:
        """Return the bytes of `samples.jsonl`; raises StoreCorruptError where there is none."""

    @abstractmethod
    def check_array(self, layout: ArrayLayout) -> None:
        """Raise StoreCorruptError unless the array's metadata is exactly what its layout implies."""

    @abstractmethod
    def array(self, layout: ArrayLayout) -> ArrayStorage:
        """Return the storage of one array."""

    @abstractmethod
    def describe(self, name: str) -> str:
        """Return how a part of the store ("dino/original", "samples.jsonl") is named in messages."""


class StoreBuilder(ABC):
    """Makes a store's skeleton, everything but the samples: whole or not at all, whatever the moment of a kill."""

    @abstractmethod
    def create(self, root: RootManifest, samples: bytes, teachers: Sequence[TeacherParts]) -> None:
        """Create the store.

        Raises StoreWriteError where something else lies at its path, OSError where the disk refuses.
        """

    @abstractmethod
    def add_teacher(self, root: RootManifest, teacher: TeacherParts) -> None:
        """Add a teacher to an existing store; touches nothing that is there."""

    @abstractmethod
    def add_view(self, root: RootManifest, teacher: str, view: ViewManifest) -> None:
        """Add a view to a teacher of an existing store; touches nothing that is there."""

    @abstractmethod
    def sweep(self) -> None:
        """Remove the unfinished builds that killed runs left beside the store."""

    @abstractmethod
    def finish(self, *, complete: bool) -> None:
        """Do what remains to be done when a writer leaves the store. complete: no sample is missing."""

"""Finds committed shards that are damaged and takes their commit back, so that a resumed run writes them again."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from cache.ledger import LedgerEntry
from cache.shard import verify_shard
from cache.storage import ArrayStorage


@dataclass(frozen=True)
class Repair:
    """One shard that was written again. sha256_was: what the ledger said; None where its line was damaged too."""

    array: str
    shard: int
    sha256_was: str | None
    sha256_is: str

    @property
    def same_bytes(self) -> bool:
        """Whether the shard has the bytes that were lost, as far as can be told."""
        return self.sha256_was in (None, self.sha256_is)


def drop_damaged_shards(
    storages: Iterable[ArrayStorage], progress: Callable[[int], None] = lambda _: None
) -> dict[tuple[str, int], str | None]:
    """Verify every committed byte of the arrays and return the damaged shards, their ledger lines dropped.

    By array path and shard: the SHA-256 that the dropped line recorded. A shard whose line itself is damaged merely
    counts as never committed.  progress: told the bytes of every shard that was read.
    """
    dropped: dict[tuple[str, int], str | None] = {}
    for storage in storages:
        entries = storage.read_ledger(salvage=True)
        sound: list[LedgerEntry] = []
        for entry in entries.values():
            damaged = _is_damaged(storage, entry)
            progress(entry.num_bytes)
            if damaged:
                dropped[storage.layout.path, entry.shard] = entry.sha256
            else:
                sound.append(entry)
        storage.replace_ledger(sound)
    return dropped


def _is_damaged(storage: ArrayStorage, entry: LedgerEntry) -> bool:
    try:
        return bool(verify_shard(storage, entry))
    except OSError:  # the disk cannot read it any more
        return True

"""The ledger: one line a committed shard. The line is the commit.

A file without a line is not data and is replaced; a line without its file is corruption. While a run is writing, rank r
appends to `ledger-<r>.jsonl`; opening for writing and finishing merge these into `ledger.jsonl`, sorted by shard.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import google_crc32c

from cache.canonical import canonical_json
from cache.files import read_regular, sync_folder, write_new
from data.errors import StoreCorruptError

LEDGER = "ledger.jsonl"


@dataclass(frozen=True, slots=True)
class LedgerEntry:
    """One committed shard: its number, first sample, number of samples, file size and the file's SHA-256."""

    shard: int
    first: int
    count: int
    num_bytes: int
    sha256: str

    def line(self) -> bytes:
        """Return the entry as its line, which carries the crc32c of its own content."""
        content = {
            "shard": self.shard,
            "first": self.first,
            "count": self.count,
            "bytes": self.num_bytes,
            "sha256": self.sha256,
        }
        crc = google_crc32c.value(canonical_json(content))
        return canonical_json({**content, "crc32c": crc}) + b"\n"


def read_ledgers(array_folder: Path, *, salvage: bool = False) -> tuple[dict[int, LedgerEntry], bool]:
    """Return an array's committed shards by number, and whether `merge_ledgers` has anything to do.

    salvage: leave out damaged lines, and shards that two lines tell differently.

    Raises StoreCorruptError for a damaged line that is not a torn last one, or two differing lines for one shard.
    """
    names = _ledger_names(array_folder)
    entries: dict[int, LedgerEntry] = {}
    disputed: set[int] = set()
    torn = False
    for name in names:
        try:
            read, cut_short = _read_ledger(array_folder, name, salvage)
        except FileNotFoundError:  # a writer has just merged it: what it held is in `ledger.jsonl` now
            return read_ledgers(array_folder, salvage=salvage)
        torn = torn or cut_short
        for entry in read:
            known = entries.setdefault(entry.shard, entry)
            if known != entry and not salvage:
                raise StoreCorruptError(f"{array_folder / name}: two differing lines for shard {entry.shard}")
            if known != entry:
                disputed.add(entry.shard)
    agreed = {shard: entry for shard, entry in entries.items() if shard not in disputed}
    return agreed, torn or any(name != LEDGER for name in names)


def merge_ledgers(array_folder: Path, entries: Iterable[LedgerEntry]) -> None:
    """Replace an array's ledgers by one sorted `ledger.jsonl`; a kill at any point loses no line."""
    temporary = array_folder / f"{LEDGER}.tmp"
    with contextlib.suppress(FileNotFoundError):
        temporary.unlink()
    write_new(temporary, encode_ledger(entries))
    temporary.rename(array_folder / LEDGER)
    sync_folder(array_folder)
    ranks = [name for name in _ledger_names(array_folder) if name != LEDGER]
    for name in ranks:
        (array_folder / name).unlink()
    if ranks:
        sync_folder(array_folder)


def encode_ledger(entries: Iterable[LedgerEntry]) -> bytes:
    """Return the bytes of the merged ledger: lines sorted by shard."""
    return b"".join(entry.line() for entry in sorted(entries, key=lambda entry: entry.shard))


def content_digest(entries: Iterable[LedgerEntry]) -> str:
    """Return an array's content digest: the SHA-256 of its merged ledger, so of every committed byte."""
    return hashlib.sha256(encode_ledger(entries)).hexdigest()


def _ledger_names(array_folder: Path) -> list[str]:
    with os.scandir(array_folder) as found:
        return sorted(e.name for e in found if e.name == LEDGER or re.fullmatch(r"ledger-.*\.jsonl", e.name))


def _read_ledger(array_folder: Path, name: str, salvage: bool) -> tuple[list[LedgerEntry], bool]:
    try:
        lines = read_regular(array_folder, name).split(b"\n")
    except StoreCorruptError:
        if salvage:
            return [], True
        raise
    cut_short = lines.pop() != b""
    entries: list[LedgerEntry] = []
    for number, line in enumerate(lines, start=1):
        entry = parse_line(line)
        if entry is not None:
            entries.append(entry)
        elif name != LEDGER and number == len(lines) and not cut_short:
            cut_short = True  # appended when the power went: its shard was never committed
        elif not salvage:
            raise StoreCorruptError(f"{array_folder / name}: line {number} is damaged")
    return entries, cut_short


def parse_line(line: bytes) -> LedgerEntry | None:
    """Return the entry of a ledger line without its newline; None for anything but exactly what would be written."""
    try:
        content = json.loads(line)
        shard, first, count, num_bytes = (int(content[key]) for key in ("shard", "first", "count", "bytes"))
        entry = LedgerEntry(shard, first, count, num_bytes, str(content["sha256"]))
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
        return None
    # Exactly the line that we would write: its checksum holds, its types are right, and nothing else stands in it.
    return entry if entry.line() == line + b"\n" else None

"""The stores that a sweep distils from: what they are, whether they can serve every run, whether they stay the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict

from cache.catalog import read_catalog
from cache.ledger import content_digest
from cache.runs import teacher_cost, total_cost
from cache.verify import read_ledgers
from data.errors import StoreStaleError


class StoreRecord(BaseModel):
    """A store as a sweep found it. arrays: fingerprint by path.  content: digest over the committed bytes by path.

    cost: what extracting it took, as `cache.runs.Cost`; None where no run noted it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: str
    fingerprint: str
    untrained: tuple[str, ...]
    arrays: dict[str, str]
    content: dict[str, str]
    cost: dict[str, Any] | None

    @classmethod
    def of(cls, path: Path) -> Self:
        """Return the record of a store. Raises StoreError where it is missing, newer, or contradicts itself."""
        catalog = read_catalog(path)
        cost = total_cost([c for c in (teacher_cost(catalog, t) for t in catalog.teachers.values()) if c is not None])
        return cls(
            path=str(path),
            fingerprint=catalog.fingerprint,
            untrained=tuple(key for key, teacher in catalog.teachers.items() if teacher.manifest.untrained),
            arrays=catalog.fingerprints,
            content={p: content_digest(ledger.entries.values()) for p, ledger in read_ledgers(catalog).items()},
            cost=None if cost is None else asdict(cost),
        )


class Stores:
    """The stores of a sweep, as they were when it started. records: by path."""

    def __init__(self, paths: Sequence[Path]) -> None:
        """Read what the stores say of themselves; raises StoreError as `StoreRecord.of`."""
        self.records = {str(path): StoreRecord.of(path) for path in dict.fromkeys(paths)}

    @property
    def fingerprints(self) -> dict[str, str]:
        """The stores' fingerprints, by path."""
        return {path: record.fingerprint for path, record in self.records.items()}

    def refuse_changed(self) -> None:
        """Raise StoreStaleError where a store is not what it was when the sweep started: it names the first change."""
        for path, record in self.records.items():
            now = StoreRecord.of(Path(path))
            for what, before, found in (
                ("fingerprint", record.arrays, now.arrays),
                ("content", record.content, now.content),
            ):
                for array in sorted({*before, *found}):
                    if before.get(array) != found.get(array):
                        raise StoreStaleError(
                            f"{path} changed while the sweep was running: {array}: {what}: expected"
                            f" {before.get(array, 'none')}, found {found.get(array, 'none')}",
                            hint="finished runs are kept; where the store is meant to be so, the same command goes on",
                        )


def refuse_other_stores(folder: Path, before: Sequence[StoreRecord], now: Mapping[str, StoreRecord]) -> None:
    """Raise StoreStaleError where a store's arrays are not those that the folder's runs were begun with.

    Arrays may have come since, as with another teacher; a store may have been moved, if only one is told of.
    """
    found = list(now.values())
    moved = len(before) == len(found) == 1
    for record in before:
        store = found[0] if moved else now.get(record.path)
        if store is None:
            continue
        for array, fingerprint in record.arrays.items():
            if store.arrays.get(array) != fingerprint:
                raise StoreStaleError(
                    f"{folder} was begun with another store: {store.path}: {array}: expected fingerprint {fingerprint},"
                    f" found {store.arrays.get(array, 'none')}",
                    hint="give the store it was begun with, or another --out",
                )

"""Checks every byte of a store against manifests, ledgers, checksums and digests, and says where it is wrong."""

from __future__ import annotations

import os
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice

from cache.catalog import Catalog, StoredTeacher
from cache.layout import IMAGES, ArrayLayout
from cache.ledger import LedgerEntry
from cache.reader import read_constant
from cache.samples import samples_digest
from cache.shard import ShardProblem, check_shard, verify_shard
from cache.storage import ArrayStorage
from data.errors import StoreError

# SHA-256 is the slow part, and it runs beside other threads.
_MAX_THREADS = 4
_MAX_SHOWN = 5
_Committed = tuple[ArrayStorage, LedgerEntry]


@dataclass(frozen=True)
class Problem:
    """One fault: array is its path in the store; shard and sample are None where it concerns more than one."""

    array: str
    shard: int | None
    sample: int | None
    problem: str


@dataclass(frozen=True)
class Ledger:
    """What an array's ledger commits: entries by shard. problem: what is wrong with it; damaged lines are left out."""

    entries: dict[int, LedgerEntry]
    problem: str | None = None


@dataclass(frozen=True)
class _Fault:
    """Something wrong in one committed shard of an array."""

    array: str
    shard: int
    found: ShardProblem


def read_ledgers(catalog: Catalog) -> dict[str, Ledger]:
    """Return the ledger of every sample array by its path; a damaged one is told, not raised."""
    return {layout.path: _read_ledger(catalog, layout) for layout in catalog.layouts()}


def find_problems(
    catalog: Catalog,
    *,
    verify: bool,
    ledgers: dict[str, Ledger] | None = None,
    progress: Callable[[int], None] = lambda _: None,
) -> list[Problem]:
    """Return everything wrong with what is committed; what is merely missing is not a problem.

    verify: read every byte and compare checksums and digests; without it, ledgers, file sizes and shard indices only.
    ledgers: of every array, where they were read already.  progress: told the bytes of each shard as it is done.
    """
    ledgers = read_ledgers(catalog) if ledgers is None else ledgers
    problems = [found for teacher in catalog.teachers.values() for found in _constants_problems(catalog, teacher)]
    problems += [Problem(path, None, None, ledger.problem) for path, ledger in ledgers.items() if ledger.problem]
    faults = list(_shard_faults(catalog, ledgers, verify, progress))
    stray = _stray_files(faults, ledgers)
    problems += [
        Problem(f.array, f.shard, f.found.sample, stray.get((f.array, f.shard)) or _told(catalog, f)) for f in faults
    ]
    return [*problems, *_samples_problems(catalog, parse=verify)]


def _read_ledger(catalog: Catalog, layout: ArrayLayout) -> Ledger:
    storage = catalog.storage.array(layout)
    try:
        return Ledger(storage.read_ledger())
    except OSError as error:
        return Ledger({}, f"the ledger cannot be read: {error.strerror}")
    except StoreError as error:
        entries = _salvaged(storage)
        lost = list(islice((str(shard) for shard in range(layout.num_shards) if shard not in entries), _MAX_SHOWN + 1))
        shown = ", ".join(lost[:_MAX_SHOWN]) + (" …" if len(lost) > _MAX_SHOWN else "")
        what = error.message.removeprefix(f"{catalog.path / layout.path}/")
        return Ledger(entries, f"{what}; no sound line commits shard {shown}" if lost else what)


def _salvaged(storage: ArrayStorage) -> dict[int, LedgerEntry]:
    try:
        return storage.read_ledger(salvage=True)
    except (StoreError, OSError):
        return {}


def _shard_faults(
    catalog: Catalog, ledgers: dict[str, Ledger], verify: bool, progress: Callable[[int], None]
) -> Iterator[_Fault]:
    """Yield what is wrong in committed shards, array by array."""
    committed = [
        (catalog.storage.array(layout), entry)
        for layout in catalog.layouts()
        for _, entry in sorted(ledgers[layout.path].entries.items())
    ]

    def check(place: _Committed) -> list[ShardProblem]:
        try:
            return verify_shard(*place) if verify else check_shard(*place)
        except OSError as error:
            return [ShardProblem(None, f"cannot be read: {error.strerror}")]
        except StoreError as error:  # it changes while it is read
            return [ShardProblem(None, error.message)]

    # Without bytes to hash, there is nothing that would run beside another thread.
    checked = _in_threads(check, committed) if verify else map(check, committed)
    for (storage, entry), problems in zip(committed, checked, strict=True):
        yield from (_Fault(storage.layout.path, entry.shard, problem) for problem in problems)
        progress(entry.num_bytes)


def _in_threads(
    check: Callable[[_Committed], list[ShardProblem]], committed: list[_Committed]
) -> Iterator[list[ShardProblem]]:
    """Yield what each check finds, in order; few are begun ahead of what is asked for."""
    threads = min(_MAX_THREADS, os.cpu_count() or 1)
    begun: deque[Future[list[ShardProblem]]] = deque()
    pool = ThreadPoolExecutor(threads)
    try:
        for place in committed:
            begun.append(pool.submit(check, place))
            if len(begun) > 2 * threads:
                yield begun.popleft().result()
        while begun:
            yield begun.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _stray_files(faults: list[_Fault], ledgers: dict[str, Ledger]) -> dict[tuple[str, int], str]:
    """Return in words whose file it is, for each array and shard where another shard's file lies."""
    found = {(fault.array, fault.shard): fault.found.sha256 for fault in faults if fault.found.sha256 is not None}
    if not found:
        return {}
    owners: dict[str, list[tuple[str, int]]] = defaultdict(list)
    for path, ledger in ledgers.items():
        for entry in ledger.entries.values():
            owners[entry.sha256].append((path, entry.shard))
    told = {}
    for (array, shard), digest in found.items():
        # The array's own shards first: shards of two arrays may be equal.
        owner = min(owners[digest], key=lambda place: place[0] != array, default=None)
        if owner is not None:
            exchanged = found.get(owner) == ledgers[array].entries[shard].sha256
            what = "two shards are exchanged" if exchanged else "another shard's file lies here"
            whose = f"shard {owner[1]}'s bytes" if owner[0] == array else f"the bytes of shard {owner[1]} of {owner[0]}"
            told[array, shard] = f"{what}: shard {shard} holds {whose}"
    return told


def _told(catalog: Catalog, fault: _Fault) -> str:
    """Return what is wrong, with the image's id where it is an image that is damaged."""
    row = fault.found.sample
    if row is None or fault.array.rpartition("/")[2] != IMAGES:
        return fault.found.problem
    try:
        return f"{fault.found.problem} ({catalog.samples[row].id})"
    except StoreError:
        return fault.found.problem


def _samples_problems(catalog: Catalog, *, parse: bool) -> list[Problem]:
    """Return what is wrong with the rows' ids. parse: read them too; else their digest alone, a tenth of the time."""
    try:
        if parse or samples_digest(catalog.storage.samples()) != catalog.root.dataset.samples_sha256:
            catalog.samples  # noqa: B018  reading them checks them
    except OSError as error:
        return [Problem("samples.jsonl", None, None, f"cannot be read: {error.strerror}")]
    except StoreError as error:
        return [Problem("samples.jsonl", None, None, error.message)]
    return []


def _constants_problems(catalog: Catalog, teacher: StoredTeacher) -> list[Problem]:
    problems = []
    for name, layout in teacher.constants.items():
        try:
            read_constant(catalog.storage, teacher, name)
        except OSError as error:
            problems.append(Problem(layout.path, 0, None, f"cannot be read: {error.strerror}"))
        except StoreError as error:
            problems.append(Problem(layout.path, 0, None, error.message.removeprefix(f"{layout.path}: ")))
    return problems

"""Checks every byte of a store against manifests, ledgers, checksums and digests, and says where it is wrong."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from cache.catalog import Catalog, StoredTeacher
from cache.layout import ArrayLayout
from cache.reader import read_constant
from cache.shard import ShardProblem, check_shard, verify_shard
from data.errors import StoreError


@dataclass(frozen=True)
class Problem:
    """One fault: array is its path in the store; shard and sample are None where it concerns more than one."""

    array: str
    shard: int | None
    sample: int | None
    problem: str


def find_problems(catalog: Catalog, *, verify: bool, progress: Callable[[int], None] = lambda _: None) -> list[Problem]:
    """Return everything wrong with what is committed; what is merely missing is not a problem.

    verify: read every byte and compare checksums and digests; without it, ledgers, file sizes and shard indices only.
    progress: told the bytes of each shard as it is done.
    """
    problems = []
    for teacher in catalog.teachers.values():
        problems.extend(_constants_problems(catalog, teacher))
    for layout in catalog.layouts():
        problems.extend(_array_problems(catalog, layout, verify, progress))
    try:
        catalog.samples  # noqa: B018  reading them checks them
    except StoreError as error:
        problems.append(Problem("samples.jsonl", None, None, error.message))
    return problems


def _array_problems(
    catalog: Catalog, layout: ArrayLayout, verify: bool, progress: Callable[[int], None]
) -> list[Problem]:
    storage = catalog.storage.array(layout)
    try:
        entries = storage.read_ledger()
    except StoreError as error:
        return [Problem(layout.path, None, None, error.message.removeprefix(f"{catalog.path / layout.path}/"))]
    problems: list[Problem] = []
    for entry in sorted(entries.values(), key=lambda entry: entry.shard):
        try:
            found = verify_shard(storage, entry) if verify else check_shard(storage, entry)
        except OSError as error:
            found = [ShardProblem(None, f"cannot be read: {error.strerror}")]
        problems.extend(Problem(layout.path, entry.shard, p.sample, p.problem) for p in found)
        progress(entry.num_bytes)
    return problems


def _constants_problems(catalog: Catalog, teacher: StoredTeacher) -> list[Problem]:
    problems = []
    for name, layout in teacher.constants.items():
        try:
            read_constant(catalog.storage, teacher, name)
        except StoreError as error:
            problems.append(Problem(layout.path, 0, None, error.message.removeprefix(f"{layout.path}: ")))
    return problems

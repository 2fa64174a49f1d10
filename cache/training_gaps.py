"""What a training run would find missing in a store, told beforehand. Nothing here is wrong with the store itself."""

from __future__ import annotations

from collections.abc import Collection, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

from cache.catalog import Catalog, StoredTeacher
from cache.commands import adding_views, writing_command
from cache.image_arrays import is_image_store
from cache.layout import ArrayLayout
from cache.verify import Ledger
from data.errors import StoreError
from data.geometry import FRAME_SIZE, VIEWS

# What a loss reads, the option that names its teacher, and its weight.
LOSSES = (("features", "--feature-teacher", "--beta"), ("logits", "--logit-teacher", "--gamma"))
_MAX_SHOWN = 3


@dataclass(frozen=True)
class Gap:
    """One thing a training run would miss. teacher: its key, None where it concerns the store."""

    teacher: str | None
    problem: str
    hint: str


def find_gaps(catalog: Catalog, ledgers: Mapping[str, Ledger]) -> list[Gap]:
    """Return what training with both losses and flips would miss in the whole store; of an image store, nothing else.

    ledgers: of every array by path.
    """
    gaps = []
    if catalog.root.frame != FRAME_SIZE:
        height, width = catalog.root.frame
        problem = f"its frame is {height}×{width}, students see {FRAME_SIZE[0]}×{FRAME_SIZE[1]}"
        gaps.append(Gap(None, problem, "extract a store in that frame"))
    if is_image_store(catalog):
        return gaps
    having = {name: [key for key, t in catalog.teachers.items() if name in _outputs(t)] for name, _, _ in LOSSES}
    for name, option, weight in LOSSES:
        if not having[name]:
            gaps.append(Gap(None, f"no teacher has {name}", f"add one, or train with {weight} 0"))
        elif len(having[name]) > 1:
            problem = f"{len(having[name])} teachers have {name}: {', '.join(having[name])}"
            gaps.append(Gap(None, problem, f"name one: {option} {having[name][0]}"))
    for key, teacher in catalog.teachers.items():
        if any(key in keys for keys in having.values()):
            gaps += [*_missing_views(catalog, key, teacher), *_missing_samples(catalog, key, teacher, ledgers)]
    return gaps


def listed(ids: Sequence[str], count: int | None = None) -> str:
    """Return the first ids, and how many more there are. count: of all, where only the first are given."""
    more = (len(ids) if count is None else count) - _MAX_SHOWN
    return ", ".join(ids[:_MAX_SHOWN]) + (f", … {more:,} more" if more > 0 else "")


def _outputs(teacher: StoredTeacher) -> set[str]:
    return {name for view in teacher.views.values() for name in view.layouts}


def _missing_views(catalog: Catalog, key: str, teacher: StoredTeacher) -> list[Gap]:
    lacking = [view for view in VIEWS if view not in teacher.views]
    if not lacking:
        return []
    add = adding_views(catalog, key, lacking)
    if "original" in lacking:
        return [Gap(key, f"no view {' and '.join(lacking)}: every training run reads original", add)]
    return [Gap(key, f"no view {lacking[0]}: training with flips reads it", f"train with --flip 0, or {add}")]


def _missing_samples(catalog: Catalog, key: str, teacher: StoredTeacher, ledgers: Mapping[str, Ledger]) -> list[Gap]:
    gaps = []
    for view, stored in teacher.views.items():
        read = [layout for name, layout in stored.layouts.items() if name != "embeddings"]
        everywhere = set.intersection(*(set(ledgers[layout.path].entries) for layout in read))
        missing = num_missing(read[0], everywhere)
        if missing:
            total = catalog.root.dataset.samples
            rows = (row for shard in uncommitted(read[0], everywhere) for row in _rows(read[0], shard))
            first = _ids(catalog, list(islice(rows, _MAX_SHOWN)))
            problem = f"{view}: {missing:,} of {total:,} samples not committed ({listed(first, missing)})"
            gaps.append(Gap(key, problem, f"the same command again resumes: {writing_command(catalog, [key])}"))
    return gaps


def uncommitted(layout: ArrayLayout, committed: Container[int]) -> Iterator[int]:
    """Yield the shards of an array that are not committed, ascending; a store may claim any number of them."""
    return (shard for shard in range(layout.num_shards) if shard not in committed)


def num_missing(layout: ArrayLayout, committed: Collection[int]) -> int:
    """Return the number of samples of an array that are not committed."""
    return layout.num_samples - sum(
        layout.shard_range(shard)[1] for shard in committed if 0 <= shard < layout.num_shards
    )


def _rows(layout: ArrayLayout, shard: int) -> range:
    first, count = layout.shard_range(shard)
    return range(first, first + count)


def _ids(catalog: Catalog, rows: Sequence[int]) -> list[str]:
    """Return the ids of rows; their numbers where `samples.jsonl` is damaged."""
    try:
        return [catalog.samples[row].id for row in rows]
    except StoreError:
        return [f"sample {row}" for row in rows]

"""What a store holds, how complete and plausible it is, as data. Imports neither zarr nor torch, reads no features."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from math import prod
from pathlib import Path
from typing import Literal

from cache.canonical import Json
from cache.catalog import Catalog, StoredTeacher, StoredView
from cache.commands import derivation_command, writing_command
from cache.image_arrays import is_image_store, removal_command
from cache.layout import IMAGES, SCALES, ArrayLayout
from cache.ledger import content_digest
from cache.runs import Cost, array_fidelity, teacher_cost, teacher_map, total_cost
from cache.training_gaps import Gap, find_gaps, num_missing
from cache.value_statistics import ArrayStatistics, view_statistics
from cache.verify import Ledger, Problem, read_ledgers
from data.errors import StoreError

Status = Literal["complete", "incomplete", "corrupt"]
_FLOAT32_BYTES = 4
_MAX_OUTLIER_IDS = 10


def summarise(
    catalog: Catalog,
    problems: Sequence[Problem],
    *,
    verified: bool,
    ledgers: Mapping[str, Ledger] | None = None,
    gaps: Sequence[Gap] = (),
) -> dict[str, Json]:
    """Return the JSON of `inspect-cache`; status is corrupt before incomplete before complete.

    ledgers: of every array, where they were read already.  gaps: what training would miss beside what the store tells.
    """
    ledgers = read_ledgers(catalog) if ledgers is None else ledgers
    arrays = [row for teacher in catalog.teachers.values() for row in _arrays(catalog, teacher, ledgers)]
    whole: Status = "complete" if arrays and all(array["complete"] for array in arrays) else "incomplete"
    status = "corrupt" if problems else whole
    costs = {key: teacher_cost(catalog, teacher) for key, teacher in catalog.teachers.items()}
    gaps = [*find_gaps(catalog, ledgers), *gaps]
    return {
        "store": str(catalog.path),
        "format_version": catalog.root.format_version,
        "fingerprint": catalog.fingerprint,
        "frame": list(catalog.root.frame),
        "dataset": catalog.root.dataset.model_dump(mode="json"),
        "holds": "images" if is_image_store(catalog) else "targets",
        "teachers": {key: _teacher(catalog, teacher, costs[key]) for key, teacher in catalog.teachers.items()},
        "arrays": arrays,
        "status": status,
        "problems": [asdict(problem) for problem in problems],
        "verified": verified,
        "training": [asdict(gap) for gap in gaps],
        "cost": _cost(total_cost([cost for cost in costs.values() if cost is not None])),
        "next": _next_command(catalog, status, problems, arrays),
    }


def summarise_unreadable(store: Path, error: StoreError) -> dict[str, Json]:
    """Return the JSON of a store whose manifests cannot be trusted, so that nothing else can be said of it."""
    place, _, what = error.message.removeprefix(f"{store}/").partition(": ")
    # Of a message that begins with a manifest's path, the group or the array whose manifest it is.
    known = error.message.startswith(f"{store}/") and what
    part = place.removesuffix("zarr.json").rstrip("/") or None
    return {
        "store": str(store),
        "format_version": None,
        "fingerprint": None,
        "frame": None,
        "dataset": None,
        "holds": None,
        "teachers": {},
        "arrays": [],
        "status": "corrupt",
        "problems": [
            {
                "array": part if known else None,
                "shard": None,
                "sample": None,
                "problem": what if known else error.message,
            }
        ],
        "verified": False,
        "training": [],
        "cost": None,
        "next": f"python cli.py extract-teachers … --out {store} --repair",
    }


def _teacher(catalog: Catalog, teacher: StoredTeacher, cost: Cost | None) -> dict[str, Json]:
    manifest = teacher.manifest
    paths = [layout.path for view in teacher.views.values() for layout in view.layouts.values()]
    return {
        **manifest.identity,
        "untrained": manifest.untrained,
        "views": list(teacher.views),
        "cost": _cost(cost),
        "multilabel_map": teacher_map(catalog, teacher),
        "pca": None if manifest.pca is None else manifest.pca.model_dump(mode="json"),
        "command": next((command for command in map(partial(derivation_command, catalog), paths) if command), None),
    }


def _cost(cost: Cost | None) -> Json:
    return None if cost is None else {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(cost).items()}


def _arrays(catalog: Catalog, teacher: StoredTeacher, ledgers: Mapping[str, Ledger]) -> list[dict[str, Json]]:
    rows = []
    for view in teacher.views.values():
        committed = {name: ledgers[layout.path].entries for name, layout in view.layouts.items()}
        statistics = view_statistics(catalog.storage, view.layouts, committed)
        for name, layout in view.layouts.items():
            row = _array(catalog, layout, ledgers[layout.path])
            row |= _statistics(catalog, statistics.get(name))
            row |= _closeness(catalog, teacher, view, name, layout.num_samples - row["missing"])
            rows.append(row)
    return rows


def _array(catalog: Catalog, layout: ArrayLayout, ledger: Ledger) -> dict[str, Json]:
    missing = num_missing(layout, ledger.entries)
    return {
        "path": layout.path,
        "shape": list(layout.shape),
        "dtype": layout.dtype,
        "chunk": list(layout.chunk_shape),
        "shard": [layout.shard_samples, *layout.sample_shape] if layout.sharded else None,
        "bytes": sum(entry.num_bytes for entry in ledger.entries.values()),
        "complete": missing == 0,
        "missing": missing,
        "fingerprint": catalog.fingerprints[layout.path],
        "content": content_digest(ledger.entries.values()),
    }


def _statistics(catalog: Catalog, found: ArrayStatistics | None) -> dict[str, Json]:
    if found is None:
        return {"mean": None, "std": None, "statistics_samples": 0, "outliers": None, "outlier_ids": []}
    return {
        "mean": found.mean,
        "std": found.std,
        "statistics_samples": found.samples,
        "outliers": len(found.outliers),
        "outlier_ids": _ids(catalog, found.outliers[:_MAX_OUTLIER_IDS]),
    }


def _ids(catalog: Catalog, rows: Sequence[int]) -> list[str]:
    try:
        return [catalog.samples[row].id for row in rows]
    except StoreError:
        return []


def _closeness(
    catalog: Catalog, teacher: StoredTeacher, view: StoredView, name: str, committed: int
) -> dict[str, Json]:
    """Return how an array compares with what the teacher put out, in bytes and in values.

    float32_bytes: what the committed samples would take as the teacher puts them out; of scales, which then would not
    be there, nothing, nor of images.
    """
    layout, pca = view.layouts[name], teacher.manifest.pca
    shape = list(layout.sample_shape)
    if pca is not None and name in ("features", "moments"):
        shape[-1] = pca.shape[1]
    fidelity = array_fidelity(catalog, layout) if name == "features" else None
    return {
        "float32_bytes": 0 if name in {*SCALES, IMAGES} else committed * prod(shape) * _FLOAT32_BYTES,
        "fidelity": None if fidelity is None else fidelity.model_dump(),
        "source": view.manifest.arrays[name].source,
    }


def _next_command(
    catalog: Catalog, status: Status, problems: Sequence[Problem], arrays: Sequence[dict[str, Json]]
) -> str | None:
    if is_image_store(catalog):
        again = writing_command(catalog)
        return f"{removal_command(catalog.path)} && {again}" if status == "corrupt" else again
    if status == "complete":
        return None
    wrong = [p.array for p in problems] or [array["path"] for array in arrays if not array["complete"]]
    keys = dict.fromkeys(path.partition("/")[0] for path in wrong)
    # What concerns all teachers, as the samples do, takes the whole command.
    concerned = list(keys) if all(key in catalog.teachers for key in keys) else []
    return writing_command(catalog, concerned) + (" --repair" if status == "corrupt" else "")

"""What a store holds and how complete it is, as data. Imports neither zarr nor torch, opens no array."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Literal

from cache.canonical import Json
from cache.catalog import Catalog
from cache.ledger import content_digest
from cache.manifest import TeacherManifest
from cache.verify import Problem
from data.errors import StoreError

Status = Literal["complete", "incomplete", "corrupt"]


def summarise(catalog: Catalog, problems: list[Problem], *, verified: bool) -> dict[str, Json]:
    """Return the JSON of `inspect-cache`; status is corrupt before incomplete before complete."""
    arrays = _arrays(catalog)
    status: Status = "complete" if arrays and all(array["complete"] for array in arrays) else "incomplete"
    return {
        "store": str(catalog.path),
        "format_version": catalog.root.format_version,
        "fingerprint": catalog.fingerprint,
        "frame": list(catalog.root.frame),
        "dataset": catalog.root.dataset.model_dump(mode="json"),
        "teachers": {key: _teacher(teacher.manifest) for key, teacher in catalog.teachers.items()},
        "arrays": arrays,
        "status": "corrupt" if problems else status,
        "problems": [asdict(problem) for problem in problems],
        "verified": verified,
    }


def summarise_unreadable(store: Path, error: StoreError) -> dict[str, Json]:
    """Return the JSON of a store whose manifests cannot be trusted, so that nothing else can be said of it."""
    return {
        "store": str(store),
        "format_version": None,
        "fingerprint": None,
        "frame": None,
        "dataset": None,
        "teachers": {},
        "arrays": [],
        "status": "corrupt",
        "problems": [{"array": None, "shard": None, "sample": None, "problem": error.message}],
        "verified": False,
    }


def _teacher(manifest: TeacherManifest) -> dict[str, Json]:
    return {**manifest.identity, "untrained": manifest.untrained}


def _arrays(catalog: Catalog) -> list[dict[str, Json]]:
    rows = []
    for layout in catalog.layouts():
        try:
            entries = catalog.storage.array(layout).read_ledger()
        except StoreError:
            entries = {}  # `find_problems` says what is wrong with the ledger
        committed = [shard for shard in entries if 0 <= shard < layout.num_shards]
        missing = layout.num_samples - sum(layout.shard_range(shard)[1] for shard in committed)
        rows.append(
            {
                "path": layout.path,
                "shape": list(layout.shape),
                "dtype": layout.dtype,
                "chunk": list(layout.chunk_shape),
                "shard": [layout.shard_samples, *layout.sample_shape] if layout.sharded else None,
                "bytes": sum(entry.num_bytes for entry in entries.values()),
                "complete": missing == 0,
                "missing": missing,
                "fingerprint": catalog.fingerprints[layout.path],
                "content": content_digest(entries.values()),
            }
        )
    return rows

"""Finds the container that lies at a store's path, or the one to make there."""

from __future__ import annotations

from pathlib import Path

from cache.storage import Storage, StoreBuilder
from cache.zarr_create import ZarrBuilder
from cache.zarr_storage import ZarrStorage


def find_storage(path: Path) -> Storage | None:
    """Return the store's container, None where there is no store."""
    if (path / "zarr.json").is_file():
        return ZarrStorage(path)
    return None


def builder_for(path: Path, storage: Storage | None, format_name: str) -> StoreBuilder:
    """Return what builds the store at a path: as it is stored, or as asked for where there is none yet."""
    return ZarrBuilder(path)

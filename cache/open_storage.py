"""Finds the container that lies at a store's path, or the one to make there."""

from __future__ import annotations

import os
from pathlib import Path

from cache.files import open_regular
from cache.hdf5_create import Hdf5Builder
from cache.hdf5_file import file_names
from cache.hdf5_header import is_hdf5
from cache.hdf5_storage import Hdf5Storage
from cache.plan import StoreFormat, format_of
from cache.storage import Storage, StoreBuilder
from cache.zarr_create import ZarrBuilder
from cache.zarr_storage import ZarrStorage
from data.errors import StoreCorruptError, StoreStaleError, StoreWriteError


def find_storage(path: Path) -> Storage | None:
    """Return the store's container, None where there is no store.

    An HDF5 store goes by its own name also while its file is still `NAME.partial`.

    Raises StoreCorruptError where something lies at the path besides the unfinished file.
    """
    final, partial = file_names(path)
    # The path twice: a writer may rename its file between two looks.
    if os.path.lexists(final) and _is_hdf5_file(partial) and os.path.lexists(final):
        raise StoreCorruptError(
            f"{path}: expected one store of that name, found {final} and {partial}",
            hint="move the one that is not wanted away",
        )
    if (path / "zarr.json").is_file():
        return ZarrStorage(path)
    return Hdf5Storage(path) if any(map(_is_hdf5_file, (final, partial, final))) else None


def builder_for(path: Path, storage: Storage | None, asked: StoreFormat | None) -> StoreBuilder:
    """Return what builds the store at a path.

    asked: the container, None for that of the store that is there; a new one then follows the path's suffix.

    Raises StoreStaleError where a store of the other format is there, StoreWriteError for an unfinished file's name.
    """
    found = None if storage is None else "hdf5" if isinstance(storage, Hdf5Storage) else "zarr"
    format_name = asked or found or format_of(path)
    if found not in (None, format_name):
        raise StoreStaleError(
            f"{path}: expected a store of format {format_name}, found one of format {found}",
            hint=f"repeat --format {found} to go on with it, or give another --out",
        )
    if format_name == "zarr":
        return ZarrBuilder(path)
    if path.suffix == ".partial":  # its lock would not be the store's
        raise StoreWriteError(
            f"{path}: .partial is what the unfinished file of an HDF5 store is called",
            hint=f"give the store's own name: {path.with_suffix('')}",
        )
    return Hdf5Builder(path)


def _is_hdf5_file(path: Path) -> bool:
    if not path.is_file():
        return False
    try:
        descriptor = open_regular(path.parent, path.name)
    except FileNotFoundError:
        return False
    try:
        return is_hdf5(descriptor)
    finally:
        os.close(descriptor)

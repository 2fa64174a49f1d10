"""Creates HDF5 stores: h5py writes a file of empty datasets beside the store and closes it; it never opens it again.

A killed h5py writer leaves a file that does not open, so nothing that may be killed is left to it: the skeleton gets
its header, is flushed and renamed whole to `NAME.partial`, and from then on only bytes of datasets change.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cache.canonical import Json, canonical_json
from cache.files import sync_file, sync_folder
from cache.hdf5_file import file_names, write_at
from cache.hdf5_header import (
    Extent,
    Header,
    array_parts,
    block_bytes_for,
    encode_header,
    metadata_sha256,
    part_path,
)
from cache.hdf5_storage import Hdf5Storage
from cache.layout import SAMPLES_FILE, ArrayLayout, constant_array, group_attributes
from cache.manifest import RootManifest, TeacherParts, ViewManifest
from cache.plan import view_layouts
from cache.shard import check_shard_data
from cache.storage import StoreBuilder
from data.errors import StoreWriteError

# Of datasets: no sample starts off its dtype's boundary, no line of a ledger crosses a disk's sector.
_ALIGNMENT_BYTES = 512
# HDF5 1.8 and later read it; its metadata carry checksums, its attributes have no size limit.
_LIBVER = ("v108", "v108")


class Hdf5Builder(StoreBuilder):
    """Builds `NAME.partial.new-<pid>`, then renames it to `NAME.partial`, and that to `NAME` once it is complete."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._final, self._partial = file_names(path)
        self._staged = self._partial.with_name(f"{self._partial.name}.new-{os.getpid()}")

    def create(self, root: RootManifest, samples: bytes, teachers: Sequence[TeacherParts]) -> None:
        """Create the store; nothing may lie at either of its names."""
        for path in (self._final, self._partial):
            _refuse_taken(path)
        constants = _constants(teachers)
        self._write_skeleton(root, samples, teachers, [layout for layout, _ in constants])
        for layout, values in constants:
            Hdf5Storage(self._staged).array(layout).write_shard(0, values, rank=0)
        self._rename(self._staged, self._partial)

    def _write_skeleton(
        self, root: RootManifest, samples: bytes, teachers: Sequence[TeacherParts], constants: list[ArrayLayout]
    ) -> None:
        groups, layouts = _tree(root, teachers)
        layouts = [*constants, *layouts]
        block_bytes = block_bytes_for(groups, layouts)
        try:
            arrays, samples_extent = _write_empty(self._staged, block_bytes, groups, layouts, len(samples))
        except RuntimeError as error:  # h5py, where the disk refuses while it closes the file
            number = re.search(r"errno = (\d+)", str(error))
            raise OSError(int(number[1]) if number else errno.EIO, str(error)) from error
        descriptor = os.open(self._staged, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            size = os.fstat(descriptor).st_size
            header = Header(file_bytes=size, metadata_sha256="", groups=groups, arrays=arrays, samples=samples_extent)
            digest = metadata_sha256(descriptor, header, block_bytes, str(self._staged))
            header = header.model_copy(update={"metadata_sha256": digest})
            write_at(descriptor, encode_header(header, block_bytes), 0)
            write_at(descriptor, samples, samples_extent[0])
            sync_file(descriptor)
        finally:
            os.close(descriptor)

    def add_teacher(self, root: RootManifest, teacher: TeacherParts) -> None:
        """Refuse: see `add_view`."""
        raise self._closed(f"teacher {teacher.manifest.key}")

    def add_view(self, root: RootManifest, teacher: str, view: ViewManifest) -> None:
        """Refuse: new datasets would have to be written by h5py into a file that holds committed samples.

        Raises StoreWriteError.
        """
        raise self._closed(f"view {view.view} of {teacher}")

    def _closed(self, what: str) -> StoreWriteError:
        return StoreWriteError(
            f"{self._path}: {what} is not in this HDF5 store, and nothing can be added to one",
            hint="extract it into a store of its own (--out): training reads several stores; or convert this one to"
            " Zarr with convert-cache and add it there",
        )

    def sweep(self) -> None:
        """Remove every unfinished skeleton."""
        for sibling in self._partial.parent.iterdir() if self._partial.parent.is_dir() else ():
            if re.fullmatch(re.escape(self._partial.name) + r"\.new-\d+", sibling.name):
                sibling.unlink()

    def finish(self, *, complete: bool) -> None:
        """Give the file the name that says whether it is complete."""
        now, then = (self._partial, self._final) if complete else (self._final, self._partial)
        if now.exists():
            self._rename(now, then)

    @staticmethod
    def _rename(old: Path, new: Path) -> None:
        _refuse_taken(new)  # a file would be replaced without a word
        old.rename(new)
        sync_folder(new.parent)


def _refuse_taken(path: Path) -> None:
    if os.path.lexists(path):
        raise StoreWriteError(
            f"{path}: something that is not a store is already there", hint="give another --out, or move it away"
        )


def _constants(teachers: Sequence[TeacherParts]) -> list[tuple[ArrayLayout, NDArray[np.float32]]]:
    """Return layout and values [rows, width] of all constants; raises StoreWriteError where one is not finite."""
    found = []
    for teacher in teachers:
        for name, values in teacher.constants.items():
            values = np.ascontiguousarray(values, dtype="<f4")
            layout = constant_array(teacher.manifest.key, name, (values.shape[0], values.shape[1]))
            if check_shard_data(layout, 0, values) is not None:
                raise StoreWriteError(f"{layout.path} holds values that are not finite: check the teacher's weights")
            found.append((layout, values))
    return found


def _tree(root: RootManifest, teachers: Sequence[TeacherParts]) -> tuple[dict[str, Json], list[ArrayLayout]]:
    """Return every group's attributes and the layout of every sample array."""
    groups: dict[str, Json] = {"": group_attributes(root.written())}
    layouts: list[ArrayLayout] = []
    for teacher in teachers:
        key = teacher.manifest.key
        groups[key] = group_attributes(teacher.manifest.written())
        for view in teacher.views.values():
            groups[f"{key}/{view.view}"] = group_attributes(view.written())
            layouts.extend(view_layouts(root, key, view).values())
    return groups, layouts


def _write_empty(
    path: Path, block_bytes: int, groups: dict[str, Json], layouts: list[ArrayLayout], samples_bytes: int
) -> tuple[dict[str, dict[str, Extent]], Extent]:
    """Write the HDF5 file and return where it has room for every array's parts and for `samples.jsonl`."""
    import h5py  # as late as here: a store that exists is read and resumed without it

    options = {"alignment_threshold": 1, "alignment_interval": _ALIGNMENT_BYTES, "locking": False}
    with h5py.File(path, "w-", libver=_LIBVER, userblock_size=block_bytes, **options) as file:
        for name, attributes in groups.items():
            group = file.require_group(name or "/")
            group.attrs["teachonce"] = canonical_json(attributes["teachonce"]).decode("ascii")
            group.attrs["teachonce_sha256"] = attributes["teachonce_sha256"]
        arrays: dict[str, dict[str, Extent]] = {}
        for layout in layouts:
            parts = {
                part: _empty_dataset(file, part_path(layout.path, part), *stored_as)
                for part, stored_as in array_parts(layout).items()
            }
            for axis, dimension in enumerate(layout.dimensions):
                file[layout.path].dims[axis].label = dimension
            arrays[layout.path] = parts
        return arrays, _empty_dataset(file, SAMPLES_FILE, (samples_bytes,), np.dtype("u1"))


def _empty_dataset(file: Any, name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Extent:
    """Create a contiguous dataset whose bytes have their place in the file now, and return that."""
    import h5py

    created = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    created.set_layout(h5py.h5d.CONTIGUOUS)
    created.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    created.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    created.set_obj_track_times(False)  # two equal stores are equal byte for byte
    links = h5py.h5p.create(h5py.h5p.LINK_CREATE)
    links.set_create_intermediate_group(True)
    space, kind = h5py.h5s.create_simple(shape), h5py.h5t.py_create(dtype)
    dataset = h5py.h5d.create(file.id, name.encode("ascii"), kind, space, created, links)
    return dataset.get_offset(), dataset.get_storage_size()

"""A small store to be given hostile content, a watch over whoever reads it, and what a forger would make to fit."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import google_crc32c
import pytest

from cache.catalog import read_catalog
from cache.reader import ArrayReader, TeacherStore
from cache.summary import summarise
from cache.verify import find_problems
from cache.writer import open_writer
from data.errors import StoreError, TeachOnceError
from tests.cache.conftest import TinyStores

if TYPE_CHECKING:
    from cache.plan import StoreFormat

Files = dict[str, bytes]


class Victim:
    """A complete store of three samples in shards of two, which every example finds as it was made.

    files: content by path below the store; "" is the one file of HDF5.  most_bytes: of address space, what reading any
    store like it may take.
    """

    def __init__(self, folder: Path, kind: StoreFormat, most_bytes: int) -> None:
        self.stores = TinyStores(folder)
        self.plan = self.stores.plan(3, shard_samples=2, views=["original"], format=kind)
        suffix = {"zarr": ".zarr", "hdf5": ".h5"}[kind]
        self.path = self.stores.build(self.plan, f"store{suffix}")
        self.most_bytes = most_bytes
        (folder / "written").mkdir()
        self.copy = folder / "written" / f"copy{suffix}"  # not beside it, where stores are looked for
        paths = [path for path in self.path.rglob("*") if path.is_file()] if self.path.is_dir() else [self.path]
        self.files = {str(path.relative_to(self.path)).removeprefix("."): path.read_bytes() for path in paths}
        self.manifests = {name: json.loads(self.files[name]) for name in self.files if name.endswith("zarr.json")}

    @contextmanager
    def holding(self, files: Files) -> Iterator[None]:
        """For the block, some files of the store have other bytes, or are there at all."""
        for name, content in files.items():
            (self.path / name).write_bytes(content)
        try:
            yield
        finally:
            for name in files:
                (self.path / name).write_bytes(self.files.get(name, b""))
                if name not in self.files:
                    (self.path / name).unlink()

    def assert_harmless(self, files: Files, *, writer: bool = False) -> None:
        """Do with the store all that one does with a store; only errors of the project's own tree are raised."""
        with self.holding(files):
            with guarded(self), suppress(StoreError):
                read_everything(self.path)
            if writer:
                self._write_copy()

    def _write_copy(self) -> None:
        shutil.rmtree(self.copy, ignore_errors=True)
        self.copy.unlink(missing_ok=True)
        if self.path.is_dir():
            shutil.copytree(self.path, self.copy)
        else:
            shutil.copy(self.path, self.copy)
        with suppress(TeachOnceError), open_writer(self.copy, self.plan) as opened:
            self.stores.fill(opened)


def read_everything(path: Path) -> None:
    """Call whatever reads; an array that refuses does not keep the others from being read."""
    catalog = read_catalog(path)
    summarise(catalog, find_problems(catalog, verify=True), verified=True)
    for check in (True, False):
        store = TeacherStore(path, check=check)
        for layout in catalog.layouts():
            with suppress(StoreError):
                read_array(store.array(*layout.path.split("/")))  # type: ignore[arg-type]
        for teacher in catalog.teachers:
            with suppress(StoreError):
                store.text_embeddings(teacher)
        with suppress(StoreError):
            assert len(store.row_of_id) == catalog.root.dataset.samples


def read_array(reader: ArrayReader) -> None:
    last = reader.layout.num_samples - 1
    assert reader.content_digest
    for row in {0, min(1, last), min(2, last), last}:
        reader.missing_rows([row])
        with suppress(StoreError):
            assert reader.read(row).shape == reader.layout.sample_shape
            reader.prefetch([row])


@contextmanager
def guarded(victim: Victim) -> Iterator[None]:
    """For the block: no file outside the store is opened, nothing is read at an offset outside, memory is little."""
    real_open, real_pread = os.open, os.pread

    def inside(path: Any, *args: Any, **options: Any) -> int:
        descriptor = real_open(path, *args, **options)
        opened = Path(f"/proc/self/fd/{descriptor}").readlink()
        assert opened.is_relative_to(victim.path) or opened.is_dir(), f"{opened} is outside the store"
        return descriptor

    def within(descriptor: int, size: int, offset: int) -> bytes:
        # Whether there is a header is found out by reading one; all else is read where the size is known.
        is_known = victim.path.is_dir()
        assert not is_known or 0 <= offset <= offset + size <= os.fstat(descriptor).st_size, (size, offset)
        return real_pread(descriptor, size, offset)

    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "open", inside)
        patch.setattr(os, "pread", within)
        resource.setrlimit(resource.RLIMIT_AS, (used + victim.most_bytes, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


# How a forger seals what was changed: written after docs/cache-format.md, not after the code.


def canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def sha256(value: Any) -> str:
    return hashlib.sha256(canonical(value)).hexdigest()


def crc(data: bytes) -> int:
    return int(google_crc32c.value(data))


def ledger_line(**fields: Any) -> bytes:
    return canonical({**fields, "crc32c": crc(canonical(fields))}) + b"\n"


def sealed(group: Any) -> bytes:
    with suppress(ValueError, TypeError, KeyError):
        group["attributes"]["teachonce_sha256"] = sha256(group["attributes"]["teachonce"])
    return json.dumps(group).encode()


def forged(victim: Victim, change: Callable[[dict[str, Any]], object]) -> Files:
    """The metadata with manifests changed and all that follows from them made to fit: a store that agrees with itself.

    change: is given the contents of all manifests, by group.
    """
    groups = {name.rpartition("/")[0]: json.loads(json.dumps(m)) for name, m in victim.manifests.items()}
    manifests = {
        name: group["attributes"]["teachonce"] for name, group in groups.items() if group["node_type"] == "group"
    }
    change(manifests)
    root = manifests[""]
    dataset = {key: root["dataset"][key] for key in ("samples", "samples_sha256")}
    for name, manifest in manifests.items():
        teacher, _, view = name.partition("/")
        for array, stored in manifest.get("arrays", {}).items():
            identity = {
                "dataset": dataset, "frame": root["frame"], "teacher": manifests[teacher]["identity"], "view": view,
                "array": array, "sample_shape": stored["sample_shape"], "dtype": stored["dtype"],
            }  # fmt: skip
            stored["fingerprint"] = sha256(identity)
            _fit(groups[f"{name}/{array}"], root["dataset"]["samples"], manifest["layout"]["shard_samples"], stored)
        if manifest.get("text_embeddings_shape"):
            classes, width = manifest["text_embeddings_shape"]
            _fit(groups[f"{name}/text_embeddings"], classes, classes, {"sample_shape": [width], "dtype": "float32"})
    return {
        f"{name}/zarr.json".lstrip("/"): sealed(group) if name in manifests else json.dumps(group).encode()
        for name, group in groups.items()
    }


def _fit(array: Any, num_samples: int, shard_samples: int, stored: Any) -> None:
    shape = stored["sample_shape"]
    array["shape"], array["data_type"] = [num_samples, *shape], stored["dtype"]
    array["chunk_grid"]["configuration"]["chunk_shape"] = [shard_samples, *shape]
    if array["codecs"][0]["name"] == "sharding_indexed":
        array["codecs"][0]["configuration"]["chunk_shape"] = [1, *shape]

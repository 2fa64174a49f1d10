"""The same float16 values, [N, 30, 30, 384], in every format, and the fastest way we know to gather rows of each.

Nobody may touch tensorstore before a fork: its threads do not exist in the child, which then waits for ever.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.rounds import Rows
from benchmarks.stores import FEATURES, SAMPLE_SHAPE, reader_of

Features = NDArray[Any]
# Fills a buffer [len(rows), 30, 30, 384] with the given rows.
Gather = Callable[[Rows, Features], object]


@dataclass(frozen=True)
class Contender:
    """One format.

    files: all that its reader opens.  open: returns its gather function; whoever drops that closes the files.
    at_least: target of its time over ours.
    """

    name: str
    files: tuple[Path, ...]
    open: Callable[[], Gather]
    at_least: float | None = None


class Formats:
    """The copies of one store below a folder."""

    def __init__(self, folder: Path, store: Path) -> None:
        self.store = store
        self.samples = reader_of(store).layout.num_samples
        self.shape = (self.samples, *SAMPLE_SHAPE)
        self.shards = tuple(sorted((store / FEATURES).glob("c/*/0/0/0")))
        self.flat = folder / "flat"
        self.big_npy = folder / "all.npy"
        self.contiguous = folder / "contiguous.h5"
        self.chunked = folder / "chunked.h5"
        self.npy = tuple(folder / "npy" / f"{row}.npy" for row in range(self.samples))
        self.pt = tuple(folder / "pt" / f"{row}.pt" for row in range(self.samples))

    def write(self) -> None:
        """Write every copy."""
        import h5py
        import torch

        self.npy[0].parent.mkdir()
        self.pt[0].parent.mkdir()
        reader = reader_of(self.store)
        with h5py.File(self.contiguous, "w") as contiguous, h5py.File(self.chunked, "w") as chunked:
            copies: Sequence[Any] = (
                np.memmap(self.flat, dtype="<f2", mode="w+", shape=self.shape),
                np.lib.format.open_memmap(self.big_npy, mode="w+", dtype="<f2", shape=self.shape),
                contiguous.create_dataset("features", self.shape, "<f2"),
                chunked.create_dataset("features", self.shape, "<f2", chunks=(1, *SAMPLE_SHAPE)),
            )
            for row in range(self.samples):
                sample = np.array(reader.read(row))
                for copy in copies:
                    copy[row] = sample
                np.save(self.npy[row], sample)
                torch.save(torch.from_numpy(sample), self.pt[row])

    def ours(self) -> Contender:
        """Return our reader."""
        return Contender("ours", self.shards, self._open_ours)

    def memmap(self) -> Contender:
        """Return the plain file, mapped as a whole: no index, no checksum, nothing to look up."""
        return Contender("np.memmap of one flat file", (self.flat,), self._open_flat, 0.8)

    def one_pt_a_sample(self) -> Contender:
        """Return what most caches of teacher outputs are."""
        return Contender("one .pt a sample", self.pt, self._open_pt, 5)

    def hdf5_chunked(self) -> Contender:
        """Return HDF5 cut as our store is."""
        return Contender("h5py, one-sample chunks", (self.chunked,), lambda: _open_hdf5(self.chunked), 2)

    def others(self) -> list[Contender]:
        """Return everything but ours."""
        return [
            self.memmap(),
            Contender('one .npy, np.load(mmap_mode="r")', (self.big_npy,), self._open_big_npy),
            Contender("zarr-python, same store", self.shards, self._open_zarr, 10),
            Contender("tensorstore, same store", self.shards, self._open_tensorstore),
            Contender("h5py, contiguous", (self.contiguous,), lambda: _open_hdf5(self.contiguous)),
            self.hdf5_chunked(),
            self.one_pt_a_sample(),
            Contender("one .npy a sample", self.npy, lambda: copying(lambda row: np.load(self.npy[row]))),
        ]

    def _open_ours(self) -> Gather:
        reader = reader_of(self.store)
        return lambda rows, out: reader.gather(rows, out=out)

    def _open_flat(self) -> Gather:
        flat = np.memmap(self.flat, dtype="<f2", mode="r", shape=self.shape)
        return copying(lambda row: flat[row])

    def _open_big_npy(self) -> Gather:
        array = np.load(self.big_npy, mmap_mode="r")
        return copying(lambda row: array[row])

    def _open_zarr(self) -> Gather:
        import zarr

        array = zarr.open_array(self.store / FEATURES, mode="r")
        return copying(lambda row: array[row])  # `oindex` with all rows takes ten times as long

    def _open_tensorstore(self) -> Gather:
        import tensorstore

        kvstore = {"driver": "file", "path": f"{self.store / FEATURES}/"}
        array = tensorstore.open({"driver": "zarr3", "kvstore": kvstore}, open=True, read=True).result()

        def gather(rows: Rows, out: Features) -> None:
            into = tensorstore.array(out)
            for copy in [into[position].write(array[row]) for position, row in enumerate(rows)]:
                copy.result()

        return gather

    def _open_pt(self) -> Gather:
        import torch

        return copying(lambda row: torch.load(self.pt[row]).numpy())


def _open_hdf5(path: Path) -> Gather:
    import h5py

    dataset = h5py.File(path, "r")["features"]

    def gather(rows: Rows, out: Features) -> None:
        for position, row in enumerate(rows):
            dataset.read_direct(out, np.s_[row], np.s_[position])

    return gather


def copying(read: Callable[[int], Any]) -> Gather:
    """Return the gather function that copies what `read` returns for every row."""

    def gather(rows: Rows, out: Features) -> None:
        for position, row in enumerate(rows):
            out[position] = read(row)

    return gather

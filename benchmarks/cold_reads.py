"""Random reads when nothing is in the page cache: what the first epoch costs, or every epoch of a store beyond memory.

A file's pages are dropped before each pass, and the table's last column shows that they were: it is what the disk
delivered over what was asked for. More than one means that the kernel read pages nobody wanted.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

import numpy as np

from benchmarks.contenders import Contender, Features, Formats
from benchmarks.rounds import Pass, Rows, disk_bytes, evict, in_turn, random_batches, timed
from benchmarks.stores import SAMPLE_BYTES, SAMPLE_SHAPE, reader_of
from benchmarks.tables import Figure, Table, time_table
from benchmarks.warm_reads import BATCH_SIZE, gather_all

# How many batches before their turn rows are asked for: 88 MB of this shape.
AHEAD = 16
READ_BLOCK = 1 << 22
IN_ORDER = "one flat file in order, the yardstick"


def cold_table(formats: Formats, rounds: int) -> Table:
    """Return the table of random batches of 8 from the disk, opening included, beside a plain file read in order."""
    out = np.ones((BATCH_SIZE, *SAMPLE_SHAPE), dtype="<f2")
    passes = ColdPasses(formats.samples)
    passes.add(f"ours, {AHEAD} batches ahead", formats.shards, lambda batches: read_ahead(formats.store, batches, out))
    passes.add("ours, nothing ahead", formats.shards, _gathering(formats.ours(), out))
    for contender in (formats.memmap(), formats.hdf5_chunked(), formats.one_pt_a_sample()):
        passes.add(contender.name, contender.files, _gathering(contender, out))
    passes.add(IN_ORDER, (formats.flat,), lambda _: read_in_order(formats.flat))
    figures = passes.figures(rounds, {IN_ORDER: 0.8})
    return time_table("Cold: random batches of 8 from the disk", figures, note="disk")


class ColdPasses:
    """Passes over all samples that start with their files out of the page cache."""

    def __init__(self, samples: int) -> None:
        self._samples = samples
        self._passes: dict[str, Pass] = {}
        self._from_disk: dict[str, list[int]] = defaultdict(list)

    def add(self, name: str, files: Sequence[Path], read: Callable[[list[Rows]], object]) -> None:
        """Add a contender; `read` opens, reads the batches and closes."""

        def run(number: int) -> float:
            batches = random_batches(self._samples, BATCH_SIZE, number)
            evict(files)
            before = disk_bytes()
            seconds = timed(lambda: read(batches)) / self._samples
            self._from_disk[name].append(disk_bytes() - before)
            return seconds

        self._passes[name] = run

    def figures(self, rounds: int, targets: dict[str, float]) -> list[Figure]:
        """Return the figures of that many rounds, each with the bytes from the disk over the bytes asked for."""
        found = in_turn(self._passes, rounds)
        asked = self._samples * SAMPLE_BYTES
        return [
            Figure(name, seconds, targets.get(name), f"{median(self._from_disk[name]) / asked:.2f}")
            for name, seconds in found.items()
        ]


def _gathering(contender: Contender, out: Features) -> Callable[[list[Rows]], object]:
    return lambda batches: gather_all(contender.open(), batches, out)


def read_ahead(store: Path, batches: Sequence[Rows], out: Features) -> None:
    """Gather batches with our reader, asking for each of them AHEAD batches before its turn."""
    reader = reader_of(store)
    for rows in batches[:AHEAD]:
        reader.prefetch(rows)
    for number, rows in enumerate(batches):
        for later in batches[number + AHEAD : number + AHEAD + 1]:
            reader.prefetch(later)
        reader.gather(rows, out=out[: len(rows)])


def read_in_order(path: Path) -> None:
    """Read a file from its first byte to its last into one small buffer."""
    buffer = bytearray(READ_BLOCK)
    with path.open("rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
        while file.readinto(buffer):
            pass

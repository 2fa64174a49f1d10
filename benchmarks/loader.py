"""Batches of the store through a torch DataLoader, beside gathering them in the training process itself.

It runs before any contender with threads of its own is opened: the workers are forked.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from benchmarks.rounds import Pass, in_turn, random_batches, timed
from benchmarks.stores import SAMPLE_SHAPE, reader_of
from benchmarks.tables import Figure, Table, time_table
from benchmarks.warm_reads import BATCH_SIZE, gather_all
from cache.reader import ArrayReader

GATHERED = "gathered here, one reused buffer"


class StoredSamples(Dataset[torch.Tensor]):
    """A store's features as a dataset: item i is row i, [30, 30, 384] float16."""

    def __init__(self, reader: ArrayReader) -> None:
        self._reader = reader

    def __len__(self) -> int:
        return self._reader.layout.num_samples

    def __getitem__(self, row: int) -> torch.Tensor:
        return torch.from_numpy(np.array(self._reader.read(row)))


def loader_table(store: Path, rounds: int) -> Table:
    """Return the table of the batches that arrive a second; nobody looks at them, which flatters the workers."""
    reader = reader_of(store, check=False)  # else each worker would still be checking samples that are new to it
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the workers; several would stack no faster and wait for each other busily
    passes = {GATHERED: _gathering_pass(reader)}
    for workers in (0, 1, 2):
        name = f"DataLoader, {workers} worker{'s' if workers != 1 else ''}"
        passes[name] = _loader_pass(reader, workers)
    found = in_turn(passes, rounds + 1)
    torch.set_num_threads(threads)
    figures = [Figure(name, seconds[1:]) for name, seconds in found.items()]
    return time_table("DataLoader: random batches of 8, warm", figures, unit="samples/s")


def _gathering_pass(reader: ArrayReader) -> Pass:
    samples = reader.layout.num_samples
    out = np.ones((BATCH_SIZE, *SAMPLE_SHAPE), dtype="<f2")

    def run(number: int) -> float:
        batches = random_batches(samples, BATCH_SIZE, number)
        return timed(lambda: gather_all(lambda rows, out: reader.gather(rows, out=out), batches, out)) / samples

    return run


def _loader_pass(reader: ArrayReader, workers: int) -> Pass:
    dataset = StoredSamples(reader)
    loader = DataLoader(dataset, BATCH_SIZE, shuffle=True, num_workers=workers, persistent_workers=workers > 0)

    def run(number: int) -> float:
        torch.manual_seed(number)
        return timed(lambda: sum(len(batch) for batch in loader)) / len(dataset)

    return run

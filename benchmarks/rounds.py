"""Measuring in rounds: every contender once a round, in an order drawn anew, so that none always follows another."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np

# One pass over all samples in the round of that number: returns seconds a sample.
Pass = Callable[[int], float]
Rows = list[int]


def in_turn(passes: Mapping[str, Pass], rounds: int) -> dict[str, tuple[float, ...]]:
    """Return the seconds of every pass by its name, one a round."""
    found: dict[str, list[float]] = {name: [] for name in passes}
    for number in range(rounds):
        for name in np.random.default_rng(number).permutation(list(passes)).tolist():
            found[name].append(passes[name](number))
    return {name: tuple(seconds) for name, seconds in found.items()}


def timed(work: Callable[[], object]) -> float:
    """Return the seconds that the work takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def random_batches(samples: int, batch_size: int, seed: int) -> list[Rows]:
    """Return all rows once, in random order, in batches."""
    rows = np.random.default_rng(seed).permutation(samples).tolist()
    return [rows[start : start + batch_size] for start in range(0, samples, batch_size)]


def evict(paths: Iterable[Path]) -> None:
    """Drop files from the page cache; pages that a process still maps stay."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def disk_bytes() -> int:
    """Return the bytes that this process has had read from disks, 0 where the system does not say."""
    try:
        lines = Path("/proc/self/io").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("read_bytes:")), 0)

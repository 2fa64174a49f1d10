"""What a read costs where a store has more shards than its reader keeps mapped.

It measures in a process of its own that may open 1,024 files, the usual limit: a reader whose maps hold descriptors
keeps the fewer of them the lower that limit is.
"""

from __future__ import annotations

import json
import resource
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

import numpy as np

from benchmarks.rounds import Pass, in_turn, random_batches, timed
from benchmarks.stores import SAMPLE_SHAPE, build_store, feature_plan, in_fresh_process, reader_of
from benchmarks.tables import Check, Table, markdown
from benchmarks.warm_reads import BATCH_SIZE, gather_all

OPEN_FILES = 1024
AT_MOST = 1.25
# Number and shape of the samples, and how few of them go into a shard, to stand beside one shard of all.
CASES = {
    "[4, 4, 8], 256 bytes, one a shard": (1000, (4, 4, 8), 1),
    "[30, 30, 384], 691 kB, two a shard": (256, SAMPLE_SHAPE, 2),
}


def many_shards_table(folder: Path, rounds: int) -> Table:
    """Return the table of random batches of 8 from one shard and from many; builds its stores below a folder."""
    with _open_files(OPEN_FILES):
        found: dict[str, list[list[float]]] = in_fresh_process("many_shards", folder, rounds)
    rows, checks = [], []
    for case, (one, many) in found.items():
        ratio = median(b / a for a, b in zip(one, many, strict=True))
        more = median(b - a for a, b in zip(one, many, strict=True)) * 1e6
        held = CASES[case][1] == SAMPLE_SHAPE  # a tiny sample is all overhead
        micros = (f"{median(seconds) * 1e6:.1f}" for seconds in (one, many))
        rows.append([case, *micros, f"{more:.1f}", f"{ratio:.2f}", f"≤ {AT_MOST}" if held else ""])
        checks.extend([Check(case, ratio, f"≤ {AT_MOST}", ratio <= AT_MOST)] if held else [])
    title = f"Warm, a store of many shards, {OPEN_FILES:,} open files allowed"
    return Table(title, markdown(["µs", "one", "many", "more", "ratio", "target"], rows), tuple(checks))


@contextmanager
def _open_files(limit: int) -> Iterator[None]:
    """Lower the number of files that processes started meanwhile may open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, limit), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def measure(folder: Path, rounds: int) -> dict[str, list[list[float]]]:
    """Return by case the seconds a sample of every round: all samples in one shard, then in many."""
    found = {}
    for case, (samples, shape, few) in CASES.items():
        with tempfile.TemporaryDirectory(dir=folder) as name:
            passes = {str(s): _pass(Path(name) / f"{s}.zarr", samples, shape, s) for s in (samples, few)}
            in_turns = in_turn(passes, rounds + 1)
        found[case] = [list(in_turns[str(s)][1:]) for s in (samples, few)]
    return found


def _pass(store: Path, samples: int, shape: tuple[int, ...], shard_samples: int) -> Pass:
    reader = reader_of(build_store(store, feature_plan(samples, shape, shard_samples)))
    out = np.ones((BATCH_SIZE, *shape), dtype="<f2")

    def run(number: int) -> float:
        batches = random_batches(samples, BATCH_SIZE, number)
        return timed(lambda: gather_all(lambda rows, out: reader.gather(rows, out=out), batches, out)) / samples

    return run


if __name__ == "__main__":
    print(json.dumps(measure(Path(sys.argv[1]), int(sys.argv[2]))))

"""Writing one shard, flushed: ours with its checksums beside the same bytes written plainly, and a whole commit."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from benchmarks.rounds import Pass, in_turn, timed
from benchmarks.stores import SHARD_SAMPLES, feature_plan, random_features
from benchmarks.tables import Figure, Table, time_table
from cache.writer import StoreWriter, open_writer

PLAIN = "plain write + fsync of the same bytes"


def write_table(folder: Path, rounds: int) -> Table:
    """Return the table of the time that each of a shard's 64 samples takes."""
    with open_writer(folder / "written.zarr", feature_plan(SHARD_SAMPLES)) as writer:
        (missing,) = writer.missing()
        outputs = random_features(missing)
        values = outputs["features"].astype("<f2")
        content = values.tobytes()
        passes = {
            "ours: crc32c, SHA-256, index, fsync": _pass(lambda: write_features(writer, values)),
            PLAIN: _pass(lambda: write_plain(folder / "plain", content)),
            "a commit of float16: moments, ledger": _pass(lambda: writer.commit(missing, {"features": values})),
            "a commit of float32: cast to float16": _pass(lambda: writer.commit(missing, outputs)),
        }
        found = in_turn(passes, rounds)
    targets = {PLAIN: 0.8}
    figures = [Figure(name, seconds, targets.get(name)) for name, seconds in found.items()]
    return time_table("Writing: one shard of 64 samples, 44 MB, flushed", figures)


def _pass(write: Callable[[], object]) -> Pass:
    return lambda _: timed(write) / SHARD_SAMPLES


def write_features(writer: StoreWriter, values: NDArray[Any]) -> None:
    """Write one shard of features as a commit does, without its ledger line."""
    layout = writer.catalog.teacher("bench").view("original").layouts["features"]
    writer.catalog.storage.array(layout).write_shard(0, values, rank=0)


def write_plain(path: Path, content: bytes) -> None:
    """Write bytes to a new file, flush it, rename it into place and flush the folder."""
    temporary = path.with_suffix(".tmp")
    with temporary.open("wb", buffering=0) as file:
        file.write(content)
        os.fsync(file.fileno())
    temporary.rename(path)
    descriptor = os.open(path.parent, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)

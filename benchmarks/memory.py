"""Peak anonymous memory of writing and of reading a store, which must not grow with the number of samples.

Mapped pages of shard files belong to the page cache and are shared; `RssAnon` in /proc/self/status is what a process
has for itself. Each figure is that of a process of its own that does nothing else, sampled by a thread.
"""

from __future__ import annotations

import json
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from benchmarks.rounds import random_batches
from benchmarks.stores import build_store, feature_plan, in_fresh_process, reader_of
from benchmarks.tables import Check, Table, markdown
from benchmarks.warm_reads import BATCH_SIZE, gather_all

COUNTS = (500, 20_000)
# Small enough for a disk to hold 20,000 of them (0.6 GB), large enough that one kept too many of them would show.
SHAPE = (30, 30, 16)
AT_MOST = 1.1
MIB = 1 << 20
PERIOD_SECONDS = 0.002
STATUS = Path("/proc/self/status")
# By the process and its figure: the line's name, and whether it is held to the target.
LINES = {
    ("write", "peak"): ("writing, peak", False),
    ("write", "peak_without_plan"): ("less the list of images", True),
    ("read", "peak"): ("reading at random, peak", True),
    ("read", "page_tables"): ("its page tables", False),
}


def memory_table(folder: Path) -> Table:
    """Return the table of anonymous memory, in MiB, of small and of large stores; writes them below a folder."""
    found = {count: _write_and_read(folder, count) for count in COUNTS}
    rows, checks = [], []
    for (work, figure), (name, held) in LINES.items():
        few, many = (found[count][work][figure] for count in COUNTS)
        target = f"≤ {AT_MOST}" if held else ""
        a_sample = (many - few) / (COUNTS[1] - COUNTS[0])
        row = [name, f"{few / MIB:.1f}", f"{many / MIB:.1f}", f"{a_sample:.0f} B", f"{many / few:.2f}", target]
        rows.append(row)
        checks.extend([Check(name, many / few, target, many / few <= AT_MOST)] if held else [])
    header = ["MiB", *(f"N = {count:,}" for count in COUNTS), "a sample", "ratio", "target"]
    return Table("Anonymous memory (RssAnon) of a process", markdown(header, rows), tuple(checks))


def _write_and_read(folder: Path, count: int) -> dict[str, dict[str, int]]:
    with tempfile.TemporaryDirectory(dir=folder) as name:
        store = Path(name) / "memory.zarr"
        return {work: in_fresh_process("memory", work, store, count) for work in ("write", "read")}


def write(store: Path, count: int) -> dict[str, int]:
    """Return the peak of writing a complete store of that many samples, with and without what its plan takes.

    The plan holds an id and a digest of every image: whoever asks for a store has those, whatever the writer does.
    """
    before = status_bytes("RssAnon")
    plan = feature_plan(count, SHAPE)
    taken = status_bytes("RssAnon") - before
    with sampled("RssAnon") as found:
        build_store(store, plan)
    return {"peak": max(found), "peak_without_plan": max(found) - taken}


def read(store: Path, count: int) -> dict[str, int]:
    """Return the peak of gathering every sample once, at random, into one buffer, and the page tables in the end."""
    with sampled("RssAnon") as found:
        reader = reader_of(store)
        out = np.ones((BATCH_SIZE, *SHAPE), dtype="<f2")
        gather_all(lambda rows, out: reader.gather(rows, out=out), random_batches(count, BATCH_SIZE, 0), out)
        page_tables = status_bytes("VmPTE")
    return {"peak": max(found), "page_tables": page_tables}


@contextmanager
def sampled(field: str) -> Iterator[list[int]]:
    """Append a field's value to the list every two milliseconds, and at the start and the end of the block."""
    found = [status_bytes(field)]
    done = threading.Event()

    def sample() -> None:
        while not done.wait(PERIOD_SECONDS):
            found.append(status_bytes(field))

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield found
    finally:
        done.set()
        thread.join()
        found.append(status_bytes(field))


def status_bytes(field: str) -> int:
    """Return a field of this process's status, in bytes."""
    lines = STATUS.read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


if __name__ == "__main__":
    work = {"write": write, "read": read}[sys.argv[1]]
    print(json.dumps(work(Path(sys.argv[2]), int(sys.argv[3]))))

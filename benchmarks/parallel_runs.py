"""How often a store lies in memory when several runs read it beside each other: once.

Each reader is a process of its own that gathers every sample of the store, as a run does over an epoch, and then holds
still. Of the maps of the store's shards, /proc/PID/smaps tells the pages that a process sees (Rss) and its share of
them (Pss: a page that n processes map counts 1/n to each); what a process has for itself is RssAnon.

    python benchmarks/parallel_runs.py [--runs-of PID …]

With `--runs-of`, the same figures of processes that are running now, as those of `sweep --parallel K`, by any store.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from benchmarks.stores import PROJECT, build_store, feature_plan, reader_of
from benchmarks.tables import Check, Table, machine, markdown, report

SAMPLES = 192
READERS = (1, 2, 4)
AT_MOST = 1.05
MIB = 1 << 20
RULE = (
    "Readers gather all samples once and hold still. Rss: pages of the store that they see, summed; Pss: each page"
    " shared out over those that map it, summed, so that it is what the store takes in memory."
)


@dataclass(frozen=True)
class Mapped:
    """Pages of a store that a process maps, and what it has for itself, in bytes."""

    rss: int
    pss: int
    private: int
    anonymous: int


def mapped(pid: int, store: Path) -> Mapped:
    """Return what a process maps of the files below a folder."""
    found: dict[str, int] = defaultdict(int)
    inside = False
    for line in Path(f"/proc/{pid}/smaps").read_text(encoding="utf-8").splitlines():
        words = line.split()
        if "-" in words[0] and not words[0].endswith(":"):
            inside = len(words) > 5 and Path(words[5]).is_relative_to(store)
        elif inside and words[0] in ("Rss:", "Pss:", "Private_Clean:", "Private_Dirty:"):
            found[words[0].rstrip(":")] += 1024 * int(words[1])
    status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    anonymous = next(1024 * int(line.split()[1]) for line in status if line.startswith("RssAnon:"))
    return Mapped(found["Rss"], found["Pss"], found["Private_Clean"] + found["Private_Dirty"], anonymous)


def shared_table(folder: Path) -> Table:
    """Return the table of one, two and four readers of one store; writes it below a folder."""
    store = build_store(folder / "shared.zarr", feature_plan(SAMPLES)).resolve()
    size = sum(path.stat().st_size for path in (store / "bench/original/features").rglob("*") if path.is_file())
    rows, checks = [], []
    for count in READERS:
        with _readers(store, count) as pids:
            found = [mapped(pid, store) for pid in pids]
        rss, pss = sum(each.rss for each in found), sum(each.pss for each in found)
        anonymous = max(each.anonymous for each in found)
        row = [str(count), f"{size / MIB:.0f}", f"{rss / MIB:.0f}", f"{pss / MIB:.0f}", f"{pss / size:.2f}"]
        rows.append([*row, f"≤ {AT_MOST}", f"{anonymous / MIB:.0f}"])
        checks.append(Check(f"{count} readers", pss / size, f"≤ {AT_MOST}", pss / size <= AT_MOST))
    header = ["readers", "store, MiB", "Rss, sum", "Pss, sum", "copies", "target", "RssAnon"]
    return Table("One copy of the store in memory", markdown(header, rows), tuple(checks))


def running_table(pids: Sequence[int]) -> Table:
    """Return the table of runs that are under way."""
    rows = []
    for pid in pids:
        command = Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")
        store = Path(f"/proc/{pid}/cwd").resolve() / command[command.index("--cached-teachers") + 1]
        found = mapped(pid, store.resolve())
        row = [str(pid), *(f"{value / MIB:.2f}" for value in (found.rss, found.pss, found.private))]
        rows.append([*row, f"{found.anonymous / MIB:.0f}"])
    header = ["run", "Rss of the store", "Pss", "private", "RssAnon"]
    return Table("Runs under way, MiB", markdown(header, rows))


@contextmanager
def _readers(store: Path, count: int) -> Iterator[list[int]]:
    command = [sys.executable, "-m", "benchmarks.parallel_runs", "--read", str(store)]
    readers = [
        subprocess.Popen(command, cwd=PROJECT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(count)
    ]
    try:
        for reader in readers:
            assert reader.stdout is not None
            assert reader.stdout.readline().strip() == "read"
        yield [reader.pid for reader in readers]
    finally:
        for reader in readers:
            reader.communicate("")


def read(store: Path) -> None:
    """Gather every sample in batches into one buffer, say so, and hold still until stdin ends."""
    reader = reader_of(store)
    out = None
    for first in range(0, SAMPLES, 8):
        rows = list(range(first, min(first + 8, SAMPLES)))
        out = reader.gather(rows, out=out)
    assert out is not None
    assert np.isfinite(out[0, 0, 0, 0])
    print("read", flush=True)
    sys.stdin.read()


def main() -> None:
    """Print the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs-of", type=int, nargs="+", default=[], metavar="PID")
    parser.add_argument("--read", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.read:
        read(options.read)
        return
    with tempfile.TemporaryDirectory() as name:
        tables = [running_table(options.runs_of)] if options.runs_of else [shared_table(Path(name))]
    print(report(f"Runs beside each other, {date.today().isoformat()}", machine(["numpy", "zarr"]), RULE, tables))


if __name__ == "__main__":
    main()

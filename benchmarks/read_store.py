"""Measures reading and writing of a feature store beside plain files, zarr-python, tensorstore, HDF5 and DataLoaders.

    python benchmarks/read_store.py [--samples 512] [--rounds 9] [--out benchmarks/results/NAME.md]

It takes some five minutes and 4 GB of disk. Every table of the report stands in a file of its own beside this one.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from datetime import date
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.cold_reads import cold_table
from benchmarks.contenders import Formats
from benchmarks.loader import loader_table
from benchmarks.many_shards import many_shards_table
from benchmarks.memory import memory_table
from benchmarks.stores import SAMPLE_BYTES, SHARD_SAMPLES, build_store, feature_plan
from benchmarks.tables import Table, machine, report
from benchmarks.warm_reads import warm_tables
from benchmarks.write_store import write_table

PACKAGES = ("numpy", "zarr", "tensorstore", "h5py", "torch", "google-crc32c")
RULE = (
    "Every contender holds the same values. A round runs all lines of a table once, in an order drawn anew; each pass"
    " takes all samples in an order drawn anew. Times are medians over the rounds, per sample. A ratio is the line's"
    " time over ours of the same round, the median over the rounds; ± is half the interquartile range of the ratios."
    " In the cold table, `disk` is what the disk delivered over what was asked for. Targets are the design's."
)


def main() -> None:
    """Measure, print the report and write it where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=512, help="number of samples, 691 kB each (default 512)")
    parser.add_argument("--rounds", type=int, default=9, help="rounds of every table (default 9)")
    parser.add_argument("--folder", type=Path, help="where to put the files: the disk to measure (default: temporary)")
    parser.add_argument("--out", type=Path, help="write the report there too")
    options = parser.parse_args()
    load_before = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="teachonce-bench-", dir=options.folder) as name:
        tables = measure(Path(name), options.samples, options.rounds)
    facts = [
        *machine(PACKAGES),
        f"load average {load_before:.1f} before, {os.getloadavg()[0]:.1f} after",
        f"{options.samples} samples [30, 30, 384] float16, {options.samples * SAMPLE_BYTES / 1e6:.0f} MB,"
        f" {SHARD_SAMPLES} a shard; {options.rounds} rounds",
    ]
    text = report(f"Reading and writing a feature store, {date.today().isoformat()}", facts, RULE, tables)
    print(text)
    if options.out is not None:
        options.out.write_text(text + "\n", encoding="utf-8")


def measure(folder: Path, samples: int, rounds: int) -> list[Table]:
    """Return all tables, of a store of that many samples built below a folder."""
    say("building the store")
    store = build_store(folder / "store.zarr", feature_plan(samples))
    say("DataLoader")
    loader = loader_table(store, rounds)  # first: its workers are forked, and tensorstore does not survive that
    say("writing the same values in every format")
    formats = Formats(folder, store)
    formats.write()
    say("warm reads")
    warm = warm_tables(formats, rounds)
    say("cold reads")
    cold = cold_table(formats, rounds)
    say("many shards")
    many = many_shards_table(folder, rounds)
    say("writes")
    written = write_table(folder, 2 * rounds)  # a disk wavers more than memory
    say("memory")
    return [*warm, many, cold, loader, written, memory_table(folder)]


def say(what: str) -> None:
    """Tell what is being done."""
    print(f"{what} …", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()

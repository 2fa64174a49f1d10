"""Measures reading and writing of a feature store beside plain files, zarr-python, HDF5 and one file a sample.

    python benchmarks/read_store.py [--samples 512] [--repeats 7] [--out benchmarks/results/NAME.md]

The rule: all contenders hold the same fp16 values, [N, 30, 30, 384], and are measured in this one process, in turn,
`repeats` times; a figure is the median of its repeats, and what counts is the ratio to ours in the same run.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cache.ledger import LedgerEntry
from cache.plan import StorePlan, TeacherPlan
from cache.reader import ArrayReader, TeacherStore
from cache.samples import SampleEntry
from cache.shard import write_shard
from cache.writer import MissingShard, StoreWriter, open_writer

SAMPLE_SHAPE = (30, 30, 384)
SAMPLE_BYTES = 30 * 30 * 384 * 2
SHARD_SAMPLES = 64
BATCH_SIZE = 8

Features = NDArray[np.float16]
Rows = list[int]
# Fills a buffer [len(rows), 30, 30, 384] with the given rows.
Gather = Callable[[Rows, Features], object]


@dataclass(frozen=True)
class Figure:
    """One line of a table: seconds a sample of every repeat, and the target for its ratio to ours."""

    name: str
    seconds: tuple[float, ...]
    target: str = ""

    @property
    def micros(self) -> float:
        """The median, in µs a sample."""
        return median(self.seconds) * 1e6


def main() -> None:
    """Measure, print the tables and write them where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=512, help="number of samples, 691 kB each (default 512)")
    parser.add_argument("--repeats", type=int, default=7, help="passes over all samples (default 7)")
    parser.add_argument(
        "--folder", type=Path, help="where to put the files: the disk to measure (default: a temporary one)"
    )
    parser.add_argument("--out", type=Path, help="write the tables as Markdown too")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="teachonce-bench-", dir=options.folder) as name:
        report = measure(Path(name), options.samples, options.repeats)
    print(report)
    if options.out is not None:
        options.out.write_text(report + "\n", encoding="utf-8")


def measure(folder: Path, samples: int, repeats: int) -> str:
    """Return the report on stores of that many samples, built below a folder."""
    load_before = os.getloadavg()[0]
    say("writing the same values in every format")
    store = build_store(folder, samples)
    make_copies(folder, store)
    say("warm reads")
    warm = read_warm(folder, store, samples, repeats)
    say("cold reads")
    cold = read_cold(folder, store, samples, max(3, repeats // 2))
    say("writes")
    written = write_shards(folder, repeats)
    load = f"load average {load_before:.1f} before, {os.getloadavg()[0]:.1f} after"
    return report_of(samples, repeats, load, warm, cold, written)


def say(what: str) -> None:
    """Tell what is being done."""
    print(f"{what} …", file=sys.stderr, flush=True)


def plan_of(samples: int) -> StorePlan:
    """Return the plan of a store of one feature teacher and one view."""
    teacher = TeacherPlan("bench", {"spec": "random numbers"}, True, np.ones(1, np.float32), {"features": SAMPLE_SHAPE})
    return StorePlan(
        sets=("2007:bench",),
        limit=None,
        samples=[SampleEntry(f"VOC2007/{row:06d}", 480, 480, f"{row:064x}") for row in range(samples)],
        teachers=[teacher],
        views=("original",),
        feature_dtype="float16",
        shard_samples=SHARD_SAMPLES,
        batch_size=None,
    )


def outputs_of(missing: MissingShard) -> dict[str, NDArray[np.float32]]:
    """Return random features [count, 30, 30, 384] for a range of samples."""
    generator = np.random.default_rng(missing.first)
    return {"features": generator.standard_normal((missing.count, *SAMPLE_SHAPE), dtype=np.float32)}


def build_store(folder: Path, samples: int) -> Path:
    """Return the path of a complete store."""
    with open_writer(folder / "store.zarr", plan_of(samples)) as writer:
        for missing in writer.missing():
            writer.commit(missing, outputs_of(missing))
    return folder / "store.zarr"


def reader_of(store: Path) -> ArrayReader:
    """Return our reader of the store's features."""
    return TeacherStore(store).array("bench", "original", "features")


def make_copies(folder: Path, store: Path) -> None:
    """Write the store's samples as one plain file, as HDF5, and as one file a sample of two kinds."""
    import h5py
    import torch

    reader = reader_of(store)
    for kind in ("npy", "pt"):
        (folder / kind).mkdir()
    with (folder / "flat").open("wb") as flat, h5py.File(folder / "samples.h5", "w") as hdf5:
        shape = (reader.layout.num_samples, *SAMPLE_SHAPE)
        dataset = hdf5.create_dataset("features", shape, "<f2", chunks=(1, *SAMPLE_SHAPE))
        for row in range(reader.layout.num_samples):
            sample = np.array(reader.read(row))
            flat.write(sample.tobytes())
            dataset[row] = sample
            np.save(folder / "npy" / f"{row}.npy", sample)
            torch.save(torch.from_numpy(sample), folder / "pt" / f"{row}.pt")
    os.sync()


def gatherers(folder: Path, store: Path, samples: int) -> Iterator[tuple[str, str, Gather]]:
    """Yield name, target and gather function of every contender; a pass makes them anew only where it says so."""
    import h5py
    import torch
    import zarr

    reader = reader_of(store)
    yield "ours", "", lambda rows, out: reader.gather(rows, out=out)
    flat = np.memmap(folder / "flat", dtype="<f2", mode="r", shape=(samples, *SAMPLE_SHAPE))
    yield "np.memmap copies (the floor)", "≥ 0.80", copying(lambda row: flat[row])
    array = zarr.open_array(store / "bench" / "original" / "features", mode="r")
    yield "zarr-python, same store", "≥ 10", copying(lambda row: array[row])
    dataset = h5py.File(folder / "samples.h5", "r")["features"]

    def gather_hdf5(rows: Rows, out: Features) -> None:
        for position, row in enumerate(rows):
            dataset.read_direct(out, np.s_[row], np.s_[position])

    yield "h5py, one-sample chunks", "≥ 2", gather_hdf5
    yield "one .pt a sample", "≥ 5", copying(lambda row: torch.load(folder / "pt" / f"{row}.pt").numpy())
    yield "one .npy a sample", "", copying(lambda row: np.load(folder / "npy" / f"{row}.npy"))


def copying(read: Callable[[int], Any]) -> Gather:
    """Return the gather function that copies what `read` returns for every row."""

    def gather(rows: Rows, out: Features) -> None:
        for position, row in enumerate(rows):
            out[position] = read(row)

    return gather


def random_batches(samples: int, seed: int) -> list[Rows]:
    """Return all rows in random order, in batches."""
    rows = np.random.default_rng(seed).permutation(samples).tolist()
    return [rows[start : start + BATCH_SIZE] for start in range(0, samples, BATCH_SIZE)]


def seconds_a_sample(gather: Gather, batches: Sequence[Rows]) -> float:
    """Return the time of gathering the batches into one reused buffer, a sample."""
    out = np.zeros((BATCH_SIZE, *SAMPLE_SHAPE), dtype="<f2")
    start = time.perf_counter()
    for rows in batches:
        gather(rows, out[: len(rows)])
    return (time.perf_counter() - start) / sum(len(rows) for rows in batches)


def read_warm(folder: Path, store: Path, samples: int, repeats: int) -> list[Figure]:
    """Return the figures of random reads from the page cache, ours first."""
    contenders = list(gatherers(folder, store, samples))
    for _, _, gather in contenders:
        seconds_a_sample(gather, random_batches(samples, 0))  # pages in the cache, checks done, modules imported
    found: dict[str, list[float]] = {name: [] for name, _, _ in contenders}
    first_touch = []
    for repeat in range(1, repeats + 1):
        batches = random_batches(samples, repeat)
        for name, _, gather in contenders:
            found[name].append(seconds_a_sample(gather, batches))
        fresh = reader_of(store)
        first_touch.append(seconds_a_sample(lambda rows, out, fresh=fresh: fresh.gather(rows, out=out), batches))  # type: ignore[misc]
    figures = [Figure(name, tuple(found[name]), target) for name, target, _ in contenders]
    return [figures[0], Figure("ours, first touch: opens, maps, checks", tuple(first_touch)), *figures[1:]]


def read_cold(folder: Path, store: Path, samples: int, repeats: int) -> list[Figure]:
    """Return the figures of reads from the disk: ours at random with prefetch, then a plain file in order."""
    shards = sorted((store / "bench/original/features").glob("c/*/0/0/0"))
    random_reads, in_order = [], []
    for repeat in range(repeats):
        batches = random_batches(samples, repeat)
        evict(shards)
        reader = reader_of(store)
        random_reads.append(seconds_a_sample(prefetching(reader, batches), batches))
        evict([folder / "flat"])
        start = time.perf_counter()
        with (folder / "flat").open("rb", buffering=0) as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
            buffer = bytearray(1 << 22)
            while file.readinto(buffer):
                pass
        in_order.append((time.perf_counter() - start) / samples)
    return [
        Figure("ours at random, 16 batches ahead", tuple(random_reads)),
        Figure("one plain file, in order", tuple(in_order), "≥ 0.80"),
    ]


def prefetching(reader: ArrayReader, batches: Sequence[Rows], ahead: int = 16) -> Gather:
    """Return a gather function that asks for batches before their turn; it must be called batch by batch."""
    upcoming = iter(batches)
    for _ in range(ahead):
        reader.prefetch(next(upcoming, []))

    def gather(rows: Rows, out: Features) -> None:
        reader.prefetch(next(upcoming, []))
        reader.gather(rows, out=out)

    return gather


def evict(paths: Sequence[Path]) -> None:
    """Drop files from the page cache."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def write_shards(folder: Path, repeats: int) -> list[Figure]:
    """Return the figures of writing whole shards, flushed: ours with checksums, plain bytes, and a full commit."""
    checked, plain, commits = [], [], []
    with open_writer(folder / "written.zarr", plan_of(SHARD_SAMPLES)) as writer:
        (missing,) = writer.missing()
        outputs = outputs_of(missing)
        values = outputs["features"].astype("<f2")
        content = values.tobytes()
        for _ in range(2 * repeats):  # a disk wavers more than memory
            checked.append(timed(lambda: write_features(writer, values)) / SHARD_SAMPLES)
            plain.append(timed(lambda: write_plain(folder / "plain", content)) / SHARD_SAMPLES)
            commits.append(timed(lambda: writer.commit(missing, outputs)) / SHARD_SAMPLES)
    shutil.rmtree(folder / "written.zarr")
    return [
        Figure("ours: crc32c, SHA-256, index, fsync", tuple(checked)),
        Figure("plain write + fsync of the same bytes", tuple(plain), "≥ 0.80"),
        Figure("commit: cast, check, moments, ledger", tuple(commits)),
    ]


def write_features(writer: StoreWriter, values: NDArray[Any]) -> LedgerEntry:
    """Write one shard of features as a commit does, without its ledger line."""
    layout = writer.catalog.teacher("bench").view("original").layouts["features"]
    return write_shard(writer.catalog.path / layout.path, layout, 0, values, ".tmp-bench")


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


def timed(work: Callable[[], object]) -> float:
    """Return the seconds that the work takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def report_of(
    samples: int, repeats: int, load: str, warm: Sequence[Figure], cold: Sequence[Figure], written: Sequence[Figure]
) -> str:
    """Return the report as Markdown that reads well on a terminal of 80 columns."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    packages = ", ".join(f"{name} {version(name)}" for name in ("numpy", "zarr", "h5py", "torch", "google-crc32c"))
    return "\n".join(
        [
            f"# Reading a feature store, {date.today().isoformat()}",
            "",
            f"{cpu_model()}, {os.cpu_count()} cores, {memory:.0f} GiB; {platform.system()}",
            load,
            f"Python {platform.python_version()}, {packages}",
            "",
            f"{samples} samples [30, 30, 384] float16, {samples * SAMPLE_BYTES / 1e6:.0f} MB, {SHARD_SAMPLES} a shard.",
            f"Medians of {repeats} passes over all samples, contenders in turn; a ratio is the",
            "line's time over ours in the same run, targets those of the design.",
            "",
            *table("Warm: random batches of 8 into one reused buffer, all in the page cache", warm),
            "",
            *table(f"Cold: page cache dropped before every pass ({len(cold[0].seconds)} passes)", cold),
            "",
            *table(f"Writing: one shard of 64 samples, flushed ({len(written[0].seconds)} times)", written),
        ]
    )


def table(title: str, figures: Sequence[Figure]) -> list[str]:
    """Return a Markdown table; the first figure is ours."""
    lines = [
        f"## {title}",
        "",
        f"| {'':38} | µs a sample | ratio | target |",
        f"|{'-' * 40}|------------:|------:|-------:|",
    ]
    for figure in figures:
        ratio = figure.micros / figures[0].micros
        lines.append(f"| {figure.name:38} | {figure.micros:11.1f} | {ratio:5.2f} | {figure.target:>6} |")
    return lines


def cpu_model() -> str:
    """Return the processor's name."""
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or "unknown processor"


if __name__ == "__main__":
    main()

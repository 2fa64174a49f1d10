"""Data loaders started again and again over the same stores, from a process that has read them before: none hangs."""

from __future__ import annotations

import multiprocessing
import subprocess
import sys
import zlib
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.cache.conftest import TinyStores

METHODS = [name for name in ("fork", "spawn", "forkserver") if name in multiprocessing.get_all_start_methods()]
# A script of its own: no other test's threads are forked, and spawned workers need not import the test suite. Where a
# worker hangs, the loader's own limit raises; where the parent does, the alarm ends it with every thread's stack.
SCRIPT = """
import faulthandler, sys, zlib
from pathlib import Path

import torch
from torch.utils.data import DataLoader, Dataset

from cache.reader import TeacherStore
from data.geometry import VIEWS

SECONDS = 120


class Checksums(Dataset):
    # Per row: by which worker it was read, and the crc32 of a sample of every array.
    def __init__(self, stores):
        self.arrays = [TeacherStore(store).array(teacher, view, name) for store in stores
                       for teacher, name in (("dino", "features"), ("clip", "logits")) for view in VIEWS]

    def __len__(self):
        return 7

    def __getitem__(self, row):
        worker = torch.utils.data.get_worker_info().id
        return [row, worker, *(zlib.crc32(array.read(row).tobytes()) for array in self.arrays)]


def main(methods, starts, *stores):
    dataset = Checksums([Path(store) for store in stores])
    said = None
    for start in range(starts):
        method = methods.split(",")[start % len(methods.split(","))]
        # The parent's own maps are open, of all shards or of some, when the workers start.
        rows = range((7 + 3 * start) % 8)
        for array in dataset.arrays:
            array.prefetch(rows)
            array.gather(rows)
        faulthandler.dump_traceback_later(SECONDS, exit=True)
        loader = DataLoader(dataset, batch_size=2, num_workers=2, multiprocessing_context=method, timeout=SECONDS / 2,
                            persistent_workers=start % 2 == 1, collate_fn=list)
        for _ in range(1 + start % 2):  # workers that persist are asked twice
            rows = [row for batch in loader for row in batch]
            assert {row[1] for row in rows} == {0, 1}, rows
            found = [[row[0], *row[2:]] for row in rows]
            assert said in (None, found), (start, said, found)
            said = found
        del loader
        faulthandler.cancel_dump_traceback_later()
    print(starts, *(number for row in said for number in row))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), *sys.argv[3:])
"""


def start_loaders(stores: TinyStores, methods: str, starts: int) -> list[int]:
    """Return what the workers of every start read of a store of each format: row and checksums, in turn."""
    script = stores.folder / "loaders.py"
    script.write_text(SCRIPT)
    paths = [stores.build(stores.plan(), "store.zarr"), stores.build(stores.plan(format="hdf5"), "store.h5")]
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, str(script), methods, str(starts), *map(str, paths)],
        capture_output=True, text=True, timeout=60 + 60 * starts,
        env={"PYTHONPATH": str(root), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    number, *said = map(int, done.stdout.split())
    assert number == starts
    return said


def expected(stores: TinyStores) -> list[int]:
    numbers = []
    for row in range(7):
        each = [
            zlib.crc32(stores.values(teacher, view, name, [row]).astype(dtype).tobytes())
            for teacher, name, dtype in (("dino", "features", "<f2"), ("clip", "logits", "<f4"))
            for view in ("original", "hflip")
        ]
        numbers += [row, *each, *each]
    return numbers


def test_a_loader_starts_by_each_method_and_its_workers_read_what_was_stored(stores: TinyStores) -> None:
    assert start_loaders(stores, ",".join(METHODS), len(METHODS)) == expected(stores)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_twenty_loaders_start_one_after_another(stores: TinyStores, method: str) -> None:
    assert start_loaders(stores, method, 20) == expected(stores)

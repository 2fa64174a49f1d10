"""Readers in other processes, as a data loader's workers use them."""

from __future__ import annotations

import hashlib
import multiprocessing
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

if TYPE_CHECKING:
    from tests.cache.conftest import TinyStores

# A script of its own: no other test's threads are forked, and spawned workers need not import the test suite.
SCRIPT = """
import hashlib, multiprocessing, sys
from pathlib import Path
from cache.reader import TeacherStore
from data.geometry import VIEWS

ROWS = [6, 0, 3, 5]

def work(readers, queue, rows):
    samples = [readers[VIEWS[row % 2]].gather([row]) for row in rows]
    queue.put(hashlib.sha256(b"".join(sample.tobytes() for sample in samples)).hexdigest())

if __name__ == "__main__":
    context = multiprocessing.get_context(sys.argv[2])
    store = TeacherStore(Path(sys.argv[1]))
    readers = {view: store.array("dino", view, "features") for view in VIEWS}
    for touched_before in (False, True):  # maps that are open in the parent must serve its children too
        queue = context.Queue()
        workers = [context.Process(target=work, args=(readers, queue, ROWS)) for _ in range(2)]
        for worker in workers:
            worker.start()
        said = [queue.get(timeout=60) for _ in workers]
        for worker in workers:
            worker.join()
            assert worker.exitcode == 0
        work(readers, queue, ROWS)
        assert {*said, queue.get(timeout=60)} == {said[0]}
    print(said[0])
"""


@pytest.mark.parametrize(
    "method", sorted({"fork", "spawn", "forkserver"} & set(multiprocessing.get_all_start_methods()))
)
def test_workers_read_what_the_parent_reads(whole_store: Path, stores: TinyStores, tmp_path: Path, method: str) -> None:
    script = tmp_path / "workers.py"
    script.write_text(SCRIPT)
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-W", "error", str(script), str(whole_store), method],
        capture_output=True, text=True, timeout=120, env={"PYTHONPATH": str(root), "PATH": "/usr/bin"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    views = ["original", "hflip"]
    expected = [stores.values("dino", views[row % 2], "features", [row])[0] for row in (6, 0, 3, 5)]
    assert done.stdout.strip() == hashlib.sha256(np.stack(expected).astype("<f2").tobytes()).hexdigest()

"""What fits into memory, what is read into it, and that none of it is a copy."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

import cache.file_map
from cache.file_map import FileMap
from cache.reader import TeacherStore
from cache.residency import available_memory, populate, refuse_too_large, shard_bytes
from cache.selection import Selection
from data.errors import StoreCorruptError, UsageError
from data.geometry import VIEWS

if TYPE_CHECKING:
    from tests.cache.conftest import TinyStores

ROOT = Path(__file__).parents[2]
MEMINFO = "MemTotal:       32000 kB\nMemFree:         1000 kB\nMemAvailable:   20000 kB\n"
FREE = 20_000 * 1024


def write(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


class TestAvailableMemory:
    @pytest.mark.parametrize(
        ("files", "expected"),
        [
            ({}, None),
            ({"proc/meminfo": MEMINFO}, FREE),
            ({"proc/meminfo": "MemTotal: 32000 kB\n"}, None),
            ({"proc/meminfo": MEMINFO, "proc/self/cgroup": "0::/run/job\n"}, FREE),
            (
                {"proc/self/cgroup": "0::/\n", "cg/memory.max": "max\n", "proc/meminfo": MEMINFO},
                FREE,
            ),
            (  # in a container: its own group is all it sees
                {"proc/self/cgroup": "0::/\n", "cg/memory.max": "5000000\n", "proc/meminfo": MEMINFO},
                5_000_000,
            ),
            (  # what is used counts, but for pages of files
                {
                    "proc/self/cgroup": "0::/run/job\n",
                    "cg/run/job/memory.max": "9000000\n",
                    "cg/run/job/memory.current": "6000000\n",
                    "cg/run/job/memory.stat": "anon 2500000\nactive_file 1000000\ninactive_file 2000000\n",
                    "proc/meminfo": MEMINFO,
                },
                6_000_000,
            ),
            (  # a group above has less
                {
                    "proc/self/cgroup": "0::/run/job\n",
                    "cg/run/job/memory.max": "9000000\n",
                    "cg/run/memory.max": "8000000\n",
                    "cg/run/memory.current": "7000000\n",
                    "proc/meminfo": MEMINFO,
                },
                1_000_000,
            ),
            (  # version 1, which counts a group's children as `total_`
                {
                    "proc/self/cgroup": "5:cpu,cpuacct:/job\n4:memory:/job\n0::/\n",
                    "cg/memory/memory.limit_in_bytes": "9223372036854771712\n",
                    "cg/memory/job/memory.limit_in_bytes": "4000000\n",
                    "cg/memory/job/memory.usage_in_bytes": "3000000\n",
                    "cg/memory/job/memory.stat": "active_file 1\ntotal_active_file 500000\ntotal_inactive_file 0\n",
                    "proc/meminfo": MEMINFO,
                },
                1_500_000,
            ),
            (  # more in use than allowed
                {
                    "proc/self/cgroup": "0::/\n",
                    "cg/memory.max": "1000\n",
                    "cg/memory.current": "2000\n",
                    "proc/meminfo": MEMINFO,
                },
                0,
            ),
            ({"proc/self/cgroup": "0::/\n", "cg/memory.max": "77\n"}, 77),
        ],
        ids=[
            "nothing is known", "the kernel's word", "an old kernel", "a group without files", "a group without limit",
            "a container", "a group in use", "a group above", "version 1", "over the limit", "a limit alone",
        ],
    )  # fmt: skip
    def test_it_is_the_least_of_what_the_kernel_and_the_groups_leave(
        self, tmp_path: Path, files: dict[str, str], expected: int | None
    ) -> None:
        write(tmp_path, files)
        assert available_memory(tmp_path / "proc", tmp_path / "cg") == expected

    @pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="Linux only")
    def test_here_it_is_no_more_than_there_is(self) -> None:
        found = available_memory()
        assert found is not None
        assert 0 < found <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")

    @pytest.mark.parametrize(("needed", "available"), [(10, 10), (10, None), (0, 0)])
    def test_what_fits_or_may_fit_is_let_through(self, needed: int, available: int | None) -> None:
        refuse_too_large("ram", needed, available)

    def test_what_does_not_fit_is_refused_with_both_sizes(self) -> None:
        message = r"--residency ram: the targets of this run take 11\.44 GB, and 900\.0 MB are free\n  next: .*mmap"
        with pytest.raises(UsageError, match=message):
            refuse_too_large("ram", 11_440_000_000, 900_000_000)


class TestPopulate:
    def selection(self, store: Path, rows: list[int]) -> Selection:
        return Selection([TeacherStore(store)], [f"VOC2007/{row + 1:06d}" for row in rows])

    def test_every_shard_of_the_run_is_read_and_no_other(self, whole_store: Path) -> None:
        arrays = self.selection(whole_store, [6, 0]).arrays("dino", "features", VIEWS).values()
        sizes = [
            (whole_store / f"dino/{view}/features/c/{shard}/0/0/0").stat().st_size for view in VIEWS for shard in (0, 2)
        ]
        told: list[int] = []
        populate(arrays, told.append)
        assert told == sizes
        assert shard_bytes(arrays) == sum(sizes)

    @pytest.mark.parametrize("known", [True, False], ids=["the kernel populates", "every page is touched"])
    def test_pages_are_in_the_page_table_afterwards(
        self, tmp_path: Path, known: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        size = 64 * os.sysconf("SC_PAGE_SIZE")
        path = tmp_path / "file"
        path.write_bytes(bytes(range(256)) * (size // 256))
        if not known:
            monkeypatch.setattr(cache.file_map, "_MADV_POPULATE_READ", 9999)
        with path.open("rb") as file:
            mapped = FileMap(file.fileno(), 100, size - 200)
        assert _resident(path) in (0, None)
        mapped.populate()
        assert _resident(path) in (size // 1024, None)
        assert np.asarray(mapped)[:4].tolist() == [100, 101, 102, 103]

    def test_a_file_that_was_cut_off_meanwhile_is_told(self, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        selection = self.selection(store, [0])
        arrays = selection.arrays("dino", "features", ["original"])
        os.truncate(store / "dino/original/features/c/0/0/0/0", 0)
        with pytest.raises(StoreCorruptError, match="expected"):
            populate(arrays.values())

    def test_advice_that_the_kernel_refuses_is_an_error(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "file").write_bytes(bytes(100))
        with (tmp_path / "file").open("rb") as file:
            mapped = FileMap(file.fileno(), 0, 100)

        def fail(*_: object) -> int:
            cache.file_map.ctypes.set_errno(errno.EIO)
            return -1

        monkeypatch.setattr(cache.file_map, "_MADVISE", fail)
        with pytest.raises(OSError, match="Input/output error"):
            mapped.populate()


def _resident(path: Path) -> int | None:
    """Return the kilobytes of a file in this process's page table, None where the system does not say."""
    try:
        lines = Path("/proc/self/smaps").read_text().splitlines()
    except OSError:
        return None
    start = next(number for number, line in enumerate(lines) if line.endswith(str(path)))
    return next(int(line.split()[1]) for line in lines[start:] if line.startswith("Rss:"))


SCRIPT = """
import json, sys
from pathlib import Path
import numpy as np
from cache.reader import TeacherStore
from cache.residency import populate
from cache.selection import Selection

def kilobytes(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))

store, residency, count = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
selection = Selection([TeacherStore(store)], [f"VOC2007/{n:06d}" for n in range(1, count + 1)])
array = selection.arrays("dino", "features", ["original"])["features"]
out = np.ones((8, *array.sample_shape), dtype=array.dtype)
array.gather(range(8), ["original"] * 8, out=out)
before = kilobytes("RssAnon"), kilobytes("RssFile")
if residency == "ram":
    populate([array])
populated = kilobytes("RssFile")
for start in range(0, count, 8):
    rows = range(start, min(start + 8, count))
    array.gather(rows, ["original"] * len(rows), out=out[: len(rows)])
print(json.dumps({"anonymous": kilobytes("RssAnon") - before[0], "populated": populated - before[1],
                  "file": kilobytes("RssFile") - before[1]}))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux only")
@pytest.mark.parametrize("residency", ["mmap", "ram"])
def test_no_target_is_copied_to_memory_of_the_process_own(
    stores: TinyStores, tmp_path: Path, residency: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Thirty megabytes are read, and the process has no more memory of its own than before."""
    shape, count = (32, 32, 64), 240
    values = np.random.default_rng(0).normal(size=shape).astype("f4")
    monkeypatch.setattr(stores, "outputs", lambda missing: {"features": np.stack([values] * missing.count)})
    teacher = stores.teacher("dino", outputs={"features": shape})
    store = stores.build(stores.plan(count, teachers=[teacher], views=["original"], shard_samples=40))
    script = tmp_path / "read.py"
    script.write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, str(script), str(store), residency, str(count)],
        capture_output=True, text=True, timeout=120, env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin"}, check=True,
    )  # fmt: skip
    found = json.loads(done.stdout)
    total = count * 32 * 32 * 64 * 2 // 1024
    assert found["file"] > 0.8 * total
    assert (found["populated"] > 0.8 * total) == (residency == "ram")
    assert found["anonymous"] < 0.05 * total

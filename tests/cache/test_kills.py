"""Writers that die by SIGKILL, resumed: the finished store is byte for byte that of an uninterrupted run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

# A process of its own, without threads, that forks one writer after another and kills it: at its n-th step that
# changes a file or a folder (the write among these is done by half), or from outside after a random time.
SCRIPT = """
import os, random, runpy, shutil, signal, sys, time
from pathlib import Path

conftest = runpy.run_path(sys.argv[1])
stores, tree = conftest["TinyStores"](Path(sys.argv[2])), conftest["tree"]
mode, kills, seed = sys.argv[3], int(sys.argv[4]), int(sys.argv[5])
CALLS = ("open", "write", "writev", "fsync", "rename", "mkdir", "unlink", "rmdir")


def build(name):
    # A store, a view more, a teacher more.
    stores.build(stores.plan(4, teachers=["dino"], views=["original"]), name)
    stores.build(stores.plan(4), name)


def count_steps(last, steps):
    for call in CALLS:
        def stepping(*args, real=getattr(os, call), call=call, **options):
            if call != "open" or args[1] & os.O_CREAT:
                steps[0] += 1
                if steps[0] == last:
                    if call == "write":
                        real(args[0], args[1][: len(args[1]) // 2])
                    if call == "writev":
                        whole = b"".join(args[1])
                        os.write(args[0], whole[: len(whole) // 2])
                    os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **options)
        setattr(os, call, stepping)


def forked(work, kill_after=None):
    # Whether the forked process was killed.
    child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException:
            sys.excepthook(*sys.exc_info())
            os._exit(1)
        os._exit(0)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    assert status in (0, signal.SIGKILL), status
    return status == signal.SIGKILL


def counted(last, steps):
    count_steps(last, steps)
    build("store.zarr")


start = time.monotonic()
forked(lambda: build("whole.zarr"))
seconds = time.monotonic() - start
whole = tree(stores.folder / "whole.zarr")
reading, writing = os.pipe()


def total():
    steps = [0]
    count_steps(-1, steps)
    build("counted.zarr")
    os.write(writing, str(steps[0]).encode())


forked(total)
num_steps = int(os.read(reading, 20))
generator = random.Random(seed)
steps = range(1, num_steps + 1) if mode == "every" else generator.sample(range(1, num_steps + 1), kills)
killed = 0
for number in range(kills) if mode == "time" else steps:
    if mode == "time":
        killed += forked(lambda: build("store.zarr"), generator.uniform(0, seconds))
    else:
        killed += forked(lambda: counted(number, [0]))
        if number % 3 == 0:  # once more, while it resumes
            forked(lambda: counted(generator.randrange(1, 60), [0]))
    assert not forked(lambda: build("store.zarr"))
    assert tree(stores.folder / "store.zarr") == whole, number
    left = sorted(path.name for path in stores.folder.iterdir())
    assert left == sorted(["counted.zarr", "counted.zarr.lock", "store.zarr", "store.zarr.lock",
                           "whole.zarr", "whole.zarr.lock"]), left
    os.rename(stores.folder / "store.zarr", stores.folder / "done")
    shutil.rmtree(stores.folder / "done")
print(killed, num_steps)
"""


def kill_writers(folder: Path, mode: str, kills: int, seed: int) -> tuple[int, int]:
    """Return how many writers were killed, and how many steps an uninterrupted one takes."""
    conftest = Path(__file__).with_name("conftest.py")
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(conftest), str(folder), mode, str(kills), str(seed)],
        capture_output=True,
        text=True,
        cwd=conftest.parents[2],
    )
    assert done.returncode == 0, done.stderr
    killed, steps = done.stdout.split()
    return int(killed), int(steps)


@pytest.mark.parametrize(("mode", "kills"), [("step", 20), ("time", 10)])
def test_killed_writers_are_resumed(tmp_path: Path, mode: str, kills: int) -> None:
    killed, steps = kill_writers(tmp_path, mode, kills, seed=0)
    assert killed == 20 or (mode == "time" and killed > 0)
    assert steps > 200


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "kills"), [("every", 0), ("time", 200)])
def test_writers_killed_at_every_step_or_at_many_times_are_resumed(tmp_path: Path, mode: str, kills: int) -> None:
    killed, steps = kill_writers(tmp_path, mode, kills, seed=1)
    assert killed == steps or (mode == "time" and killed > 100)

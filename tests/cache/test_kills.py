"""Writers that die by SIGKILL, resumed: the finished store is byte for byte that of an uninterrupted run."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cache.killing import run_killing

SCRIPT = """
container = runpy.run_path(str(Path(sys.argv[1]).with_name("test_store_contract.py")))["CONTAINERS"][sys.argv[3]]
mode, kills, seed = sys.argv[4], int(sys.argv[5]), int(sys.argv[6])
from cache.writer import open_writer
import h5py  # before the clock starts; its files are opened and closed in the forked writers alone


def write(name, plan):
    with open_writer(stores.folder / (name + container.suffix), plan) as writer:
        stores.fill(writer)
        writer.note_provenance("dino", "original", {"device": "cpu"})


def build(name):
    if container.format == "zarr":  # a view more, a teacher more; an HDF5 file takes neither
        write(name, stores.plan(4, teachers=["dino"], views=["original"]))
    write(name, stores.plan(4, format=container.format))


start = time.monotonic()
assert not forked(lambda: build("whole"))
seconds = time.monotonic() - start
whole = list(container.content(stores.folder / ("whole" + container.suffix)).values())
num_steps = number_of_steps(lambda: build("counted"))
generator = random.Random(seed)
steps = range(1, num_steps + 1) if mode == "every" else generator.sample(range(1, num_steps + 1), min(kills, num_steps))
killed, store = 0, stores.folder / ("store" + container.suffix)
for number in range(kills) if mode == "time" else steps:
    if mode == "time":
        killed += forked(lambda: build("store"), kill_after=generator.uniform(0, seconds))
    else:
        killed += forked(lambda: build("store"), last=number)
        if number % 3 == 0:  # once more, while it resumes
            forked(lambda: build("store"), last=generator.randrange(1, 60))
    assert not forked(lambda: build("store"))
    assert list(container.content(store).values()) == whole, number
    left = sorted(path.name for path in stores.folder.iterdir())
    names = [name + container.suffix for name in ("counted", "store", "whole")]
    assert left == sorted(names + [name + ".lock" for name in names]), left
    shutil.rmtree(store) if store.is_dir() else store.unlink()
print(killed, num_steps)
"""


@pytest.mark.parametrize("container", ["zarr", "hdf5"])
@pytest.mark.parametrize(("mode", "kills"), [("step", 10), ("time", 5)])
def test_killed_writers_are_resumed(tmp_path: Path, container: str, mode: str, kills: int) -> None:
    killed, steps = run_killing(tmp_path, SCRIPT, container, mode, kills, 0)
    assert killed == 10 or (mode == "time" and killed > 0)
    assert steps > {"zarr": 200, "hdf5": 60}[container]


@pytest.mark.slow
@pytest.mark.parametrize("container", ["zarr", "hdf5"])
@pytest.mark.parametrize(("mode", "kills"), [("every", 0), ("time", 200)])
def test_writers_killed_at_every_step_or_at_many_times_are_resumed(
    tmp_path: Path, container: str, mode: str, kills: int
) -> None:
    killed, steps = run_killing(tmp_path, SCRIPT, container, mode, kills, 1)
    assert killed == steps or (mode == "time" and killed > 100)

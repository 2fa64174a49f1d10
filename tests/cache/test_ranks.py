"""Two processes that write one store together, and what is left when one of them dies."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

# A process of its own, without threads, that forks the ranks; they talk through a pair of sockets.
SCRIPT = """
import json, os, pickle, random, runpy, shutil, signal, socket, struct, sys, time
from pathlib import Path

from cache.writer import open_writer
from data.errors import TeachOnceError

conftest = runpy.run_path(sys.argv[1])
stores, tree = conftest["TinyStores"](Path(sys.argv[2])), conftest["tree"]
PLAN = stores.plan(12, teachers=["dino", "clip"])


class SocketRanks:
    # Rank r of two; both send before they receive, so neither waits for the other in vain.
    size = 2

    def __init__(self, rank, link):
        self.rank, self.link = rank, link

    def exchange(self, value):
        data = pickle.dumps(value)
        self.link.sendall(struct.pack("<Q", len(data)) + data)
        other = pickle.loads(self.receive(struct.unpack("<Q", self.receive(8))[0]))
        return [value, other] if self.rank == 0 else [other, value]

    def receive(self, count):
        data = b""
        while len(data) < count:
            more = self.link.recv(count - len(data))
            if not more:
                raise TeachOnceError("the other rank is gone")
            data += more
        return data


def write(rank, link, name, fails=None, shares=None):
    with open_writer(stores.folder / name, PLAN, ranks=SocketRanks(rank, link)) as writer:
        mine = writer.missing()
        if shares is not None:
            shares.send(pickle.dumps((rank, [(m.teacher, m.view, m.shard) for m in mine])))
        for number, missing in enumerate(mine):
            if (rank, number) == fails:
                raise TeachOnceError("this rank has had enough")
            writer.commit(missing, stores.outputs(missing))


def fork_rank(rank, link, name, other_link, **options):
    child = os.fork()
    if child:
        return child
    other_link.close()
    try:
        write(rank, link, name, **options)
    except TeachOnceError as error:
        sys.stderr.write(f"rank {rank}: {error}\\n")
        os._exit(error.exit_code)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        os._exit(99)
    os._exit(0)


def start(name, **options):
    a, b = socket.socketpair()
    children = [fork_rank(0, a, name, b, **options), fork_rank(1, b, name, a, **options)]
    a.close(), b.close()
    return children


def wait(children):
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def one_process(name):
    stores.build(PLAN, name)
    return tree(stores.folder / name)
"""

SHARES = """
ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
assert wait(start("two.zarr", shares=theirs)) == [0, 0]
shares = dict(pickle.loads(ours.recv(1 << 20)) for _ in range(2))
assert tree(stores.folder / "two.zarr") == one_process("one.zarr")
print(json.dumps([shares[0], shares[1]]))
"""

FAILURE = """
said = wait(start("two.zarr", fails=(1, 1)))
left = sorted(path.name for path in stores.folder.glob("two.zarr/*/*/*/ledger*"))
assert wait(start("two.zarr")) == [0, 0]
assert tree(stores.folder / "two.zarr") == one_process("one.zarr")
print(json.dumps([said, left]))
"""

LOCKED = """
with open_writer(stores.folder / "two.zarr", PLAN):
    said = wait(start("two.zarr"))
print(json.dumps(said))
"""

KILLS = """
kills, seed = int(sys.argv[3]), int(sys.argv[4])
whole, generator, killed = one_process("one.zarr"), random.Random(seed), [0, 0]
begun = time.monotonic()
wait(start("timed.zarr"))
seconds = time.monotonic() - begun
while sum(killed) < kills:
    orphans = []
    for _ in range(3):  # killed, killed while it resumes, and once more
        children = start("store.zarr")
        time.sleep(generator.uniform(0, seconds))
        for rank in generator.choice([[0], [1], [0, 1]]):
            os.kill(children[rank], signal.SIGKILL)
        orphans += children  # whoever was not killed goes on beside the next two
    codes = [os.waitstatus_to_exitcode(status) for status in (os.waitpid(c, 0)[1] for c in orphans)]
    assert set(codes) <= {0, 1, -signal.SIGKILL}, codes
    for place, code in enumerate(codes):
        killed[place % 2] += code == -signal.SIGKILL
    for _ in range(2):  # an orphan may have been writing when the first began
        last = wait(start("store.zarr"))
    assert last == [0, 0], last
    assert tree(stores.folder / "store.zarr") == whole
    left = sorted(p.name for p in stores.folder.iterdir() if p.name.startswith("store"))
    assert left == ["store.zarr", "store.zarr.lock"], left
    shutil.rmtree(stores.folder / "store.zarr")
print(json.dumps(killed))
"""


def run(folder: Path, script: str, *arguments: object) -> tuple[object, str]:
    """What the script printed, parsed, and what the ranks said."""
    conftest = Path(__file__).with_name("conftest.py")
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT + script, str(conftest), str(folder), *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=conftest.parents[2],
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), done.stderr


def test_two_ranks_write_disjoint_shards_of_the_store_that_one_would_write(tmp_path: Path) -> None:
    shares, _ = run(tmp_path, SHARES)
    first, second = ({tuple(missing) for missing in share} for share in shares)  # type: ignore[attr-defined]
    ranges = [{shard for _, _, shard in share} for share in (first, second)]
    # By ranges of images, so that each image is decoded by one rank only.
    assert ranges == [{0, 2}, {1, 3}]
    assert len(first) == len(second) == 8


def test_a_rank_that_fails_fails_the_others_and_the_store_resumes(tmp_path: Path) -> None:
    (codes, ledgers), said = run(tmp_path, FAILURE)  # type: ignore[misc]
    assert codes == [1, 1]
    assert "rank 0: " in said
    assert "rank 1: TeachOnceError: this rank has had enough" in said
    assert set(ledgers) == {"ledger.jsonl"}  # what all ranks committed is merged all the same


def test_a_store_that_another_process_writes_is_refused_on_every_rank(tmp_path: Path) -> None:
    codes, said = run(tmp_path, LOCKED)
    assert codes == [1, 1]
    assert said.count("another process is writing this store (pid") == 2


def test_ranks_killed_at_random_leave_a_store_that_resumes(tmp_path: Path) -> None:
    killed, _ = run(tmp_path, KILLS, 12, 0)
    assert min(killed) > 0  # type: ignore[call-overload]


@pytest.mark.slow
def test_many_killed_ranks_leave_a_store_that_resumes(tmp_path: Path) -> None:
    killed, _ = run(tmp_path, KILLS, 200, 1)
    assert sum(killed) >= 200  # type: ignore[call-overload]

"""What scripts that kill writers have in common.

Each runs in a process of its own, without threads, that forks one writer after another and kills it: at its n-th step
that changes a file or a folder (a write among these is done by half), or from outside after some time.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

_PRELUDE = """
import os, random, runpy, shutil, signal, sys, time
from pathlib import Path

stores = runpy.run_path(sys.argv[1])["TinyStores"](Path(sys.argv[2]))
CALLS = ("open", "write", "writev", "pwrite", "fsync", "rename", "mkdir", "unlink", "rmdir")


def count_steps(last, steps):
    write = os.write
    for call in CALLS:
        def stepping(*args, real=getattr(os, call), call=call, **options):
            if call != "open" or args[1] & os.O_CREAT:
                steps[0] += 1
                if steps[0] == last:
                    if call in ("write", "pwrite"):
                        real(args[0], args[1][: len(args[1]) // 2], *args[2:])
                    elif call == "writev":
                        whole = b"".join(args[1])
                        write(args[0], whole[: len(whole) // 2])
                    os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **options)
        setattr(os, call, stepping)


def forked(work, kill_after=None, last=None):
    # Whether the forked process was killed: after some time, or at its step `last`.
    child = os.fork()
    if child == 0:
        try:
            if last is not None:
                count_steps(last, [0])
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


def number_of_steps(work):
    reading, writing = os.pipe()

    def counted():
        steps, write = [0], os.write
        count_steps(-1, steps)
        work()
        write(writing, str(steps[0]).encode())

    assert not forked(counted)
    return int(os.read(reading, 20))
"""


def run_killing(folder: Path, script: str, *arguments: object) -> list[int]:
    """Return the numbers that a script printed; it finds `stores` in the folder, its arguments from argv[3] on."""
    conftest = Path(__file__).with_name("conftest.py")
    done = subprocess.run(
        [sys.executable, "-c", _PRELUDE + script, str(conftest), str(folder), *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=conftest.parents[2],
    )
    assert done.returncode == 0, done.stderr
    return [int(word) for word in done.stdout.split()]

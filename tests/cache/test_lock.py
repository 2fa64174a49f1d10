from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cache.lock import exclusive
from data.errors import StoreLockedError, StoreWriteError

HOLD = """
import sys, time
from pathlib import Path
from cache.lock import exclusive
with exclusive(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the lock of `store.zarr`."""
    root = Path(__file__).parents[2]
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "store.zarr")], stdout=subprocess.PIPE, text=True, cwd=root
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_a_second_writer_is_refused_with_pid_and_host_and_gets_in_after_a_sigkill(
    tmp_path: Path, holder: subprocess.Popen[str]
) -> None:
    store = tmp_path / "store.zarr"
    with pytest.raises(StoreLockedError) as caught, exclusive(store):
        pass
    assert f"(pid {holder.pid} on {socket.gethostname()}, since 2" in caught.value.message
    assert caught.value.exit_code == 1
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with exclusive(store):
        assert json.loads((tmp_path / "store.zarr.lock.json").read_text())["pid"] == os.getpid()


def test_the_lock_is_freed_and_its_note_removed_when_the_block_fails(tmp_path: Path) -> None:
    store = tmp_path / "store.zarr"
    with pytest.raises(KeyError), exclusive(store):
        raise KeyError
    assert [path.name for path in tmp_path.iterdir()] == ["store.zarr.lock"]
    with exclusive(store):
        pass


def test_a_lock_held_by_the_same_process_is_refused_too(tmp_path: Path) -> None:
    store = tmp_path / "store.zarr"
    with exclusive(store), pytest.raises(StoreLockedError, match=f"pid {os.getpid()}"), exclusive(store):
        pass


def test_a_note_that_cannot_be_read_leaves_the_refusal(tmp_path: Path) -> None:
    store = tmp_path / "store.zarr"
    with exclusive(store):
        (tmp_path / "store.zarr.lock.json").write_text("[]")
        with pytest.raises(StoreLockedError) as caught, exclusive(store):
            pass
    assert caught.value.message == f"{store}: another process is writing this store"


def test_a_parent_that_is_a_file_is_a_write_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StoreWriteError, match="cannot write"), exclusive(tmp_path / "file" / "store.zarr"):
        pass

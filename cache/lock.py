"""One writer a store: a file lock beside it, and a readable note on who holds it."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

from filelock import FileLock, Timeout

from cache.files import make_folders, writing
from data.errors import StoreLockedError


@contextmanager
def exclusive(store: Path) -> Iterator[None]:
    """Hold the store's writer lock for the block; it is freed at once when the process dies, however it dies.

    Raises StoreLockedError, at once, with the holder's pid and host; StoreWriteError where no lock file can be made.
    """
    holder = store.with_name(f"{store.name}.lock.json")
    lock = FileLock(store.with_name(f"{store.name}.lock"))
    with writing(f"{store}.lock"):
        make_folders(store.parent)
        _acquire(lock, store, holder)
    try:
        with writing(str(holder)):
            holder.write_text(_note(), encoding="utf-8")
        yield
    except BaseException:
        with suppress(OSError):  # what went wrong first is what counts
            holder.unlink(missing_ok=True)
        raise
    else:
        with writing(str(holder)):
            holder.unlink(missing_ok=True)
    finally:
        lock.release()


def _acquire(lock: FileLock, store: Path, holder: Path) -> None:
    try:
        lock.acquire(timeout=0)
    except Timeout:  # an OSError too, so it must not reach `writing`
        raise StoreLockedError(
            f"{store}: another process is writing this store{_who(holder)}",
            hint="wait until it ends, or end it; then run the same command again",
        ) from None


def _note() -> str:
    start = datetime.now(UTC).isoformat(timespec="seconds")
    return json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "start": start})


def _who(holder: Path) -> str:
    try:
        found = json.loads(holder.read_text(encoding="utf-8"))
        return f" (pid {found['pid']} on {found['host']}, since {found['start']})"
    except (OSError, ValueError, KeyError, TypeError):
        return ""

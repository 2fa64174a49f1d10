"""Durable writing and distrustful reading of the store's files."""

from __future__ import annotations

import errno
import json
import os
import stat
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from cache.canonical import Json
from data.errors import StoreCorruptError, StoreError, StoreWriteError

# Metadata files are small; a larger one is not ours and would only cost memory.
_MAX_METADATA_BYTES = 1 << 30
# What one call writes; of pieces it may take 1,024 at most (IOV_MAX).
_BYTES_AT_ONCE = 16 << 20
_PIECES_AT_ONCE = 512


def open_regular(folder: Path, name: str) -> int:
    """Return a read-only descriptor of a regular file; a link, a pipe or a device is refused, and never waited for.

    folder: trusted.  name: the file's path below it; no part of that may be a link, so nothing outside is reached.

    Raises FileNotFoundError where there is no such file, StoreCorruptError for anything but a regular one, StoreError
    where the system refuses to open it.
    """
    path = folder / name
    *folders, last = name.split("/")
    if ".." in folders:
        raise StoreCorruptError(f"{path}: expected a regular file inside {folder}, found a way out of it")
    try:
        with _opened_folder(folder, folders) as parent:
            descriptor = os.open(last, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=parent)
    except OSError as error:
        if any(part.is_symlink() for part in (path, *path.parents) if part != folder and part.is_relative_to(folder)):
            raise StoreCorruptError(f"{path}: expected a regular file inside {folder}, found a symbolic link") from None
        if isinstance(error, FileNotFoundError | NotADirectoryError):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path)) from None
        raise StoreError(f"{path}: cannot be opened: {error.strerror}") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise StoreCorruptError(f"{path}: expected a regular file, found something else")
    return descriptor


@contextmanager
def _opened_folder(folder: Path, below: Sequence[str]) -> Iterator[int]:
    """Open the folder that the given parts lead to, following no link below the first: quicker than resolving the
    path, and nobody can put a link in between.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for part in below:
            flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
            deeper = os.open(part, flags, dir_fd=descriptor)
            os.close(descriptor)
            descriptor = deeper
        yield descriptor
    finally:
        os.close(descriptor)


def read_regular(folder: Path, name: str) -> bytes:
    """Return the bytes of a regular file that is not a shard.

    Raises as `open_regular`, and StoreCorruptError where the file is far larger than any of ours.
    """
    with os.fdopen(open_regular(folder, name), "rb") as file:
        if os.fstat(file.fileno()).st_size > _MAX_METADATA_BYTES:
            raise StoreCorruptError(f"{folder / name}: far larger than this file can be")
        return file.read()


def read_json(folder: Path, name: str) -> Json:
    """Return the parsed JSON of a regular file.

    Raises StoreCorruptError where it is missing or not JSON, else as `read_regular`.
    """
    try:
        return json.loads(read_regular(folder, name))
    except FileNotFoundError:
        raise StoreCorruptError(f"{folder / name}: missing") from None
    except (ValueError, RecursionError) as error:
        raise StoreCorruptError(f"{folder / name}: not JSON ({error})") from error


def sync_file(descriptor: int) -> None:
    """Flush a file to the disk itself. A failure is fatal: the kernel may have dropped the pages, so never retry."""
    if sys.platform == "darwin":
        import fcntl

        fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)
    else:
        os.fsync(descriptor)


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries, so that a name created or renamed in it outlives a power cut."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_new(path: Path, data: bytes) -> None:
    """Write a new file and flush it; an existing one is refused with FileExistsError."""
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644), "wb") as file:
        file.write(data)
        file.flush()
        sync_file(file.fileno())


def in_large_writes(pieces: Iterable[memoryview | bytes]) -> Iterator[list[memoryview]]:
    """Yield the pieces in groups that are written at once, of about 16 MB.

    The kernel then keeps the file in large pages: random reads of one shard took 76 µs a sample of 691 kB, and 95 to
    106 µs where every sample had been written by itself.
    """
    group: list[memoryview] = []
    for piece in pieces:
        group.append(memoryview(piece))
        if len(group) == _PIECES_AT_ONCE or sum(part.nbytes for part in group) >= _BYTES_AT_ONCE:
            yield group
            group = []
    if group:
        yield group


def write_all(descriptor: int, group: list[memoryview]) -> None:
    """Write a group of pieces at the descriptor's place, going on after short writes."""
    left = list(group)
    while left:
        written = os.writev(descriptor, left)
        if written == 0:
            raise OSError(errno.EIO, "nothing was written")
        while left and written >= left[0].nbytes:
            written -= left.pop(0).nbytes
        if left:
            left[0] = left[0][written:]


def append_line(path: Path, line: bytes) -> None:
    """Append one line by a single write and flush it; the folder too where the file is new.

    What an earlier call left of a line that the disk refused goes first, or it would spoil the new one.
    """
    created = not path.exists()
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    try:
        _cut_to_whole_lines(descriptor)
        if os.write(descriptor, line) != len(line):
            raise OSError(errno.ENOSPC, "a line was written only in part", str(path))
        sync_file(descriptor)
    finally:
        os.close(descriptor)
    if created:
        sync_folder(path.parent)


def _cut_to_whole_lines(descriptor: int) -> None:
    size = os.fstat(descriptor).st_size
    if size and os.pread(descriptor, 1, size - 1) != b"\n":
        os.ftruncate(descriptor, os.pread(descriptor, size, 0).rfind(b"\n") + 1)


def make_folders(folder: Path) -> None:
    """Make a folder and those above it that are missing; each name is flushed, so that it outlives a power cut."""
    missing = []
    while not folder.is_dir():
        missing.append(folder)
        folder = folder.parent
    for new in reversed(missing):
        new.mkdir(exist_ok=True)
        sync_folder(new.parent)


@contextmanager
def writing(what: str) -> Iterator[None]:
    """Turn an OSError of the block into a StoreWriteError that says what was being written and what to do."""
    hints = {
        errno.ENOSPC: "free some space and run the same command again: it resumes",
        errno.EDQUOT: "free some of your quota and run the same command again: it resumes",
        errno.EACCES: "check the owner and the permissions of the folder, or give another --out",
        errno.EPERM: "check the owner and the permissions of the folder, or give another --out",
        errno.EROFS: "the file system is read-only: give another --out",
    }
    try:
        yield
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        hint = hints.get(error.errno or 0, "what was committed is intact: run the same command again to resume")
        raise StoreWriteError(f"{what}: cannot write: {reason}", hint=hint) from error

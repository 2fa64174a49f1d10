"""Opens the one file of an HDF5 store, under whichever of its two names it goes.

The file is `NAME.partial` until every sample is committed. A writer may finish at the very moment at which another
process opens it, so both names are tried, and a file that was opened once is recognised by its first line.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from cache.files import open_regular
from cache.hdf5_header import read_first_line
from data.errors import StoreCorruptError, StoreMissingError


def file_names(path: Path) -> tuple[Path, Path]:
    """Return the names of a store's finished and of its unfinished file."""
    final = Path(os.path.realpath(path)) if path.is_symlink() else path
    return final, final.with_name(f"{final.name}.partial")


@dataclass(frozen=True)
class StoreFile:
    """The file of one store, known by its first line. path: the store's; the file may still be the unfinished one."""

    path: Path
    first_line: bytes
    num_bytes: int

    def open(self, flags: int = os.O_RDONLY) -> int:
        """Return a descriptor of the file, the caller's to close.

        Raises StoreMissingError where it is gone, StoreCorruptError where another file has come in its place.
        """
        descriptor = open_file(self.path, flags)
        size = os.fstat(descriptor).st_size
        if size == self.num_bytes and read_first_line(descriptor) == self.first_line:
            return descriptor
        os.close(descriptor)
        if size != self.num_bytes:
            raise StoreCorruptError(f"{self.path}: expected {self.num_bytes} bytes, found {size}")
        raise StoreCorruptError(f"{self.path}: another file has come in its place since it was opened")

    @contextmanager
    def opened(self, flags: int = os.O_RDONLY) -> Iterator[int]:
        """Hold a descriptor for the block; raises as `open`."""
        descriptor = self.open(flags)
        try:
            yield descriptor
        finally:
            os.close(descriptor)


def open_file(path: Path, flags: int = os.O_RDONLY) -> int:
    """Return a descriptor of the file of the store at a path.

    Raises StoreMissingError where there is none, OSError where it may not be written, else as `open_regular`.
    """
    final, partial = file_names(path)
    for file in (final, partial, final):
        try:
            descriptor = open_regular(file.parent, file.name)
            if flags == os.O_RDONLY:
                return descriptor
            os.close(descriptor)
            return os.open(file, flags | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            continue
    raise StoreMissingError(f"{final}: the store's file is gone")


def write_at(descriptor: int, data: bytes | bytearray | memoryview, offset: int) -> None:
    """Write all bytes at an offset, going on after short writes; raises OSError where the disk refuses."""
    left = memoryview(data)
    while left.nbytes:
        written = os.pwrite(descriptor, left, offset)
        if written == 0:
            raise OSError(errno.EIO, "nothing was written")
        left, offset = left[written:], offset + written

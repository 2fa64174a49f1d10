"""Read-only maps of files that hold no descriptor, so that what a process may open does not bound what it may map.

Python's `mmap` keeps a duplicate of the descriptor for as long as the map lives (until 3.13, whose `trackfd=False` ends
that). The system call needs the descriptor only while it runs: see docs/decisions/0010.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

_LIBC = ctypes.CDLL(None, use_errno=True)
_MMAP, _MUNMAP, _MADVISE = _LIBC.mmap, _LIBC.munmap, _LIBC.madvise
# The last argument is an off_t, which is a C long wherever addresses have 64 bits.
_MMAP.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_MMAP.restype = ctypes.c_void_p
_MUNMAP.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_MADVISE.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_FAILED = ctypes.c_void_p(-1).value
# Linux 5.14; Python 3.11 has no name for it.
_MADV_POPULATE_READ = 22
_USUAL_MAX_MAPS = 65_530


def _max_maps() -> int:
    try:
        allowed = int(Path("/proc/sys/vm/max_map_count").read_text())
    except (OSError, ValueError):
        allowed = _USUAL_MAX_MAPS
    return allowed // 2


# How many maps all readers of a process keep: half of what the kernel allows it, the rest is for everyone else.
MAX_MAPS = _max_maps()
# Addresses of the maps that exist. A set: adding and discarding are atomic, also in a garbage collection.
_mapped: set[int] = set()


def num_maps() -> int:
    """Return the number of maps that this process holds through this module."""
    return len(_mapped)


class FileMap:
    """A range of a file, mapped read-only and shared, until the last array that looks into it is gone.

    offset, num_bytes: of the range.

    Raises OSError where the system refuses.
    """

    def __init__(self, descriptor: int, offset: int, num_bytes: int) -> None:
        start = offset // mmap.PAGESIZE * mmap.PAGESIZE
        self._skipped = offset - start
        self._length = self._skipped + num_bytes
        address = _MMAP(None, self._length, mmap.PROT_READ, mmap.MAP_SHARED, descriptor, start)
        if address is None or address == _FAILED:
            raise _os_error()
        self._address: int = address
        self.offset, self.num_bytes = offset, num_bytes
        _mapped.add(address)

    @property
    def __array_interface__(self) -> dict[str, Any]:
        """How numpy sees the range: [num_bytes] uint8, read-only. Arrays made of it keep the map alive."""
        address = self._address + self._skipped
        return {"data": (address, True), "shape": (self.num_bytes,), "typestr": "|u1", "version": 3}

    def __del__(self, _munmap: Any = _MUNMAP) -> None:
        address = getattr(self, "_address", None)
        if address is not None:
            _mapped.discard(address)
            _munmap(address, self._length)

    def will_need(self, offset: int, num_bytes: int) -> None:
        """Ask the kernel to read a part of the range from the disk, in the background."""
        # The kernel turns this into posix_fadvise(WILLNEED), which would need a descriptor.
        self._advise(mmap.MADV_WILLNEED, offset, num_bytes)

    def populate(self) -> None:
        """Read the range from the disk, and enter its pages in this process's page table; copies nothing.

        Raises OSError where a page cannot be read.
        """
        self.will_need(0, self.num_bytes)  # in large pieces, where touching would take them one by one
        # Elsewhere the number may mean anything.
        if sys.platform != "linux" or self._advise(_MADV_POPULATE_READ, 0, self.num_bytes) == errno.EINVAL:
            self._touch()

    def _touch(self) -> None:
        pages: NDArray[np.uint8] = np.asarray(self)[:: mmap.PAGESIZE]
        pages.max(initial=0)

    def _advise(self, advice: int, offset: int, num_bytes: int) -> int:
        """Return 0, or EINVAL for advice that this kernel does not know; raises OSError for anything else."""
        first = (self._skipped + offset) // mmap.PAGESIZE * mmap.PAGESIZE
        length = self._skipped + offset + num_bytes - first
        if _MADVISE(self._address + first, length, advice) == 0:
            return 0
        error = _os_error()
        if error.errno != errno.EINVAL:
            raise error
        return errno.EINVAL


def _os_error() -> OSError:
    number = ctypes.get_errno()
    return OSError(number, os.strerror(number))

"""Processes as others can recognise them: where they run, their number there, and when they began."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from typing import Self

from pydantic import BaseModel, ConfigDict


class Process(BaseModel):
    """A process. machine: the boot of the machine, and the namespace in which `pid` is its number.

    start: when it began, in clock ticks since the boot: another process that gets its number began later.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    machine: str
    pid: int
    start: int

    @classmethod
    def this(cls) -> Self:
        """Return this process."""
        return cls(machine=this_machine(), pid=os.getpid(), start=_start(os.getpid()) or 0)

    @classmethod
    def of(cls, pid: int) -> Self | None:
        """Return a process by its number here, None where there is none."""
        start = _start(pid)
        return None if start is None else cls(machine=this_machine(), pid=pid, start=start)

    def is_alive(self) -> bool | None:
        """Return whether it still runs; None where that cannot be seen from here."""
        return None if self.machine != this_machine() else _start(self.pid) == self.start


@cache
def this_machine() -> str:
    """Return what tells this boot of this machine, and the pid namespace of this process, from all others."""
    # A host's name is not enough: containers on a shared folder may all be called the same.
    boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return f"{boot}/{Path('/proc/self/ns/pid').readlink()}"


def _start(pid: int) -> int | None:
    try:
        status = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The name before may hold anything; the state is the first field behind it, the start the twentieth.
    fields = status.rpartition(")")[2].split()
    return None if fields[0] in "ZX" else int(fields[19])

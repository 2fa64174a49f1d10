"""Keeps the shards of a run in memory: as pages of the kernel, which all processes share, never as a copy."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from cache.selected_array import SelectedArray
from data.errors import UsageError

# Limits of a version 1 hierarchy that are none: the kernel's largest number of whole pages.
_NO_LIMIT = 1 << 62


def shard_bytes(arrays: Iterable[SelectedArray]) -> int:
    """Return the bytes of all shards that hold an image of the run."""
    return sum(reader.storage.shard_bytes(shard) for array in arrays for reader, shard in array.shards())


def populate(arrays: Iterable[SelectedArray], progress: Callable[[int], None] = lambda _: None) -> None:
    """Read all shards that hold an image of the run into the page cache and into this process's page table.

    progress: told the bytes of every shard.  Raises StoreError where a shard cannot be read.
    """
    for array in arrays:
        for reader, shard in array.shards():
            progress(reader.populate(shard))


def refuse_too_large(residency: str, needed: int, available: int | None) -> None:
    """Raise UsageError where the bytes that a residency needs are more than there are; None: nobody knows."""
    if available is not None and needed > available:
        raise UsageError(
            f"--residency {residency}: the targets of this run take {_size(needed)}, and {_size(available)} are free",
            hint="read them from the disk as they are needed: --residency mmap (the default); or train on fewer images"
            " (--limit), or on a smaller store (python cli.py convert-cache)",
        )


def available_memory(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Return the bytes of memory that this process can still fill; None where the system does not say.

    That is what the kernel calls available, or what the process's control groups leave it where that is less. Pages of
    files count as free in both: they give way.
    """
    known = [value for value in (_mem_available(proc), *_left_by_cgroups(proc, cgroups)) if value is not None]
    return max(0, min(known)) if known else None


def _mem_available(proc: Path) -> int | None:
    return _fields(proc / "meminfo", scale=1024).get("MemAvailable:")


def _left_by_cgroups(proc: Path, cgroups: Path) -> Iterable[int]:
    """Yield what each control group of this process, from its own up to the root, leaves it."""
    try:
        lines = (proc / "self" / "cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, limit, usage = cgroups, "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            root, limit, usage = cgroups / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        own = root / path.lstrip("/")
        # In a container the path may be that of the host, where nothing is mounted: then only the root is seen.
        for folder in (own, *own.parents[: len(own.relative_to(root).parts)]):
            left = _left_by(folder / limit, folder / usage, folder / "memory.stat")
            if left is not None:
                yield left


def _left_by(limit: Path, usage: Path, stat: Path) -> int | None:
    allowed, used = _number(limit), _number(usage)
    if allowed is None or allowed >= _NO_LIMIT:
        return None
    fields = _fields(stat)
    # `total_`: version 1, which counts the groups below only there.
    files = sum(fields.get(f"total_{name}", fields.get(name, 0)) for name in ("active_file", "inactive_file"))
    return allowed - max(0, (used or 0) - files)


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # `max`: no limit
        return None


def _fields(path: Path, scale: int = 1) -> dict[str, int]:
    try:
        lines = [line.split() for line in path.read_text().splitlines()]
    except OSError:
        return {}
    return {line[0]: int(line[1]) * scale for line in lines if len(line) > 1 and line[1].isdigit()}


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.1f} MB"

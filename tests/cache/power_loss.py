"""What a power cut may leave of a folder: a model of how POSIX file systems promise to keep data.

A file's bytes are kept only once that file was flushed, a name (made, renamed, removed) only once the folder that holds
it was flushed. Whatever was not flushed may be kept or lost, each change apart from every other. Three kinds of
atomicity are taken for granted, as disks and journaling file systems give them: a sector of 512 bytes that was there
before is the old one or the new one, a name points to one file or to another, and a rename inside one folder happens as
a whole. A rename between two folders is two changes here, which is harsher than they are.

The writer under test runs for real. Before and after each of its calls of the system the whole folder is looked at, so
nothing depends on how it writes: by `os.write`, through a buffered file or in a library of another language.
"""

from __future__ import annotations

import os
import random
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest

# Every file by its path below the root, None for a folder: what may be found after a power cut.
Tree = dict[str, bytes | None]
Names = Mapping[str, int]  # one folder's entries: name → node

_CHANGING = (
    "open", "write", "pwrite", "writev", "pwritev", "sendfile", "copy_file_range", "posix_fallocate", "ftruncate",
    "truncate", "mkdir", "rename", "replace", "link", "symlink", "unlink", "remove", "rmdir",
)  # fmt: skip
_FLUSHING = ("fsync", "fdatasync")
SECTOR_BYTES = 512


@dataclass(frozen=True)
class NameChange:
    """Entries of the folder `node` that changed together: name → node, None where it is gone; which are folders."""

    node: int
    entries: Mapping[str, int | None]
    folders: frozenset[int]

    def outcomes(self) -> list[Mapping[str, int | None]]:
        """Lost, kept."""
        return [{}, self.entries]


@dataclass(frozen=True)
class DataChange:
    """Bytes of the file `node` that were written together at an offset; its size before and after that."""

    node: int
    start: int
    written: bytes
    size_before: int
    size_after: int

    def outcomes(self) -> list[tuple[bytes, int] | None]:
        """Lost; or the bytes and the size that were kept: all, or half of them.

        Where the file grew, the half may end it, and the size may be kept without its data.
        """
        whole, middle = self.written, (len(self.written) + 1) // 2
        if self.size_after > self.size_before:
            cut = (whole[:middle], self.start + middle)
            return [None, (whole, self.size_after), cut, (bytes(len(whole)), self.size_after)]
        middle = (self.start + middle) // SECTOR_BYTES * SECTOR_BYTES - self.start
        half = [(whole[:middle], self.size_after)] if 0 < middle < len(whole) else []
        return [None, (whole, self.size_after), *half]

    def applied(self, content: bytes, outcome: tuple[bytes, int] | None) -> bytes:
        """Return the file's content with one of the outcomes."""
        if outcome is None:
            return content
        written, size = outcome
        content = content.ljust(self.start, b"\0")
        content = content[: self.start] + written + content[self.start + len(written) :]
        return content[:size] if self.size_after < self.size_before else content


@dataclass(frozen=True)
class Flush:
    """A flush of the file or folder that had this path then."""

    node: int
    path: Path
    is_folder: bool


@dataclass(frozen=True)
class Promise:
    """What the writer said to be committed: it must be found after every later power cut."""

    what: frozenset[Any]


Operation = NameChange | DataChange | Flush | Promise


class Recorder:
    """Follows a writer below a folder and keeps its operations in order.

    The folder is as it was made: all that lies there at the start is taken to be on the disk.
    """

    def __init__(self, folder: Path) -> None:
        self.operations: list[Operation] = []
        self._folder = folder
        self._system = {name: getattr(os, name) for name in (*_CHANGING, *_FLUSHING) if hasattr(os, name)}
        self._lock = threading.RLock()  # a writer may have threads: one operation after another all the same
        self._descriptors: dict[int, int] = {}  # held open, so that no node's number is given out a second time
        self._names, self._data = self._look()
        self.start = Moment("the start", folder.stat().st_ino, self._names, self._data, (), frozenset())

    def promise(self, *what: Any) -> None:
        """Note what the writer has just said to be committed."""
        with self._lock:
            self.operations.append(Promise(frozenset(what)))

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Follow whatever runs in the block."""
        try:
            with pytest.MonkeyPatch.context() as patch:
                for name in self._system:
                    patch.setattr(os, name, self._followed(name))
                yield
                self._observe()
        finally:
            for descriptor in self._descriptors.values():
                os.close(descriptor)

    def _followed(self, name: str) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            if name == "open" and not args[1] & (os.O_CREAT | os.O_TRUNC):
                return self._system[name](*args, **options)
            with self._lock:
                self._observe()
                if name in _FLUSHING:
                    node, path = os.fstat(args[0]).st_ino, Path(f"/proc/self/fd/{args[0]}").readlink()
                    self.operations.append(Flush(node, path, node in self._names))
                    return None
                try:
                    return self._system[name](*args, **options)
                finally:
                    self._observe()

        return call

    def _observe(self) -> None:
        """Note what has changed since the last look."""
        names, data = self._look()
        for folder, entries in names.items():
            before = self._names.get(folder, {})
            if before != entries:
                changed = sorted(name for name in {**before, **entries} if before.get(name) != entries.get(name))
                now = {name: entries.get(name) for name in changed}
                folders = frozenset(node for node in entries.values() if node in names)
                self.operations.append(NameChange(folder, now, folders))
        for node, content in data.items():
            before_bytes = self._data.get(node, b"")
            if before_bytes != content:
                self.operations.append(_difference(node, before_bytes, content))
        self._names, self._data = {**self._names, **names}, {**self._data, **data}

    def _look(self) -> tuple[dict[int, Names], dict[int, bytes]]:
        """Return every folder's entries and every file's bytes, by node."""
        names: dict[int, Names] = {}
        data: dict[int, bytes] = {}
        folders = [(str(self._folder), self._folder.stat().st_ino)]
        while folders:
            folder, node = folders.pop()
            with os.scandir(folder) as found:
                # Nothing in a lock needs to outlive its process.
                entries = [entry for entry in found if ".lock" not in entry.name]
            names[node] = {entry.name: entry.inode() for entry in entries}
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    self._hold(entry)
                    folders.append((entry.path, entry.inode()))
                else:
                    descriptor = self._hold(entry)
                    data[entry.inode()] = os.pread(descriptor, os.fstat(descriptor).st_size, 0)
        return names, data

    def _hold(self, entry: os.DirEntry[str]) -> int:
        if entry.inode() not in self._descriptors:
            self._descriptors[entry.inode()] = self._system["open"](entry.path, os.O_RDONLY)
        return self._descriptors[entry.inode()]


@dataclass(frozen=True)
class Moment:
    """The disk between two operations: what is on it for certain, what may be, and what was promised."""

    label: str
    root: int
    names: Mapping[int, Names]
    data: Mapping[int, bytes]
    pending: tuple[NameChange | DataChange, ...]
    promised: frozenset[Any]

    def after(self, operation: Operation, label: str) -> Moment:
        """Return the moment after one more operation."""
        names, data, pending, promised = dict(self.names), dict(self.data), list(self.pending), self.promised
        match operation:
            case Promise(what):
                promised |= what
            case Flush(node):
                for change in (change for change in pending if change.node == node):
                    _apply(change, change.outcomes()[1], names, data)
                pending = [change for change in pending if change.node != node]
            case NameChange(folders=folders):
                names = {folder: {} for folder in folders} | names
                pending.append(operation)
            case DataChange():
                pending.append(operation)
        found = _within_reach(self.root, names, pending)
        return Moment(
            label,
            self.root,
            {node: entries for node, entries in names.items() if node in found},
            {node: content for node, content in data.items() if node in found},
            tuple(change for change in pending if change.node in found),
            promised,
        )

    def trees(self, limit: int, seed: int) -> Iterator[Tree]:
        """Yield what a power cut at this moment may leave.

        All of it where that is at most `limit` cases; else `limit` of them: everything lost, everything kept, all
        files cut in half, all of them zeros, then a random choice among one change kept alone, one lost alone, and any.
        """
        counts = [len(change.outcomes()) for change in self.pending]
        if prod(counts) <= limit:
            yield from map(self._tree, product(*map(range, counts)))
            return
        generator = random.Random(f"{seed} {self.label}")
        extremes = [tuple(min(outcome, count - 1) for count in counts) for outcome in range(max(counts))]
        alone = [tuple(int((place == odd) == kept) for place in range(len(counts)))
                 for odd in range(len(counts)) for kept in (True, False)]  # fmt: skip
        others = [*alone, *(tuple(map(generator.randrange, counts)) for _ in range(limit))]
        generator.shuffle(others)
        yield from map(self._tree, [*extremes, *others][:limit])

    def _tree(self, case: tuple[int, ...]) -> Tree:
        names, data = dict(self.names), dict(self.data)
        for change, outcome in zip(self.pending, case, strict=True):
            _apply(change, change.outcomes()[outcome], names, data)
        return dict(_walk(self.root, "", names, data))


def moments(recorder: Recorder, ignored: Callable[[Flush], bool] = lambda _: False) -> Iterator[Moment]:
    """Yield the moments between a writer's operations; a flush of which `ignored` says yes did not happen."""
    moment = recorder.start
    for number, operation in enumerate(recorder.operations):
        if not (isinstance(operation, Flush) and ignored(operation)):
            moment = moment.after(operation, f"operation {number}: {operation}")
            yield moment


@contextmanager
def folder_in_memory() -> Iterator[Path]:
    """Give a folder for the block, on a file system in memory where there is one: nothing in it need outlive it."""
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="teachonce-", dir=memory) as folder:
        yield Path(folder)


def write_tree(tree: Tree, folder: Path) -> None:
    """Make a folder with what a power cut left."""
    folder.mkdir()
    for path, content in tree.items():
        if content is None:
            (folder / path).mkdir()
        else:
            (folder / path).write_bytes(content)


def _difference(node: int, before: bytes, after: bytes) -> DataChange:
    both = min(len(before), len(after))
    other = np.flatnonzero(np.frombuffer(before, np.uint8, both) != np.frombuffer(after, np.uint8, both))
    start = int(other[0]) if len(other) else both
    end = int(other[-1]) + 1 if len(before) == len(after) else len(after)
    return DataChange(node, start, after[start:end], len(before), len(after))


def _apply(change: NameChange | DataChange, outcome: Any, names: dict[int, Names], data: dict[int, bytes]) -> None:
    if isinstance(change, DataChange):
        data[change.node] = change.applied(data.get(change.node, b""), outcome)
    else:
        entries = {**names[change.node], **outcome}
        names[change.node] = {name: node for name, node in entries.items() if node is not None}


def _within_reach(root: int, names: Mapping[int, Names], pending: Iterable[NameChange | DataChange]) -> set[int]:
    """Return the nodes that some power cut could leave to be found: the others are gone for certain."""
    entries = {node: set(found.values()) for node, found in names.items()}
    for change in pending:
        if isinstance(change, NameChange):
            entries[change.node].update(node for node in change.entries.values() if node is not None)
    found, ahead = set(), [root]
    while ahead:
        node = ahead.pop()
        if node not in found:
            found.add(node)
            ahead.extend(entries.get(node, ()))
    return found


def _walk(
    folder: int, path: str, names: Mapping[int, Names], data: Mapping[int, bytes]
) -> Iterator[tuple[str, bytes | None]]:
    for name, node in names[folder].items():
        yield path + name, None if node in names else data.get(node, b"")
        if node in names:
            yield from _walk(node, f"{path}{name}/", names, data)

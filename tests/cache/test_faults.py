"""A disk that refuses, at every call in turn: the run ends in plain words, and the next one finishes the store."""

from __future__ import annotations

import errno
import os
import re
import resource
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from cache.catalog import read_catalog
from cache.reader import TeacherStore
from cache.verify import find_problems
from cache.writer import open_writer
from data.errors import StoreMissingError, StoreWriteError
from tests.cache.conftest import TinyStores
from tests.cache.power_loss import folder_in_memory

if TYPE_CHECKING:
    from cache.plan import StoreFormat

RESUMES = "what was committed is intact: run the same command again to resume"
NO_SPACE = "free some space and run the same command again: it resumes"


class Writer:
    """Writes one and the same store again and again, in a folder of its own."""

    def __init__(self, folder: Path, kind: StoreFormat) -> None:
        self.stores = TinyStores(folder)
        self.format = kind
        suffix = {"zarr": "zarr", "hdf5": "h5"}[kind]
        self.path, whole = folder / f"store.{suffix}", folder / f"whole.{suffix}"
        self.write(whole)
        self.whole = content(whole)
        self.beside = sorted([path.name for path in folder.iterdir()])

    def write(self, path: Path | None = None) -> None:
        """Two shards of one sample. In Zarr: a new store, a view more, a teacher more (with text embeddings)."""
        first, then = {"teachers": ["dino"], "views": ["original"]}, {"teachers": ["dino"]}
        changes: list[dict[str, Any]] = [first, then, {}] if self.format == "zarr" else [{}]
        for change in changes:
            plan = self.stores.plan(2, shard_samples=1, format=self.format, **change)
            with open_writer(path or self.path, plan) as writer:
                self.stores.fill(writer)

    def count(self, calls: Iterable[str]) -> int:
        """How many such calls an undisturbed run takes."""
        disk = Disk(calls, 0, lambda _: False)
        with disk.in_place():
            self.write()
        self.remove()
        return disk.count

    def remove(self) -> None:
        for left in self.stores.folder.glob(f"{self.path.name}*"):
            if left.is_dir():
                shutil.rmtree(left)
            elif not left.name.endswith(".lock"):
                left.unlink()

    def assert_resumes(self) -> None:
        """What a refused run left is sound, and the next run makes of it what an uninterrupted one makes."""
        try:
            assert find_problems(read_catalog(self.path), verify=True) == []
        except StoreMissingError:
            assert not self.path.exists()
        self.write()
        assert content(self.path) == self.whole
        found = sorted(path.name for path in self.stores.folder.iterdir())
        assert found == sorted([*self.beside, self.path.name, f"{self.path.name}.lock"])
        self.remove()


def content(store: Path) -> dict[str, bytes]:
    paths = [path for path in store.rglob("*") if path.is_file()] if store.is_dir() else [store]
    return {str(path.relative_to(store)): path.read_bytes() for path in paths}


@pytest.fixture(params=["zarr", "hdf5"])
def writer(request: pytest.FixtureRequest) -> Iterator[Writer]:
    with folder_in_memory() as folder:
        yield Writer(folder, request.param)


@pytest.fixture
def zarr_writer() -> Iterator[Writer]:
    with folder_in_memory() as folder:
        yield Writer(folder, "zarr")


class Disk:
    """Stands before calls of the system and refuses some of those that change anything, with one error.

    calls: their names in `os`.  refuses: told the number of the call, from 0 on.  spared: ends of paths whose calls are
    never refused; a lock's file is opened in another way too, and that its note stays has a test of its own.
    """

    def __init__(
        self,
        calls: Iterable[str],
        code: int,
        refuses: Callable[[int], bool],
        spared: tuple[str, ...] = (".lock", ".lock.json"),
    ) -> None:
        self.calls, self.code, self.refuses, self.spared = calls, code, refuses, spared
        self.count = 0

    @contextmanager
    def in_place(self) -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            for call in self.calls:
                patch.setattr(os, call, self._guarded(call, getattr(os, call)))
            yield

    def _guarded(self, call: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def guarded(*args: Any, **options: Any) -> Any:
            is_no_change = (call == "open" and not args[1] & (os.O_CREAT | os.O_WRONLY | os.O_RDWR)) or (
                call == "mkdir" and Path(args[0]).is_dir()
            )
            if is_no_change or str(args[0]).endswith(self.spared):
                return real(*args, **options)
            number, self.count = self.count, self.count + 1
            if self.refuses(number):
                raise OSError(self.code, os.strerror(self.code))
            return real(*args, **options)

        return guarded


def open_descriptors() -> list[Path]:
    return sorted(Path("/proc/self/fd").iterdir())


def refusal(work: Callable[[], object]) -> StoreWriteError | None:
    """What the writer said, None where it came to its end. Descriptors that it left open are a fault of their own."""
    before = open_descriptors()
    try:
        work()
    except StoreWriteError as error:
        return error
    finally:
        assert open_descriptors() == before
    return None


def assert_refused_at(
    writer: Writer, numbers: Iterable[int], calls: Iterable[str], code: int, hint: str, *, lasting: bool
) -> None:
    """Refuse the n-th of the calls, and where `lasting` all after it, for all n of `numbers`."""
    for number in numbers:
        disk = Disk(calls, code, lambda n, number=number: n == number or (lasting and n > number))  # type: ignore[misc]
        with disk.in_place():
            error = refusal(writer.write)
        assert error is not None, f"call {number} was refused and nothing was said"
        assert f"cannot write: {os.strerror(code)}" in error.message, number
        assert hint in (error.hint or ""), number
        writer.assert_resumes()


WRITES, NAMES = ("write", "pwrite", "writev", "pwritev"), ("mkdir", "rename", "unlink", "rmdir")
FAULTS = {
    "the disk is full": (("open", "mkdir", "rename", "fsync", *WRITES), errno.ENOSPC, NO_SPACE),
    "permission is lost": (("open", *NAMES), errno.EACCES, "check the owner and the permissions"),
    "it is made read-only": (("open", "fsync", *NAMES, *WRITES), errno.EROFS, "the file system is read-only"),
    "it is broken": (("open", "fsync", *NAMES, *WRITES), errno.EIO, RESUMES),
}


def test_a_disk_that_fills_for_one_write_is_told_and_the_run_resumes(writer: Writer) -> None:
    count = writer.count(WRITES)
    assert count > 30
    assert_refused_at(writer, range(count), WRITES, errno.ENOSPC, NO_SPACE, lasting=False)


def test_a_flush_that_fails_is_told_and_the_run_resumes(writer: Writer) -> None:
    count = writer.count(["fsync"])
    assert count > 30
    assert_refused_at(writer, range(0, count, 4), ["fsync"], errno.EIO, RESUMES, lasting=False)


@pytest.mark.slow
def test_every_flush_that_fails_is_told_and_the_run_resumes(writer: Writer) -> None:
    assert_refused_at(writer, range(writer.count(["fsync"])), ["fsync"], errno.EIO, RESUMES, lasting=False)


@pytest.mark.parametrize(("calls", "code", "hint"), FAULTS.values(), ids=FAULTS)
def test_a_disk_that_refuses_from_some_moment_on_is_told_and_the_run_resumes(
    writer: Writer, calls: tuple[str, ...], code: int, hint: str
) -> None:
    count = writer.count(calls)
    assert_refused_at(writer, range(0, count, count // 10), calls, code, hint, lasting=True)


@pytest.mark.slow
@pytest.mark.parametrize("lasting", [False, True], ids=["once", "from then on"])
@pytest.mark.parametrize(("calls", "code", "hint"), FAULTS.values(), ids=FAULTS)
def test_a_disk_that_refuses_any_call_is_told_and_the_run_resumes(
    writer: Writer, calls: tuple[str, ...], code: int, hint: str, lasting: bool
) -> None:
    assert_refused_at(writer, range(writer.count(calls)), calls, code, hint, lasting=lasting)


def test_a_flush_that_failed_is_never_tried_again(writer: Writer) -> None:
    """The kernel may have dropped the pages: a second flush would succeed and mean nothing."""
    held: list[int] = []
    for number in range(0, writer.count(["fsync"]), 3):
        flushed: list[tuple[int, int]] = []

        def fsync(descriptor: int, flushed: list[tuple[int, int]] = flushed, number: int = number) -> None:
            held.append(os.dup(descriptor))  # so that the node's number is not given out again
            flushed.append((os.fstat(descriptor).st_ino, os.fstat(descriptor).st_mode))
            if len(flushed) == number + 1:
                raise OSError(errno.EIO, os.strerror(errno.EIO))

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "fsync", fsync)
            with pytest.raises(StoreWriteError):
                writer.write()
        failed, later = flushed[number], flushed[number + 1 :]
        # A folder is flushed once more after it has changed once more.
        assert failed not in (later[:1] if stat.S_ISDIR(failed[1]) else later), number
        writer.remove()
        while held:
            os.close(held.pop())


class ShortWrites:
    """`os.write` and its like as a disk may do them: so many bytes at a time; a ledger's line is cut at `line`."""

    def __init__(self, patch: pytest.MonkeyPatch, most: int, line: int | None = None) -> None:
        self.short = 0
        for name in ("write", "pwrite"):
            patch.setattr(os, name, self._limited(getattr(os, name), most, line))
        for name in ("writev", "pwritev"):
            patch.setattr(os, name, self._first(getattr(os, name), most))

    def _limited(self, real: Callable[..., int], most: int, line: int | None) -> Callable[..., int]:
        def write(descriptor: int, data: bytes, *place: int) -> int:
            view = memoryview(data).cast("B")
            end = line if bytes(view[:9]) == b'{"bytes":' else most
            self.short += end is not None and end < len(view)
            return real(descriptor, view[:end], *place)

        return write

    def _first(self, real: Callable[..., int], most: int) -> Callable[..., int]:
        def write(descriptor: int, buffers: list[bytes], *place: int) -> int:
            self.short += 1
            return real(descriptor, [memoryview(buffers[0]).cast("B")[:most]], *place)

        return write


@pytest.mark.parametrize("most", [1, 3, 50])
def test_shards_written_a_few_bytes_at_a_time_are_the_same(writer: Writer, most: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        disk = ShortWrites(patch, most)
        writer.write()
    assert disk.short > 0
    assert content(writer.path) == writer.whole


@pytest.mark.parametrize("line", [0, 1, 60, 129])
def test_a_line_that_is_cut_is_refused_and_never_counts(writer: Writer, line: int) -> None:
    """A line is one write. A cut one is the full disk that Linux reports so."""
    with pytest.MonkeyPatch.context() as patch:
        ShortWrites(patch, 1 << 30, line)
        error = refusal(writer.write)
    assert error is not None
    assert error.message.endswith(": cannot write: No space left on device")
    assert error.hint == NO_SPACE
    assert TeacherStore(writer.path).array("dino", "original", "moments").missing_rows([0, 1]) == [0, 1]
    writer.assert_resumes()


@pytest.mark.parametrize("line", [0, 1, 60, 129])
def test_a_commit_that_was_refused_may_be_tried_again_by_the_same_writer(writer: Writer, line: int) -> None:
    with open_writer(writer.path, writer.stores.plan(2, shard_samples=1, format=writer.format)) as opened:
        first = opened.missing()[0]
        with pytest.MonkeyPatch.context() as patch:
            ShortWrites(patch, 1 << 30, line)
            with pytest.raises(StoreWriteError):
                opened.commit(first, writer.stores.outputs(first))
        writer.stores.fill(opened)
    assert find_problems(read_catalog(writer.path), verify=True) == []
    writer.assert_resumes()


def test_a_file_size_limit_is_told_like_any_full_disk(writer: Writer) -> None:
    """Linux then writes up to the limit, and refuses the next write (EFBIG; Python ignores SIGXFSZ)."""
    sizes = {len(data) for data in writer.whole.values()}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit in sorted({size - 1 for size in sizes} | {size // 2 for size in sizes} | {size // 10 for size in sizes}):
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
            error = refusal(writer.write)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert error is not None
        assert re.search("cannot write: (File too large|No space left on device)", error.message)
        assert error.hint is not None
        writer.assert_resumes()


# A file system of its own in a name space of its own, which ends with the process: no rights are needed, nothing stays.
SMALL_DISK = """
import re, runpy, subprocess, sys
from pathlib import Path
from data.errors import StoreWriteError

tests, folder, store_format, kind = runpy.run_path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], sys.argv[4]
for size in range(*map(int, sys.argv[5:])):
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", folder], check=True)
    writer = tests["Writer"](folder, store_format)  # which makes the whole store that others are compared with
    whole = writer.whole
    subprocess.run(["umount", folder], check=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"{kind}={size}", "tmpfs", folder], check=True)
    try:
        writer.write()
        print("enough")
    except StoreWriteError as error:
        # Refused by the disk, or before that: what is known to be too much is not begun.
        assert re.search("cannot write: No space left on device|what is to be written needs", error.message), error
        assert error.hint.startswith("free some space"), error
        print("refused")
    subprocess.run(["mount", "-o", f"remount,{kind}=100000k", folder], check=True)
    writer.beside = []
    writer.assert_resumes()
    subprocess.run(["umount", folder], check=True)
"""


@pytest.mark.parametrize(
    ("store_format", "kind", "sizes"),
    [
        ("zarr", "size", (12_288, 250_000, 16_384)),
        ("zarr", "nr_inodes", (5, 140, 9)),
        ("hdf5", "size", (12_288, 200_000, 12_288)),
        ("hdf5", "nr_inodes", (2, 8, 1)),
    ],
)
def test_a_real_disk_that_fills_is_told_and_the_run_resumes(
    tmp_path: Path, store_format: str, kind: str, sizes: tuple[int, int, int]
) -> None:
    own = ["unshare", "--user", "--map-root-user", "--mount"]
    mounted = [*own, "mount", "-t", "tmpfs", "tmpfs", str(tmp_path)]
    if shutil.which("unshare") is None or subprocess.run(mounted, capture_output=True).returncode:
        pytest.skip("no file system can be mounted here: user name spaces are not allowed")
    arguments = [__file__, str(tmp_path), store_format, kind, *map(str, sizes)]
    done = subprocess.run(
        [*own, sys.executable, "-W", "error", "-c", SMALL_DISK, *arguments],
        capture_output=True, text=True, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("refused") >= 2
    assert done.stdout.endswith("enough\n")


@pytest.mark.parametrize("code", [errno.EROFS, errno.EIO, errno.EACCES])
def test_a_lock_note_that_cannot_be_removed_is_told_and_frees_the_lock(zarr_writer: Writer, code: int) -> None:
    disk = Disk(["unlink"], code, lambda _: True, spared=())
    with disk.in_place():
        error = refusal(zarr_writer.write)
    assert error is not None
    zarr_writer.assert_resumes()

from __future__ import annotations

import errno
import os
import socket
from pathlib import Path
from typing import Any

import pytest

from cache.files import (
    append_line,
    in_large_writes,
    open_regular,
    read_json,
    read_regular,
    write_all,
    write_new,
    writing,
)
from data.errors import StoreCorruptError, StoreError, StoreWriteError


def test_a_regular_file_is_read(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b").write_bytes(b"content")
    assert read_regular(tmp_path, "a/b") == b"content"


def test_a_folder_behind_a_link_may_hold_the_store_itself(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "file").write_bytes(b"content")
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    assert read_regular(tmp_path / "link", "file") == b"content"


def make_fifo(path: Path) -> None:
    os.mkfifo(path)


def make_link(path: Path) -> None:
    path.symlink_to("/etc/passwd")


def make_dangling_link(path: Path) -> None:
    path.symlink_to(path.with_name("nowhere"))


@pytest.mark.parametrize("make", [make_fifo, make_link, make_dangling_link, Path.mkdir])
def test_anything_but_a_regular_file_is_refused_without_waiting(tmp_path: Path, make: Any) -> None:
    make(tmp_path / "file")
    with pytest.raises(StoreCorruptError, match="expected a regular file"):
        open_regular(tmp_path, "file")


def test_a_socket_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # the path of a socket may not be long
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind("file")
        with pytest.raises(StoreError, match="cannot be opened"):
            open_regular(tmp_path, "file")


def test_no_folder_on_the_way_may_be_a_link(tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "file").write_bytes(b"content")
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "array").symlink_to(tmp_path / "outside")
    with pytest.raises(StoreCorruptError, match="symbolic link"):
        open_regular(tmp_path / "store", "array/file")
    with pytest.raises(StoreCorruptError, match="a way out of it"):
        open_regular(tmp_path / "store", "../outside/file")


def test_pieces_are_written_whole_whatever_a_call_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pieces = [bytes([n % 256]) * n for n in range(1, 1200)]
    groups = list(in_large_writes(pieces))
    assert b"".join(part.tobytes() for group in groups for part in group) == b"".join(pieces)
    assert max(len(group) for group in groups) <= 1024
    real = os.writev
    monkeypatch.setattr(os, "writev", lambda fd, parts: real(fd, [b"".join(parts)[:50_001]]))
    with (tmp_path / "file").open("wb", buffering=0) as file:
        for group in groups:
            write_all(file.fileno(), group)
    assert (tmp_path / "file").read_bytes() == b"".join(pieces)


def test_a_missing_file_is_missing_even_where_a_folder_on_the_way_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"")
    for name in ("nothing", "a/b"):
        with pytest.raises(FileNotFoundError):
            open_regular(tmp_path, name)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[" * 100_000], ids=["empty", "cut", "not text", "deep"])
def test_what_is_not_json_is_corrupt(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(StoreCorruptError, match=r"x\.json: not JSON"):
        read_json(tmp_path, "x.json")


def test_a_file_far_too_large_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "x.json").open("wb") as file:
        file.truncate(1 << 40)  # sparse
    with pytest.raises(StoreCorruptError, match="far larger"):
        read_json(tmp_path, "x.json")


def test_a_new_file_never_replaces_one(tmp_path: Path) -> None:
    write_new(tmp_path / "file", b"first")
    with pytest.raises(FileExistsError):
        write_new(tmp_path / "file", b"second")


def test_lines_are_appended_by_one_write_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writes: list[bytes] = []
    real = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: (writes.append(bytes(data)), real(fd, data))[1])
    append_line(tmp_path / "log", b"one\n")
    append_line(tmp_path / "log", b"two\n")
    assert writes == [b"one\n", b"two\n"]
    assert (tmp_path / "log").read_bytes() == b"one\ntwo\n"


def test_a_line_is_flushed_and_so_is_the_folder_of_a_new_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed: list[Path] = []
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (flushed.append(Path(f"/proc/self/fd/{fd}").readlink()), real(fd))[1])
    append_line(tmp_path / "log", b"one\n")
    append_line(tmp_path / "log", b"two\n")
    assert flushed == [tmp_path / "log", tmp_path, tmp_path / "log"]


REFUSALS = {
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "quota",
    errno.EACCES: "permissions",
    errno.EROFS: "read-only",
    errno.EIO: "run the same command again",
}


@pytest.mark.parametrize(("code", "hint"), REFUSALS.items(), ids=[errno.errorcode[code] for code in REFUSALS])
def test_what_the_disk_refuses_is_told_with_what_to_do(code: int, hint: str) -> None:
    with pytest.raises(StoreWriteError, match=hint) as caught, writing("the array"):
        raise OSError(code, os.strerror(code))
    assert caught.value.message == f"the array: cannot write: {os.strerror(code)}"
    assert caught.value.exit_code == 1

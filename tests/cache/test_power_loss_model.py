"""What the model of a power cut says may be found, worked out by hand."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cache.power_loss import Recorder, moments


def possible(folder: Path, work: Callable[[Path], object]) -> set[tuple[tuple[str, bytes | None], ...]]:
    recorder = Recorder(folder)
    with recorder.recording():
        work(folder)
    *_, last = moments(recorder)
    return {tuple(sorted(tree.items())) for tree in last.trees(1000, seed=0)}


def test_a_file_that_is_not_flushed_may_be_absent_empty_cut_or_zeros(tmp_path: Path) -> None:
    found = possible(tmp_path, lambda folder: (folder / "a").write_bytes(b"12"))
    contents = (b"", b"12", b"1", b"\0\0")
    assert found == {(), *((("a", content),) for content in contents)}


def test_a_flushed_file_may_lack_its_name(tmp_path: Path) -> None:
    assert possible(tmp_path, lambda folder: flushed(folder / "a", b"12")) == {(), (("a", b"12"),)}


def test_a_flushed_name_may_lack_its_bytes(tmp_path: Path) -> None:
    def work(folder: Path) -> None:
        (folder / "a").write_bytes(b"12")
        flush(folder)

    assert possible(tmp_path, work) == {(("a", content),) for content in (b"", b"12", b"1", b"\0\0")}


def test_what_is_appended_leaves_what_was_flushed(tmp_path: Path) -> None:
    def work(folder: Path) -> None:
        flushed(folder / "a", b"old,")
        flush(folder)
        with (folder / "a").open("ab") as file:
            file.write(b"new,")

    contents = (b"old,", b"old,new,", b"old,ne", b"old,\0\0\0\0")
    assert possible(tmp_path, work) == {(("a", content),) for content in contents}


def test_a_file_renamed_over_another_is_the_one_or_the_other(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"old")

    def work(folder: Path) -> None:
        flushed(folder / "b", b"new")
        (folder / "b").rename(folder / "a")

    assert possible(tmp_path, work) == {
        (("a", b"old"),),
        (("a", b"old"), ("b", b"new")),
        (("a", b"new"),),
    }


def test_a_file_renamed_into_another_folder_may_be_in_both_or_in_none(tmp_path: Path) -> None:
    (tmp_path / "to").mkdir()
    (tmp_path / "a").write_bytes(b"1")
    found = possible(tmp_path, lambda folder: (folder / "a").rename(folder / "to" / "a"))
    to = ("to", None)
    assert found == {(to,), (("a", b"1"), to), (to, ("to/a", b"1")), (("a", b"1"), to, ("to/a", b"1"))}


@pytest.mark.parametrize(
    ("start", "size", "kept"), [(100, 200, ()), (512, 512, ()), (400, 300, (112,)), (0, 2048, (1024,))]
)
def test_what_is_written_in_place_is_the_old_or_the_new_sector_by_sector(
    tmp_path: Path, start: int, size: int, kept: tuple[int, ...]
) -> None:
    old, new = b"o" * 2048, b"n" * size
    (tmp_path / "a").write_bytes(old)

    def work(folder: Path) -> None:
        with (folder / "a").open("r+b") as file:
            file.seek(start)
            file.write(new)

    contents = [old[:start] + new[:part] + old[start + part :] for part in (0, size, *kept)]
    assert possible(tmp_path, work) == {(("a", content),) for content in contents}


def test_two_writes_are_kept_or_lost_apart(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"oooo")

    def work(folder: Path) -> None:
        descriptor = os.open(folder / "a", os.O_WRONLY)
        os.pwrite(descriptor, b"1", 0)
        os.pwrite(descriptor, b"2", 3)
        os.close(descriptor)

    contents = (b"oooo", b"1ooo", b"ooo2", b"1oo2")
    assert possible(tmp_path, work) == {(("a", content),) for content in contents}


def test_nothing_below_a_folder_is_found_without_the_folders_own_name(tmp_path: Path) -> None:
    def work(folder: Path) -> None:
        (folder / "a" / "b").mkdir(parents=True)
        flush(folder / "a")

    assert possible(tmp_path, work) == {(), (("a", None), ("a/b", None))}


def test_everything_flushed_leaves_one_case(tmp_path: Path) -> None:
    def work(folder: Path) -> None:
        (folder / "a").mkdir()
        flushed(folder / "a" / "b", b"1")
        flush(folder / "a")
        flush(folder)

    assert possible(tmp_path, work) == {(("a", None), ("a/b", b"1"))}


def flushed(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    flush(path)


def flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)

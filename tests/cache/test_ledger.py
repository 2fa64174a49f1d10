from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import google_crc32c
import pytest

import cache.ledger
from cache.canonical import canonical_json
from cache.ledger import LedgerEntry, content_digest, encode_ledger, merge_ledgers, read_ledgers
from data.errors import StoreCorruptError

ENTRIES = [LedgerEntry(shard, 3 * shard, 3, 1000 + shard, f"{shard:064x}") for shard in range(4)]
A, B, C, D = (entry.line() for entry in ENTRIES)
OTHER_B = LedgerEntry(1, 3, 3, 1001, "f" * 64).line()


def write(folder: Path, **ledgers: bytes) -> None:
    for name, content in ledgers.items():
        (folder / f"{name.replace('_', '-')}.jsonl").write_bytes(content)


def shards(folder: Path) -> list[int]:
    return sorted(read_ledgers(folder)[0])


def test_a_line_is_canonical_json_with_a_crc32c_of_the_rest() -> None:
    content = json.loads(A)
    crc = content.pop("crc32c")
    assert content == {"shard": 0, "first": 0, "count": 3, "bytes": 1000, "sha256": "0" * 64}
    assert crc == google_crc32c.value(canonical_json(content))
    assert canonical_json({**content, "crc32c": crc}) + b"\n" == A


def test_no_ledger_means_nothing_is_committed(tmp_path: Path) -> None:
    assert read_ledgers(tmp_path) == ({}, False)


def test_lines_of_all_ranks_count(tmp_path: Path) -> None:
    write(tmp_path, ledger=A + C, ledger_0=B, ledger_11=D)
    assert read_ledgers(tmp_path) == (dict(enumerate(ENTRIES)), True)


def test_other_files_of_the_array_are_no_ledgers(tmp_path: Path) -> None:
    (tmp_path / "ledger.jsonl.tmp").write_bytes(b"x")
    (tmp_path / "provenance.jsonl").write_bytes(b"x")
    assert read_ledgers(tmp_path) == ({}, False)


TORN = {
    "without its end": A + B + C[:-20],
    "without its newline": A + B + C[:-1],
    "as zeros after a power cut": A + B + b"\0" * 50,
    "as zeros with a newline": A + B + b"\0" * 50 + b"\n",
}


@pytest.mark.parametrize("content", TORN.values(), ids=TORN)
def test_a_torn_last_line_is_dropped_and_the_ledger_wants_merging(tmp_path: Path, content: bytes) -> None:
    write(tmp_path, ledger_0=content)
    entries, to_merge = read_ledgers(tmp_path)
    assert sorted(entries) == [0, 1]
    assert to_merge
    merge_ledgers(tmp_path, entries.values())
    assert read_ledgers(tmp_path) == (entries, False)


def test_a_merged_ledger_that_was_cut_loses_its_last_line_only(tmp_path: Path) -> None:
    write(tmp_path, ledger=A + B + C[:-9])
    assert shards(tmp_path) == [0, 1]
    assert read_ledgers(tmp_path)[1]


def with_crc(content: dict[str, Any]) -> bytes:
    return canonical_json({**content, "crc32c": google_crc32c.value(canonical_json(content))}) + b"\n"


GOOD = {"shard": 1, "first": 3, "count": 3, "bytes": 1001, "sha256": "0" * 64}
DAMAGED = {
    "a flipped digit": B.replace(b"1001", b"1002"),
    "an edited crc": B.replace(b'"crc32c":', b'"crc32c":1'),
    "an empty line": b"\n",
    "not json": b"{]\n",
    "not an object": b"[1,2]\n",
    "a number": b"7\n",
    "deep": b"[" * 100_000 + b"\n",
    "other spacing": B.replace(b",", b", "),
    "a field too many": with_crc({**GOOD, "more": 1}),
    "a field too few": with_crc({key: value for key, value in GOOD.items() if key != "first"}),
    "a shard that is text": with_crc({**GOOD, "shard": "1"}),
    "a shard that is a fraction": with_crc({**GOOD, "shard": 1.5}),
    "a shard that is true": with_crc({**GOOD, "shard": True}),
    "a shard that is a list": with_crc({**GOOD, "shard": [1]}),
    "a count beyond all numbers": b'{"bytes":1,"count":1e999,"crc32c":1,"first":3,"sha256":"0","shard":1}\n',
    "a digest that is a number": with_crc({**GOOD, "sha256": 5}),
}


@pytest.mark.parametrize("line", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_line_before_a_good_one_is_corruption(tmp_path: Path, line: bytes) -> None:
    write(tmp_path, ledger_0=A + line + C)
    with pytest.raises(StoreCorruptError, match=r"ledger-0\.jsonl: line 2 is damaged"):
        read_ledgers(tmp_path)


@pytest.mark.parametrize("line", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_last_line_of_the_merged_ledger_is_corruption_too(tmp_path: Path, line: bytes) -> None:
    """It was renamed into place whole: no kill explains such a line."""
    write(tmp_path, ledger=A + line)
    with pytest.raises(StoreCorruptError, match=r"ledger\.jsonl: line 2 is damaged"):
        read_ledgers(tmp_path)


@pytest.mark.parametrize("ledgers", [{"ledger": B + OTHER_B}, {"ledger": B, "ledger_0": OTHER_B}], ids=["one", "two"])
def test_two_differing_lines_for_a_shard_are_corruption(tmp_path: Path, ledgers: dict[str, bytes]) -> None:
    write(tmp_path, **ledgers)
    with pytest.raises(StoreCorruptError, match="two differing lines for shard 1"):
        read_ledgers(tmp_path)


def test_the_same_line_twice_is_one(tmp_path: Path) -> None:
    write(tmp_path, ledger=A + B, ledger_0=B + A + A)
    assert shards(tmp_path) == [0, 1]


def test_a_merge_sorts_all_lines_into_one_ledger(tmp_path: Path) -> None:
    write(tmp_path, ledger=C, ledger_0=D + A, ledger_1=B)
    merge_ledgers(tmp_path, read_ledgers(tmp_path)[0].values())
    assert [path.name for path in tmp_path.iterdir()] == ["ledger.jsonl"]
    assert (tmp_path / "ledger.jsonl").read_bytes() == A + B + C + D == encode_ledger(reversed(ENTRIES))


def test_the_content_digest_does_not_depend_on_how_the_lines_lie(tmp_path: Path) -> None:
    write(tmp_path, ledger_0=D + A, ledger_1=C + B)
    entries = read_ledgers(tmp_path)[0]
    assert content_digest(entries.values()) == content_digest(ENTRIES)
    merge_ledgers(tmp_path, entries.values())
    assert content_digest(read_ledgers(tmp_path)[0].values()) == content_digest(ENTRIES)


class KilledError(BaseException):
    """Stands for a SIGKILL."""


def killing(function: Callable[..., Any], countdown: list[int], after: bool) -> Callable[..., Any]:
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        countdown[0] -= 1
        if countdown[0] == 0 and not after:
            raise KilledError
        result = function(*args, **kwargs)
        if countdown[0] == 0:
            raise KilledError
        return result

    return wrapped


@pytest.mark.parametrize("after", [False, True], ids=["before the step", "after the step"])
@pytest.mark.parametrize("step", range(1, 9))
def test_a_kill_at_any_step_of_a_merge_loses_no_line(tmp_path: Path, step: int, after: bool) -> None:
    write(tmp_path, ledger=C, ledger_0=D + A, ledger_1=B)
    (tmp_path / "ledger.jsonl.tmp").write_bytes(b"of an earlier kill")
    with pytest.MonkeyPatch.context() as patch:
        countdown = [step]
        for target, name in (
            (cache.ledger, "write_new"),
            (cache.ledger, "sync_folder"),
            (Path, "rename"),
            (Path, "unlink"),
        ):
            patch.setattr(target, name, killing(getattr(target, name), countdown, after))
        if step <= 7:  # unlink, write, rename, sync, unlink, unlink, sync
            with pytest.raises(KilledError):
                merge_ledgers(tmp_path, ENTRIES)
        else:
            merge_ledgers(tmp_path, ENTRIES)
    assert shards(tmp_path) == [0, 1, 2, 3]
    merge_ledgers(tmp_path, read_ledgers(tmp_path)[0].values())
    assert [path.name for path in tmp_path.iterdir()] == ["ledger.jsonl"]
    assert (tmp_path / "ledger.jsonl").read_bytes() == A + B + C + D


def test_a_ledger_that_a_writer_merges_meanwhile_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, ledger_0=A + B)
    real = cache.ledger._ledger_names

    def merged_after_listing(folder: Path) -> list[str]:
        monkeypatch.setattr(cache.ledger, "_ledger_names", real)
        names = real(folder)
        merge_ledgers(folder, ENTRIES[:2])
        return names

    monkeypatch.setattr(cache.ledger, "_ledger_names", merged_after_listing)
    assert shards(tmp_path) == [0, 1]

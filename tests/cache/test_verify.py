"""What `inspect-cache --verify` finds, and how it names it. Single bytes of a shard are in test_shard.py."""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import google_crc32c
import pytest

from cache.catalog import read_catalog
from cache.ledger import LedgerEntry
from cache.shard import ShardProblem
from cache.storage import ArrayStorage
from cache.verify import Ledger, Problem, find_problems, read_ledgers
from cache.zarr_storage import ZarrArray
from data.errors import StoreError

if TYPE_CHECKING:
    from tests.cache.conftest import TinyStores

FEATURES, LOGITS, TEXT = "dino/original/features", "clip/hflip/logits", "clip/text_embeddings"
HFLIP = "dino/hflip/features"
CHUNK = 3 * 2 * 5 * 2 + 4


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 0x80
    path.write_bytes(data)


def replace(path: Path, old: bytes, new: bytes) -> None:
    path.write_bytes(path.read_bytes().replace(old, new))


def swap(a: Path, b: Path) -> None:
    a.rename(a.with_name("aside"))
    b.rename(a)
    a.with_name("aside").rename(b)


def rewrite_sample(path: Path) -> None:
    """Change the first sample and give it the checksum that it then has."""
    data = bytearray(path.read_bytes())
    data[0] ^= 1
    data[CHUNK - 4 : CHUNK] = google_crc32c.value(bytes(data[: CHUNK - 4])).to_bytes(4, "little")
    path.write_bytes(data)


def drop_from_index(path: Path, place: int) -> None:
    """Mark the sample at a place as never written, in an index whose checksum holds."""
    data = path.read_bytes()
    index = bytearray(data[-3 * 16 - 4 : -4])
    index[16 * place : 16 * place + 16] = b"\xff" * 16
    path.write_bytes(data[: -len(index) - 4] + index + google_crc32c.value(bytes(index)).to_bytes(4, "little"))


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


Expected = tuple[str, int | None, int | None, str]
# What is done to a complete store; what must be found; whether that takes --verify.
DAMAGE: dict[str, tuple[Callable[[Path], Any], list[Expected], bool]] = {
    "a sample's payload": (
        lambda s: flip(s / FEATURES / "c/1/0/0/0", CHUNK + 3),
        [(FEATURES, 1, 4, "the sample fails its checksum")],
        True,
    ),
    "a sample's checksum": (
        lambda s: flip(s / FEATURES / "c/2/0/0/0", CHUNK - 1),
        [(FEATURES, 2, 6, "the sample fails its checksum")],
        True,
    ),
    "the index": (
        lambda s: flip(s / FEATURES / "c/1/0/0/0", -20),
        [(FEATURES, 1, None, "the shard index fails its checksum")],
        False,
    ),
    "the index's checksum": (
        lambda s: flip(s / FEATURES / "c/1/0/0/0", -1),
        [(FEATURES, 1, None, "the shard index fails its checksum")],
        False,
    ),
    "a chunk of a small array": (
        lambda s: flip(s / LOGITS / "c/0/0", 5),
        [(LOGITS, 0, None, "the shard's one chunk fails its checksum")],
        True,
    ),
    "the padding of the last chunk": (
        lambda s: flip(s / LOGITS / "c/2/0", 20),
        [(LOGITS, 2, None, "the shard's one chunk fails its checksum")],
        True,
    ),
    "two samples and another array": (
        lambda s: (flip(s / FEATURES / "c/0/0/0/0", 0), flip(s / FEATURES / "c/0/0/0/0", CHUNK),
                   flip(s / LOGITS / "c/1/0", 0)),
        [(LOGITS, 1, None, "the shard's one chunk fails its checksum"),
         (FEATURES, 0, 0, "the sample fails its checksum"), (FEATURES, 0, 1, "the sample fails its checksum")],
        True,
    ),
    "a shard cut short": (
        lambda s: os.truncate(s / FEATURES / "c/0/0/0/0", 100),
        [(FEATURES, 0, None, "expected 244 bytes, found 100")],
        False,
    ),
    "a shard gone": (
        lambda s: (s / LOGITS / "c/1/0").unlink(),
        [(LOGITS, 1, None, "committed, but its file is missing")],
        False,
    ),
    "the folder of a shard gone": (
        lambda s: shutil.rmtree(s / FEATURES / "c/1"),
        [(FEATURES, 1, None, "committed, but its file is missing")],
        False,
    ),
    "a pipe for a shard": (
        lambda s: pipe(s / LOGITS / "c/1/0"),
        [(LOGITS, 1, None, "expected a regular file, found something else")],
        False,
    ),
    "two shards exchanged": (
        lambda s: swap(s / FEATURES / "c/0/0/0/0", s / FEATURES / "c/1/0/0/0"),
        [(FEATURES, 0, None, "two shards are exchanged: shard 0 holds shard 1's bytes"),
         (FEATURES, 1, None, "two shards are exchanged: shard 1 holds shard 0's bytes")],
        True,
    ),
    "two shards of two views exchanged": (
        lambda s: swap(s / LOGITS / "c/2/0", s / "clip/original/logits/c/2/0"),
        [("clip/original/logits", 2, None, f"two shards are exchanged: shard 2 holds the bytes of shard 2 of {LOGITS}"),
         (LOGITS, 2, None, "shard 2 holds the bytes of shard 2 of clip/original/logits")],
        True,
    ),
    "a shard over another": (
        lambda s: shutil.copy(s / FEATURES / "c/0/0/0/0", s / FEATURES / "c/1/0/0/0"),
        [(FEATURES, 1, None, "another shard's file lies here: shard 1 holds shard 0's bytes")],
        True,
    ),
    "a shard of another view": (
        lambda s: shutil.copy(s / "dino/hflip/features/c/0/0/0/0", s / FEATURES / "c/0/0/0/0"),
        [(FEATURES, 0, None, f"another shard's file lies here: shard 0 holds the bytes of shard 0 of {HFLIP}")],
        True,
    ),
    "a sample written anew with its checksum": (
        lambda s: rewrite_sample(s / FEATURES / "c/1/0/0/0"),
        [(FEATURES, 1, None, "the file is not the one that was committed (its SHA-256 differs)")],
        True,
    ),
    "a sample that the index lacks": (
        lambda s: drop_from_index(s / FEATURES / "c/1/0/0/0", place=2),
        [(FEATURES, 1, 5, "the shard index says that sample 5 was never written")],
        False,
    ),
    "a ledger's line and a sample of another shard": (
        lambda s: (replace(s / FEATURES / "ledger.jsonl", b'"shard":0', b'"shard":5'),
                   flip(s / FEATURES / "c/1/0/0/0", 0)),
        [(FEATURES, None, None, "ledger.jsonl: line 1 is damaged; no sound line commits shard 0"),
         (FEATURES, 1, 3, "the sample fails its checksum")],
        True,
    ),
    "a ledger's first line": (
        lambda s: replace(s / LOGITS / "ledger.jsonl", b'"shard":0', b'"shard":5'),
        [(LOGITS, None, None, "ledger.jsonl: line 1 is damaged; no sound line commits shard 0")],
        False,
    ),
    "a ledger's last line": (
        lambda s: replace(s / LOGITS / "ledger.jsonl", b'"shard":2', b'"shard":5'),
        [(LOGITS, None, None, "ledger.jsonl: line 3 is damaged; no sound line commits shard 2")],
        False,
    ),
    "a ledger of another array": (
        lambda s: shutil.copy(s / FEATURES / "ledger.jsonl", s / LOGITS / "ledger.jsonl"),
        [(LOGITS, 0, None, "ledger: expected first, count, bytes (0, 3, 52), found (0, 3, 244)"),
         (LOGITS, 1, None, "ledger: expected first, count, bytes (3, 3, 52), found (3, 3, 244)"),
         (LOGITS, 2, None, "ledger: expected first, count, bytes (6, 1, 52), found (6, 1, 116)")],
        False,
    ),
    "a pipe for a ledger": (
        lambda s: pipe(s / LOGITS / "ledger.jsonl"),
        [(LOGITS, None, None, "ledger.jsonl: expected a regular file, found something else; no sound line commits"
                              " shard 0, 1, 2")],
        False,
    ),
    "text embeddings": (lambda s: flip(s / TEXT / "c/0/0", 9), [(TEXT, 0, None, "checksum fails")], False),
    "the checksum of text embeddings": (
        lambda s: flip(s / TEXT / "c/0/0", -1), [(TEXT, 0, None, "checksum fails")], False,
    ),
    "text embeddings gone": (
        lambda s: (s / TEXT / "c/0/0").unlink(),
        [(TEXT, 0, None, "c/0/0: shard 0 is committed, but its file is missing")],
        False,
    ),
    "the samples": (
        lambda s: replace(s / "samples.jsonl", b"VOC2007/000004", b"VOC2007/000009"),
        [("samples.jsonl", None, None, "the file was edited")],
        False,
    ),
    "the samples gone": (
        lambda s: (s / "samples.jsonl").unlink(), [("samples.jsonl", None, None, "missing")], False,
    ),
}  # fmt: skip


@pytest.mark.parametrize(("damage", "expected", "needs_verify"), DAMAGE.values(), ids=DAMAGE)
def test_damage_is_found_and_named(
    store: Path, damage: Callable[[Path], Any], expected: list[Expected], needs_verify: bool
) -> None:
    assert find_problems(read_catalog(store), verify=True) == []
    damage(store)
    found = find_problems(read_catalog(store), verify=True)
    assert [(p.array, p.shard, p.sample) for p in found] == [e[:3] for e in expected]
    for problem, (*_, message) in zip(found, expected, strict=True):
        assert message in problem.problem
    without = find_problems(read_catalog(store), verify=False)
    assert len(without) < len(expected) if needs_verify else len(without) == len(expected)


def test_no_flipped_bit_of_any_file_is_missed(stores: TinyStores) -> None:
    """Every file of a small store but for provenance: all bytes of the short ones, some twenty of the long ones. The
    newline of a ledger's last line is told otherwise: without it the line is no commit, and its samples are missing."""
    store = stores.build(stores.plan(4, feature_dtype="int8", views=("hflip",)))
    for path in sorted(p for p in store.rglob("*") if p.is_file() and p.name != "provenance.jsonl"):
        data = path.read_bytes()
        for position in {*range(0, len(data), max(1, len(data) // 20)), len(data) - 1}:
            path.write_bytes(data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :])
            try:
                catalog = read_catalog(store)
                committed = [len(ledger.entries) for ledger in read_ledgers(catalog).values()]
                told = min(committed) < 2 or find_problems(catalog, verify=True) != []
            except StoreError:
                told = True
            assert told, f"{path.relative_to(store)}, byte {position}"
        path.write_bytes(data)
    assert find_problems(read_catalog(store), verify=True) == []


@pytest.mark.skipif(sys.platform != "linux", reason="asks /proc which file a descriptor belongs to")
@pytest.mark.parametrize("container", ["zarr", "hdf5"])
def test_a_flipped_bit_is_named_in_any_container(stores: TinyStores, container: str) -> None:
    catalog = read_catalog(stores.build(stores.plan(format=container)))
    storage = catalog.storage.array(catalog.teachers["dino"].views["hflip"].layouts["features"])
    descriptor, extents = storage.open_shard(1)
    path = Path(f"/proc/self/fd/{descriptor}").readlink()
    os.close(descriptor)
    flip(path, extents.samples[2] + 7)
    flip(path, extents.checksums[1])
    found = [("dino/hflip/features", 1, sample) for sample in (4, 5)]
    assert [(p.array, p.shard, p.sample) for p in find_problems(catalog, verify=True)] == found


def test_a_ledger_that_cannot_be_read_is_a_problem(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: ZarrArray, **_: Any) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(ZarrArray, "read_ledger", broken)
    ledgers = read_ledgers(read_catalog(store))
    assert ledgers[FEATURES] == Ledger({}, "the ledger cannot be read: Input/output error")
    assert len(find_problems(read_catalog(store), verify=True)) == len(ledgers)


def test_an_interrupt_does_not_wait_for_the_whole_store(whole_store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun = []

    def slow(_: ArrayStorage, entry: LedgerEntry) -> list[ShardProblem]:
        begun.append(entry)
        time.sleep(0.02)
        return []

    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("cache.verify.verify_shard", slow)
    with pytest.raises(KeyboardInterrupt):
        find_problems(read_catalog(whole_store), verify=True, progress=interrupt)
    assert len(begun) < 24


def test_a_shard_that_cannot_be_read_is_a_problem(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> bytes:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "pread", broken)
    found = find_problems(read_catalog(store), verify=True)
    assert Problem(FEATURES, 0, None, "cannot be read: Input/output error") in found


def test_what_is_merely_missing_is_no_problem(stores: TinyStores) -> None:
    assert find_problems(read_catalog(stores.build(limit=5)), verify=True) == []


def test_progress_counts_every_committed_byte(whole_store: Path) -> None:
    seen: list[int] = []
    find_problems(read_catalog(whole_store), verify=True, progress=seen.append)
    files = [p for p in whole_store.rglob("*") if p.is_file() and "c" in p.relative_to(whole_store).parts]
    assert sum(seen) == sum(p.stat().st_size for p in files if TEXT not in str(p))

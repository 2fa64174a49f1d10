"""A damaged store, repaired: what is damaged is written again, nothing else is touched."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from cache.catalog import read_catalog
from cache.layout import FORMAT_VERSION
from cache.verify import find_problems
from cache.writer import open_writer
from data.errors import StoreCorruptError, StoreStaleError

if TYPE_CHECKING:
    from tests.cache.conftest import TinyStores

FEATURES, LOGITS, TEXT = "dino/original/features", "clip/hflip/logits", "clip/text_embeddings"


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 0x20
    path.write_bytes(data)


def replace(path: Path, old: bytes, new: bytes) -> None:
    assert old in path.read_bytes()
    path.write_bytes(path.read_bytes().replace(old, new, 1))


def swap(a: Path, b: Path) -> None:
    first, second = a.read_bytes(), b.read_bytes()
    a.write_bytes(second)
    b.write_bytes(first)


def ledger_line(store: Path, number: int, change: Callable[[bytes], bytes]) -> None:
    path = store / FEATURES / "ledger.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    lines[number] = change(lines[number])
    path.write_bytes(b"".join(lines))


Damage = Callable[[Path], Any]
# What is done to a complete store, and the shards that are written again.
SHARDS: dict[str, tuple[Damage, set[tuple[str, int]]]] = {
    "a flipped bit in a sample": (lambda s: flip(s / FEATURES / "c/1/0/0/0", 9), {(FEATURES, 1)}),
    "a flipped bit in an index": (lambda s: flip(s / FEATURES / "c/2/0/0/0", -20), {(FEATURES, 2)}),
    "a truncated shard": (lambda s: os.truncate(s / LOGITS / "c/0/0", 7), {(LOGITS, 0)}),
    "a missing shard": (lambda s: (s / LOGITS / "c/1/0").unlink(), {(LOGITS, 1)}),
    "exchanged shards": (
        lambda s: swap(s / FEATURES / "c/0/0/0/0", s / FEATURES / "c/1/0/0/0"),
        {(FEATURES, 0), (FEATURES, 1)},
    ),
    "a damaged ledger line": (lambda s: ledger_line(s, 0, lambda line: b"#" + line), {(FEATURES, 0)}),
    "a ledger line more that differs": (
        lambda s: ledger_line(s, 1, lambda line: line + line.replace(b'"first":3', b'"first":4')),
        set(),
    ),
    "no ledger": (lambda s: (s / LOGITS / "ledger.jsonl").unlink(), {(LOGITS, 0), (LOGITS, 1), (LOGITS, 2)}),
    "a ledger that is a link": (
        lambda s: ((s / LOGITS / "ledger.jsonl").unlink(), (s / LOGITS / "ledger.jsonl").symlink_to("/dev/zero")),
        {(LOGITS, 0), (LOGITS, 1), (LOGITS, 2)},
    ),
    "two arrays at once": (
        lambda s: (flip(s / FEATURES / "c/1/0/0/0", 9), flip(s / LOGITS / "c/2/0", 1)),
        {(FEATURES, 1), (LOGITS, 2)},
    ),
}
METADATA: dict[str, Damage] = {
    "a teacher's text embeddings": lambda s: flip(s / TEXT / "c/0/0", 5),
    "no text embeddings": lambda s: (s / TEXT / "c/0/0").unlink(),
    "an array's metadata": lambda s: replace(s / FEATURES / "zarr.json", b"float16", b"float32"),
    "no metadata of an array": lambda s: (s / FEATURES / "zarr.json").unlink(),
    "no metadata of a constant": lambda s: (s / TEXT / "zarr.json").unlink(),
    "a value of a view's manifest": lambda s: replace(s / "dino/original/zarr.json", b"float16", b"float32"),
    "a key of a view's manifest": lambda s: replace(s / "dino/original/zarr.json", b'"layout"', b'"layOut"'),
    "a manifest that is no JSON any more": lambda s: replace(s / "clip/zarr.json", b'"key":', b'"key"x'),
    "a manifest's digest": lambda s: replace(s / "clip/zarr.json", b'"teachonce_sha256": "', b'"teachonce_sha256": "0'),
    "the root manifest": lambda s: replace(s / "zarr.json", b'"limit": null', b'"limit": 1000'),
    "the samples": lambda s: replace(s / "samples.jsonl", b"000001", b"000009"),
    "no samples": lambda s: (s / "samples.jsonl").unlink(),
}


def repaired(stores: TinyStores, store: Path) -> dict[tuple[str, int], bool]:
    """What a repairing writer wrote again, and whether the bytes were those that the ledger recorded."""
    with open_writer(store, stores.plan(), repair=True) as writer:
        stores.fill(writer)
    return {(repair.array, repair.shard): repair.same_bytes for repair in writer.repaired}


def mtimes(store: Path) -> dict[str, int]:
    shards = (path for path in store.rglob("*") if path.is_file() and "c" in path.parts)
    return {str(path.relative_to(store)): path.stat().st_mtime_ns for path in shards}


@pytest.mark.parametrize(("damage", "shards"), SHARDS.values(), ids=SHARDS)
def test_damaged_shards_are_written_again_and_no_other(
    stores: TinyStores, store: Path, tree_of: Any, damage: Damage, shards: set[tuple[str, int]]
) -> None:
    whole = tree_of(store)
    damage(store)
    before = mtimes(store)
    with open_writer(store, stores.plan(), repair=True) as writer:
        missing = {(f"{m.teacher}/{m.view}/{name}", m.shard) for m in writer.missing() for name in m.arrays}
        assert missing == shards
        stores.fill(writer)
    assert tree_of(store) == whole
    assert find_problems(read_catalog(store), verify=True) == []
    rewritten = {name for name, time in mtimes(store).items() if before.get(name) != time}
    assert {name.split("/c/")[0] for name in rewritten} == {array for array, _ in shards}
    assert len(rewritten) == len(shards)


@pytest.mark.parametrize("damage", METADATA.values(), ids=METADATA)
def test_damaged_metadata_is_mended_and_no_shard_is_touched(
    stores: TinyStores, store: Path, tree_of: Any, damage: Damage
) -> None:
    whole = tree_of(store)
    damage(store)
    before = mtimes(store)
    assert repaired(stores, store) == {}
    assert tree_of(store) == whole
    changed = {name.split("/c/")[0] for name, time in mtimes(store).items() if before.get(name) != time}
    assert changed <= {TEXT}


def test_the_whole_store_is_there_again_whatever_was_damaged_at_once(
    stores: TinyStores, store: Path, tree_of: Any
) -> None:
    whole = tree_of(store)
    for damage in (SHARDS["two arrays at once"][0], METADATA["the samples"], METADATA["a manifest's digest"]):
        damage(store)
    assert repaired(stores, store) == {(FEATURES, 1): True, (LOGITS, 2): True}
    assert tree_of(store) == whole


def test_a_sound_store_is_left_as_it_is(stores: TinyStores, store: Path, tree_of: Any) -> None:
    before, times = tree_of(store), mtimes(store)
    assert repaired(stores, store) == {}
    assert (tree_of(store), mtimes(store)) == (before, times)


def test_without_repair_the_damage_is_refused_and_the_next_command_named(stores: TinyStores, store: Path) -> None:
    flip(store / FEATURES / "c/2/0/0/0", -20)
    with pytest.raises(StoreCorruptError) as caught:
        stores.build(name=store.name)
    assert caught.value.message == "dino/original/features: shard 2: the shard index fails its checksum"
    assert caught.value.hint is not None
    assert "--repair" in caught.value.hint


def test_other_bytes_than_the_recorded_ones_are_told_and_noted(stores: TinyStores, store: Path) -> None:
    recorded = json.loads((store / FEATURES / "ledger.jsonl").read_bytes().splitlines()[1])["sha256"]
    flip(store / FEATURES / "c/1/0/0/0", 9)
    with open_writer(store, stores.plan(), repair=True) as writer:
        (missing,) = writer.missing()
        outputs = stores.outputs(missing)
        writer.commit(missing, {**outputs, "features": outputs["features"] + np.float32(0.5)})
        writer.note_provenance("dino", "original", {"host": "here"})
    (repair,) = writer.repaired
    assert (repair.array, repair.shard, repair.sha256_was, repair.same_bytes) == (FEATURES, 1, recorded, False)
    now = json.loads((store / FEATURES / "ledger.jsonl").read_bytes().splitlines()[1])["sha256"]
    note = json.loads((store / FEATURES / "provenance.jsonl").read_bytes().splitlines()[-1])
    assert note["repaired"] == [{"shard": 1, "was": recorded, "is": now}]


UNPROVABLE: dict[str, Damage] = {
    "a manifest without digest or content": lambda s: (s / "dino/zarr.json").write_bytes(b"{}"),
    "no manifest at all": lambda s: (s / "dino/original/zarr.json").unlink(),
}


@pytest.mark.parametrize("damage", UNPROVABLE.values(), ids=UNPROVABLE)
def test_a_manifest_of_which_nothing_is_left_is_not_made_up(
    stores: TinyStores, store: Path, tree_of: Any, damage: Damage
) -> None:
    damage(store)
    before = tree_of(store)
    with pytest.raises(StoreCorruptError):
        repaired(stores, store)
    assert tree_of(store) == before


def test_repair_does_not_take_another_teacher_for_the_stored_one(stores: TinyStores, store: Path) -> None:
    flip(store / FEATURES / "c/1/0/0/0", 9)
    other = stores.plan(teachers=[stores.teacher("dino", identity={"spec": "another"}), "clip"])
    with (
        pytest.raises(StoreStaleError, match=r"dino\.spec: stored dino, found another"),
        open_writer(store, other, repair=True),
    ):
        raise AssertionError("opened")


def test_a_newer_format_is_not_repaired(stores: TinyStores, store: Path) -> None:
    replace(store / "zarr.json", b'"format_version": 1', b'"format_version": %d' % (FORMAT_VERSION + 1))
    with pytest.raises(StoreStaleError, match="newer"):
        repaired(stores, store)


def test_progress_counts_every_committed_byte(stores: TinyStores, store: Path) -> None:
    seen: list[int] = []
    with open_writer(store, stores.plan(), repair=True, progress=seen.append):
        pass
    lines = [json.loads(line) for path in store.rglob("ledger.jsonl") for line in path.read_bytes().splitlines()]
    assert sum(seen) == sum(line["bytes"] for line in lines)

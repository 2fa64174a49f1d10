"""Hostile stores: metadata, ledgers and indices with anything in them. A store is untrusted input.

Whatever stands there: no error outside the project's own tree, no byte from outside the store's files, and no memory by
a size that a file merely claims.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import os
import struct
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from cache.catalog import read_catalog
from cache.reader import TeacherStore
from cache.writer import open_writer
from data.errors import StoreError, TeachOnceError
from tests.cache.hostile_store import Victim, canonical, crc, forged, guarded, ledger_line, sealed
from tests.cache.power_loss import folder_in_memory

FEATURES = "dino/original/features"
CHUNK = 3 * 2 * 5 * 2 + 4  # one sample of FEATURES and its checksum
ABSENT = 2**64 - 1


@pytest.fixture(scope="module")
def victim() -> Iterator[Victim]:
    with folder_in_memory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)
        yield Victim(folder, "zarr", 32 << 20)


@pytest.fixture(scope="module")
def hdf5() -> Iterator[Victim]:
    with folder_in_memory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)
        yield Victim(folder, "hdf5", 96 << 20)  # a header may have 64 MB


def test_forging_nothing_gives_the_store_as_it_is(victim: Victim) -> None:
    files = forged(victim, lambda _: None)
    assert {name: json.loads(content) for name, content in files.items()} == victim.manifests
    assert ledger_line(**{k: v for k, v in json.loads(victim.files[f"{FEATURES}/ledger.jsonl"].split()[0]).items()
                          if k != "crc32c"}).strip() == victim.files[f"{FEATURES}/ledger.jsonl"].split()[0]  # fmt: skip


NUMBERS = st.sampled_from([0, -1, 1, 2, 3, 4, 7, 65_536, 65_537, 10**12, 2**31, 2**63, 2**64, 10**30, 1.5, 1e300])
ODD: st.SearchStrategy[Any] = NUMBERS | st.sampled_from(
    [None, True, False, "", "x", "3", "../dino", "/etc/passwd", "\ud800", "hflip", "float64", "object", "NaN", [], {},
     [1], {"a": 1}, [[[[]]]], float("nan"), float("inf"), "A" * 10_000]
)  # fmt: skip
"""What may stand where something else should."""


@st.composite
def other_bytes(draw: st.DrawFn, content: bytes) -> bytes:
    """The content with some pieces left out, put in, put elsewhere or replaced."""
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, len(content)))
        end = min(len(content), start + draw(st.integers(0, 40)))
        piece = draw(st.binary(max_size=12) | st.just(content[start:end] * 2) | st.just(b"\n") | st.just(b"9" * 5000))
        content = content[:start] + piece + content[end:]
    return content


@st.composite
def other_json(draw: st.DrawFn, value: Any) -> Any:
    """The value with one part of it, at any depth, replaced, removed or added."""
    value = json.loads(json.dumps(value))
    parent, ways = value, list(value)
    for _ in range(draw(st.integers(0, 6))):
        key = draw(st.sampled_from(sorted(ways)))
        if not isinstance(parent[key], dict | list) or not parent[key]:
            break
        parent = parent[key]
        ways = list(parent) if isinstance(parent, dict) else list(range(len(parent)))
    key = draw(st.sampled_from(sorted(ways)))
    match draw(st.sampled_from(["replace", "remove", "add"])):
        case "replace":
            parent[key] = draw(ODD)
        case "remove":
            del parent[key]
        case "add" if isinstance(parent, dict):
            parent[draw(st.sampled_from(["a", "", "../x", "\ud800", "format_version", "logits"]))] = draw(ODD)
        case _:
            parent.append(draw(ODD))
    return value


def check_bytes(victim: Victim, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(victim.files)))
    victim.assert_harmless({name: data.draw(other_bytes(victim.files[name]))}, writer=True)


def check_metadata(victim: Victim, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(victim.manifests)))
    metadata = data.draw(other_json(victim.manifests[name]))
    content = sealed(metadata) if data.draw(st.booleans()) else json.dumps(metadata).encode()
    victim.assert_harmless({name: content}, writer=True)


def shape_of(array: str, view: Any) -> Any:
    return view["arrays"][array]["sample_shape"]


def check_forged_numbers(victim: Victim, data: st.DataObject) -> None:
    """One to three numbers of any manifest are others, and all else fits."""
    places: list[tuple[str, Callable[[Any], Any], Any]] = [
        ("", lambda root: root["dataset"], "samples"), ("", lambda root: root["frame"], 0),
        ("clip", lambda teacher: teacher["text_embeddings_shape"], 0),
        ("clip", lambda teacher: teacher["text_embeddings_shape"], 1),
    ]  # fmt: skip
    for view in ("dino/original", "clip/original"):
        places += [(view, lambda v: v["layout"], "shard_samples"), (view, lambda v: v["layout"], "batch_size")]
        for name, array in victim.manifests[f"{view}/zarr.json"]["attributes"]["teachonce"]["arrays"].items():
            shape = partial(shape_of, name)
            places += [(view, shape, axis) for axis in range(len(array["sample_shape"]))]
    edits = data.draw(st.lists(st.tuples(st.sampled_from(places), NUMBERS), min_size=1, max_size=3))

    def change(manifests: dict[str, Any]) -> None:
        for (group, inside, key), number in edits:
            inside(manifests[group])[key] = number

    victim.assert_harmless(forged(victim, change))


def check_samples(victim: Victim, data: st.DataObject) -> None:
    content = data.draw(other_bytes(victim.files["samples.jsonl"]))

    def change(manifests: dict[str, Any]) -> None:
        manifests[""]["dataset"]["samples_sha256"] = hashlib.sha256(content).hexdigest()

    victim.assert_harmless({**forged(victim, change), "samples.jsonl": content})


def check_ledger(victim: Victim, data: st.DataObject) -> None:
    """Lines whose checksums hold, of anything; a row is served only as it was written."""
    fields = {"shard": 0, "first": 0, "count": 2, "bytes": 2 * CHUNK + 36, "sha256": "0" * 64}
    lines = [ledger_line(**{name: data.draw(st.just(value) | ODD) for name, value in fields.items()})
             for _ in range(data.draw(st.integers(1, 4)))]  # fmt: skip
    name = data.draw(st.sampled_from(["ledger.jsonl", "ledger-0.jsonl", "ledger-x.jsonl"]))
    victim.assert_harmless({f"{FEATURES}/ledger.jsonl": b"", f"{FEATURES}/{name}": b"".join(lines)})


def check_index(victim: Victim, data: st.DataObject) -> None:
    """An index whose checksum holds, of any numbers: served is what an index may say, and nothing else."""
    name = f"{FEATURES}/c/0/0/0/0"
    number = st.sampled_from([0, CHUNK, 2 * CHUNK, CHUNK - 4, 1, 2 * CHUNK + 36, 2**63, 2**64 - CHUNK, ABSENT, 10**12])
    numbers = data.draw(
        st.permutations([0, CHUNK]).map(lambda o: [o[0], CHUNK, o[1], CHUNK]) | st.lists(number, min_size=4, max_size=4)
    )
    index = struct.pack("<4Q", *numbers)
    content = victim.files[name][: 2 * CHUNK] + index + struct.pack("<I", crc(index))
    with victim.holding({name: content}):
        reader = TeacherStore(victim.path, check=False).array("dino", "original", "features")
        if sorted(numbers[::2]) == [0, CHUNK] and numbers[1::2] == [CHUNK, CHUNK]:
            for row, offset in enumerate(numbers[::2]):
                assert reader.read(row).tobytes() == content[offset : offset + CHUNK - 4]
        else:
            with pytest.raises(StoreError):
                reader.read(0)
    victim.assert_harmless({name: content})


def check_provenance(victim: Victim, data: st.DataObject) -> None:
    """Notes of anything, whose fields are what they should be or are not."""
    fidelity = {"samples": 3, "cosine_mean": 0.9, "cosine_p01": 0.8, "relative_error": 0.1, "explained_variance": None}
    note = {
        "time": "2026-01-01T00:00:00+00:00", "host": "here", "device": "cpu", "samples": 3, "fidelity": fidelity,
        "teacher_seconds_all_views": 1.5, "command": "python cli.py convert-cache A B --to hdf5",
    }  # fmt: skip
    notes = [data.draw(other_json(note)) for _ in range(data.draw(st.integers(1, 3)))]
    content = b"".join(canonical(each) + b"\n" for each in notes)
    victim.assert_harmless({f"{FEATURES}/provenance.jsonl": data.draw(st.just(content) | other_bytes(content))})


def check_hdf5_bytes(hdf5: Victim, data: st.DataObject) -> None:
    hdf5.assert_harmless({"": data.draw(other_bytes(hdf5.files[""]))}, writer=True)


def check_hdf5_header(hdf5: Victim, data: st.DataObject) -> None:
    """The header with one part of it another, its digest made to fit."""
    content = hdf5.files[""]
    first, header, _ = content.split(b"\n", 2)
    block_bytes = int(first.split()[3])
    other = canonical(data.draw(other_json(json.loads(header)))) + b"\n"
    size = data.draw(st.sampled_from([block_bytes, block_bytes, 0, 91, 92, 512, 1 << 26, 99_999_999]))
    rest = other.ljust(block_bytes - 91, b"\0")
    block = b"TeachOnce HDF5 1 %08d %s\n" % (size, hashlib.sha256(rest).hexdigest().encode()) + rest
    hdf5.assert_harmless({"": block + content[block_bytes:]}, writer=True)


CHECKS = {check.__name__.removeprefix("check_"): check for check in (
    check_bytes, check_metadata, check_forged_numbers, check_samples, check_ledger, check_index, check_provenance
)}  # fmt: skip


def run(check: Callable[[Victim, st.DataObject], None], victim: Victim, examples: int) -> None:
    @settings(max_examples=examples, phases=[Phase.generate, Phase.shrink])
    @given(data=st.data())
    def examples_hold(data: st.DataObject) -> None:
        check(victim, data)

    examples_hold()


HDF5_CHECKS = {"bytes": check_hdf5_bytes, "header": check_hdf5_header}


@pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS)
def test_hostile_content_is_refused_in_plain_words(victim: Victim, check: Any) -> None:
    run(check, victim, 60)


@pytest.mark.parametrize("check", HDF5_CHECKS.values(), ids=HDF5_CHECKS)
def test_hostile_content_of_hdf5_is_refused_in_plain_words(hdf5: Victim, check: Any) -> None:
    run(check, hdf5, 60)


# What a store may claim of itself, everything made to fit, while its files stay as small as they are.
CLAIMS: dict[str, Callable[[dict[str, Any]], object]] = {
    "a million million samples": lambda m: m[""]["dataset"].update(samples=10**12),
    "a shard of a million million samples": lambda m: m["dino/original"]["layout"].update(shard_samples=10**12),
    "a million million classes": lambda m: m["clip"].update(text_embeddings_shape=[10**6, 10**6]),
}


def test_shards_that_are_merely_claimed_cost_nothing(victim: Victim) -> None:
    def claim(manifests: dict[str, Any]) -> None:
        manifests[""]["dataset"]["samples"] = 3_000_000
        manifests["dino/original"]["layout"]["shard_samples"] = 1

    victim.assert_harmless(forged(victim, claim))


@pytest.mark.filterwarnings("ignore:invalid value encountered in matmul:RuntimeWarning")
@pytest.mark.parametrize("stored", [True, False], ids=["as stored", "as computed now"])
def test_a_probe_that_is_not_finite_is_refused(victim: Victim, stored: bool) -> None:
    infinite = np.full(8, np.inf, np.float32)
    probe = {"float32": base64.b64encode(infinite.tobytes()).decode()}
    files = forged(victim, lambda manifests: manifests["dino"].update(probe=probe)) if stored else {}
    teacher = victim.stores.teacher("dino") if stored else victim.stores.teacher("dino", probe=infinite)
    plan = dataclasses.replace(victim.plan, teachers=[teacher])
    with victim.holding(files), pytest.raises(TeachOnceError), open_writer(victim.path, plan):
        pass


# Of one sample, likewise.
SHAPES = {
    "a million million values": [10**6, 10**6, 1],
    "more values than there are addresses": [2**40, 2**40, 2**40],
    "an axis that no index reaches": [1, 1, 10**30],
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_a_shape_that_is_merely_claimed_costs_nothing(victim: Victim, shape: list[int]) -> None:
    def claim(manifests: dict[str, Any]) -> None:
        manifests["dino/original"]["arrays"]["features"]["sample_shape"] = shape

    files = forged(victim, claim)
    victim.assert_harmless(files)
    with victim.holding(files), guarded(victim), pytest.raises(StoreError):
        TeacherStore(victim.path).array("dino", "original", "features").gather([0, 2])


@pytest.mark.parametrize("claim", CLAIMS.values(), ids=CLAIMS)
def test_a_size_that_is_merely_claimed_costs_nothing(victim: Victim, claim: Callable[[dict[str, Any]], object]) -> None:
    files = forged(victim, claim)
    victim.assert_harmless(files)
    with victim.holding(files), guarded(victim), pytest.raises(StoreError):
        read_some(victim.path)


def read_some(path: Path) -> None:
    store = TeacherStore(path)
    store.text_embeddings("clip")
    store.array("dino", "original", "features").gather([0, 2])


@pytest.mark.parametrize("shape", [[1, 10], [10, 1], [2, 4], [10**6, 10**6]], ids=str)
def test_moments_of_a_shape_that_moments_cannot_have_are_refused(victim: Victim, shape: list[int]) -> None:
    """They are [2, C] of the features' C: who adds them up relies on it."""

    def claim(manifests: dict[str, Any]) -> None:
        manifests["dino/original"]["arrays"]["moments"]["sample_shape"] = shape

    with victim.holding(forged(victim, claim)), pytest.raises(StoreError):
        read_catalog(victim.path)


def test_the_largest_number_of_samples_that_may_be_claimed_takes_no_memory_either(victim: Victim) -> None:
    """Its flags are pages that nobody touches: what a process holds for itself is what counts."""

    def claim(manifests: dict[str, Any]) -> None:
        manifests[""]["dataset"]["samples"] = 10**8
        manifests["dino/original"]["layout"]["shard_samples"] = 65_536

    with victim.holding(forged(victim, claim)):
        before = anonymous_bytes()
        reader = TeacherStore(victim.path).array("dino", "original", "features")
        with pytest.raises(StoreError):
            reader.read(0)
        with pytest.raises(StoreError):
            reader.read(10**8 - 1)
        assert anonymous_bytes() - before < 16 << 20


def anonymous_bytes() -> int:
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


@pytest.mark.slow
@pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS)
def test_much_hostile_content_is_refused_in_plain_words(victim: Victim, check: Any) -> None:
    run(check, victim, 800)


@pytest.mark.slow
@pytest.mark.parametrize("check", HDF5_CHECKS.values(), ids=HDF5_CHECKS)
def test_much_hostile_content_of_hdf5_is_refused_in_plain_words(hdf5: Victim, check: Any) -> None:
    run(check, hdf5, 800)

"""Every byte of a small store, damaged: it is found, or nothing that a reader is told differs. And it is repaired."""

from __future__ import annotations

import json
import random
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import google_crc32c
import numpy as np
import pytest

from cache.catalog import read_catalog
from cache.reader import TeacherStore
from cache.summary import summarise
from cache.verify import find_problems
from cache.writer import open_writer
from data.errors import StoreError, StoreWriteError
from data.geometry import VIEWS, View
from tests.cache.conftest import TinyStores
from tests.cache.power_loss import folder_in_memory

if TYPE_CHECKING:
    from cache.plan import StoreFormat

MASKS = (0x01, 0x20, 0x80, 0xFF)  # one bit, a letter's case, a number's sign, everything
SUFFIXES: dict[StoreFormat, str] = {"zarr": ".zarr", "hdf5": ".h5"}


@dataclass(frozen=True)
class Verdict:
    """What became of one damage.

    outcome: `found` (by verifying, or by refusing to open the store); `incomplete` (samples are missed, everything else
    is told as before); `harmless` (nothing differs).  wrong: arrays of which a checking reader serves another value.
    """

    outcome: str
    wrong: frozenset[str] = frozenset()


class Store:
    """A complete store, and what it says undamaged. files: content by path below it; "" is the one file of HDF5."""

    def __init__(self, folder: Path, num_samples: int, shard_samples: int, views: Sequence[View], kind: StoreFormat):
        self.stores = TinyStores(folder)
        self.plan = self.stores.plan(num_samples, shard_samples=shard_samples, views=views, format=kind)
        self.path = folder / f"store{SUFFIXES[kind]}"
        with open_writer(self.path, self.plan) as writer:
            self.stores.fill(writer)
            writer.note_provenance("dino", "original", {"host": "here"})
        self.rows = range(num_samples)
        paths = [path for path in self.path.rglob("*") if path.is_file()] if self.path.is_dir() else [self.path]
        self.files = {str(path.relative_to(self.path)).removeprefix("."): path.read_bytes() for path in paths}
        arrays = [tuple(layout.path.split("/")) for layout in read_catalog(self.path).layouts()]
        self.values = {array: TeacherStore(self.path).array(*array).gather(self.rows) for array in arrays}  # type: ignore[arg-type]
        self.said = self._said()

    def _said(self) -> dict[str, Any]:
        """All that is told of the store but its values: status, images, identity, text embeddings, committed shards."""
        store = TeacherStore(self.path)
        catalog = store.catalog
        summary = summarise(catalog, find_problems(catalog, verify=True), verified=True)
        return {
            "status": summary["status"],
            "identity": [summary["fingerprint"], catalog.root, catalog.fingerprints, catalog.samples, store.row_of_id],
            "teachers": [(teacher.manifest, teacher.views) for teacher in catalog.teachers.values()],
            "text": {key: store.text_embeddings(key).tolist() for key in catalog.teachers if key == "clip"},
            "committed": [[array[field] for field in ("path", "missing", "content")] for array in summary["arrays"]],
        }

    def verdict(self) -> Verdict:
        wrong = frozenset(self._wrongly_served())
        try:
            said = self._said()
        except StoreError:
            return Verdict("found", wrong)
        if said == self.said:
            return Verdict("harmless", wrong)
        if said["status"] == "corrupt":
            return Verdict("found", wrong)
        missed = said | {"committed": self.said["committed"], "status": "complete"} == self.said
        return Verdict("incomplete" if missed and said["status"] == "incomplete" else "another", wrong)

    def _wrongly_served(self) -> Iterator[str]:
        try:
            store = TeacherStore(self.path)
        except StoreError:
            return
        for array, expected in self.values.items():
            for row in self.rows:
                with suppress(StoreError):
                    if not np.array_equal(store.array(*array).read(row), expected[row]):  # type: ignore[arg-type]
                        yield "/".join(array)

    @contextmanager
    def damaged(self, files: dict[str, bytes | None]) -> Iterator[None]:
        """For the block, some files have other bytes, or are gone where those are None."""
        for name, content in files.items():
            if content is None:
                (self.path / name).unlink()
            else:
                (self.path / name).write_bytes(content)
        try:
            yield
        finally:
            for name in files:
                (self.path / name).write_bytes(self.files[name])

    def with_bytes(self, name: str, content: bytes | None) -> Verdict:
        """The verdict where one file has other bytes, or is gone."""
        with self.damaged({name: content}):
            return self.verdict()

    def exchanged(self, a: str, b: str) -> Any:
        """For the block, two files have each other's bytes."""
        return self.damaged({a: self.files[b], b: self.files[a]})


@pytest.fixture(scope="module")
def store() -> Iterator[Store]:
    """Nine kilobytes: small enough to damage each."""
    with folder_in_memory() as folder:
        yield Store(folder, 3, 2, ["original"], "zarr")


@pytest.fixture(scope="module")
def hdf5() -> Iterator[Store]:
    with folder_in_memory() as folder:
        yield Store(folder, 3, 2, ["original"], "hdf5")


@pytest.fixture
def larger() -> Iterator[Store]:
    """With several shards of one size, and of two views."""
    with folder_in_memory() as folder:
        yield Store(folder, 7, 3, VIEWS, "zarr")


def kind(name: str) -> str:
    """Which of the documented kinds of file it is."""
    last = name.rpartition("/")[2]
    return last if "." in last else "shard"


def flipped(content: bytes, position: int, mask: int) -> bytes:
    return content[:position] + bytes([content[position] ^ mask]) + content[position + 1 :]


def all_flips(store: Store) -> list[tuple[str, int, int]]:
    return [(n, p, mask) for n, content in sorted(store.files.items()) for p in range(len(content)) for mask in MASKS]


def all_lengths(store: Store) -> list[tuple[str, int]]:
    return [(name, length) for name, content in sorted(store.files.items()) for length in range(len(content))]


# Where a file that is cut short or gone is no damage: nobody reads the one, and what the other still says is true.
CUT = {"provenance.jsonl": "harmless", "ledger.jsonl": "incomplete"}


def assert_flips_are_found(store: Store, flips: Iterable[tuple[str, int, int]]) -> None:
    for name, position, mask in flips:
        content = store.files[name]
        outcome = "harmless" if kind(name) == "provenance.jsonl" else "found"
        if kind(name) == "ledger.jsonl" and position == len(content) - 1:
            outcome = "incomplete"  # a last line without its newline is dropped, as if the run had not come to it
        found = store.with_bytes(name, flipped(content, position, mask))
        assert found == Verdict(outcome), (name, position, mask)


def assert_cuts_are_found(store: Store, lengths: Iterable[tuple[str, int]]) -> None:
    for name, length in lengths:
        found = store.with_bytes(name, store.files[name][:length])
        assert found == Verdict(CUT.get(kind(name), "found")), (name, length)


def test_a_sample_of_flipped_bytes_and_cut_files_is_found(store: Store) -> None:
    assert store.verdict() == Verdict("harmless")
    generator = random.Random(0)
    assert_flips_are_found(store, generator.sample(all_flips(store), 250))
    assert_cuts_are_found(store, generator.sample(all_lengths(store), 100))


@pytest.mark.slow
def test_every_flipped_byte_is_found(store: Store) -> None:
    flips = all_flips(store)
    assert len(flips) > 36_000
    assert_flips_are_found(store, flips)


@pytest.mark.slow
def test_every_file_cut_to_every_length_is_found(store: Store) -> None:
    assert_cuts_are_found(store, all_lengths(store))


def test_the_last_byte_of_every_file_matters(store: Store) -> None:
    assert_flips_are_found(store, [(name, len(content) - 1, 1) for name, content in store.files.items()])
    assert_cuts_are_found(store, [(name, len(content) - 1) for name, content in store.files.items()])


def test_a_byte_more_is_found(store: Store) -> None:
    for name, content in store.files.items():
        for more in (b"\0", b"x"):
            outcome = {"provenance.jsonl": "harmless", "ledger.jsonl": "harmless"}.get(kind(name), "found")
            assert store.with_bytes(name, content + more) == Verdict(outcome), name


def test_white_space_in_metadata_is_harmless(store: Store) -> None:
    for name, content in store.files.items():
        if kind(name) == "zarr.json":
            for other in (json.dumps(json.loads(content)).encode(), content + b"\n", content.replace(b"\n", b" ")):
                assert store.with_bytes(name, other) == Verdict("harmless"), name


def test_every_file_that_is_gone_is_found_or_missed(store: Store) -> None:
    for name in store.files:
        assert store.with_bytes(name, None) == Verdict(CUT.get(kind(name), "found")), name


def assert_hdf5_flips_are_found(hdf5: Store, positions: Iterable[int], masks: Sequence[int]) -> None:
    """Everything but the provenance, whose places the header's second line tells."""
    content = hdf5.files[""]
    extents = [parts["provenance"] for parts in json.loads(content.split(b"\n", 2)[1])["arrays"].values()
               if "provenance" in parts]  # fmt: skip
    for position in positions:
        harmless = any(start <= position < start + size for start, size in extents)
        for mask in masks:
            found = hdf5.with_bytes("", flipped(content, position, mask))
            assert found == Verdict("harmless" if harmless else "found"), (position, mask)


def test_a_sample_of_flipped_bytes_of_hdf5_and_of_cuts_is_found(hdf5: Store) -> None:
    assert hdf5.verdict() == Verdict("harmless")
    generator, size = random.Random(0), len(hdf5.files[""])
    assert_hdf5_flips_are_found(hdf5, generator.sample(range(size), 60), MASKS)
    for length in (0, 1, size - 1, *generator.sample(range(size), 30)):
        assert hdf5.with_bytes("", hdf5.files[""][:length]) == Verdict("found"), length
    assert hdf5.with_bytes("", hdf5.files[""] + b"x") == Verdict("found")


@pytest.mark.slow
def test_many_flipped_bytes_of_hdf5_are_found(hdf5: Store) -> None:
    assert_hdf5_flips_are_found(hdf5, range(0, len(hdf5.files[""]), 7), [0x01])


def test_every_folder_that_is_gone_is_found_but_those_of_whole_views_and_teachers(larger: Store) -> None:
    """A view or a teacher that is not there was never added, as far as a store can tell: its fingerprint tells."""
    aside = larger.path.with_name("aside")
    for folder in sorted(path for path in larger.path.rglob("*") if path.is_dir()):
        is_part = folder.parent == larger.path or folder.name in VIEWS
        folder.rename(aside)
        assert larger.verdict() == Verdict("another" if is_part else "found"), folder
        if is_part:
            assert read_catalog(larger.path).fingerprint != larger.said["identity"][0]
        aside.rename(folder)


def test_exchanged_shards_of_one_size_are_found_by_verifying_alone(larger: Store) -> None:
    """As docs/cache-format.md says. A reader serves the other shard's samples, and of a short one its padding."""
    shards = [name for name in sorted(larger.files) if kind(name) == "shard" and "text_embeddings" not in name]
    pairs = [(a, b) for a, b in combinations(shards, 2) if len(larger.files[a]) == len(larger.files[b])]
    assert len(pairs) > 50
    for a, b in pairs:
        with larger.exchanged(a, b):
            assert find_problems(read_catalog(larger.path), verify=False) == []
            assert larger.verdict() == Verdict("found", frozenset({array_of(a), array_of(b)})), (a, b)


def array_of(shard: str) -> str:
    return "/".join(shard.split("/")[:3])


@pytest.mark.parametrize("last", ["zarr.json", "ledger.jsonl"])
def test_exchanged_metadata_and_ledgers_are_found(larger: Store, last: str) -> None:
    names = [name for name in sorted(larger.files) if kind(name) == last]
    pairs = [(a, b) for a, b in combinations(names, 2) if larger.files[a] != larger.files[b]]
    assert len(pairs) >= 28
    for a, b in pairs:
        with larger.exchanged(a, b):
            assert larger.verdict() == Verdict("found"), (a, b)


@pytest.mark.parametrize("field", ["shard", "first", "count", "bytes", "sha256"])
def test_a_ledger_line_with_a_checksum_made_to_fit_misleads_no_reader(store: Store, field: str) -> None:
    for name, content in store.files.items():
        if kind(name) == "ledger.jsonl":
            for number, line in enumerate(content.splitlines()):
                fields = json.loads(line)
                del fields["crc32c"]
                fields[field] = "0" * 64 if field == "sha256" else fields[field] + 1
                lines = content.splitlines(keepends=True)
                lines[number] = sealed(fields)
                assert store.with_bytes(name, b"".join(lines)) == Verdict("found"), (name, number)


def sealed(fields: dict[str, Any]) -> bytes:
    """The line as docs/cache-format.md describes it."""

    def canonical(value: Any) -> bytes:
        return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()

    return canonical({**fields, "crc32c": google_crc32c.value(canonical(fields))}) + b"\n"


def repair(store: Store) -> None:
    with open_writer(store.path, store.plan, repair=True) as writer:
        store.stores.fill(writer)


# Of these, each holds what nothing else in the store does: what is left of one may prove nothing.
GROUPS = re.compile(r"((dino|clip)/(original/)?)?zarr\.json")


def assert_repaired(store: Store, name: str, content: bytes | None) -> None:
    """Damage one file, or remove it; resuming with repair restores every byte, or says that it cannot."""
    clean = {path: data for path, data in store.files.items() if kind(path) != "provenance.jsonl"}
    with store.damaged({name: content}):
        if GROUPS.fullmatch(name):
            with suppress(StoreError, StoreWriteError):
                repair(store)
                assert store.verdict() == Verdict("harmless"), (name, content)
        else:
            repair(store)
            assert {path: (store.path / path).read_bytes() for path in clean} == clean, (name, content)


def damages(store: Store) -> list[tuple[str, bytes | None]]:
    flips = [(name, flipped(store.files[name], position, mask)) for name, position, mask in all_flips(store)]
    cuts = [(name, store.files[name][:length]) for name, length in all_lengths(store)]
    return [*flips, *cuts]


def test_a_repair_restores_every_byte(store: Store) -> None:
    for name in store.files:
        assert_repaired(store, name, None)
    for name, content in random.Random(0).sample(damages(store), 60):
        assert_repaired(store, name, content)


@pytest.mark.slow
def test_many_repairs_restore_every_byte(store: Store) -> None:
    for name, content in random.Random(1).sample(damages(store), 3000):
        assert_repaired(store, name, content)


def test_a_repair_restores_folders(larger: Store) -> None:
    """Of shards and of arrays. Of a view or a teacher too: they are added again."""
    for folder in sorted(path.relative_to(larger.path) for path in larger.path.rglob("*") if path.is_dir()):
        shutil.rmtree(larger.path / folder)
        repair(larger)
        assert larger.verdict() == Verdict("harmless"), folder

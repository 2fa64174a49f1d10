"""Edited, exchanged, missing and hostile metadata."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from cache.canonical import digest
from cache.catalog import read_catalog
from data.errors import StoreCorruptError, StoreIncompleteError, StoreMissingError, StoreStaleError, TeachOnceError

if TYPE_CHECKING:
    from tests.cache.conftest import TinyStores


def edit(path: Path, change: Callable[[Any], None], *, seal: bool = False) -> None:
    """Change a `zarr.json`; seal: as a forger would, with the digest made to fit."""
    metadata = json.loads(path.read_bytes())
    change(metadata)
    if seal:
        metadata["attributes"]["teachonce_sha256"] = digest(metadata["attributes"]["teachonce"])
    path.write_text(json.dumps(metadata))


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if isinstance(value, dict | list) and value:
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from leaves(value[key], (*path, key))
    else:
        yield path


def other(value: Any) -> Any:
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    return "original" if value == "hflip" else "hflip" if value == "original" else f"{value}x"


def test_a_store_is_described_as_it_was_planned(stores: TinyStores) -> None:
    plan = stores.plan()
    catalog = read_catalog(stores.build(plan))
    assert catalog.root == plan.root_manifest()
    assert catalog.samples == plan.samples
    assert sorted(catalog.teachers) == ["clip", "dino"]
    assert [layout.path for layout in catalog.layouts() if layout.path.startswith("dino")] == [
        "dino/original/moments", "dino/original/features", "dino/hflip/moments", "dino/hflip/features",
    ]  # fmt: skip
    assert catalog.teacher("dino").manifest == plan.teachers[0].manifest()


def test_every_edited_field_of_every_metadata_file_is_refused(store: Path) -> None:
    """Value by value: manifests, their digests, array metadata."""
    count = 0
    for file in store.rglob("zarr.json"):
        good = file.read_bytes()
        for path in leaves(json.loads(good)):
            metadata = parent = json.loads(good)
            for key in path[:-1]:
                parent = parent[key]
            parent[path[-1]] = other(parent[path[-1]])
            file.write_text(json.dumps(metadata))
            with pytest.raises((StoreCorruptError, StoreStaleError)):
                read_catalog(store)
            count += 1
        file.write_bytes(good)
    assert count > 250
    read_catalog(store)


ROOT, TEACHER, VIEW = "", "dino", "dino/original"
FORGED = {
    "another frame": (ROOT, lambda m: m.update(frame=[512, 512]), "expected fingerprint"),
    "another number of samples": (ROOT, lambda m: m["dataset"].update(samples=6), "expected fingerprint"),
    "other samples": (ROOT, lambda m: m["dataset"].update(samples_sha256="0" * 64), "expected fingerprint"),
    "no samples": (ROOT, lambda m: m["dataset"].update(samples=0), "dataset.samples"),
    "absurdly many samples": (ROOT, lambda m: m["dataset"].update(samples=10**18), "dataset.samples"),
    "a field too many": (ROOT, lambda m: m.update(more=1), "more: Extra inputs"),
    "a field too few": (ROOT, lambda m: m.pop("frame"), "frame: Field required"),
    "no format version": (ROOT, lambda m: m.pop("format_version"), "format_version: Field required"),
    "an older format": (ROOT, lambda m: m.update(format_version=0), "format_version"),
    "a format version that is text": (ROOT, lambda m: m.update(format_version="2"), "format_version"),
    "a number that is text": (ROOT, lambda m: m["dataset"].update(samples="7"), "not the one that was written"),
    "another teacher's identity": (TEACHER, lambda m: m["identity"].update(spec="other"), "expected fingerprint"),
    "another key": (TEACHER, lambda m: m.update(key="clip"), "found that of 'clip'"),
    "a key that is a path": (TEACHER, lambda m: m.update(key="../dino"), "expected a teacher key"),
    "a probe that is no base64": (TEACHER, lambda m: m["probe"].update(float32="#"), "probe.float32"),
    "a probe of odd length": (TEACHER, lambda m: m["probe"].update(float32="AAAA"), "whole float32 numbers"),
    "another view": (VIEW, lambda m: m.update(view="hflip"), "expected the manifest of view original, found hflip"),
    "an array more": (
        VIEW,
        lambda m: m["arrays"].update(logits={"sample_shape": [4], "dtype": "float32", "fingerprint": "f"}),
        "expected fingerprint",
    ),
    "an array that is a path": (
        VIEW, lambda m: m["arrays"].update({"../features": m["arrays"]["features"]}), "expected some of the arrays",
    ),
    "another shape": (VIEW, lambda m: m["arrays"]["features"].update(sample_shape=[2, 3, 5]), "expected fingerprint"),
    "another dtype": (VIEW, lambda m: m["arrays"]["features"].update(dtype="float32"), "expected fingerprint"),
    "another fingerprint": (VIEW, lambda m: m["arrays"]["features"].update(fingerprint="0"), "expected fingerprint"),
    "other shards": (VIEW, lambda m: m["layout"].update(shard_samples=4), "is not what the manifests imply"),
}  # fmt: skip


@pytest.mark.parametrize(("group", "change", "message"), FORGED.values(), ids=FORGED)
def test_a_forged_manifest_that_contradicts_the_rest_is_refused(
    store: Path, group: str, change: Callable[[Any], None], message: str
) -> None:
    edit(store / group / "zarr.json", lambda metadata: change(metadata["attributes"]["teachonce"]), seal=True)
    with pytest.raises(StoreCorruptError, match=message):
        read_catalog(store)


def test_an_edited_manifest_is_named(store: Path) -> None:
    edit(store / "dino" / "zarr.json", lambda metadata: metadata["attributes"]["teachonce"].update(untrained=False))
    with pytest.raises(StoreCorruptError, match=r"dino/zarr\.json: the manifest is not the one that was written"):
        read_catalog(store)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), json.loads("[" * 600 + "]" * 600)])
def test_a_manifest_with_what_cannot_be_hashed_is_refused(store: Path, value: Any) -> None:
    edit(store / "dino/zarr.json", lambda metadata: metadata["attributes"]["teachonce"]["identity"].update(x=value))
    with pytest.raises(StoreCorruptError, match=r"dino/zarr\.json"):
        read_catalog(store)


def test_a_newer_format_is_said_before_anything_else_is_validated(store: Path) -> None:
    edit(
        store / "zarr.json", lambda metadata: metadata["attributes"].update(teachonce={"format_version": 2, "new": {}})
    )
    with pytest.raises(StoreStaleError, match="expected format version 1, found the newer 2") as caught:
        read_catalog(store)
    assert "update TeachOnce" in str(caught.value)


def test_a_view_with_the_manifest_of_another_view_is_refused(store: Path) -> None:
    shutil.copy(store / "dino" / "hflip" / "zarr.json", store / "dino" / "original" / "zarr.json")
    with pytest.raises(StoreCorruptError, match="expected the manifest of view original, found hflip"):
        read_catalog(store)


def test_a_teacher_in_the_folder_of_another_is_refused(store: Path) -> None:
    (store / "dino").rename(store / "vit")
    with pytest.raises(StoreCorruptError, match="expected the manifest of 'vit', found that of 'dino'"):
        read_catalog(store)


def test_an_array_from_another_place_is_refused(store: Path) -> None:
    shutil.copy(store / "clip/original/logits/zarr.json", store / "clip/original/embeddings/zarr.json")
    with pytest.raises(StoreCorruptError, match=r"embeddings/zarr\.json: is not what the manifests imply"):
        read_catalog(store)


@pytest.mark.parametrize("group", ["dino", "dino/original", "dino/original/features", "clip/text_embeddings"])
@pytest.mark.parametrize(
    "content", [None, b"", b"[]", b"null", b'{"attributes": 5}', b'{"attributes": {"teachonce": 5}}']
)
def test_a_part_without_its_metadata_is_corrupt(store: Path, group: str, content: bytes | None) -> None:
    path = store / group / "zarr.json"
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(StoreCorruptError, match=f"{group}/zarr.json"):
        read_catalog(store)


@pytest.mark.parametrize("content", [b"[]", b"{}", b'{"zarr_format": 3, "node_type": "group", "attributes": {}}'])
def test_a_zarr_group_of_others_is_not_a_store(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "zarr.json").write_bytes(content)
    with pytest.raises(StoreMissingError, match="not of a TeachOnce store"):
        read_catalog(tmp_path)


def test_a_path_without_a_store_names_the_stores_beside_it(whole_store: Path, tmp_path: Path) -> None:
    with pytest.raises(StoreMissingError, match=r"typo\.zarr does not exist; stores beside it: .*store\.zarr"):
        read_catalog(whole_store.with_name("typo.zarr"))
    with pytest.raises(StoreMissingError, match="is not a store"):
        read_catalog(tmp_path)
    with pytest.raises(StoreMissingError, match="does not exist"):
        read_catalog(tmp_path / "no" / "such" / "folder")


SAMPLES_EDITS = {
    "a byte": (lambda data: data.replace(b"301", b"302"), "the file was edited"),
    "two lines exchanged": (lambda data: b"".join(sorted(data.splitlines(True), reverse=True)), "the file was edited"),
    "a line gone": (lambda data: b"".join(data.splitlines(True)[1:]), "the file was edited"),
    "nothing": (lambda data: b"", "the file was edited"),
}


@pytest.mark.parametrize(("change", "message"), SAMPLES_EDITS.values(), ids=SAMPLES_EDITS)
def test_edited_samples_are_refused(store: Path, change: Callable[[bytes], bytes], message: str) -> None:
    path = store / "samples.jsonl"
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(StoreCorruptError, match=message):
        _ = read_catalog(store).samples


def test_missing_samples_are_refused(store: Path) -> None:
    (store / "samples.jsonl").unlink()
    with pytest.raises(StoreCorruptError, match=r"samples\.jsonl: missing"):
        _ = read_catalog(store).samples


@pytest.mark.parametrize("part", ["zarr.json", "dino/zarr.json", "dino/original/zarr.json"])
@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/etc/passwd")], ids=["fifo", "link"])
def test_a_pipe_or_a_link_in_place_of_metadata_is_refused(store: Path, part: str, make: Callable[[Path], None]) -> None:
    (store / part).unlink()
    make(store / part)
    with pytest.raises(TeachOnceError):
        read_catalog(store)


@pytest.mark.parametrize("part", ["dino/original", "dino/original/features"])
def test_a_folder_that_leads_out_of_the_store_is_refused(store: Path, tmp_path: Path, part: str) -> None:
    (store / part).rename(tmp_path / "outside")
    (store / part).symlink_to(tmp_path / "outside")
    with pytest.raises(StoreCorruptError, match="symbolic link"):
        read_catalog(store)


def test_what_the_store_lacks_is_said_with_what_it_has(whole_store: Path) -> None:
    catalog = read_catalog(whole_store)
    with pytest.raises(StoreIncompleteError, match=r"no teacher 'vit' in this store \(it has clip, dino\)"):
        catalog.teacher("vit")


def test_a_view_that_the_store_lacks_is_said_with_how_to_add_it(stores: TinyStores) -> None:
    catalog = read_catalog(stores.build(stores.plan(views=("original",))))
    with pytest.raises(
        StoreIncompleteError, match=r"(?s)view 'hflip' is not in the store \(it has original\).*--view hflip"
    ):
        catalog.teacher("dino").view("hflip")

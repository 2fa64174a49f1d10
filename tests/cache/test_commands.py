"""The commands that a store names: split as a shell would, and refused where a note is odd."""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from cache.catalog import read_catalog
from cache.commands import derivation_command, relabelled_from, writing_command
from cache.convert import convert
from cache.derive import ConvertRequest
from cache.relabel import RelabelRequest, relabel

if TYPE_CHECKING:
    from tests.cache.conftest import TinyStores


def note(store: Path, path: str, command: object) -> None:
    catalog = read_catalog(store)
    layout = next(layout for layout in catalog.layouts() if layout.path == path)
    catalog.storage.array(layout).append_provenance({"command": command})


def test_a_command_names_what_the_manifests_imply(stores: TinyStores) -> None:
    store = stores.build()
    assert writing_command(read_catalog(store)) == (
        "python cli.py extract-teachers --voc-root DIR --voc-set 2007:train --teacher clip --teacher dino --untrained"
        f" --shard-samples 3 --out {store}"
    )
    assert writing_command(read_catalog(store), ["dino"]) == (
        "python cli.py extract-teachers --voc-root DIR --voc-set 2007:train --teacher dino --untrained"
        f" --shard-samples 3 --out {store}"
    )


def test_what_is_the_default_is_left_out_and_what_is_odd_is_quoted(stores: TinyStores) -> None:
    teacher = stores.teacher("dino", identity={"spec": "timm:a b"}, untrained=False)
    plan = stores.plan(
        teachers=[teacher], views=("original",), feature_dtype="int8", shard_samples=64, limit=7,
        sets=("2007:train", "2012:val"),
    )  # fmt: skip
    store = stores.build(plan, name="my store.zarr")
    words = shlex.split(writing_command(read_catalog(store)))
    assert words[3:] == [
        "--voc-root", "DIR", "--voc-set", "2007:train", "--voc-set", "2012:val", "--limit", "7",
        "--teacher", "dino=timm:a b", "--view", "original", "--dtype", "int8", "--out", str(store),
    ]  # fmt: skip


def test_trained_and_untrained_teachers_together_are_not_called_untrained(stores: TinyStores) -> None:
    store = stores.build(stores.plan(teachers=[stores.teacher("dino", untrained=False), "clip"]))
    assert "--untrained" not in writing_command(read_catalog(store))
    assert "--untrained" in writing_command(read_catalog(store), ["clip"])


def test_a_derived_store_names_the_conversion_and_the_place_where_it_lies_now(stores: TinyStores) -> None:
    source = stores.build()
    command = "python cli.py convert-cache SRC DST --dtype int8"
    derived = convert(ConvertRequest(source, stores.folder / "d.zarr", command, dtype="int8")).out
    moved = derived.rename(stores.folder / "moved here.zarr")
    expected = f"python cli.py convert-cache SRC '{moved}' --dtype int8"
    assert writing_command(read_catalog(moved)) == expected
    assert derivation_command(read_catalog(moved), "clip/original/logits") == expected  # a copy
    assert derivation_command(read_catalog(source)) is None
    for notes in moved.rglob("provenance.jsonl"):
        notes.unlink()
    assert writing_command(read_catalog(moved)) == f"python cli.py convert-cache SOURCE '{moved}'"


def test_a_store_of_both_kinds_names_the_command_of_the_teacher_concerned(stores: TinyStores) -> None:
    store = stores.build()
    note(store, "dino/hflip/features", "python cli.py convert-cache a b --pca 8")
    assert writing_command(read_catalog(store), ["dino"]).startswith("python cli.py convert-cache a ")
    assert writing_command(read_catalog(store), ["clip"]).startswith("python cli.py extract-teachers ")


def relabelled(store: Path, key: str = "clip_plain") -> Path:
    """The store with logits of its own embeddings under the key."""
    command = f"python cli.py relabel-logits SRC --prompts 'my plain.yaml' --teacher clip --as {key}"
    text = np.ones((4, 6), np.float32)
    relabel(read_catalog(store), RelabelRequest("clip", key, {"spec": "clip"}, text, 100.0, None, {"command": command}))
    return store


def test_relabelled_logits_name_their_own_command_and_the_place_where_the_store_lies_now(stores: TinyStores) -> None:
    moved = relabelled(stores.build()).rename(stores.folder / "moved here.zarr")
    catalog = read_catalog(moved)
    expected = f"python cli.py relabel-logits '{moved}' --prompts 'my plain.yaml' --teacher clip --as clip_plain"
    assert writing_command(catalog, ["clip_plain"]) == expected
    assert derivation_command(catalog, "clip_plain/hflip/logits") == expected
    assert derivation_command(catalog, "clip/hflip/logits") is None
    assert [relabelled_from(catalog, catalog.teachers[key]) for key in ("clip", "clip_plain", "dino")] == [
        None, "clip", None,
    ]  # fmt: skip


def test_what_relabelled_logits_are_made_from_comes_first(stores: TinyStores) -> None:
    store = relabelled(stores.build())
    without = writing_command(read_catalog(stores.build(name="other.zarr"))).replace("other.zarr", store.name)
    assert "--teacher clip --teacher dino" in without
    assert writing_command(read_catalog(store)) == without
    assert writing_command(read_catalog(store), ["clip_plain", "clip", "dino"]) == without


def test_of_relabelled_logits_alone_one_command_is_named_after_the_other(stores: TinyStores) -> None:
    store = relabelled(relabelled(stores.build()), "clip_b")
    assert writing_command(read_catalog(store), ["clip_plain", "clip_b"]).endswith("--as clip_b")


def test_a_lost_note_leaves_the_prompt_file_open(stores: TinyStores) -> None:
    store = relabelled(stores.build())
    for notes in store.rglob("provenance.jsonl"):
        notes.unlink()
    expected = f"python cli.py relabel-logits {store} --prompts FILE --teacher clip --as clip_plain"
    assert writing_command(read_catalog(store), ["clip_plain"]) == expected


def test_copied_relabelled_logits_name_the_conversion(stores: TinyStores) -> None:
    store = relabelled(stores.build())
    for name, teachers in (("all", ()), ("one", ("clip_plain",))):
        command = f"python cli.py convert-cache {store} DST"
        copy = convert(ConvertRequest(store, stores.folder / f"{name}.zarr", command, teachers=teachers)).out
        expected = f"python cli.py convert-cache {store} {copy}"
        assert writing_command(read_catalog(copy)) == expected
        assert writing_command(read_catalog(copy), ["clip_plain"]) == expected
    for notes in copy.rglob("provenance.jsonl"):
        notes.unlink()
    assert writing_command(read_catalog(copy)) == f"python cli.py convert-cache SOURCE {copy}"


ODD = {
    "another program": "rm -rf convert-cache a b",
    "another verb": "python cli.py extract-teachers a b",
    "too short": "python cli.py convert-cache a",
    "without a store": "python cli.py relabel-logits",
    "control characters": "python cli.py convert-cache a b \x1b[2J",
    "an open quote": "python cli.py convert-cache a 'b",
    "no text": ["python", "cli.py", "convert-cache", "a", "b"],
}


@pytest.mark.parametrize("command", ODD.values(), ids=ODD)
def test_an_odd_note_is_never_shown_as_a_command(store: Path, command: object) -> None:
    note(store, "dino/original/features", command)
    assert derivation_command(read_catalog(store)) is None


def test_what_a_shell_would_obey_is_quoted(store: Path) -> None:
    note(store, "dino/original/features", "python cli.py convert-cache a b --dtype int8; rm x '$(y)'")
    command = derivation_command(read_catalog(store))
    assert command is not None
    assert shlex.split(command) == [
        "python",
        "cli.py",
        "convert-cache",
        "a",
        str(store),
        "--dtype",
        "int8;",
        "rm",
        "x",
        "$(y)",
    ]
    assert "'int8;'" in command


def test_a_store_without_teachers_names_none(stores: TinyStores) -> None:
    store = stores.build(dataclasses.replace(stores.plan(), teachers=[]))
    assert writing_command(read_catalog(store)) == (
        f"python cli.py extract-teachers --voc-root DIR --voc-set 2007:train --out {store}"
    )

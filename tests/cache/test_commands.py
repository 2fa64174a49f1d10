"""The commands that a store names: split as a shell would, and refused where a note is odd."""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from cache.catalog import read_catalog
from cache.commands import derivation_command, writing_command
from cache.convert import convert
from cache.derive import ConvertRequest

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


ODD = {
    "another program": "rm -rf convert-cache a b",
    "another verb": "python cli.py extract-teachers a b",
    "too short": "python cli.py convert-cache a",
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

"""docs/cache-format.md: its reader runs, and it names every field of the manifests."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from cache.int8 import dequantise
from cache.layout import TEACHER_KEY
from cache.reader import TeacherStore

if TYPE_CHECKING:
    from tests.cache.conftest import TinyStores

DOCUMENT = (Path(__file__).parents[2] / "docs" / "cache-format.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    """What the code at the document's end defines."""
    blocks = re.findall(r"```python\n(.*?)```", DOCUMENT, flags=re.DOTALL)
    assert len(blocks) == 1
    assert DOCUMENT.endswith(f"{blocks[0]}```\n")
    assert len(blocks[0].splitlines()) < 60
    assert set(re.findall(r"^(?:from|import) (\w+)", blocks[0], flags=re.MULTILINE)) == {
        "json",
        "math",
        "pathlib",
        "numpy",
    }
    namespace: dict[str, Any] = {}
    exec(compile(blocks[0], "docs/cache-format.md", "exec"), namespace)
    return namespace


@pytest.fixture(scope="module")
def reader(document: dict[str, Any]) -> Any:
    """The class that reads arrays."""
    return document["Reader"]


def test_the_documents_reader_reads_what_ours_reads(reader: Any, whole_store: Path) -> None:
    store = TeacherStore(whole_store)
    for layout in store.catalog.layouts():
        teacher, view, name = layout.path.split("/")
        ours = store.array(teacher, view, name).gather(range(7))  # type: ignore[arg-type]
        theirs = reader(whole_store, layout.path)
        np.testing.assert_array_equal(np.stack([theirs[row] for row in range(7)]), ours)
        assert theirs.row_of_id == store.row_of_id


def test_the_documents_reader_restores_int8_features(document: dict[str, Any], stores: TinyStores) -> None:
    store = stores.build(stores.plan(teachers=["dino"], feature_dtype="int8"))
    opened = TeacherStore(store)
    for row in range(7):
        names = ("features", "scale_channel", "scale_token")
        ours = dequantise(*(opened.array("dino", "hflip", name).read(row) for name in names))
        np.testing.assert_array_equal(document["read_features"](store, "dino/hflip", row), ours)


def test_the_documents_reader_refuses_what_is_not_committed(reader: Any, stores: TinyStores) -> None:
    store = stores.build(stores.plan(teachers=["dino"], views=["original"]), limit=2)
    ledger = store / "dino/original/features/ledger.jsonl"
    ledger.rename(ledger.with_name("ledger-0.jsonl"))
    with ledger.with_name("ledger-0.jsonl").open("ab") as file:
        file.write(b'{"bytes":12')  # torn
    theirs = reader(store, "dino/original/features")
    ours = TeacherStore(store).array("dino", "original", "features")
    np.testing.assert_array_equal(theirs[5], ours.read(5))
    for row in (6, 7, -1):
        with pytest.raises(KeyError, match="is not in the store"):
            theirs[row]


def fields(value: Any, prefix: str = "") -> set[str]:
    if not isinstance(value, dict) or prefix == "identity":
        return {prefix}
    return set().union(*(fields(inner, f"{prefix}.{key}".lstrip(".")) for key, inner in value.items()))


@pytest.mark.parametrize("group", ["", "clip", "dino/original"])
def test_every_field_of_a_manifest_is_explained(whole_store: Path, group: str) -> None:
    attributes = json.loads((whole_store / group / "zarr.json").read_text())["attributes"]
    assert set(attributes) == {"teachonce", "teachonce_sha256"}
    named = {re.sub(r"arrays\.\w+", "arrays.<name>", field) for field in fields(attributes["teachonce"])}
    assert {field for field in named if f"| `{field}` |" not in DOCUMENT} == set()


def test_every_file_of_a_store_is_explained(whole_store: Path) -> None:
    names = {path.name for path in whole_store.rglob("*") if path.is_file() and not path.name.isdigit()}
    assert names == {"zarr.json", "samples.jsonl", "ledger.jsonl"}
    for name in [*names, "provenance.jsonl", "ledger-0.jsonl"]:
        assert f"/{name} " in DOCUMENT
    assert f"`{TEACHER_KEY.pattern}`" in DOCUMENT

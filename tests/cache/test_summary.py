from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

from cache.catalog import read_catalog
from cache.summary import summarise, summarise_unreadable
from cache.verify import Problem
from data.errors import StoreCorruptError

if TYPE_CHECKING:
    from tests.cache.conftest import TinyStores


def test_the_keys_are_those_of_the_contract(whole_store: Path) -> None:
    summary = summarise(read_catalog(whole_store), [Problem("a", 1, 2, "p")], verified=True)
    assert list(summary) == [
        "store", "format_version", "fingerprint", "frame", "dataset", "teachers", "arrays", "status", "problems",
        "verified",
    ]  # fmt: skip
    assert {"sets", "samples"} <= set(summary["dataset"])
    assert summary["problems"] == [{"array": "a", "shard": 1, "sample": 2, "problem": "p"}]
    for array in summary["arrays"]:
        assert list(array) == [
            "path", "shape", "dtype", "chunk", "shard", "bytes", "complete", "missing", "fingerprint", "content",
        ]  # fmt: skip
    json.dumps(summary, allow_nan=False)
    assert set(summarise_unreadable(whole_store, StoreCorruptError("x"))) == set(summary)


def test_a_complete_store_is_described(whole_store: Path) -> None:
    summary = summarise(read_catalog(whole_store), [], verified=False)
    assert summary["store"] == str(whole_store)
    assert (summary["format_version"], summary["frame"], summary["status"]) == (1, [480, 480], "complete")
    assert summary["dataset"]["sets"] == ["2007:train"]
    assert summary["dataset"]["samples"] == 7
    assert summary["teachers"]["dino"] == {
        "spec": "dino",
        "input_size": [420, 420],
        "normalisation": {"mean": [0.485, 0.456, 0.406]},
        "untrained": True,
    }
    arrays = {array["path"]: array for array in summary["arrays"]}
    assert len(arrays) == 8
    features = arrays["dino/hflip/features"]
    folder = whole_store / "dino/hflip/features"
    assert features == {
        "path": "dino/hflip/features",
        "shape": [7, 3, 2, 5],
        "dtype": "float16",
        "chunk": [1, 3, 2, 5],
        "shard": [3, 3, 2, 5],
        "bytes": sum(path.stat().st_size for path in folder.glob("c/*/0/0/0")),
        "complete": True,
        "missing": 0,
        "fingerprint": features["fingerprint"],
        "content": hashlib.sha256((folder / "ledger.jsonl").read_bytes()).hexdigest(),
    }
    assert (arrays["clip/original/logits"]["chunk"], arrays["clip/original/logits"]["shard"]) == ([3, 4], None)


def test_missing_counts_samples_and_an_incomplete_array_makes_an_incomplete_store(stores: TinyStores) -> None:
    store = stores.build(limit=5)  # the first range of all, the second of dino/original
    summary = summarise(read_catalog(store), [], verified=False)
    assert summary["status"] == "incomplete"
    missing = {array["path"]: (array["missing"], array["complete"]) for array in summary["arrays"]}
    assert missing["dino/original/features"] == (1, False)
    assert missing["clip/hflip/logits"] == (4, False)


def test_a_store_without_arrays_is_incomplete(stores: TinyStores) -> None:
    assert summarise(read_catalog(stores.build(stores.plan(teachers=[]))), [], verified=True)["status"] == "incomplete"


def test_corrupt_comes_before_incomplete_and_incomplete_before_complete(stores: TinyStores, whole_store: Path) -> None:
    problem = Problem("a", None, None, "p")
    partial, whole = read_catalog(stores.build(limit=5)), read_catalog(whole_store)
    assert summarise(partial, [problem], verified=True)["status"] == "corrupt"
    assert summarise(whole, [problem], verified=True)["status"] == "corrupt"
    assert summarise(partial, [], verified=True)["status"] == "incomplete"
    assert summarise(whole, [], verified=True)["status"] == "complete"


def test_a_damaged_ledger_counts_nothing_as_committed(store: Path) -> None:
    ledger = store / "dino/original/features/ledger.jsonl"
    ledger.write_bytes(ledger.read_bytes().replace(b'"shard":0', b'"shard":1'))
    arrays = {array["path"]: array for array in summarise(read_catalog(store), [], verified=False)["arrays"]}
    assert arrays["dino/original/features"]["missing"] == 7


def test_a_store_that_cannot_be_trusted_is_said_to_be_corrupt(whole_store: Path) -> None:
    summary = summarise_unreadable(whole_store, StoreCorruptError("x/zarr.json: missing"))
    assert summary["status"] == "corrupt"
    assert summary["problems"] == [{"array": None, "shard": None, "sample": None, "problem": "x/zarr.json: missing"}]

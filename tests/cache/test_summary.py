from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from numpy.typing import NDArray

from cache.catalog import read_catalog
from cache.convert import convert
from cache.derive import ConvertRequest
from cache.fidelity import Fidelity
from cache.reader import TeacherStore
from cache.summary import summarise, summarise_unreadable
from cache.verify import Problem
from cache.writer import open_writer
from data.errors import StoreCorruptError

if TYPE_CHECKING:
    from tests.cache.conftest import TinyStores


def test_the_keys_are_those_of_the_contract(whole_store: Path) -> None:
    summary = summarise(read_catalog(whole_store), [Problem("a", 1, 2, "p")], verified=True)
    assert list(summary) == [
        "store", "format_version", "fingerprint", "frame", "dataset", "holds", "teachers", "arrays", "status",
        "problems", "verified", "training", "cost", "next",
    ]  # fmt: skip
    assert {"sets", "samples"} <= set(summary["dataset"])
    assert summary["problems"] == [{"array": "a", "shard": 1, "sample": 2, "problem": "p"}]
    for array in summary["arrays"]:
        assert list(array) == [
            "path", "shape", "dtype", "chunk", "shard", "bytes", "complete", "missing", "fingerprint", "content",
            "mean", "std", "statistics_samples", "outliers", "outlier_ids", "float32_bytes", "fidelity", "source",
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
        "views": ["original", "hflip"],
        "cost": None,
        "multilabel_map": None,
        "pca": None,
        "command": None,
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
        "mean": features["mean"],
        "std": features["std"],
        "statistics_samples": 7,
        "outliers": 0,
        "outlier_ids": [],
        "float32_bytes": 7 * 3 * 2 * 5 * 4,
        "fidelity": None,
        "source": None,
    }
    values = TeacherStore(whole_store).array("dino", "hflip", "features").gather(range(7)).astype(np.float64)
    assert (features["mean"], features["std"]) == pytest.approx((values.mean(), values.std()), rel=1e-5)
    assert (arrays["clip/original/logits"]["chunk"], arrays["clip/original/logits"]["shard"]) == ([3, 4], None)


def test_missing_counts_samples_and_an_incomplete_array_makes_an_incomplete_store(stores: TinyStores) -> None:
    store = stores.build(limit=5)  # the first range of all, the second of dino/original
    summary = summarise(read_catalog(store), [], verified=False)
    assert summary["status"] == "incomplete"
    missing = {array["path"]: (array["missing"], array["complete"]) for array in summary["arrays"]}
    assert missing["dino/original/features"] == (1, False)
    assert missing["clip/hflip/logits"] == (4, False)
    assert summary["next"] == (
        "python cli.py extract-teachers --voc-root DIR --voc-set 2007:train --teacher clip --teacher dino --untrained"
        f" --shard-samples 3 --out {store}"
    )
    assert {gap["teacher"] for gap in summary["training"]} == {"clip", "dino"}
    assert set(summary["training"][0]) == {"teacher", "problem", "hint"}


def test_a_store_without_arrays_is_incomplete(stores: TinyStores) -> None:
    assert summarise(read_catalog(stores.build(stores.plan(teachers=[]))), [], verified=True)["status"] == "incomplete"


def test_corrupt_comes_before_incomplete_and_incomplete_before_complete(stores: TinyStores, whole_store: Path) -> None:
    problem = Problem("a", None, None, "p")
    partial, whole = read_catalog(stores.build(limit=5)), read_catalog(whole_store)
    assert summarise(partial, [problem], verified=True)["status"] == "corrupt"
    assert summarise(whole, [problem], verified=True)["status"] == "corrupt"
    assert summarise(partial, [], verified=True)["status"] == "incomplete"
    assert summarise(whole, [], verified=True)["status"] == "complete"


def test_a_damaged_ledger_counts_its_sound_lines_as_committed(store: Path) -> None:
    ledger = store / "dino/original/features/ledger.jsonl"
    ledger.write_bytes(ledger.read_bytes().replace(b'"shard":0', b'"shard":1'))
    arrays = {array["path"]: array for array in summarise(read_catalog(store), [], verified=False)["arrays"]}
    assert arrays["dino/original/features"]["missing"] == 3


def test_the_next_command_repairs_what_is_damaged(store: Path) -> None:
    catalog = read_catalog(store)
    logits, samples = Problem("clip/original/logits", 1, None, "p"), Problem("samples.jsonl", None, None, "p")
    assert summarise(catalog, [], verified=True)["next"] is None
    one = summarise(catalog, [logits], verified=True)["next"]
    assert "--teacher clip --untrained" in one
    assert one.endswith(" --repair")
    assert "--teacher clip --teacher dino" in summarise(catalog, [logits, samples], verified=True)["next"]


def test_sizes_in_float32_are_those_of_what_the_teacher_put_out(stores: TinyStores) -> None:
    """By hand: 7 samples of 3 × 2 × 5 features; scales would not be there, and a projection would not have been."""
    source = stores.build()
    command = "python cli.py convert-cache SRC DST"
    request = ConvertRequest(source, stores.folder / "d.zarr", command, dtype="int8", components=2)
    summary = summarise(read_catalog(convert(request).out), [], verified=False)
    sizes = {array["path"]: array["float32_bytes"] for array in summary["arrays"]}
    names = ("features", "moments", "scale_channel", "scale_token")
    assert [sizes[f"dino/original/{name}"] for name in names] == [7 * 30 * 4, 7 * 2 * 5 * 4, 0, 0]
    assert sizes["clip/original/logits"] == 7 * 4 * 4


def test_a_derived_store_says_from_what_and_how(stores: TinyStores) -> None:
    source = stores.build()
    command = "python cli.py convert-cache SRC DST --pca 2"
    derived = convert(ConvertRequest(source, stores.folder / "d.zarr", command, components=2)).out
    summary = summarise(read_catalog(derived), [], verified=False)
    arrays = {array["path"]: array for array in summary["arrays"]}
    original = read_catalog(source).fingerprints["dino/hflip/features"]
    assert (arrays["dino/hflip/features"]["source"], arrays["clip/hflip/logits"]["source"]) == (original, None)
    pca = summary["teachers"]["dino"]["pca"]
    assert (pca["shape"], pca["fit_samples"], 0 < pca["explained_variance"] < 1) == ([3, 5], 7, True)
    assert summary["teachers"]["dino"]["command"] == command.replace("DST", str(derived))
    fidelity = arrays["dino/hflip/features"]["fidelity"]
    assert fidelity.keys() == set(Fidelity.model_fields)
    assert fidelity["samples"] == 7
    json.dumps(summary, allow_nan=False)


def test_costs_are_told_by_teacher_and_in_all(stores: TinyStores) -> None:
    with open_writer(stores.folder / "s.zarr", stores.plan()) as writer:
        stores.fill(writer)
        for teacher, seconds in (("dino", 3.0), ("clip", 0.5)):
            for view in ("original", "hflip"):
                facts = {"host": "h", "device": "d", "samples": 7, "teacher_seconds_all_views": seconds}
                writer.note_provenance(teacher, view, facts)  # type: ignore[arg-type]
    summary = summarise(read_catalog(stores.folder / "s.zarr"), [], verified=False)
    assert set(summary["cost"]) == {
        "runs", "seconds", "outputs", "devices", "hosts", "batch_sizes", "first", "last", "bottlenecks",
    }  # fmt: skip
    costs = {key: teacher["cost"] for key, teacher in summary["teachers"].items()}
    assert (costs["dino"]["seconds"], costs["clip"]["seconds"], summary["cost"]["seconds"]) == (3.0, 0.5, 3.5)
    assert (costs["dino"]["outputs"], summary["cost"]["outputs"], summary["cost"]["devices"]) == (14, 28, ["d"])


def test_the_worst_outliers_are_named_by_id(stores: TinyStores, monkeypatch: pytest.MonkeyPatch) -> None:
    values = stores.values

    def loud(teacher: str, view: str, name: str, rows: Iterable[int], *shape: Any) -> NDArray[np.float32]:
        """Every fourth sample is far louder than the rest."""
        sizes = {row: 50.0 + row for row in range(3, 60, 4)}
        return np.stack([values(teacher, view, name, [row], *shape)[0] * sizes.get(row, 1.0) for row in rows])

    monkeypatch.setattr(stores, "values", loud)
    store = stores.build(stores.plan(60, teachers=["clip"], shard_samples=20))
    logits = next(
        a for a in summarise(read_catalog(store), [], verified=False)["arrays"] if a["path"].endswith("logits")
    )
    assert (logits["outliers"], len(logits["outlier_ids"])) == (15, 10)
    (store / "samples.jsonl").write_bytes(b"")
    logits = next(
        a for a in summarise(read_catalog(store), [], verified=False)["arrays"] if a["path"].endswith("logits")
    )
    assert (logits["outliers"], logits["outlier_ids"]) == (15, [])


UNREADABLE = {
    "an array": ("{store}/dino/original/features/zarr.json: is not", "dino/original/features", "is not"),
    "a view": ("{store}/dino/original/zarr.json: was edited", "dino/original", "was edited"),
    "the root": ("{store}/zarr.json: frame: too short", None, "frame: too short"),
    "a fingerprint": ("{store}/dino/hflip/moments: expected a, found b", "dino/hflip/moments", "expected a, found b"),
    "the file itself": ("{store}: expected 5 bytes, found 4", None, "{store}: expected 5 bytes, found 4"),
    "anything else": ("x/zarr.json: missing", None, "x/zarr.json: missing"),
}


@pytest.mark.parametrize(("message", "array", "problem"), UNREADABLE.values(), ids=UNREADABLE)
def test_a_store_that_cannot_be_trusted_is_corrupt(
    whole_store: Path, message: str, array: str | None, problem: str
) -> None:
    summary = summarise_unreadable(whole_store, StoreCorruptError(message.format(store=whole_store)))
    told = {"array": array, "shard": None, "sample": None, "problem": problem.format(store=whole_store)}
    assert (summary["status"], summary["problems"]) == ("corrupt", [told])
    assert summary["next"] == f"python cli.py extract-teachers … --out {whole_store} --repair"

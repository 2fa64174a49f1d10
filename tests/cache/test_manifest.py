from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from pydantic import ValidationError

from cache.canonical import digest
from cache.manifest import PcaManifest, Probe, StoredArray, ViewManifest, array_fingerprint, store_fingerprint

if TYPE_CHECKING:
    from tests.cache.conftest import TinyStores


def fingerprint(stores: TinyStores, **changes: Any) -> str:
    plan = stores.plan(changes.pop("num_samples", 7), **changes.pop("plan", {}))
    identity = changes.pop("teacher_identity", {"spec": "a", "layer": 11})
    teacher = stores.teacher("dino", identity=identity).manifest()
    if "pca" in changes:
        teacher = teacher.model_copy(update={"pca": changes.pop("pca")})
    view, name = changes.pop("view", "original"), changes.pop("array", "features")
    features_dtype = changes.pop("features_dtype", "float16")
    array = StoredArray(**{"sample_shape": (3, 2, 5), "dtype": "float16", "fingerprint": "", **changes})
    return array_fingerprint(plan.root_manifest(), teacher, view, name, array, features_dtype)


IDENTITY = {
    "the images": {"num_samples": 6},
    "the frame": {"plan": {"frame": (512, 480)}},
    "a field of the teacher": {"teacher_identity": {"spec": "a", "layer": 10}},
    "a field more": {"teacher_identity": {"spec": "a", "layer": 11, "norm": True}},
    "the view": {"view": "hflip"},
    "the array": {"array": "embeddings"},
    "the shape": {"sample_shape": (2, 3, 5)},
    "the dtype": {"dtype": "float32"},
    "what it was computed from": {"source": "0" * 64},
}


@pytest.mark.parametrize("changes", IDENTITY.values(), ids=IDENTITY)
def test_whatever_determines_the_values_changes_the_fingerprint(stores: TinyStores, changes: dict[str, Any]) -> None:
    assert fingerprint(stores, **changes) != fingerprint(stores)


NOT_IDENTITY = {
    "the names of the sets": {"plan": {"sets": ("2012:train",)}},
    "the limit that chose the images": {"plan": {"limit": 7}},
    "samples a shard": {"plan": {"shard_samples": 64}},
    "the order of keys": {"teacher_identity": {"layer": 11, "spec": "a"}},
}


@pytest.mark.parametrize("changes", NOT_IDENTITY.values(), ids=NOT_IDENTITY)
def test_what_does_not_determine_the_values_leaves_the_fingerprint(stores: TinyStores, changes: dict[str, Any]) -> None:
    assert fingerprint(stores, **changes) == fingerprint(stores)


def test_the_dtype_of_features_changes_the_fingerprint_of_what_follows_from_them(stores: TinyStores) -> None:
    of_moments = {kind: fingerprint(stores, array="moments", features_dtype=kind) for kind in ("float16", "int8")}
    assert of_moments["float16"] != of_moments["int8"]
    assert fingerprint(stores, array="logits") == fingerprint(stores, array="logits", features_dtype="int8")


def test_another_pca_basis_changes_the_fingerprint_of_what_was_projected(stores: TinyStores) -> None:
    def projected(basis_sha256: str) -> str:
        fit = {"fit_samples": 5, "fit_samples_sha256": "b" * 64, "explained_variance": 0.9}
        return fingerprint(stores, source="0" * 64, pca=PcaManifest(shape=(3, 5), sha256=basis_sha256, **fit))

    assert projected("a" * 64) != projected("c" * 64)


def test_the_stores_fingerprint_is_the_digest_of_its_arrays_fingerprints_by_path() -> None:
    assert store_fingerprint({"b": "2", "a": "1"}) == digest({"a": "1", "b": "2"})


def test_a_probes_cosine_is_that_of_the_vectors() -> None:
    stored = np.array([3, 4, 0], dtype=np.float32)
    probe = Probe.of(stored)
    assert probe.cosine(stored) == pytest.approx(1.0)
    assert probe.cosine(np.array([4, 3, 0], dtype=np.float32)) == pytest.approx(24 / 25)
    assert probe.cosine(-2 * stored) == pytest.approx(-1.0)
    assert probe.cosine(np.zeros(3, dtype=np.float32)) == 0.0
    assert probe.cosine(stored[:2]) == 0.0


ARRAY = {"sample_shape": [4], "dtype": "float32", "fingerprint": "f"}
LAYOUT = {"shard_samples": 3, "batch_size": 16}
BAD_VIEWS = {
    "unknown view": ({"view": "vflip"}, "view"),
    "unknown array": ({"arrays": {"logits": ARRAY, "boxes": ARRAY}}, "expected some of the arrays"),
    "an array that is a path": ({"arrays": {"../logits": ARRAY}}, "expected some of the arrays"),
    "no array": ({"arrays": {}}, "found none"),
    "too many axes": ({"arrays": {"logits": {**ARRAY, "sample_shape": [4, 4]}}}, "expected axes"),
    "an empty axis": ({"arrays": {"logits": {**ARRAY, "sample_shape": [0]}}}, "expected axes"),
    "int8 logits": ({"arrays": {"logits": {**ARRAY, "dtype": "int8"}}}, "only features may be int8"),
    "int8 without scales": (
        {"arrays": {"features": {**ARRAY, "sample_shape": [2, 2, 4], "dtype": "int8"}}},
        "only with scale_channel and scale_token",
    ),
    "object dtype": ({"arrays": {"logits": {**ARRAY, "dtype": "object"}}}, "dtype"),
    "no shard": ({"layout": {**LAYOUT, "shard_samples": 0}}, "shard_samples"),
    "a vast shard": ({"layout": {**LAYOUT, "shard_samples": 65_537}}, "shard_samples"),
    "no batch": ({"layout": {**LAYOUT, "batch_size": 0}}, "batch_size"),
    "a field too many": ({"more": 1}, "more"),
}


@pytest.mark.parametrize(("changes", "message"), BAD_VIEWS.values(), ids=BAD_VIEWS)
def test_a_view_manifest_that_means_nothing_is_refused(changes: dict[str, Any], message: str) -> None:
    good = {"view": "original", "arrays": {"logits": ARRAY}, "layout": LAYOUT}
    ViewManifest.model_validate(good)
    with pytest.raises(ValidationError, match=message):
        ViewManifest.model_validate({**good, **changes})

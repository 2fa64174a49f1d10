"""A store of format 1, written once and kept: every later version must open it, read it and be able to resume it.

Its values follow from this formula, not from a run of ours: features[n, i, j, c] = n + i/2 + j/4 + c/8, all exact in
float16, mirrored in j for `hflip`; logits[n, k] = 10 n − k; text_embeddings[k, d] = k + d/16.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from cache.catalog import read_catalog
from cache.plan import StorePlan, TeacherPlan
from cache.reader import TeacherStore
from cache.samples import SampleEntry
from cache.selection import Selection
from cache.summary import summarise
from cache.verify import find_problems
from cache.writer import open_writer

GOLDEN = Path(__file__).parent / "golden" / "format-1.zarr"
SAMPLE, ROW, COLUMN, CHANNEL = np.ogrid[:3, :2, :2, :3]
ORIGINAL = (SAMPLE + ROW / 2 + COLUMN / 4 + CHANNEL / 8).astype("<f2")
FEATURES = {"original": ORIGINAL, "hflip": ORIGINAL[:, :, ::-1]}
LOGITS = (10 * np.arange(3)[:, None] - np.arange(4)).astype("<f4")
TEXT = (np.arange(4)[:, None] + np.arange(2) / 16).astype("<f4")
PLAN = StorePlan(
    sets=("2007:train",),
    limit=3,
    samples=[SampleEntry(f"VOC2007/{n:06d}", 375, 500, f"{n:064x}") for n in (12, 17, 23)],
    teachers=[
        TeacherPlan(
            "golden_features", {"spec": "golden", "layer": -1}, True, np.ones(4, "<f4"), {"features": (2, 2, 3)}
        ),
        TeacherPlan(
            "golden_logits", {"spec": "golden", "scale": 100.0}, False, -np.ones(4, "<f4"), {"logits": (4,)}, TEXT
        ),
    ],
    views=("original", "hflip"),
    feature_dtype="float16",
    shard_samples=2,
    batch_size=8,
)


def test_it_is_small() -> None:
    assert sum(path.stat().st_size for path in GOLDEN.rglob("*") if path.is_file()) < 50_000


@pytest.mark.parametrize("view", ["original", "hflip"])
def test_every_value_is_read(view: str) -> None:
    store = TeacherStore(GOLDEN)
    features = store.array("golden_features", view, "features")  # type: ignore[arg-type]
    logits = store.array("golden_logits", view, "logits")  # type: ignore[arg-type]
    np.testing.assert_array_equal(features.gather(range(3)), FEATURES[view])
    np.testing.assert_array_equal(logits.gather(range(3)), LOGITS)


def test_text_embeddings_and_statistics_are_read() -> None:
    store = TeacherStore(GOLDEN)
    np.testing.assert_array_equal(store.text_embeddings("golden_logits"), TEXT)
    mean, std = Selection([store], ["VOC2007/000012", "VOC2007/000023"]).channel_statistics("golden_features")
    # Over samples 0 and 2: n averages 1, i/2 averages 1/4, j/4 averages 1/8; variances 1, 1/16 and 1/64.
    np.testing.assert_allclose(mean, 1.375 + np.arange(3) / 8)
    np.testing.assert_allclose(std, np.sqrt(1 + 1 / 16 + 1 / 64), rtol=1e-6)


def test_it_is_sound_and_complete() -> None:
    catalog = read_catalog(GOLDEN)
    assert [sample.id for sample in catalog.samples] == ["VOC2007/000012", "VOC2007/000017", "VOC2007/000023"]
    assert find_problems(catalog, verify=True) == []
    assert summarise(catalog, [], verified=True)["status"] == "complete"


def test_its_fingerprint_never_changes() -> None:
    assert read_catalog(GOLDEN).fingerprint == "6fff2859e5924adbc954fa43e93a851540d8e29002c644cf76641d145d91b4aa"


def test_it_can_be_resumed_with_the_plan_it_was_made_from(tmp_path: Path) -> None:
    copy = Path(shutil.copytree(GOLDEN, tmp_path / "copy.zarr"))
    with open_writer(copy, PLAN) as writer:
        assert writer.missing() == []

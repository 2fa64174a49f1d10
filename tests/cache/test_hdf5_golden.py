"""An HDF5 store of format 1, written once and kept: every later version must open it, read it and be able to resume it.

Its values follow from this formula, not from a run of ours: features[n, i, j, c] = n + i/2 + j/4 + c/8, all exact in
float16; text_embeddings[k, d] = k + d/16. It was made with h5py 3.16 (HDF5 2.0) by `make`.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import h5py
import numpy as np

from cache.catalog import read_catalog
from cache.plan import StorePlan, TeacherPlan
from cache.reader import TeacherStore
from cache.samples import SampleEntry
from cache.summary import summarise
from cache.verify import find_problems
from cache.writer import open_writer

GOLDEN = Path(__file__).parent / "golden" / "format-1.h5"
SAMPLE, ROW, COLUMN, CHANNEL = np.ogrid[:3, :2, :2, :3]
FEATURES = (SAMPLE + ROW / 2 + COLUMN / 4 + CHANNEL / 8).astype("<f2")
TEXT = (np.arange(4)[:, None] + np.arange(2) / 16).astype("<f4")
TEACHER = TeacherPlan(
    "golden", {"spec": "golden", "layer": -1}, True, np.ones(4, "<f4"), {"features": (2, 2, 3)}, text_embeddings=TEXT
)
PLAN = StorePlan(
    sets=("2007:train",),
    limit=3,
    samples=[SampleEntry(f"VOC2007/{n:06d}", 375, 500, f"{n:064x}") for n in (12, 17, 23)],
    teachers=[TEACHER],
    views=("original",),
    feature_dtype="float16",
    shard_samples=2,
    batch_size=8,
    format="hdf5",
)


def make(path: Path) -> None:
    """Write the store."""
    with open_writer(path, PLAN) as writer:
        for missing in writer.missing():
            rows = slice(missing.first, missing.first + missing.count)
            writer.commit(missing, {"features": FEATURES[rows].astype("<f4")})
        writer.note_provenance("golden", "original", {"device": "none"})


def test_it_is_small() -> None:
    assert GOLDEN.stat().st_size < 50_000


def test_every_value_is_read() -> None:
    store = TeacherStore(GOLDEN)
    np.testing.assert_array_equal(store.array("golden", "original", "features").gather(range(3)), FEATURES)
    moments = store.array("golden", "original", "moments").gather(range(3))
    # Over four cells: n + 3/8 + c/8 on average, with a variance of 1/16 + 1/64.
    mean = np.arange(3)[:, None] + 3 / 8 + np.arange(3) / 8
    np.testing.assert_allclose(moments[:, 0] / 4, mean)
    np.testing.assert_allclose(moments[:, 1] / 4, mean**2 + 5 / 64)
    np.testing.assert_array_equal(store.text_embeddings("golden"), TEXT)


def test_h5py_reads_the_same() -> None:
    with h5py.File(GOLDEN, "r") as file:
        np.testing.assert_array_equal(file["golden/original/features"][()], FEATURES)
        np.testing.assert_array_equal(file["golden/text_embeddings"][()], TEXT)


def test_it_is_sound_and_complete() -> None:
    catalog = read_catalog(GOLDEN)
    assert [sample.id for sample in catalog.samples] == ["VOC2007/000012", "VOC2007/000017", "VOC2007/000023"]
    assert find_problems(catalog, verify=True) == []
    assert summarise(catalog, [], verified=True)["status"] == "complete"
    notes = [catalog.storage.array(layout).read_provenance() for layout in catalog.layouts()]
    assert [note["device"] for (note,) in notes] == ["none", "none"]


def test_its_fingerprint_never_changes() -> None:
    assert read_catalog(GOLDEN).fingerprint == "2474c16eb601a05d4530e558c4a9735145244c8bd7839562f6f2c6a71a7bb602"


def test_it_can_be_resumed_with_the_plan_it_was_made_from(tmp_path: Path) -> None:
    copy = Path(shutil.copy(GOLDEN, tmp_path / "copy.h5"))
    with open_writer(copy, PLAN) as writer:
        assert writer.missing() == []
    assert copy.read_bytes() == GOLDEN.read_bytes()

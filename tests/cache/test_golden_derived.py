"""A derived store of format 1, one principal component as int8, written once and kept: later versions must read it.

It was made by `make` from the golden store, whose features are n + i/2 + j/4 + c/8: all channels rise alike, so one
component, (1, 1, 1) / √3, holds everything. Its values follow from that, not from a run of ours.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from cache.catalog import read_catalog
from cache.convert import convert
from cache.derive import ConvertRequest
from cache.layout import PCA
from cache.reader import TeacherStore, read_constant, read_features
from cache.verify import find_problems
from data.geometry import VIEWS, View

GOLDEN = Path(__file__).parent / "golden" / "format-1-derived.zarr"
SOURCE = GOLDEN.with_name("format-1.zarr")
SAMPLE, ROW, COLUMN = np.ogrid[:3, :2, :2]
# The means of n, i/2 and j/4 add up to 1.375.
PROJECTED = np.sqrt(3) * (SAMPLE + ROW / 2 + COLUMN / 4 - 1.375)[..., None]


def make(path: Path) -> None:
    """Write the store."""
    convert(
        ConvertRequest(SOURCE, path, "python cli.py convert-cache format-1.zarr DST --dtype int8 --pca 1",
                       teachers=("golden_features",), dtype="int8", components=1)
    )  # fmt: skip


def test_it_is_small() -> None:
    assert sum(path.stat().st_size for path in GOLDEN.rglob("*") if path.is_file()) < 50_000


@pytest.mark.parametrize("view", VIEWS)
def test_every_value_is_read(view: View) -> None:
    store = TeacherStore(GOLDEN)
    expected = PROJECTED if view == "original" else PROJECTED[:, :, ::-1]
    found = np.stack([read_features(store, "golden_features", view, row) for row in range(3)])
    # The sign of a component is a convention; of one channel, each token has a scale of its own and loses nothing.
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    q = store.array("golden_features", view, "features").gather(range(3))
    assert (q.dtype, set(np.unique(np.abs(q)))) == (np.int8, {127})
    moments = store.array("golden_features", view, "moments").gather(range(3))
    np.testing.assert_allclose(moments[:, 0, 0], PROJECTED.sum(axis=(1, 2, 3)), rtol=1e-5)
    np.testing.assert_allclose(moments[:, 1, 0], (PROJECTED**2).sum(axis=(1, 2, 3)), rtol=1e-5)


def test_the_basis_is_read() -> None:
    catalog = read_catalog(GOLDEN)
    stored = catalog.teachers["golden_features"]
    basis = read_constant(catalog.storage, stored, PCA)
    np.testing.assert_allclose(basis, [1.375 + np.arange(3) / 8, np.full(3, 1 / np.sqrt(3))], rtol=1e-6)
    assert stored.manifest.pca is not None
    assert stored.manifest.pca.fit_samples == 3
    assert stored.manifest.pca.explained_variance == pytest.approx(1.0)


def test_it_is_sound_and_names_its_source() -> None:
    catalog, source = read_catalog(GOLDEN), read_catalog(SOURCE)
    assert find_problems(catalog, verify=True) == []
    arrays = catalog.teachers["golden_features"].views["hflip"].manifest.arrays
    assert {array.source for array in arrays.values()} == {source.fingerprints["golden_features/hflip/features"]}


def test_it_can_be_resumed_by_its_command(tmp_path: Path) -> None:
    copy = Path(shutil.copytree(GOLDEN, tmp_path / "copy.zarr"))
    before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    make(copy)
    assert {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()} == before

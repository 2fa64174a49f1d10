"""One model at two layers in one store: two targets, each its own layer's, and a student may take either."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from cache.reader import TeacherStore
from data.errors import StoreStaleError
from features.registry import build_teacher
from pipeline.extract import extract
from pipeline.train import train
from tests.pipeline.small_runs import extraction, from_store, small_run

LAYERS = {"first": "timm:test_vit@layer=1,norm=none,grid=15x15", "last": "timm:test_vit@grid=15x15"}
SPECS = tuple(f"{key}={spec}" for key, spec in LAYERS.items())


def test_two_layers_are_two_targets(devkit: Path, tmp_path: Path) -> None:
    config = extraction(devkit, tmp_path / "s.zarr", teachers=SPECS, untrained=True, limit=4, views=("original",))
    opened = TeacherStore(extract(config).store)
    stored = {key: opened.array(key, "original", "features").gather(range(4)).astype(np.float32) for key in LAYERS}
    assert stored["first"].shape == stored["last"].shape == (4, 15, 15, 64)
    assert np.abs(stored["first"] - stored["last"]).mean() > 0.1 * np.abs(stored["last"]).mean()
    for key, spec in LAYERS.items():
        identity = opened.catalog.teachers[key].manifest.identity
        assert identity["spec"] == spec
        assert identity["weights_digest"] == build_teacher("timm:test_vit", untrained=True).weights_digest
    with pytest.raises(StoreStaleError, match=r"first\.layer: stored block 1 of \d+, patch tokens, found last block"):
        extract(extraction(devkit, config.out, teachers=(f"first={LAYERS['last']}",), untrained=True, limit=4))


@pytest.mark.parametrize("key", [pytest.param("first"), pytest.param("last", marks=pytest.mark.slow)])
def test_a_student_takes_the_layer_that_is_named(devkit: Path, tmp_path: Path, key: str) -> None:
    config = extraction(devkit, tmp_path / "s.zarr", teachers=SPECS, untrained=True, limit=4)
    store = extract(config).store
    distillation = from_store(store, feature_teacher=key, gamma=0.0)
    result = train(small_run(devkit, tmp_path, distillation=distillation))
    assert result["targets"]["teachers"]["features"] == key

from pathlib import Path

import pytest
import torch

from data.errors import StoreMissingError
from data.voc import read_voc
from pipeline.extract import extract
from pipeline.stored_targets import StoredTargets
from pipeline.sweep.live_ratio import as_live, measure_live_ratio
from pipeline.teacher_choice import views_drawn
from pipeline.train import target_source
from tests.pipeline.small_runs import extraction, from_store, small_run


@pytest.fixture(scope="module")
def store(devkit: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return extract(extraction(devkit, tmp_path_factory.mktemp("store") / "s.zarr")).store


def test_a_ratio_is_of_the_steps_that_were_taken(devkit: Path, tmp_path: Path, store: Path) -> None:
    config = small_run(devkit, tmp_path, distillation=from_store(store, beta=2.0, target_shuffle=1))
    found = measure_live_ratio(config, steps=1)
    assert found.source == "measured"
    assert found.live_s is not None
    assert found.cached_s is not None
    assert found.ratio == pytest.approx(found.live_s / found.cached_s)
    assert found.said == "median of 1 steps of mobilenet_v3_small, batch of 2, on cpu"
    assert list(tmp_path.iterdir()) == []


def test_live_teachers_are_those_of_the_store_under_the_same_losses(devkit: Path, tmp_path: Path, store: Path) -> None:
    config = small_run(devkit, tmp_path, distillation=from_store(store, beta=2.0, gamma=0.0))
    records, device = read_voc(devkit, ("2007:train",), 2), torch.device("cpu")
    stored = StoredTargets(config.distillation, records, views_drawn(0.5), device)
    live = as_live(config.distillation, stored)
    assert (live.beta, live.gamma, live.source) == (2.0, 0.0, "live")
    assert live.teachers == ("tiny_dino=tiny_dino",)  # the logit teacher would not be run
    source = target_source(config.model_copy(update={"distillation": live}), records, device)
    assert source is not None
    assert source.choice == stored.choice
    assert source.feature_shape == stored.feature_shape


def test_a_store_that_is_gone_is_told(devkit: Path, tmp_path: Path) -> None:
    config = small_run(devkit, tmp_path, distillation=from_store(tmp_path / "gone.zarr"))
    with pytest.raises(StoreMissingError, match=r"gone\.zarr"):
        measure_live_ratio(config, steps=1)

"""A run that is killed at any step ends as one that was not: the same losses, weights and averages."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.checkpoint import BEST, LATEST, load_checkpoint
from pipeline.config import TrainConfig
from pipeline.dataset import LoadedBatch
from pipeline.train import train
from pipeline.trainer import Trainer
from tests.pipeline.small_runs import (
    PulledPlugError,
    assert_same_checkpoints,
    from_store,
    small_run,
    weights_of,
    without_seconds,
)

# Four steps: two an epoch of two images each, with all that has state: average, masks, weights that are found.
RECIPE = {"epochs": 2, "batch_size": 2, "jitter": 0.2, "ema": 0.9}
DISTILLATION = {"feature_loss": "mgd", "kd_weight": "auto", "logit_loss": "binary"}


def run_of(devkit: Path, store: Path, folder: Path, **changes: Any) -> TrainConfig:
    distillation = from_store(store, **DISTILLATION)
    settings = {"recipe": RECIPE, "limit": 4, "distillation": distillation, "report_steps": 2, "evaluate": "final-only"}
    return small_run(devkit, folder, **{**settings, **changes})


@pytest.fixture(scope="module")
def whole(devkit: Path, store: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainConfig, dict[str, Any]]:
    config = run_of(devkit, store, tmp_path_factory.mktemp("whole"))
    return config, train(config)


def kill_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    run_step = Trainer.run_step

    def killed(self: Trainer, parts: Sequence[LoadedBatch | None], num_images: int) -> dict[str, Tensor]:
        if self.step == step:
            raise PulledPlugError
        return run_step(self, parts, num_images)

    monkeypatch.setattr(Trainer, "run_step", killed)


def assert_same(config: TrainConfig, result: dict[str, Any], whole: tuple[TrainConfig, dict[str, Any]]) -> None:
    assert_same_checkpoints(config.checkpoint_dir, whole[0].checkpoint_dir)
    for key in ("last", "best", "steps"):
        assert without_seconds(result[key]) == without_seconds(whole[1][key])


@pytest.mark.parametrize("step", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_a_run_killed_within_an_epoch_goes_on_from_its_last_saved_step(
    devkit: Path, store: Path, tmp_path: Path, whole: Any, step: int
) -> None:
    config = run_of(devkit, store, tmp_path, checkpoint_steps=1)
    with pytest.MonkeyPatch.context() as patched:
        kill_at(patched, step)
        with pytest.raises(PulledPlugError):
            train(config)
    saved = load_checkpoint(config.checkpoint_dir / LATEST)
    assert saved.step == step
    torch.manual_seed(step)  # nothing may come from the state that another process happens to be in
    assert_same(config, train(config, resume=True), whole)


@pytest.mark.slow
def test_kills_at_twenty_random_steps_change_nothing(devkit: Path, store: Path, tmp_path: Path, whole: Any) -> None:
    """Every run is killed again and again, with a checkpoint every second step."""
    rng = random.Random(5)
    kills = runs = 0
    while kills < 20:
        runs += 1
        config = run_of(devkit, store, tmp_path / str(runs), checkpoint_steps=2)
        resume, result = False, None
        while result is None:
            with pytest.MonkeyPatch.context() as patched:
                kill_at(patched, rng.randrange(0, 7))
                try:
                    result = train(config, resume=resume)
                except PulledPlugError:
                    kills += 1
            resume = True
        assert_same(config, result, whole)


@pytest.mark.slow
def test_parts_of_a_batch_add_up_to_the_batch(devkit: Path, store: Path, tmp_path: Path) -> None:
    """With frozen norms, whose statistics do not look at the batch, to rounding."""
    student = small_run(devkit, tmp_path).student.model_copy(update={"norms": "frozen"})
    runs = []
    for parts in (1, 2, 3):
        config = small_run(
            devkit, tmp_path / str(parts), recipe={"batch_size": 3, "accumulate": parts}, limit=6, student=student,
            distillation=from_store(store),
        )  # fmt: skip
        runs.append((train(config)["last"]["losses"], weights_of(config)))
    for losses, weights in runs[1:]:
        for name, value in runs[0][0].items():
            assert losses[name] == pytest.approx(value, rel=2e-3), name
        for name, expected in runs[0][1].items():
            torch.testing.assert_close(weights[name], expected, rtol=1e-3, atol=1e-4, msg=name)


def test_the_average_is_that_of_the_weights_after_every_step(
    devkit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_step = Trainer.run_step
    seen: list[Tensor] = []

    def remembered(self: Trainer, parts: Sequence[LoadedBatch | None], num_images: int) -> dict[str, Tensor]:
        done = run_step(self, parts, num_images)
        seen.append(self.student.logit_head.weight.detach().clone())
        return done

    name = "logit_head.weight"
    monkeypatch.setattr(Trainer, "run_step", remembered)
    config = small_run(devkit, tmp_path, recipe={"ema": 0.75, "batch_size": 1}, limit=4)
    train(config)
    average = seen[0].double()
    for weight in seen[1:]:
        average = 0.75 * average + 0.25 * weight.double()
    torch.testing.assert_close(weights_of(config, BEST)[name].double(), average, rtol=1e-5, atol=1e-7)
    assert torch.equal(weights_of(config, LATEST)[name], seen[-1])

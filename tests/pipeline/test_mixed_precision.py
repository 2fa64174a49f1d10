"""bfloat16, float16, channels-last and compiled runs: the run of float32, as far as their arithmetic allows."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from data.errors import TrainingError
from data.records import ImageRecord
from pipeline.checkpoint import load_checkpoint
from pipeline.config import TrainConfig
from pipeline.dataset import LoadedBatch
from pipeline.train import train
from pipeline.trainer import Trainer
from tests.pipeline.small_runs import PulledPlugError, equal, from_store, small_run, weights_of

CPU = torch.device("cpu")


def run_of(devkit: Path, store: Path, folder: Path, **recipe: Any) -> TrainConfig:
    return small_run(devkit, folder, recipe=recipe, distillation=from_store(store), evaluate="final-only")


def losses_of(config: TrainConfig) -> dict[str, float]:
    losses: dict[str, float] = json.loads((config.run_dir / "metrics.jsonl").read_text().splitlines()[-1])["losses"]
    return losses


@pytest.fixture(scope="module")
def plain(devkit: Path, store: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    config = run_of(devkit, store, tmp_path_factory.mktemp("plain"))
    train(config)
    return losses_of(config)


@pytest.mark.parametrize(
    ("recipe", "tolerance"),
    [
        pytest.param({"amp": "bfloat16"}, 0.05, id="bfloat16"),
        pytest.param({"amp": "float16"}, 0.05, id="float16", marks=pytest.mark.slow),
        pytest.param({"channels_last": True}, 0.01, id="channels last", marks=pytest.mark.slow),
    ],
)
def test_losses_are_near_those_of_float32(
    devkit: Path, store: Path, tmp_path: Path, plain: dict[str, float], recipe: dict[str, Any], tolerance: float
) -> None:
    config = run_of(devkit, store, tmp_path, **recipe)
    train(config)
    for name in ("detection", "feature", "logit"):
        assert losses_of(config)[name] == pytest.approx(plain[name], rel=tolerance)
    weights = weights_of(config)
    assert all(value.dtype == torch.float32 for value in weights.values() if value.is_floating_point())


def test_bfloat16_reaches_the_backbone_and_spares_the_losses(
    devkit: Path, records: list[ImageRecord], monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = Trainer(small_run(devkit, Path("unused"), recipe={"amp": "bfloat16"}).resolved(), records[:2], CPU, None)
    seen: list[torch.dtype] = []
    body: Any = trainer.student.detector.backbone.body
    body.register_forward_hook(lambda _, __, maps: seen.append(maps[-1].dtype))
    scale = trainer.objective.forward

    def told(*given: Any) -> dict[str, Tensor]:
        parts: dict[str, Tensor] = scale(*given)
        seen.append(parts["detection"].dtype)
        return parts

    monkeypatch.setattr(trainer.objective, "forward", told)
    from pipeline.train import training_loader

    loaded = next(iter(training_loader(trainer)))
    trainer.run_step([loaded], 2)
    assert seen == [torch.bfloat16, torch.float32]


@pytest.mark.slow
def test_float16_keeps_its_scale_over_a_resume(devkit: Path, store: Path, tmp_path: Path) -> None:
    config = run_of(devkit, store, tmp_path, amp="float16", epochs=2)
    whole = run_of(devkit, store, tmp_path / "whole", amp="float16", epochs=2)
    train(whole)
    run_step = Trainer.run_step

    def killed(self: Trainer, parts: Sequence[LoadedBatch | None], num_images: int) -> dict[str, Tensor]:
        if self.step == 3:
            raise PulledPlugError
        return run_step(self, parts, num_images)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Trainer, "run_step", killed)
        with pytest.raises(PulledPlugError):
            train(config)
    saved = load_checkpoint(config.checkpoint_dir / "student_latest.pth").training
    assert saved is not None
    assert saved["scaler"]["scale"] > 0
    train(config, resume=True)
    assert equal(weights_of(config), weights_of(whole))


def test_an_exploding_run_names_step_and_images_and_keeps_its_checkpoint(
    devkit: Path, store: Path, tmp_path: Path
) -> None:
    config = small_run(devkit, tmp_path, recipe={"epochs": 2, "learning_rate": 1e30, "clip_norm": 1e30})
    with pytest.raises(TrainingError, match=r"is not finite at step \d+: .*images VOC2007/") as caught:
        train(config)
    assert "--learning-rate" in str(caught.value)


@pytest.mark.slow
def test_a_compiled_run_is_near_the_plain_one(
    devkit: Path, store: Path, tmp_path: Path, plain: dict[str, float]
) -> None:
    config = run_of(devkit, store, tmp_path, compile=True)
    train(config)
    for name in ("detection", "feature", "logit"):
        assert losses_of(config)[name] == pytest.approx(plain[name], rel=0.01)
    names = weights_of(config).keys()
    assert not [name for name in names if "_orig_mod" in name]

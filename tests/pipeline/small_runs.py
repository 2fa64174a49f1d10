"""Configurations small enough that a whole extraction or a training run takes a second or two."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from data.geometry import VIEWS, View
from data.records import ImageRecord
from pipeline.checkpoint import BEST, LATEST, Checkpoint, load_checkpoint, save_checkpoint
from pipeline.config import Distillation, Recipe, Residency, TrainConfig
from pipeline.dataset import LoadedBatch, SampleKey, TrainingImages, collate_loaded
from pipeline.extract import ExtractConfig
from pipeline.stored_targets import StoredTargets
from pipeline.trainer import Trainer
from students.config import StudentConfig
from students.detector import Student, build_student

# A real MobileNetV3-Small under a narrow neck with few proposals.
SMALL_STUDENT = StudentConfig(
    backbone="mobilenet_v3_small",
    backbone_weights="none",
    neck_width=16,
    rpn_samples=32,
    roi_samples=16,
    train_proposals=50,
    eval_proposals=20,
)
TINY_TEACHERS = ("tiny_dino", "tiny_clip")


def extraction(voc_root: Path, out: Path, **changes: Any) -> ExtractConfig:
    """The twelve training images, both tiny teachers and views; shards of four and batches of three do not fit."""
    settings: dict[str, Any] = {
        "voc_root": voc_root,
        "voc_sets": ("2007:train",),
        "out": out,
        "teachers": TINY_TEACHERS,
        "shard_samples": 4,
        "batch_size": 3,
        "workers": 0,
        "device": "cpu",
    }
    return ExtractConfig(**{**settings, **changes})


def small_run(voc_root: Path, folder: Path, name: str = "run", **changes: Any) -> TrainConfig:
    """Two steps of two images. `changes` replace fields of the run; `recipe` is a dictionary of the recipe's."""
    recipe = Recipe(**{"epochs": 1, "batch_size": 2, **changes.pop("recipe", {})})
    settings: dict[str, Any] = {
        "run_name": name,
        "voc_root": voc_root,
        "voc_sets": ("2007:train",),
        "val_sets": ("2007:val",),
        "limit": 4,
        "student": SMALL_STUDENT,
        "recipe": recipe,
        "device": "cpu",
        "workers": 0,
        "pictures": 0,
        "runs_dir": folder / "runs",
        "checkpoints_dir": folder / "checkpoints",
    }
    return TrainConfig(**{**settings, **changes})


def from_store(*stores: Path, **weights: Any) -> Distillation:
    return Distillation(source="store", stores=stores, **weights)


def stored_targets(
    *stores: Path,
    records: list[ImageRecord],
    views: Sequence[View] = VIEWS,
    residency: Residency = "mmap",
    **settings: Any,
) -> StoredTargets:
    """The stores' targets of the records on the CPU. `settings` are fields of the distillation."""
    return StoredTargets(from_store(*stores, **settings), records, views, torch.device("cpu"), residency)


def load(records: list[ImageRecord], views: list[View], **settings: Any) -> LoadedBatch:
    """One batch of the records, each in its view."""
    images = TrainingImages(records, **settings)
    return collate_loaded([images.load(SampleKey(index, view, 0)) for index, view in enumerate(views)])


def files_of(folder: Path) -> dict[str, bytes]:
    """The bytes of every file that two equal stores share: all but who made them, and when."""
    paths = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != "provenance.jsonl")
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def weights_of(config: TrainConfig, name: str = LATEST) -> dict[str, Tensor]:
    return load_checkpoint(config.checkpoint_dir / name).student


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Whether two state dicts agree to the last bit."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def assert_same_checkpoints(folder: Path, other: Path) -> None:
    """The latest and the best checkpoint of two runs: weights, losses and all training state, to the last bit."""
    for name in (LATEST, BEST):
        one, two = load_checkpoint(folder / name), load_checkpoint(other / name)
        assert equal(one.student, two.student)
        assert without_seconds(one.history) == without_seconds(two.history)
        assert (one.training is None) == (two.training is None)
        for part in (one.training or {}).keys() - {"random_states"}:
            assert one.training is not None
            assert two.training is not None
            assert_same_state(one.training[part], two.training[part])


def assert_same_state(one: Any, other: Any) -> None:
    """Two trees of plain values and tensors are equal."""
    assert type(one) is type(other)
    if isinstance(one, Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for name, value in one.items():
            assert_same_state(value, other[name])
    elif isinstance(one, list):
        assert len(one) == len(other)
        for mine, theirs in zip(one, other, strict=True):
            assert_same_state(mine, theirs)
    else:
        assert one == other


def without_seconds(content: Any) -> Any:
    """The content of a result or a history without what the clock said."""
    if isinstance(content, dict):
        return {k: without_seconds(v) for k, v in content.items() if not k.startswith(("seconds", "data_wait"))}
    return [without_seconds(item) for item in content] if isinstance(content, list) else content


class PulledPlugError(Exception):
    """Stands for a kill."""


def stop_in_epoch(monkeypatch: pytest.MonkeyPatch, epoch: int, after_steps: int = 1) -> None:
    """Stop training in an epoch (from 1), after so many of its steps."""
    run_step = Trainer.run_step

    def step(self: Trainer, parts: Sequence[LoadedBatch | None], num_images: int) -> dict[str, Tensor]:
        if self.step == (epoch - 1) * len(self.batches) + after_steps:
            raise PulledPlugError
        return run_step(self, parts, num_images)

    monkeypatch.setattr(Trainer, "run_step", step)


def save_student(folder: Path, config: StudentConfig, **changes: Any) -> Path:
    """Save a student built from a seed whose box head has opinions: a fresh one says nearly the same of every box."""
    torch.manual_seed(3)
    student = build_student(config)
    with torch.no_grad():
        student.detector.roi_heads.box_predictor.cls_score.weight.mul_(40)
    return save_as(folder / LATEST, student, **changes)


def save_as(path: Path, student: Student, **changes: Any) -> Path:
    fields: dict[str, Any] = {
        "config": small_run(Path("voc"), Path("out"), student=student.config).resolved(),
        "student": student.state_dict(),
        "epoch": 1,
        "step": 2,
        "history": [],
        "targets": {"source": "none"},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    save_checkpoint(path, Checkpoint(**{**fields, **changes}))
    return path

"""Checkpoints: plain tensors, numbers, strings, lists and dicts, so that `torch.load` needs no trust.

| key        | holds                                                                                |
|------------|--------------------------------------------------------------------------------------|
| format     | 1                                                                                    |
| config     | the `TrainConfig`, as JSON                                                           |
| student    | the student's state dict (detector and auxiliary logit head)                         |
| epoch      | finished epochs; step: finished steps                                                |
| history    | one dict an epoch: losses, rates, validation figures                                 |
| targets    | where the teacher targets came from: fingerprints and content digests, or identities |
| training   | objective and optimizer state; absent in `student_best.pth`                          |
"""

from __future__ import annotations

import contextlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from data.errors import CheckpointError, TrainingError
from pipeline.config import TrainConfig
from students.detector import Student, build_student

FORMAT = 1
LATEST = "student_latest.pth"
BEST = "student_best.pth"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint's content; see the module's table."""

    config: TrainConfig
    student: dict[str, Tensor]
    epoch: int
    step: int
    history: list[dict[str, Any]]
    targets: dict[str, Any]
    training: dict[str, Any] | None = None

    def build_student(self, device: torch.device) -> Student:
        """Return the student with its weights, in evaluation mode, on the device.

        Raises CheckpointError where the weights do not fit the configuration.
        """
        student = build_student(self.config.student.without_weights())
        try:
            student.load_state_dict(self.student)
        except RuntimeError as error:
            raise CheckpointError(
                f"the checkpoint's weights do not fit its own configuration ({self.config.student.backbone}): {error}"
            ) from error
        return student.to(device).eval()


def save_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint; a kill at any point leaves the old file or the new one, whole."""
    content: dict[str, Any] = {
        "format": FORMAT,
        "config": json.loads(checkpoint.config.model_dump_json()),
        "student": checkpoint.student,
        "epoch": checkpoint.epoch,
        "step": checkpoint.step,
        "history": checkpoint.history,
        "targets": checkpoint.targets,
    }
    if checkpoint.training is not None:
        content["training"] = checkpoint.training
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except (OSError, RuntimeError) as error:
        temporary.unlink(missing_ok=True)
        # Where a write fails, torch's writer fails once more when it is closed, and that is what comes out.
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError):
            raise
        raise TrainingError(
            f"{path}: cannot be written: {cause.strerror or cause}; what it held before is as it was",
            hint="free some space, then go on with --resume",
        ) from error


def remove_leftovers(folder: Path) -> None:
    """Remove what a killed process had half written in a run's folder of checkpoints."""
    for path in folder.glob(".*.pth.tmp-*"):
        path.unlink(missing_ok=True)


def load_checkpoint(path: Path, backbone: str | None = None) -> Checkpoint:
    """Return the checkpoint at a path, on the CPU.

    backbone: the one that the caller expects.

    Raises CheckpointError where it is missing, not ours, of a newer format, damaged, or of another backbone.
    """
    if not path.is_file():
        near = next(folder for folder in path.parents if folder.is_dir())
        # Not all the way down: an environment's site-packages hold `.pth` files of another kind.
        found = sorted(str(p) for pattern in (f"*/{LATEST}", f"*/{BEST}") for p in near.glob(pattern))[:5]
        beside = f"; found {', '.join(found)}" if found else ""
        raise CheckpointError(f"{path}: no such checkpoint{beside}", hint="train one: python cli.py train …")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler raises whatever the damage makes of it
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{path}: cannot be read as a checkpoint ({first})") from error
    if not isinstance(content, dict) or not isinstance(content.get("format"), int):
        raise CheckpointError(f"{path}: a torch file, but not a TeachOnce checkpoint")
    if content["format"] > FORMAT:
        raise CheckpointError(
            f"{path}: expected format {FORMAT}, found the newer {content['format']}", hint="update TeachOnce"
        )
    try:
        config = TrainConfig.model_validate(content.pop("config"))
        content.pop("format")
        checkpoint = Checkpoint(config=config, **content)
    except (ValidationError, TypeError, KeyError) as error:
        raise CheckpointError(f"{path}: the checkpoint is damaged: {error}") from error
    stored = config.student.backbone
    if backbone is not None and backbone != stored:
        raise CheckpointError(
            f"{path}: expected a checkpoint of backbone {backbone}, found one of {stored}",
            hint=f"give --backbone {stored}, or leave --backbone out",
        )
    return checkpoint


def link_latest(checkpoints_dir: Path, target: Path) -> None:
    """Point `checkpoints/student_latest.pth` at the last run's latest checkpoint, atomically."""
    link = checkpoints_dir / LATEST
    temporary = checkpoints_dir / f".{LATEST}.tmp-{os.getpid()}"
    with contextlib.suppress(FileNotFoundError):
        temporary.unlink()
    temporary.symlink_to(target.relative_to(checkpoints_dir))
    temporary.replace(link)

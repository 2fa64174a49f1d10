"""A student learns: the whole way through the command line, to a figure that chance does not reach."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from data.synthetic import make_devkit

REPOSITORY = Path(__file__).resolve().parents[1]
CLASSES = ("bird", "bottle", "car", "cat", "dog", "person")


def call(*arguments: str | Path) -> Any:
    """Run a verb in a process of its own, on as many cores as it likes, and return its JSON."""
    environment = {name: value for name, value in os.environ.items() if not name.endswith("_NUM_THREADS")}
    command = [sys.executable, "cli.py", *map(str, arguments), "--json"]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
def test_a_student_overfits_sixteen_images_and_eval_agrees(tmp_path: Path) -> None:
    devkit = make_devkit(tmp_path / "VOCdevkit", num_train=16, num_val=0, classes=CLASSES, seed=1)
    images = ("--voc-root", devkit, "--voc-set", "2007:train")
    result = call(
        "train", *images, "--val-set", "2007:train", "--backbone", "mobilenet_v3_small", "--backbone-weights", "none",
        "--epochs", "38", "--batch-size", "4", "--learning-rate", "0.02", "--flip", "0", "--eval-final-only",
        "--run-name", "overfit", "--runs-dir", tmp_path / "runs", "--checkpoints-dir", tmp_path / "checkpoints",
        "--workers", "0", "--device", "cpu",
    )  # fmt: skip
    print(result["last"]["val"]["per_iou"], result["seconds"])
    assert result["steps"] == 152
    assert result["last"]["losses"]["detection"] < 1.0

    checkpoint, saved = tmp_path / "checkpoints/overfit/student_latest.pth", tmp_path / "detections"
    scored = call("eval", "--checkpoint", checkpoint, *images, "--save-detections", saved, "--device", "cpu")
    assert scored["per_iou"]["0.50"] > 0.6
    assert scored == result["last"]["val"]
    assert call("eval", "--detections", saved, *images) == scored

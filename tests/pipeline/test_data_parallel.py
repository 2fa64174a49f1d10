"""Two processes under torchrun train the student of one, to rounding: the same losses and weights at the same batch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pipeline.checkpoint import load_checkpoint

ROOT = Path(__file__).parents[2]
TORCHRUN = ("-m", "torch.distributed.run", "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0",
            "--nproc-per-node")  # fmt: skip
# Norms are frozen: their statistics would look at a process's own images.
OPTIONS = (
    "--backbone", "mobilenet_v3_small", "--backbone-weights", "none", "--norms", "frozen", "--epochs", "2",
    "--workers", "0", "--device", "cpu", "--limit", "7", "--batch-size", "4", "--eval-final-only", "--run-name", "r",
)  # fmt: skip


def run(processes: int, devkit: Path, folder: Path, *more: str | Path) -> subprocess.CompletedProcess[str]:
    places = ("--runs-dir", folder / "runs", "--checkpoints-dir", folder / "checkpoints")
    command = ["cli.py", "train", "--voc-root", devkit, *OPTIONS, *places, *more]
    before = [*TORCHRUN, processes] if processes > 1 else []
    return subprocess.run(
        [sys.executable, *map(str, [*before, *command])],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=280, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def result_of(folder: Path) -> dict[str, object]:
    result: dict[str, object] = json.loads((folder / "runs/r/result.json").read_text())
    return result


def assert_alike(folder: Path, other: Path) -> None:
    one, two = (json.loads((f / "runs/r/metrics.jsonl").read_text().splitlines()[-1]) for f in (folder, other))
    for name, value in one["losses"].items():
        assert two["losses"][name] == pytest.approx(value, rel=5e-3), name
    mine, theirs = (load_checkpoint(f / "checkpoints/r/student_latest.pth").student for f in (folder, other))
    for name, expected in mine.items():
        torch.testing.assert_close(theirs[name], expected, rtol=2e-3, atol=2e-4, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize(
    "kd",
    [
        ("--beta", "1"),
        ("--feature-loss", "mgd"),
        ("--feature-loss", "fgd", "--accumulate", "2"),
        # Found anew after every step: a process without an image in one of them must find the same.
        ("--kd-weight", "auto", "--report-steps", "1", "--limit", "5"),
    ],
    ids=str,
)
def test_two_processes_train_as_one(devkit: Path, store: Path, tmp_path: Path, kd: tuple[str, ...]) -> None:
    """Seven images in batches of four: in the last one, a process has one image and the other two."""
    for processes in (1, 2):
        done = run(processes, devkit, tmp_path / str(processes), "--cached-teachers", store, *kd)
        assert done.returncode == 0, done.stderr
    assert_alike(tmp_path / "1", tmp_path / "2")
    assert result_of(tmp_path / "2")["processes"] == 2
    # One process writes: one line an epoch.
    assert len((tmp_path / "2/runs/r/metrics.jsonl").read_text().splitlines()) == 2


@pytest.mark.slow
def test_correlation_over_the_batch_is_that_of_all_processes(devkit: Path, store: Path, tmp_path: Path) -> None:
    options = ("--cached-teachers", store, "--feature-loss", "pkd", "--gamma", "0")
    for processes in (1, 2):
        done = run(processes, devkit, tmp_path / str(processes), *options, "--limit", "8")
        assert done.returncode == 0, done.stderr
    assert_alike(tmp_path / "1", tmp_path / "2")
    done = run(2, devkit, tmp_path / "3", *options, "--limit", "5")
    assert done.returncode != 0
    assert "--feature-loss pkd: expected an image for each of 2 processes" in done.stderr


@pytest.mark.slow
def test_a_process_without_an_image_waits_for_the_others(devkit: Path, tmp_path: Path) -> None:
    for processes in (1, 2):
        done = run(processes, devkit, tmp_path / str(processes), "--limit", "5")
        assert done.returncode == 0, done.stderr
    assert_alike(tmp_path / "1", tmp_path / "2")

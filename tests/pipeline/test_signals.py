"""The real command in processes of its own, killed and interrupted: --resume ends as a run that was left alone."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from data.synthetic import make_devkit
from pipeline.checkpoint import LATEST, load_checkpoint
from tests.pipeline.small_runs import assert_same_checkpoints, without_seconds

ROOT = Path(__file__).parents[2]
KILLS = 20
SECONDS = 240
# Of one image and a small network, so that a restart is little more than its imports; with all that has state: the
# average, masks, and weights that are found. Six steps an epoch.
OPTIONS = (
    "--backbone", "timm:test_efficientnet", "--backbone-weights", "none", "--epochs", "4", "--batch-size", "1",
    "--limit", "6", "--jitter", "0.2", "--ema", "0.9", "--feature-loss", "mgd", "--kd-weight", "auto", "--logit-loss",
    "binary", "--report-steps", "2", "--checkpoint-steps", "2", "--pictures", "0", "--device", "cpu", "--run-name", "r",
)  # fmt: skip


@pytest.fixture(scope="module")
def common(store: Path, devkit: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The command less its folders; the one validation image comes from a devkit that begins with the same images."""
    root = make_devkit(tmp_path_factory.mktemp("signals") / "VOCdevkit", num_train=12, num_val=1, seed=7)
    options = [*OPTIONS, "--voc-root", str(root), "--cached-teachers", str(store)]
    return [sys.executable, "cli.py", "train", *options]


def places(folder: Path) -> list[str]:
    return ["--runs-dir", str(folder / "runs"), "--checkpoints-dir", str(folder / "checkpoints")]


def latest(folder: Path) -> Path:
    return folder / "checkpoints/r" / LATEST


@contextmanager
def started(command: list[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Start a process in a group of its own; what is left of it in the end is killed."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    with (
        log.open("wb") as said,
        subprocess.Popen(command, cwd=ROOT, stdout=said, stderr=said, start_new_session=True, env=environment) as job,
    ):
        try:
            yield job
        finally:
            if job.poll() is None:
                os.killpg(job.pid, signal.SIGKILL)


def run_to_its_end(command: list[str], log: Path) -> None:
    with started(command, log) as job:
        job.wait(SECONDS)
    assert job.returncode == 0, log.read_text()


def wait_for_saves(job: subprocess.Popen[bytes], path: Path, count: int) -> None:
    """Return once the checkpoint was replaced so many times, or the process has ended."""

    def identity() -> tuple[int, int] | None:
        try:
            found = path.stat()
        except FileNotFoundError:
            return None
        return found.st_ino, found.st_mtime_ns

    before, deadline = identity(), time.monotonic() + SECONDS
    while count and job.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
        now = identity()
        if now != before:
            before, count = now, count - 1


def assert_same_end(folder: Path, other: Path) -> None:
    """The same weights, states and losses of every epoch, and nothing left over."""
    assert_same_checkpoints(folder / "checkpoints/r", other / "checkpoints/r")
    one, two = (json.loads((each / "runs/r/result.json").read_text()) for each in (folder, other))
    for key in ("last", "best", "steps"):
        assert without_seconds(one[key]) == without_seconds(two[key])
    lines, others = ((each / "runs/r/metrics.jsonl").read_text().splitlines() for each in (folder, other))
    assert [without_seconds(json.loads(line)) for line in lines] == [
        without_seconds(json.loads(line)) for line in others
    ]
    assert not [path.name for path in folder.rglob("*") if ".tmp" in path.name]


@pytest.fixture(scope="module")
def whole(common: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was left alone."""
    folder = tmp_path_factory.mktemp("whole")
    run_to_its_end([*common, *places(folder)], folder / "log")
    return folder


@pytest.mark.slow
def test_twenty_kills_at_random_steps_change_nothing(common: list[str], whole: Path, tmp_path: Path) -> None:
    """SIGKILL at any moment of a step, also while a checkpoint is written, again and again."""
    rng, kills, runs, steps = random.Random(11), 0, 0, []
    while kills < KILLS:
        runs += 1
        folder = tmp_path / str(runs)
        folder.mkdir()
        resume: list[str] = []
        while True:
            with started([*common, *places(folder), *resume], folder / "log") as job:
                if kills < KILLS:
                    wait_for_saves(job, latest(folder), rng.randint(1, 2))
                    time.sleep(rng.uniform(0, 0.4))
                    job.kill()
                job.wait(SECONDS)
            if job.returncode == 0:
                break
            assert job.returncode == -signal.SIGKILL, (folder / "log").read_text()
            kills += 1
            steps.append(load_checkpoint(latest(folder)).step)
            resume = ["--resume"]
        assert_same_end(folder, whole)
    print(f"{kills} kills in {runs} runs, saved at steps {steps}")
    assert len(set(steps)) > 4


@pytest.mark.slow
def test_an_interrupted_run_saves_its_step_and_exits_130(common: list[str], whole: Path, tmp_path: Path) -> None:
    """Ctrl-C to the whole group of processes, as a terminal sends it; then --resume."""
    command, log = [*common, *places(tmp_path), "--workers", "1"], tmp_path / "log"
    with started(command, log) as job:
        wait_for_saves(job, latest(tmp_path), 2)
        os.killpg(job.pid, signal.SIGINT)
        job.wait(SECONDS)
    said = log.read_text()
    assert job.returncode == 130, said
    assert "Traceback" not in said
    assert "saved at step" in said
    assert 4 <= load_checkpoint(latest(tmp_path)).step < 24
    run_to_its_end([*command, "--resume"], log)
    assert_same_end(tmp_path, whole)

"""The verb: what a dry run shows, the commands for a scheduler, exit codes; and, slow, real runs."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import cli
import pipeline.sweep.command
from pipeline.sweep.collect import collect
from pipeline.sweep.estimates import PARAMETERS, checkpoint_bytes
from pipeline.sweep.schedule import Rules
from pipeline.train_options import training_options
from students.config import StudentConfig
from students.detector import build_student
from tests.command_line import Done, run
from tests.pipeline.small_runs import small_run
from tests.pipeline.sweep.fakes import REPOSITORY, FakeRunner, write_plan

DISTILLED = {
    "features": {"cached-teachers": True, "gamma": 0, "grid": {"beta": [1, 5]}},
    "best": {"cached-teachers": True, "beta": {"best_of": "features"}},
}


@pytest.fixture
def fake_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeRunner:
    """Runs of the verb that are over at once."""
    runner = FakeRunner(tmp_path / "events")
    monkeypatch.setattr(pipeline.sweep.command, "TrainRunner", lambda *_, **__: runner)
    monkeypatch.setattr(pipeline.sweep.command, "Rules", lambda parallel, retries: Rules(parallel, retries, 0.01, 0.02))
    return runner


def sweep(devkit: Path, folder: Path, *more: str | Path, plan: Path | None = None) -> Done:
    plan = plan or write_plan(folder)
    return run("sweep", plan, "--voc-root", devkit, "--out", folder / "out", *more)


class TestDryRun:
    def test_it_shows_runs_time_and_disk_and_touches_nothing(self, devkit: Path, store: Path, tmp_path: Path) -> None:
        plan = write_plan(tmp_path, arms={"plain": {}, **DISTILLED, "other": {"backbone": "timm:resnet34"}})
        done = sweep(devkit, tmp_path, "--dry-run", "--cached-teachers", store, plan=plan)
        assert done.code == 0, done.err
        assert max(map(len, done.out.splitlines()[1:])) <= 80  # the first one names the folder
        rows = {line.split()[0]: line.split()[1:] for line in done.out.splitlines() if line.strip()}
        assert rows["features-beta5"][:4] == ["resnet18", "3", "–", "–"]
        assert rows["other"][-1] == "unknown"
        assert rows["all"][:1] == ["15"]
        assert "best: beta of the best of features, by mean validation mAP at the last epoch" in done.out
        assert "time: unknown until one run of a backbone is finished" in done.out
        assert not (tmp_path / "out").exists()

    def test_it_knows_what_is_finished_and_what_that_took(
        self, devkit: Path, tmp_path: Path, fake_runs: FakeRunner
    ) -> None:
        plan = write_plan(tmp_path, arms={"a": {}, "b": {"flip": 0}}, seeds=[0])
        assert sweep(devkit, tmp_path, plan=plan).code == 0
        done = sweep(devkit, tmp_path, "--dry-run", "--json", "--seeds", "0,1", plan=plan)
        told = json.loads(done.out)
        assert (told["runs"], told["finished"], told["seeds"]) == (4, 2, [0, 1])
        assert 0 < told["seconds"] < 120
        assert [arm["finished"] for arm in told["arms"]] == [1, 1]

    @pytest.mark.parametrize("backbone", PARAMETERS)
    def test_the_disk_is_counted_from_the_students_weights(self, backbone: str, tmp_path: Path) -> None:
        student = StudentConfig(backbone=backbone, backbone_weights="none")
        weights = sum(p.numel() for p in build_student(student).parameters())
        assert PARAMETERS[backbone] == weights
        config = small_run(tmp_path, tmp_path, student=student)
        # Weights twice, and what the optimiser keeps of each: SGD a momentum, AdamW two moments.
        assert checkpoint_bytes(config) == 4 * weights * (4 if backbone == "vit_tiny" else 3)


class TestCommands:
    def test_a_line_a_run_and_a_comment_for_what_is_not_known_yet(
        self, devkit: Path, store: Path, tmp_path: Path
    ) -> None:
        plan = write_plan(tmp_path, arms={"plain": {}, **DISTILLED}, seeds=[0, 1])
        done = sweep(devkit, tmp_path, "--emit-commands", "--cached-teachers", store, plan=plan)
        lines = done.out.splitlines()
        assert (done.code, len(lines)) == (0, 7)
        assert lines[-1] == "# best, 2 runs: waits for features; then ask for the commands again"
        assert not (tmp_path / "out").exists()
        params = cli.cli.commands["train"].make_context("train", shlex.split(lines[1])[3:]).params
        assert params["beta"] == 1.0
        assert params["cached_teachers"] == (store,)
        assert len(params["expect_fingerprints"][0]) == 64
        assert params["runs_dir"] == tmp_path / "out" / "runs"

    def test_a_run_made_by_its_command_is_finished_for_the_sweep(
        self, devkit: Path, store: Path, tmp_path: Path, fake_runs: FakeRunner
    ) -> None:
        plan = write_plan(
            tmp_path, seeds=[0], arms=DISTILLED,
            train={"backbone": "mobilenet_v3_small", "backbone-weights": "none", "epochs": 1, "batch-size": 2,
                   "limit": 2, "workers": 0, "pictures": 0, "device": "cpu", "evaluate": "final-only"},
        )  # fmt: skip
        given = ("--cached-teachers", store)
        (command, *_) = sweep(devkit, tmp_path, "--emit-commands", *given, plan=plan).out.splitlines()
        assert run(*shlex.split(command)[2:]).code == 0
        again = sweep(devkit, tmp_path, "--emit-commands", *given, plan=plan).out.splitlines()
        assert again[0] == f"# finished: {shlex.split(command)[shlex.split(command).index('--run-name') + 1]}"
        done = sweep(devkit, tmp_path, *given, plan=plan)
        assert done.code == 0, done.err
        assert "1 of 3 runs are finished" in done.err
        assert "features-beta1, seed 0: started" not in done.err


class TestExitCodes:
    def test_failed_runs_exit_1_and_the_rest_is_told(self, devkit: Path, tmp_path: Path, fake_runs: FakeRunner) -> None:
        fake_runs.failures = {"plain": 99}
        done = sweep(devkit, tmp_path, "--json", "--retries", "0", "--seeds", "0")
        told = json.loads(done.out)
        assert done.code == 1
        assert list(told["failed"].values()) == ["exit 1: the try 0 failed"]
        # The baseline's settings are those of a member of the grid, so that member has no runs either.
        assert told["waiting"] == {"best": "waits for rates"}

    @pytest.mark.parametrize(
        ("more", "said"),
        [
            (("--seeds", "0,x"), "expected numbers from 0, each once"),
            (("--seeds", "1,1"), "expected numbers from 0, each once"),
            (("--set", "epochs=x"), "--set: epochs: 'x' is not a valid int"),
            (("--parallel", "0"), "0 is not in the range"),
        ],
        ids=["seeds", "twice", "set", "parallel"],
    )
    def test_what_cannot_be_meant_exits_2(self, more: tuple[str, ...], said: str, devkit: Path, tmp_path: Path) -> None:
        done = sweep(devkit, tmp_path, *more)
        assert done.code == 2
        assert said in done.err

    def test_beta_without_features_in_the_store_is_refused(self, devkit: Path, store: Path, tmp_path: Path) -> None:
        arms = {"a": {"cached-teachers": True, "feature-teacher": "tiny_clip"}}
        done = sweep(devkit, tmp_path, "--cached-teachers", store, plan=write_plan(tmp_path, arms=arms))
        assert done.code == 2
        assert "arm a: --feature-teacher tiny_clip: the store" in done.err
        assert "has no features of it" in done.err

    def test_images_that_are_not_in_the_store_exit_3(self, devkit: Path, store: Path, tmp_path: Path) -> None:
        plan = write_plan(tmp_path, arms={"a": {"cached-teachers": True}})
        done = sweep(devkit, tmp_path, "--cached-teachers", store, "--set", "voc-set=2007:val", plan=plan)
        assert done.code == 3
        assert "arm a: 6 of 6 training images are not in the store" in done.err

    def test_another_store_on_the_same_folder_exits_3(
        self, devkit: Path, store: Path, store32: Path, tmp_path: Path, fake_runs: FakeRunner
    ) -> None:
        plan = write_plan(tmp_path, arms={"a": {"cached-teachers": True}}, seeds=[0])
        assert sweep(devkit, tmp_path, "--cached-teachers", store, plan=plan).code == 0
        done = sweep(devkit, tmp_path, "--cached-teachers", store32, plan=plan)
        assert done.code == 3
        assert "was begun with another store" in done.err


def test_every_option_of_train_is_one_of_a_plan_or_refused_with_a_reason() -> None:
    from pipeline.sweep.settings import _NOT_IN_PLANS, TrainOptions

    flags = {str(option.name) for option in training_options()}
    options = TrainOptions()
    assert all(options.flag(name) for name in flags)
    assert set(_NOT_IN_PLANS) - flags == {"run_name", "runs_dir", "checkpoints_dir", "resume"}


def test_a_sweep_imports_no_torch() -> None:
    script = "import sys, pipeline.sweep.command; print(sorted({'torch', 'zarr'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.slow
class TestRealRuns:
    def environment(self) -> dict[str, str]:
        return {**os.environ, "OMP_NUM_THREADS": "1"}

    def command(self, devkit: Path, store: Path, folder: Path) -> list[str]:
        options = ("--set", "limit=4", "--parallel", "2", "--seeds", "0,1")
        places = ("--voc-root", str(devkit), "--cached-teachers", str(store), "--out", str(folder))
        return [sys.executable, "cli.py", "sweep", "plans/smoke.yaml", *places, *options]

    def sweep(self, devkit: Path, store: Path, folder: Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(devkit, store, folder),
            cwd=REPOSITORY, env=self.environment(), capture_output=True, text=True, check=False,
        )  # fmt: skip

    def test_the_smoke_plan_killed_twice_comes_to_the_same(self, devkit: Path, store: Path, tmp_path: Path) -> None:
        whole = self.sweep(devkit, store, tmp_path / "whole")
        assert whole.returncode == 0, whole.stderr
        for finished in (1, 4):
            process = subprocess.Popen(
                self.command(devkit, store, tmp_path / "killed"),
                cwd=REPOSITORY, env=self.environment(), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            )  # fmt: skip
            while len(list((tmp_path / "killed" / "runs").glob("*/result.json"))) < finished:
                assert process.poll() is None
                time.sleep(0.1)
            process.send_signal(signal.SIGKILL)
            process.wait()
        done = self.sweep(devkit, store, tmp_path / "killed")
        assert done.returncode == 0, done.stderr
        for arm, other in zip(collect(tmp_path / "whole").arms, collect(tmp_path / "killed").arms, strict=True):
            assert arm.settings == other.settings
            assert {s: r["last"]["val"] for s, r in arm.results.items()} == {
                s: r["last"]["val"] for s, r in other.results.items()
            }
        # No run was begun anew once it was finished: each log ends where the result was told, once.
        logs = list((tmp_path / "killed" / "logs").glob("*.log"))
        assert len(logs) == 8
        assert all(len(re.findall(r"^training took", log.read_text(), re.M)) == 1 for log in logs)

    def test_no_run_of_a_sweep_imports_a_teacher_library(self, devkit: Path, store: Path, tmp_path: Path) -> None:
        """Every process that Python starts below the sweep notes at its end which of them it has imported."""
        (tmp_path / "sitecustomize.py").write_text(
            "import atexit, os, sys\n"
            "def note():\n"
            "    found = sorted({'transformers', 'open_clip', 'torch'} & set(sys.modules))\n"
            f"    open({str(tmp_path / 'imported')!r}, 'a').write(f'{{found}} {{sys.argv[1:2]}}\\n')\n"
            "atexit.register(note)\n"
        )
        done = subprocess.run(
            self.command(devkit, store, tmp_path / "out"), cwd=REPOSITORY, capture_output=True, text=True, check=False,
            env={**self.environment(), "PYTHONPATH": str(tmp_path)},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        lines = (tmp_path / "imported").read_text().splitlines()
        assert lines.count("['torch'] ['train']") == 8
        assert not [line for line in lines if "transformers" in line or "open_clip" in line]

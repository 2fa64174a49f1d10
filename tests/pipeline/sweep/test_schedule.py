"""Working through a plan with fake runs: order, choices, failures, interruptions, kills, and several processes."""

from __future__ import annotations

import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from data.errors import StoreStaleError
from pipeline.sweep.collect import SweepRuns, collect
from pipeline.sweep.command import SweepOutcome, run_sweep
from pipeline.sweep.processes import Process
from pipeline.sweep.schedule import Rules
from pipeline.sweep.stores import Stores
from pipeline.sweep.variants import Run
from tests.pipeline.sweep.fakes import FakeRunner, events, request, work_in_background, write_plan

QUICK = Rules(parallel=2, poll_seconds=0.01, wait_seconds=0.02)
# Nine of the twelve of baseline and rates, for one rate is the baseline's, and three of the chosen one.
NUM_RUNS = 12


def work(folder: Path, devkit: Path, rules: Rules = QUICK, **fake: Any) -> SweepOutcome:
    plan = folder / "plan.yaml"
    asked = request(folder, devkit, plan=plan if plan.exists() else write_plan(folder))
    return run_sweep(asked, FakeRunner(folder / "events", **fake), rules)


def scores(collected: SweepRuns) -> dict[str, dict[int, float]]:
    return {
        arm.name: {seed: result["last"]["val"]["mAP"] for seed, result in arm.results.items()} for arm in collected.arms
    }


def each_ended_once(folder: Path) -> None:
    ended = {name: count for (what, name), count in events(folder).items() if what == "end"}
    assert len(ended) == NUM_RUNS
    assert set(ended.values()) == {1}


@pytest.fixture(scope="module")
def whole_folder(devkit: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a plan that nothing happened to on the way. Shared: copy it."""
    folder = tmp_path_factory.mktemp("whole")
    assert work(folder, devkit).failed == {}
    each_ended_once(folder)
    return folder


@pytest.fixture(scope="module")
def whole(whole_folder: Path) -> SweepRuns:
    """What that came to."""
    return collect(whole_folder / "out")


class TestWork:
    def test_every_run_is_there_and_validation_has_chosen(self, whole: SweepRuns) -> None:
        assert [arm.name for arm in whole.arms] == [
            "plain", "rates-learning_rate0.01", "rates-learning_rate0.02", "rates-learning_rate0.04", "best",
        ]  # fmt: skip
        assert whole.waiting == {}
        assert all(sorted(arm.results) == [0, 1, 2] for arm in whole.arms)
        choice = whole.arms[-1].chosen["learning-rate"]
        assert (choice.of, choice.value, choice.member) == ("rates", 0.02, "rates-learning_rate0.02")
        # By hand: 0.5 − |rate − 0.02| plus the mean of 0, 0.01 and 0.02.
        assert choice.val_map == pytest.approx(
            {"rates-learning_rate0.01": 0.5, "rates-learning_rate0.02": 0.51, "rates-learning_rate0.04": 0.49}
        )
        assert whole.arms[-1].settings == {"learning-rate": 0.02, "flip": 0.0}
        assert whole.arms[2].grid_of == "rates"
        assert whole.arms[2].baseline == "plain"

    def test_again_it_finds_everything_finished_also_where_the_folder_was_moved(
        self, devkit: Path, tmp_path: Path, whole_folder: Path, whole: SweepRuns
    ) -> None:
        moved = shutil.copytree(whole_folder, tmp_path / "moved")
        again = work(moved, devkit)
        assert events(moved) == events(whole_folder)
        assert scores(again.collected) == scores(whole)

    def test_runs_beside_each_other_are_as_many_as_asked_and_have_slots(self, devkit: Path, tmp_path: Path) -> None:
        plan = write_plan(tmp_path, arms={"a": {"grid": {"jitter": [0, 0.1, 0.2]}}}, seeds=[0])
        slots: list[int] = []

        class Noting(FakeRunner):
            def start(self, run: Run, *, resume: bool, slot: int) -> Any:
                slots.append(slot)
                return super().start(run, resume=resume, slot=slot)

        run_sweep(request(tmp_path, devkit, plan=plan), Noting(tmp_path / "events", seconds=0.2), QUICK)
        assert sorted(slots[:2]) == [0, 1]
        assert set(slots) == {0, 1}

    def test_more_seeds_run_only_what_is_new(self, devkit: Path, tmp_path: Path, whole_folder: Path) -> None:
        grown = shutil.copytree(whole_folder, tmp_path / "grown")
        write_plan(grown, seeds=[3])
        done = work(grown, devkit)
        assert [sorted(arm.results) for arm in done.collected.arms] == [[0, 1, 2, 3]] * 5
        assert sum(n for (what, _), n in events(grown).items() if what == "start") == NUM_RUNS + 4


class TestFailures:
    def test_a_run_that_fails_is_tried_again_and_goes_on(self, devkit: Path, tmp_path: Path, whole: SweepRuns) -> None:
        write_plan(tmp_path, seeds=[0])
        done = work(tmp_path, devkit, failures={"plain": 2})
        assert done.failed == {}
        assert scores(done.collected)["plain"][0] == scores(whole)["plain"][0]
        found = events(tmp_path)
        assert {n for (what, name), n in found.items() if what == "resume" and name.startswith("plain")} == {2}

    def test_one_that_fails_each_time_is_given_up_with_its_log(
        self, devkit: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        write_plan(tmp_path, seeds=[0, 1])
        done = work(tmp_path, devkit, failures={"rates-learning_rate0.04": 99})
        assert {name.rpartition("-")[0] for name in done.failed} == {
            f"rates-learning_rate0.04-s{seed}" for seed in (0, 1)
        }
        assert set(done.failed.values()) == {"exit 1 after 3 tries: the try 2 failed"}
        told = capsys.readouterr().err
        assert "given up, exit 1 after 3 tries; the end of" in told
        assert "  | error: the try 2 failed\n  |   next: try again" in told
        # The others went on; what depends on it did not, and says why.
        collected = done.collected
        assert [len(arm.results) for arm in collected.arms] == [2, 2, 2, 0, 0]
        assert collected.arms[3].failed == dict.fromkeys((0, 1), "exit 1 after 3 tries: the try 2 failed")
        assert "best: skipped, rates-learning_rate0.04 seed 0, rates-learning_rate0.04 seed 1" in told
        # The next time it is tried again.
        again = work(tmp_path, devkit)
        assert (again.failed, again.collected.arms[3].failed) == ({}, {})

    @pytest.mark.parametrize("code", [2, 3])
    def test_what_another_try_cannot_mend_is_not_tried_again(self, code: int, devkit: Path, tmp_path: Path) -> None:
        write_plan(tmp_path, seeds=[0])
        done = work(tmp_path, devkit, failures={"plain": 99}, exit_code=code)
        assert set(done.failed.values()) == {f"exit {code}: the try 0 failed"}
        assert sum(n for (what, name), n in events(tmp_path).items() if name.startswith("plain")) == 1

    def test_a_run_that_is_killed_is_told_by_its_signal(self, devkit: Path, tmp_path: Path) -> None:
        plan = write_plan(tmp_path, arms={"a": {}}, seeds=[0])

        class Killing(FakeRunner):
            def start(self, run: Run, *, resume: bool, slot: int) -> Any:
                child = super().start(run, resume=resume, slot=slot)
                child.send(signal.SIGKILL)
                return child

        rules = Rules(retries=1, poll_seconds=0.01)
        done = run_sweep(request(tmp_path, devkit, plan=plan), Killing(tmp_path / "events", seconds=9), rules)
        (message,) = done.failed.values()
        assert message.startswith("killed by SIGKILL (out of memory?) after 2 tries: ")


class TestStoreChanges:
    def test_a_store_that_changes_stops_the_sweep(
        self, devkit: Path, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        plan = write_plan(tmp_path, arms={"a": {"cached-teachers": True, "grid": {"beta": [1, 2, 3]}}}, seeds=[0])
        started: list[str] = []

        def change(run: Run) -> None:
            started.append(run.name)
            if len(started) == 2:
                monkeypatch.setattr(Stores, "refuse_changed", stale)

        def stale(self: Stores) -> None:
            raise StoreStaleError("changed")

        asked = request(tmp_path, devkit, plan=plan, cached_teachers=(store,))
        with pytest.raises(StoreStaleError):
            run_sweep(asked, FakeRunner(tmp_path / "events", before=change), Rules(poll_seconds=0.01))
        assert len(started) == 2
        collected = collect(tmp_path / "out")
        assert sum(len(arm.results) for arm in collected.arms) == 2
        assert collected.stores[0]["untrained"] == ["tiny_clip", "tiny_dino"]
        assert collected.store_cost is not None
        assert collected.store_cost["outputs"] == 48  # twelve images, two teachers, two views


@contextmanager
def processes(*started: Any) -> Iterator[None]:
    try:
        yield
    finally:
        for process in started:
            process.kill()
            process.wait()
            process.stdout.close()


def wait_until(folder: Path, what: str, count: int) -> None:
    until = time.monotonic() + 60
    while sum(n for (found, _), n in events(folder).items() if found == what) < count:
        assert time.monotonic() < until, events(folder)
        time.sleep(0.01)


class TestProcesses:
    def test_two_processes_do_no_run_twice(self, devkit: Path, tmp_path: Path, whole: SweepRuns) -> None:
        write_plan(tmp_path)
        two = [work_in_background(tmp_path, devkit, seconds=0.1) for _ in range(2)]
        with processes(*two):
            assert [process.wait(60) for process in two] == [0, 0], [p.stdout.read() for p in two if p.stdout]
            told = [process.stdout.read() for process in two if process.stdout]
        each_ended_once(tmp_path)
        assert sum(n for (what, _), n in events(tmp_path).items() if what in ("start", "resume")) == NUM_RUNS
        assert all("started" in text for text in told)  # both of them worked
        assert scores(collect(tmp_path / "out")) == scores(whole)

    def test_killed_twice_it_ends_with_the_same_table(self, devkit: Path, tmp_path: Path, whole: SweepRuns) -> None:
        write_plan(tmp_path)
        for ended in (2, 6):
            process = work_in_background(tmp_path, devkit, seconds=0.2, parallel=2)
            with processes(process):
                wait_until(tmp_path, "end", ended)
                process.send_signal(signal.SIGKILL)
                process.wait()
        done = work(tmp_path, devkit)
        each_ended_once(tmp_path)
        assert scores(done.collected) == scores(whole)

    def test_ctrl_c_lets_the_runs_save_and_the_same_command_goes_on(
        self, devkit: Path, tmp_path: Path, whole: SweepRuns
    ) -> None:
        write_plan(tmp_path)
        process = work_in_background(tmp_path, devkit, seconds=30, parallel=2)
        with processes(process):
            wait_until(tmp_path, "start", 2)
            time.sleep(0.3)  # until the fake runs listen
            process.send_signal(signal.SIGINT)
            assert process.wait(20) == 130
            assert process.stdout is not None
            assert "the runs under way save and end" in process.stdout.read()
        assert sum(n for (what, _), n in events(tmp_path).items() if what == "saved") == 2
        done = work(tmp_path, devkit)
        each_ended_once(tmp_path)
        assert sum(n for (what, _), n in events(tmp_path).items() if what == "resume") == 2
        assert scores(done.collected) == scores(whole)

    def test_a_run_ends_when_its_sweep_is_killed(self, devkit: Path, tmp_path: Path) -> None:
        write_plan(tmp_path)
        process = work_in_background(tmp_path, devkit, seconds=60)
        with processes(process):
            wait_until(tmp_path, "start", 1)
            (pid,) = [int(line.split()[2]) for line in (tmp_path / "events").read_text().splitlines()]
            time.sleep(0.3)
            process.send_signal(signal.SIGKILL)
            process.wait()
            wait_until(tmp_path, "saved", 1)
        until = time.monotonic() + 20
        while Process.of(pid) is not None:
            assert time.monotonic() < until
            time.sleep(0.01)

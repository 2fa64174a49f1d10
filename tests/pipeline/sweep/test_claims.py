"""Claims: one owner at a time, whoever dies, sleeps or has another clock."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from pipeline.sweep.claims import Claim, Claims, Heartbeat
from pipeline.sweep.processes import Process, this_machine
from tests.pipeline.sweep.fakes import REPOSITORY

RUN = "arm-s0-01234567"
RACE = """
import sys
from pathlib import Path
from pipeline.sweep.claims import Claims

claims = Claims(Path(sys.argv[1]))
print("ready", flush=True)
sys.stdin.readline()
print(*(number for number in range(200) if claims.take(f"run-{number}") is not None), flush=True)
sys.stdin.read()  # a process that is gone holds nothing
"""


def elsewhere(**changes: Any) -> Process:
    return Process(**{"machine": "another boot/pid:[1]", "pid": os.getpid(), "start": 1, **changes})


def taken(claims: Claims, run: str = RUN) -> Claim:
    claim = claims.take(run)
    assert claim is not None
    return claim


def test_a_claimed_run_is_nobody_elses_until_it_is_given_back(tmp_path: Path) -> None:
    claims = Claims(tmp_path)
    claim = taken(claims)
    assert claims.take(RUN) is None
    assert Claims(tmp_path).take(RUN) is None
    assert claims.take("other-s0-01234567") is not None
    claim.update(state="interrupted", seconds=3.0)
    again = taken(claims)
    assert (again.number, claims.holds(again), claims.holds(claim)) == (2, True, False)
    assert [note.state for note in claims.notes(RUN)] == ["interrupted", "running"]
    assert [note.seconds for note in claims.notes(RUN)] == [3.0, None]


def test_of_processes_that_race_for_many_runs_each_gets_its_own(tmp_path: Path) -> None:
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", RACE, str(tmp_path)],
            cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )
        for _ in range(2)
    ]  # fmt: skip
    pipes = [(racer.stdin, racer.stdout) for racer in racers if racer.stdin and racer.stdout]
    for _, said in pipes:
        assert said.readline() == "ready\n"
    for heard, _ in pipes:
        heard.write("go\n")
        heard.flush()
    won = [said.readline().split() for _, said in pipes]
    for racer in racers:
        racer.communicate("")
    assert all(won)  # both had a chance
    assert Counter(number for each in won for number in each) == Counter(map(str, range(200)))


def test_the_run_of_a_dead_process_is_taken_over_at_once(tmp_path: Path) -> None:
    script = f"from pathlib import Path; from pipeline.sweep.claims import *; Claims(Path('{tmp_path}')).take('{RUN}')"
    subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY, check=True)
    claims = Claims(tmp_path)
    newest = claims.newest(RUN)
    assert newest is not None
    assert newest.note is not None
    assert newest.note.state == "running"
    assert taken(claims).number == 2


def test_not_while_its_own_process_lives(tmp_path: Path) -> None:
    claims, me = Claims(tmp_path), Process.this()
    gone = me.model_copy(update={"start": me.start - 1})  # the number was another process's before
    assert (me.is_alive(), gone.is_alive(), elsewhere().is_alive()) == (True, False, None)
    claim = taken(claims)
    claim.update(owner=gone, child=me)
    assert claims.take(RUN) is None
    claim.update(child=gone)
    assert taken(claims).number == 2


@pytest.mark.parametrize(("age", "free"), [(290, False), (310, True)])
def test_of_another_machine_only_the_files_age_counts(tmp_path: Path, age: float, free: bool) -> None:
    claims = Claims(tmp_path)
    claim = taken(claims)
    claim.update(owner=elsewhere())
    now = claims.now()
    os.utime(claim.path, (now - age, now - age))
    assert (claims.take(RUN) is not None) is free


def test_the_age_is_by_the_file_systems_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    claims = Claims(tmp_path)
    taken(claims).update(owner=elsewhere())
    monkeypatch.setattr(time, "time", lambda: 1e12)
    assert claims.take(RUN) is None


def test_a_claim_that_is_just_being_written_is_a_claim(tmp_path: Path) -> None:
    claims = Claims(tmp_path)
    (tmp_path / f"{RUN}.1.json").write_text('{"run": ')
    assert claims.take(RUN) is None
    old = claims.now() - 1000
    os.utime(tmp_path / f"{RUN}.1.json", (old, old))
    assert taken(claims).number == 2


def test_a_claim_that_is_held_stays_young(tmp_path: Path) -> None:
    claims = Claims(tmp_path)
    claim = taken(claims)
    claim.update(owner=elsewhere())
    with Heartbeat(0.01) as heartbeat:
        heartbeat.hold(claim)
        os.utime(claim.path, (0, 0))
        until = time.monotonic() + 20
        while claim.path.stat().st_mtime == 0:
            assert time.monotonic() < until
            time.sleep(0.01)
        assert claims.take(RUN) is None
        heartbeat.drop(claim)
    os.utime(claim.path, (0, 0))
    assert claims.take(RUN) is not None


def test_machines_are_told_apart_by_boot_and_namespace() -> None:
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    assert this_machine().startswith(f"{boot}/pid:[")
    assert Process.of(os.getpid()) == Process.this()
    assert Process.of(2**22 + 1) is None

"""A sweep over runs that are over at once, and processes that work through it. No torch, no images."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from pipeline.sweep.children import TrainProcess
from pipeline.sweep.command import SweepRequest
from pipeline.sweep.folder import SweepFolder
from pipeline.sweep.variants import Run

REPOSITORY = Path(__file__).resolve().parents[3]
_FAKE = Path(__file__).with_name("fake_train.py")

# Three seeds of a baseline, of three rates, of what the best rate decides: 15 runs.
PLAN: dict[str, Any] = {
    "name": "rates",
    "train": {"backbone-weights": "none"},
    "seeds": [0, 1, 2],
    "arms": {
        "plain": {"backbone": "resnet18"},
        "rates": {"baseline": "plain", "grid": {"learning-rate": [0.01, 0.02, 0.04]}},
        "best": {"baseline": "plain", "learning-rate": {"best_of": "rates"}, "flip": 0},
    },
}


def score_of(run: Run) -> float:
    """The higher, the nearer the rate is to 0.02; a seed moves it a little."""
    rate = run.config.resolved().recipe.learning_rate
    assert rate is not None
    return 0.5 - abs(rate - 0.02) + run.seed / 100


@dataclass
class FakeRunner:
    """Starts fake runs. failures: by member, how many first tries end with `exit_code`; never told: all of them."""

    events: Path
    seconds: float = 0.0
    failures: dict[str, int] = field(default_factory=dict)
    exit_code: int = 1
    before: Callable[[Run], None] = lambda _: None

    def start(self, run: Run, *, resume: bool, slot: int) -> TrainProcess:
        self.before(run)
        spec = {
            "name": run.name,
            "run_dir": str(run.config.run_dir),
            "checkpoint": str(run.config.checkpoint_dir / "student_latest.pth"),
            "config": run.config.resolved().model_dump(mode="json"),
            "score": score_of(run),
            "seconds": self.seconds,
            "failures": self.failures.get(run.member.name, 0),
            "exit_code": self.exit_code,
            "events": str(self.events),
            "resume": resume,
        }
        log = SweepFolder(run.config.runs_dir.parent).log(run)
        return TrainProcess([sys.executable, "-S", str(_FAKE), json.dumps(spec)], log, {})


def write_plan(folder: Path, **changes: Any) -> Path:
    """Write the plan, with changes of its own keys."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "plan.yaml"
    path.write_text(yaml.safe_dump({**PLAN, **changes}, sort_keys=False))
    return path


def request(folder: Path, devkit: Path, **changes: Any) -> SweepRequest:
    plan = changes.pop("plan", None) or write_plan(folder)
    return SweepRequest(plan=plan, voc_root=devkit, out=folder / "out", **changes)


def work_in_background(folder: Path, devkit: Path, *, seconds: float = 0.0, parallel: int = 1) -> subprocess.Popen[str]:
    """Start a process that works through the plan in a folder; several may."""
    script = Path(__file__).with_name("work.py")
    arguments = [str(folder), str(devkit), str(seconds), str(parallel)]
    return subprocess.Popen(
        [sys.executable, str(script), *arguments],
        cwd=REPOSITORY,
        env={"PYTHONPATH": str(REPOSITORY), "PATH": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def events(folder: Path) -> Counter[tuple[str, str]]:
    """How often each run started, resumed, saved and ended: by (what, run)."""
    path = folder / "events"
    lines = path.read_text().splitlines() if path.exists() else []
    return Counter((what, name) for what, name, _ in map(str.split, lines))

"""`work.py FOLDER DEVKIT SECONDS PARALLEL`: works through the plan in a folder with fake runs, as a process does."""

from __future__ import annotations

import sys
from pathlib import Path

from pipeline.sweep.command import run_sweep
from pipeline.sweep.schedule import Rules
from tests.pipeline.sweep.fakes import FakeRunner, request


def main() -> int:
    """Work; exit as the command line does."""
    folder, devkit = Path(sys.argv[1]), Path(sys.argv[2])
    seconds, parallel = float(sys.argv[3]), int(sys.argv[4])
    asked = request(folder, devkit, plan=folder / "plan.yaml", parallel=parallel)
    rules = Rules(parallel=parallel, poll_seconds=0.01, wait_seconds=0.02)
    try:
        done = run_sweep(asked, FakeRunner(folder / "events", seconds), rules)
    except KeyboardInterrupt:
        return 130
    return 1 if done.failed else 0


if __name__ == "__main__":
    sys.exit(main())

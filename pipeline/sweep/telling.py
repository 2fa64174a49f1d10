"""What a sweep says of its runs while it works."""

from __future__ import annotations

import signal
from typing import Any

from pipeline.results import percent
from pipeline.sweep.estimates import Estimates
from pipeline.sweep.standing import Standing
from pipeline.sweep.variants import Run
from pipeline.text_tables import readable_time


def title(run: Run) -> str:
    """Return a run's name for people."""
    return f"{run.member.name}, seed {run.seed}"


def ending(code: int) -> str:
    """Return an exit code that is not success in words."""
    if code < 0:
        return f"killed by {signal.Signals(-code).name}" + (" (out of memory?)" if code == -signal.SIGKILL else "")
    return "ended without a result" if code == 0 else f"exit {code}"


def finished_line(run: Run, result: dict[str, Any], seconds: float, standing: Standing, left: float | None) -> str:
    """Return the line of a run that is finished. seconds: it took.  left: the others will take, None if unknown."""
    scored = f"val mAP {percent(result['last']['val']['mAP'])}"
    count = f"{standing.num_finished} of {standing.num_runs} runs finished"
    more = f", {readable_time(left)} left" if left else ""
    return f"{title(run)}: {scored} in {readable_time(seconds)}; {count}{more}"


def time_left(standing: Standing, estimates: Estimates, parallel: int) -> float | None:
    """Return how long the runs that are not finished will take about; None where nothing of their kind is known."""
    total = 0.0
    for member in standing.variants.members.values():
        shared = standing.variants.owner(member) != member.name
        num_open = 0 if shared else len(standing.seeds) - len(standing.results[member.name])
        if num_open:
            seconds = estimates.seconds(standing.variants.trial(member))
            if seconds is None:
                return None
            total += num_open * seconds
    return total / parallel

"""What a sweep says at its end: the table of its results, and what failed."""

from __future__ import annotations

from typing import Any

from data.errors import TeachOnceError
from pipeline.config import TrainConfig
from pipeline.progress import say
from pipeline.sweep.collect import SweepRuns
from pipeline.sweep.command import SweepOutcome
from pipeline.sweep.cost import LiveRatio
from pipeline.sweep.results import write_results


def closing_parts(done: SweepOutcome, live: LiveRatio | None = None) -> list[Any]:
    """Write the result files and return what to print. live: how much longer a step takes with live teachers."""
    return list(write_results(done.collected, done.folder, live))


def live_ratio(collected: SweepRuns, given: float | None, measure: bool) -> LiveRatio | None:
    """Return how much longer a step takes with live teachers: as given, as measured now, or None for neither.

    Measured on the first arm that distils and has a finished run. Why it cannot be is said; the results are there.
    """
    if given is not None:
        return LiveRatio(ratio=given, source="given")
    results = [result for arm in collected.arms if arm.distils for result in arm.results.values()]
    if not measure or not results:
        return None
    from pipeline.sweep.live_ratio import measure_live_ratio

    try:
        return measure_live_ratio(TrainConfig.model_validate(results[0]["config"]))
    except TeachOnceError as error:
        say(f"live teachers could not be measured: {error.message}")
        return None


def sweep_json(done: SweepOutcome) -> dict[str, Any]:
    """Return what a sweep came to as data."""
    collected = done.collected
    return {
        "plan": collected.plan_name,
        "out": str(done.folder),
        "runs": collected.num_runs,
        "finished": collected.num_finished,
        "failed": done.failed,
        "waiting": collected.waiting,
        "arms": [
            {
                "name": arm.name,
                "settings": arm.settings,
                "baseline": arm.baseline,
                "chosen": {option: {"of": c.of, "value": c.value} for option, c in arm.chosen.items()},
                "val_mAP": {str(seed): result["last"]["val"]["mAP"] for seed, result in sorted(arm.results.items())},
            }
            for arm in collected.arms
        ],
    }

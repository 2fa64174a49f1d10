"""What a sweep says at its end: the table of its results, and what failed."""

from __future__ import annotations

import importlib
from statistics import fmean
from typing import Any

from pipeline.results import percent
from pipeline.sweep.collect import SweepRuns
from pipeline.sweep.command import SweepOutcome
from pipeline.text_tables import Heading, plain_table


def closing_parts(done: SweepOutcome) -> list[Any]:
    """Write the result files and return what to print."""
    try:
        write: Any = importlib.import_module("pipeline.sweep.results").write_results
    except ModuleNotFoundError:
        return [_plain(done.collected)]
    parts: list[Any] = write(done.collected, done.folder)
    return parts


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


def _plain(collected: SweepRuns) -> Any:
    table = plain_table(Heading("arm"), Heading("seeds", right=True), Heading("val mAP, last epoch", right=True))
    for arm in collected.arms:
        scores = [result["last"]["val"]["mAP"] for result in arm.results.values()]
        mean = None if not scores or None in scores else fmean(scores)
        table.add_row(arm.name, str(len(arm.results)), percent(mean))
    return table

"""What a sweep cost, what live teachers would have, and after how many runs the extraction has paid for itself.

The first two are read from the store and the runs. How much longer a step takes with live teachers has to be measured
or given; where it was not, nothing is guessed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import ceil
from pathlib import Path
from statistics import mean
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pipeline.sweep.collect import SweepRuns
from pipeline.text_tables import readable_time

LIVE_FILE = "live-ratio.json"


class LiveRatio(BaseModel):
    """How many times as long a training step takes with live teachers. source: `given` or `measured`.

    live_s, cached_s: medians of seconds a step, where measured.  said: on what, in words.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    ratio: float = Field(gt=0)
    source: str
    live_s: float | None = None
    cached_s: float | None = None
    said: str = ""


@dataclass(frozen=True)
class SweepCost:
    """Seconds of a sweep. None for what is not known.

    extraction: of the store, once.  cached_runs: finished runs that distilled from it.  cached: training of one of
    them, mean.  cached_total: of all of them.  live, live_total: the same with live teachers.  break_even: the number
    of runs from which on extracting was cheaper; None also where live teachers would never cost more.
    """

    extraction: float | None
    runs: int
    training_total: float
    cached_runs: int
    cached: float | None
    cached_total: float
    live_ratio: LiveRatio | None
    live: float | None
    live_total: float | None
    break_even: int | None

    def to_json(self) -> dict[str, Any]:
        """Return everything as JSON knows it."""
        return {**asdict(self), "live_ratio": None if self.live_ratio is None else self.live_ratio.model_dump()}


def sweep_cost(collected: SweepRuns, live_ratio: LiveRatio | None) -> SweepCost:
    """Return what the finished runs took, and what they would have taken with live teachers."""
    results = [result for arm in collected.arms for result in arm.results.values()]
    cached = [_training(result) for result in results if result["config"]["distillation"]["source"] == "store"]
    each = mean(cached) if cached else None
    extraction = collected.store_cost["seconds"] if collected.store_cost else None
    live = each * live_ratio.ratio if each is not None and live_ratio is not None else None
    return SweepCost(
        extraction=extraction,
        runs=len(results),
        training_total=sum(map(_training, results)),
        cached_runs=len(cached),
        cached=each,
        cached_total=sum(cached),
        live_ratio=live_ratio,
        live=live,
        live_total=None if live is None else live * len(cached),
        break_even=None
        if extraction is None or live is None or each is None or live <= each
        else max(1, ceil(extraction / (live - each))),
    )


def cost_lines(cost: SweepCost) -> list[str]:
    """Return the cost in plain sentences; what was not measured is said."""
    lines = []
    if cost.extraction is None:
        lines.append("Extraction: the store does not say what it took.")
    else:
        lines.append(f"Extraction, once: {readable_time(cost.extraction)}.")
    lines.append(f"Training: {readable_time(cost.training_total)} in {_runs(cost.runs)}.")
    if cost.cached is None:
        lines.append("No finished run distilled from the store.")
        return lines
    lines.append(f"A run that distils from the store: {readable_time(cost.cached)} on average, without a teacher.")
    if cost.live is None or cost.live_ratio is None:
        lines.append(
            "With live teachers: not measured, so no break-even. --measure-live takes a few steps of both, --live-ratio"
            " X gives a measured ratio."
        )
        return lines
    how = f"× {cost.live_ratio.ratio:.2f}, {cost.live_ratio.source}"
    said = f": {cost.live_ratio.said}" if cost.live_ratio.said else ""
    lines.append(f"The same run with live teachers: {readable_time(cost.live)} ({how}{said}).")
    lines.append(_balance(cost, cost.live, cost.cached))
    return lines


def _balance(cost: SweepCost, live: float, cached: float) -> str:
    if live <= cached:
        return "Live teachers would have cost no more a run: the store does not pay for itself here."
    if cost.extraction is None or cost.break_even is None:
        return "Without the extraction's time there is no break-even."
    saved = (live - cached) * cost.cached_runs - cost.extraction
    reached = f"{_runs(cost.cached_runs)} so far {'saved' if saved >= 0 else 'are still short of it by'}"
    return f"Break-even after {_runs(cost.break_even)}; {reached} {readable_time(abs(saved))}."


def save_live_ratio(folder: Path, live: LiveRatio) -> None:
    """Keep a measured or given ratio beside the sweep's results, for later reports."""
    (folder / LIVE_FILE).write_text(live.model_dump_json(indent=2) + "\n", encoding="utf-8")


def read_live_ratio(folder: Path) -> LiveRatio | None:
    """Return the ratio that was kept; None where none was, or what is there is no ratio."""
    try:
        return LiveRatio.model_validate_json((folder / LIVE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValidationError):
        return None


def _training(result: Mapping[str, Any]) -> float:
    return float(result["seconds"]["training"])


def _runs(count: int) -> str:
    return f"{count} run{'' if count == 1 else 's'}"

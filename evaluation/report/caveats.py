"""What keeps the figures of a report from meaning more than they do, in plain words."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from .run import Run

# Settings in which a run may differ from its baseline without being another experiment.
_FREE = ("run_name", "distillation.", "runs_dir", "checkpoints_dir", "workers", "pictures", "report_steps", "residency",
         "checkpoint_steps", "cache_images", "device", "evaluate", "voc_root")  # fmt: skip
_FAR_FROM_CONVERGED = 20


def caveats(runs: Sequence[Run], baseline: Run) -> list[str]:
    """Return the caveats of a report of these runs, the gravest first."""
    return [
        *_untrained(runs),
        *_controls(runs),
        *_same_images(runs),
        *_few_epochs(runs),
        *_seeds(runs),
        *_unpaired(runs, baseline),
    ]


def _untrained(runs: Sequence[Run]) -> list[str]:
    keys = sorted({key for run in runs for key in run.untrained})
    if not keys:
        return []
    named = _names([run for run in runs if run.untrained], runs)
    return [f"UNTRAINED teachers: {', '.join(keys)}{named}. The figures say nothing of what distillation gains."]


def _controls(runs: Sequence[Run]) -> list[str]:
    return [f"Control arm: {run.name} ({run.control})." for run in runs if run.control]


def _same_images(runs: Sequence[Run]) -> list[str]:
    judged = [run for run in runs if run.same_images]
    if not judged:
        return []
    return [f"Selected and reported on the same images{_names(judged, runs)}: the best epoch's figure flatters."]


def _few_epochs(runs: Sequence[Run]) -> list[str]:
    by_epochs = defaultdict(list)
    for run in runs:
        if run.random_weights and run.num_epochs <= _FAR_FROM_CONVERGED:
            by_epochs[run.num_epochs].append(run)
    return [
        f"{count} epoch{'s' * (count != 1)} from random initialisation: far from converged{_names(found, runs)}."
        for count, found in sorted(by_epochs.items())
    ]


def _seeds(runs: Sequence[Run]) -> list[str]:
    arms = arms_of(runs)
    counts = [len({run.seed for run in found}) for found in arms]
    if len(runs) < 2:
        return ["One run with one seed: another seed would give other figures."]
    if max(counts) == 1:
        return ["One seed an arm: a difference between arms may be one between seeds, and nothing here can tell."]
    least, most = min(counts), max(counts)
    seeds = f"{most}" if least == most else f"{least} to {most}"
    return [f"{seeds} seeds an arm, each run shown by itself. The intervals are over images, not over seeds."]


def _unpaired(runs: Sequence[Run], baseline: Run) -> list[str]:
    said = []
    for run in runs:
        names = sorted(run.config.keys() | baseline.config.keys())
        differing = [
            name for name in names
            if run.config.get(name) != baseline.config.get(name) and not name.startswith(_FREE) and name != "seed"
        ]  # fmt: skip
        if differing:
            said.append(f"{run.name} differs from {baseline.name} in more than distillation: {', '.join(differing)}.")
    return said


def arms_of(runs: Sequence[Run]) -> list[list[Run]]:
    """Return the runs grouped by everything that they were trained with but the seed."""
    groups: dict[tuple[tuple[str, str], ...], list[Run]] = defaultdict(list)
    apart = tuple(name for name in _FREE if name != "distillation.")
    for run in runs:
        key = tuple(item for item in sorted(run.config.items()) if not item[0].startswith((*apart, "seed")))
        groups[key].append(run)
    return list(groups.values())


def _names(some: Sequence[Run], runs: Sequence[Run]) -> str:
    return "" if len(some) == len(runs) else f" ({', '.join(run.name for run in some)})"

"""The sentences that stand beside a sweep's figures in every format: what they rest on, and what is missing."""

from __future__ import annotations

from evaluation.statistics import FEW_SEEDS
from pipeline.sweep.summary import SAME_IMAGES, ArmSummary, SweepSummary, SweepTable

LEGEND = (
    "± is the standard deviation over seeds. Δ: mean difference from the first row of the block, over the seeds that"
    " both have. The 95 % interval is that of the row alone; p is corrected over all rows of the table (Holm), * where"
    " it is below 0.05, so an interval may leave zero out where p does not. Detects: the true difference that this many"
    " seeds would find in 80 % of sweeps, tested alone. What is not significant is not equal: the interval says what is"
    " not ruled out."
)


def caption(summary: SweepSummary, table: SweepTable) -> list[str]:
    """Return what has to stand beside each single table: without it, its figures would mislead."""
    lines = []
    if summary.runs.same_images:
        lines.append(SAME_IMAGES)
    if summary.runs.untrained:
        lines.append(f"UNTRAINED teachers: {', '.join(summary.runs.untrained)}")
    if table.epoch == "best":
        lines.append(f"each run at the epoch that is best on val; compare at the last epoch{_picked(summary)}")
    return lines


def notes(summary: SweepSummary) -> list[str]:
    """Return what the figures rest on, in sentences, the gravest first."""
    facts, headline = summary.runs, summary.tables[0]
    found = []
    if facts.untrained:
        found.append(
            f"UNTRAINED teachers: {', '.join(facts.untrained)}. The figures show that the parts work, and say nothing"
            " of distillation."
        )
    if facts.same_images and facts.finished:
        found.append(
            f"{SAME_IMAGES[0].upper()}{SAME_IMAGES[1:]}: what was chosen there, an epoch or a weight, looks better than"
            " it is. With test-set in the plan's train there is an independent figure."
        )
    found += _seeds(headline)
    found += [line for arm in summary.arms for line in (*_chosen(arm), *_missing(arm))]
    found += _unpaired(headline)
    if facts.finished and not facts.each_epoch:
        found.append("Validated after the last epoch only: there is no best one.")
    if facts.random_initialisation:
        found.append("Random initialisation: this few epochs are far from converged.")
    if len(facts.devices) > 1:
        found.append(f"Runs on different devices ({', '.join(facts.devices)}) are paired less closely.")
    return found


def _picked(summary: SweepSummary) -> str:
    return ", since this one was picked on the same images" if summary.runs.same_images else ""


def _seeds(table: SweepTable) -> list[str]:
    """Return how few seeds the comparisons have, if they are few."""
    counts = [row.comparison.difference.n for row in table.rows if row.comparison is not None]
    if not counts:
        return []
    fewest, most = min(counts), max(counts)
    if most < 2:
        return ["One seed an arm at most: too few seeds to tell. No interval and no p can be given; run more seeds."]
    told = []
    if fewest < 2:
        lone = [r.arm for r in table.rows if r.comparison is not None and r.comparison.difference.n < 2]
        told.append(f"Too few seeds to tell: {', '.join(lone)} (fewer than two shared with the baseline).")
    if max(2, fewest) < FEW_SEEDS:
        told.append(
            f"Only {max(2, fewest)} seeds: the intervals are wide and rest on a spread that is itself poorly known;"
            f" {FEW_SEEDS} or more are better."
        )
    return told


def _chosen(arm: ArmSummary) -> list[str]:
    return [f"{arm.name}: {choice}." for choice in arm.chosen]


def _missing(arm: ArmSummary) -> list[str]:
    told = [f"{arm.name}, seed {seed}: failed: {message}" for seed, message in arm.failed.items()]
    if arm.waiting:
        told.append(f"{arm.name}: not run yet: {arm.waiting}.")
    elif arm.missing:
        told.append(f"{arm.name}: not finished: seed{'s' * (len(arm.missing) > 1)} {_listed(arm.missing)}.")
    return told


def _unpaired(table: SweepTable) -> list[str]:
    """Return which seeds an arm has without its baseline: they are in its mean and not in its difference."""
    told = []
    for row in table.rows:
        if row.comparison is not None and row.over_seeds.n > len(row.paired):
            told.append(
                f"{row.arm}: Δ rests on {len(row.paired)} of {row.over_seeds.n} seeds, those that {row.baseline} has"
                f" too{f' ({_listed(row.paired)})' if row.paired else ''}."
            )
    return told


def _listed(seeds: tuple[int, ...]) -> str:
    return ", ".join(map(str, seeds))

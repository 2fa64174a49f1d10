"""Decides what `best_of` means: the grid member of the highest mean validation mAP at the last epoch, never of test."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from pipeline.sweep.variants import Member

Results = Mapping[int, dict[str, Any]]


@dataclass(frozen=True)
class Choice:
    """A value that was chosen by validation. member: the one it is from.

    val_map: mean validation mAP at the last epoch over the seeds, a fraction, of every member by its name.
    """

    of: str
    option: str
    value: Any
    member: str
    val_map: dict[str, float]


def choose(
    members: list[Member], option: str, results: Mapping[str, Results], seeds: tuple[int, ...]
) -> Choice | str | None:
    """Return the choice of an option's value among an arm's members, once all their runs are finished, else None.

    results: of the finished runs, by member and seed.  Of equal means the first member in the grid's order wins. Where
    there is nothing to choose by, what to say of it.
    """
    means: dict[str, float] = {}
    for member in members:
        found = results.get(member.name, {})
        if any(seed not in found for seed in seeds):
            return None
        scores = [found[seed]["last"]["val"]["mAP"] for seed in seeds]
        if None in scores:
            return f"{member.name} has no validation mAP: its validation images hold no object"
        means[member.name] = fmean(scores)
    best = max(members, key=lambda member: means[member.name])
    return Choice(best.arm, option, best.varied[option], best.name, means)

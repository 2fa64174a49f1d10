"""Gathers what a sweep's folder holds: every arm with its runs' results, its failures, and what was chosen for it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.sweep.choices import Choice
from pipeline.sweep.claims import Claims
from pipeline.sweep.folder import SweepFolder
from pipeline.sweep.plan import BestOf
from pipeline.sweep.settings import Places
from pipeline.sweep.standing import Standing
from pipeline.sweep.variants import Member, Run, Variants


@dataclass(frozen=True)
class ArmRuns:
    """One arm of a sweep, or one member of an arm's grid, with its runs.

    settings: its options that are not those of all arms, by the names they have in a plan (`feature-loss`), with the
    values that were chosen for it; one that is not chosen yet is missing.
    grid_of: the arm whose grid it is a member of, and varied: its values in it; None and empty without a grid.
    distils: whether it has teacher targets.
    results: `result.json` by seed.  failed: why not, by seed.  A seed in neither was not run yet.
    chosen: what `best_of` came to, by option.  wall_seconds: from start to end of the run, by seed, start-up included.
    """

    name: str
    settings: dict[str, Any]
    grid_of: str | None
    baseline: str | None
    results: dict[int, dict[str, Any]]
    failed: dict[int, str]
    chosen: dict[str, Choice]
    about: str = ""
    distils: bool = False
    varied: dict[str, Any] = field(default_factory=dict)
    wall_seconds: dict[int, float] = field(default_factory=dict)


@dataclass(frozen=True)
class SweepRuns:
    """A whole sweep. seeds: that every arm has, or is to have.  settings: options of all arms.

    stores: path, fingerprint and untrained teachers of each.  store_cost: seconds, runs, outputs and devices of their
    extraction, as `cache.runs.Cost`, summed over stores; None where nobody noted it, or where no arm distils.
    waiting: why members have no runs yet, by name.
    """

    plan_name: str
    about: str
    arms: tuple[ArmRuns, ...]
    store_cost: dict[str, Any] | None
    seeds: tuple[int, ...]
    settings: dict[str, Any]
    stores: tuple[dict[str, Any], ...] = ()
    waiting: dict[str, str] = field(default_factory=dict)

    @property
    def num_runs(self) -> int:
        """Runs of the whole plan."""
        return len(self.arms) * len(self.seeds)

    @property
    def num_finished(self) -> int:
        """Those that are finished."""
        return sum(len(arm.results) for arm in self.arms)


def collect(folder: Path) -> SweepRuns:
    """Return what a sweep's folder holds.

    Raises UsageError where there is no sweep, or its plan was edited; CheckpointError for a result that cannot be read.
    """
    sweep = SweepFolder(folder)
    plan, stores = sweep.read()
    standing = Standing(Variants(str(sweep.plan_file), plan), Places(folder, (Path("store"),)))
    claims = Claims(sweep.claims)
    costs = [record.cost for record in stores]
    return SweepRuns(
        plan_name=plan.name,
        about=plan.about,
        arms=tuple(_arm(standing, member, claims) for member in standing.variants.members.values()),
        store_cost=_summed([cost for cost in costs if cost is not None]) if None not in costs else None,
        seeds=plan.seeds,
        settings=dict(standing.variants.plan.train),
        stores=tuple(
            {"path": r.path, "fingerprint": r.fingerprint, "untrained": list(r.untrained), "cost": r.cost}
            for r in stores
        ),
        waiting={member.name: waits_for(standing, member) for member in standing.waiting()},
    )


def waits_for(standing: Standing, member: Member) -> str:
    """Return what a member waits for, in words."""
    if member.name in standing.undecidable:
        return standing.undecidable[member.name]
    return f"waits for {' and '.join(dict.fromkeys(member.references.values()))}"


def _arm(standing: Standing, member: Member, claims: Claims) -> ArmRuns:
    variants, name = standing.variants, member.name
    arm = variants.plan.arms[member.arm]
    chosen = {variants.options.flag(option): c for option, c in standing.choices.get(name, {}).items()}
    own = {option: v for option, v in arm.options.items() if not isinstance(v, BestOf) and v is not None}
    varied = {variants.options.flag(option): value for option, value in member.varied.items()}
    runs, results = standing.runs.get(name, {}), standing.results[name]
    return ArmRuns(
        name=name,
        settings={**own, **{option: choice.value for option, choice in chosen.items()}, **varied},
        grid_of=member.arm if arm.grid else None,
        baseline=arm.baseline,
        results=dict(results),
        failed={seed: why for seed, run in runs.items() if seed not in results and (why := _failure(claims, run))},
        chosen=chosen,
        about=arm.about,
        distils=variants.distils(member),
        varied=varied,
        wall_seconds={seed: found for seed, run in runs.items() if (found := _seconds(claims, run)) is not None},
    )


def _failure(claims: Claims, run: Run) -> str | None:
    notes = claims.notes(run.name)
    return (notes[-1].message or "failed") if notes and notes[-1].state == "failed" else None


def _seconds(claims: Claims, run: Run) -> float | None:
    """Return what a run took in all its sittings; None where one of them was killed before it could be noted."""
    notes = [note.seconds for note in claims.notes(run.name)]
    return sum(s for s in notes if s is not None) if notes and None not in notes else None


def _summed(costs: list[dict[str, Any]]) -> dict[str, Any] | None:
    if not costs:
        return None
    summed = {key: sum(cost[key] for cost in costs) for key in ("seconds", "outputs")}
    lists = {key: sorted({each for cost in costs for each in cost[key]}) for key in ("devices", "hosts", "bottlenecks")}
    return {**costs[0], **summed, **lists, "runs": max(cost["runs"] for cost in costs)}

"""The verb `sweep`, from its options to its closing table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.errors import UsageError
from pipeline.progress import say
from pipeline.sweep.children import Runner, TrainRunner, train_command
from pipeline.sweep.claims import Claims
from pipeline.sweep.collect import SweepRuns, collect, waits_for
from pipeline.sweep.folder import SweepFolder, status_of
from pipeline.sweep.plan import read_plan
from pipeline.sweep.preflight import check_runs, distilled_stores
from pipeline.sweep.schedule import Rules, Schedule
from pipeline.sweep.settings import STORES, Places, TrainOptions
from pipeline.sweep.standing import Standing
from pipeline.sweep.stores import Stores
from pipeline.sweep.variants import Variants
from pipeline.train_options import option_name


@dataclass(frozen=True)
class SweepRequest:
    """What the command line asks for. overrides: OPTION=VALUE texts.  out: sweeps/NAME unless given."""

    plan: Path
    cached_teachers: tuple[Path, ...] = ()
    voc_root: Path | None = None
    out: Path | None = None
    overrides: tuple[str, ...] = ()
    seeds: tuple[int, ...] = ()
    parallel: int | None = None
    devices: tuple[str, ...] = ()
    retries: int = 2

    @property
    def num_parallel(self) -> int:
        """Runs beside each other: one a device, unless said."""
        return self.parallel or max(1, len(self.devices))


@dataclass(frozen=True)
class Prepared:
    """A sweep that can be run: everything that could be refused was looked at."""

    standing: Standing
    stores: Stores
    folder: SweepFolder

    def begin(self) -> None:
        """Write the folder's plan."""
        self.folder.begin(self.standing.variants.plan, self.stores.records)

    def commands(self) -> list[str]:
        """Return one line a run for a shell; a comment for what is finished, or cannot be named yet."""
        standing, lines = self.standing, []
        for run in standing.all_runs():
            if standing.is_finished(run):
                lines.append(f"# finished: {run.name}")
            else:
                resume = status_of(run) == "started"
                lines.append(train_command(standing.variants.options, standing.places, run, resume=resume))
        for member in standing.waiting():
            why = waits_for(standing, member)
            lines.append(f"# {member.name}, {len(standing.seeds)} runs: {why}; then ask for the commands again")
        return lines


@dataclass(frozen=True)
class SweepOutcome:
    """What a sweep came to. failed: why runs were given up, by name."""

    folder: Path
    collected: SweepRuns
    failed: dict[str, str]


def prepare(request: SweepRequest) -> Prepared:
    """Return the sweep that was asked for, checked; nothing is written.

    Raises UsageError, DatasetError, StoreError or CheckpointError.
    """
    plan = read_plan(request.plan)
    overrides = parsed_overrides(request.overrides, request.voc_root)
    if request.seeds:
        plan = plan.with_seeds(request.seeds)
    where = str(request.plan)
    variants = Variants(where, plan, overrides)
    stores = Stores(distilled_stores(variants, request.cached_teachers))
    folder = SweepFolder(request.out or Path("sweeps") / plan.name)
    places = Places(folder.path, request.cached_teachers, stores.fingerprints)
    check_runs(variants, places)
    joined = folder.joined(variants.plan, stores.records)
    if joined.seeds != plan.seeds:
        say(f"{folder.path} has the seeds {', '.join(map(str, joined.seeds))}: all of them are run")
    standing = Standing(Variants(where, joined), places)
    for run in standing.all_runs():
        status_of(run)
    return Prepared(standing, stores, folder)


def run_sweep(request: SweepRequest, runner: Runner | None = None, rules: Rules | None = None) -> SweepOutcome:
    """Work through a plan; return what it came to. runner, rules: others than the request's, for what is no training.

    Raises as `prepare`; KeyboardInterrupt once everything under way has saved; StoreStaleError where a store changed.
    """
    prepared = prepare(request)
    standing, places = prepared.standing, prepared.standing.places
    parallel = request.num_parallel
    prepared.begin()
    claims = Claims(prepared.folder.claims)
    train = runner or TrainRunner(standing.variants.options, places, parallel=parallel, devices=request.devices)
    say(f"{standing.num_finished} of {standing.num_runs} runs are finished")
    schedule = Schedule(standing, train, claims, prepared.stores, rules or Rules(parallel, request.retries))
    schedule.work()
    for member in standing.waiting():
        failed = [run for run in standing.all_runs() if run.name in schedule.failed]
        arms = set(member.references.values())
        because = ", ".join(f"{run.member.name} seed {run.seed}" for run in failed if run.member.arm in arms)
        say(f"{member.name}: skipped, {f'{because} failed' if because else waits_for(standing, member)}")
    return SweepOutcome(prepared.folder.path, collect(prepared.folder.path), schedule.failed)


def parsed_overrides(texts: Sequence[str], voc_root: Path | None) -> dict[str, Any]:
    """Return `--set OPTION=VALUE` texts as options; `null` is the default.

    Raises UsageError for what `train` would not take.
    """
    options, found = TrainOptions(), dict[str, Any]()
    given: dict[str, list[str]] = {}
    for text in texts:
        key, separator, value = text.partition("=")
        if not separator or not key:
            raise UsageError(f"--set: expected OPTION=VALUE, found {text!r}")
        given.setdefault(option_name(key), []).append(value)
    for name, values in given.items():
        if name == STORES:
            raise UsageError("--set cached-teachers: not for this option", hint="give --cached-teachers STORE")
        given_value = None if values == ["null"] else values if len(values) > 1 else values[0]
        found[name] = options.value("--set", name, given_value)
    if voc_root is not None:
        found["voc_root"] = str(voc_root)
    return found

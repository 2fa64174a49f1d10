"""What a sweep would do: its runs, how far they are, and what they will take in time and on the disk."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rich.console import RenderableType

from pipeline.sweep.claims import Claims
from pipeline.sweep.estimates import Estimates, checkpoint_bytes
from pipeline.sweep.folder import status_of
from pipeline.sweep.standing import Standing
from pipeline.sweep.variants import Member
from pipeline.text_tables import Heading, plain_table, printable, readable_size, readable_time

_UNKNOWN = "unknown"


@dataclass(frozen=True)
class MemberForecast:
    """What is ahead of a member. seconds: of all its runs that are not finished; None where no such run is finished.

    disk_bytes: of the checkpoints of all its runs; None for a backbone of unknown size.  same_as: the member whose runs
    are its own too.  chosen_from: the arm that
    decides on an option, by option.
    """

    name: str
    backbone: str
    runs: int
    finished: int
    started: int
    seconds: float | None
    disk_bytes: int | None
    same_as: str | None
    chosen_from: dict[str, str]


def forecast(standing: Standing) -> list[MemberForecast]:
    """Return what is ahead, member by member; touches nothing."""
    folder = standing.places.out / "claims"
    finished = [run for run in standing.all_runs() if standing.is_finished(run)]
    estimates = Estimates.of(finished, Claims(folder)) if folder.is_dir() else Estimates()
    return [_member(standing, member, estimates) for member in standing.variants.members.values()]


def forecast_json(standing: Standing, found: list[MemberForecast]) -> dict[str, Any]:
    """Return a forecast as data."""
    return {
        "plan": standing.variants.plan.name,
        "out": str(standing.places.out),
        "seeds": list(standing.seeds),
        "runs": sum(each.runs for each in found),
        "finished": sum(each.finished for each in found),
        "seconds": _sum([each.seconds for each in found]),
        "disk_bytes": _sum([each.disk_bytes for each in found]),
        "arms": [dict(vars(each)) for each in found],
    }


def forecast_parts(standing: Standing, found: list[MemberForecast], parallel: int) -> list[RenderableType]:
    """Return a forecast as a table of 80 columns and the lines below it."""
    plan = standing.variants.plan
    table = plain_table(
        Heading("arm"), Heading("backbone"), Heading("runs", right=True), Heading("finished", right=True),
        Heading("started", right=True), Heading("time left", right=True), Heading("disk", right=True),
    )  # fmt: skip
    for each in found:
        table.add_row(
            each.name, printable(each.backbone), str(each.runs), str(each.finished or "–"), str(each.started or "–"),
            _time(each.seconds), _size(each.disk_bytes),
        )  # fmt: skip
    total, done, started = (sum(getattr(e, f) for e in found) for f in ("runs", "finished", "started"))
    seconds = _sum([each.seconds for each in found])
    beside = seconds if seconds is None else seconds / parallel
    table.add_section()
    table.add_row("all", "", str(total), str(done or "–"), str(started or "–"), _time(beside),
                  _size(_sum([each.disk_bytes for each in found])))  # fmt: skip
    return [f"{plan.name}: {len(found)} arms × {len(plan.seeds)} seeds, into {standing.places.out}", "", table, "",
            *_lines(standing, found, seconds)]  # fmt: skip


def _lines(standing: Standing, found: list[MemberForecast], seconds: float | None) -> list[str]:
    lines = []
    for each in found:
        if each.same_as:
            lines.append(f"{each.name}: the same runs as {each.same_as}")
        chosen = ", ".join(f"{option} of the best of {arm}" for option, arm in each.chosen_from.items())
        if chosen:
            lines.append(f"{each.name}: {chosen}, by mean validation mAP at the last epoch")
    if seconds is None:
        lines.append("time: unknown until one run of a backbone is finished")
    if any(each.disk_bytes is None for each in found):
        lines.append("disk: unknown for a timm: backbone; the others' are of two checkpoints a run")
    return lines


def _member(standing: Standing, member: Member, estimates: Estimates) -> MemberForecast:
    config, owner = standing.variants.trial(member), standing.variants.owner(member)
    shared = owner != member.name
    runs = {} if shared else standing.runs.get(member.name, {})
    count, finished = (0, 0) if shared else (len(standing.seeds), len(standing.results[member.name]))
    each_takes, each_fills = estimates.seconds(config), checkpoint_bytes(config)
    options = standing.variants.options
    return MemberForecast(
        name=member.name,
        backbone=config.student.backbone,
        runs=count,
        finished=finished,
        started=sum(status_of(run) == "started" for run in runs.values()),
        seconds=0.0 if finished == count else None if each_takes is None else each_takes * (count - finished),
        disk_bytes=None if each_fills is None else each_fills * count,
        same_as=owner if shared else None,
        chosen_from={options.flag(option): arm for option, arm in member.references.items()},
    )


def _sum(values: list[Any]) -> Any:
    return None if None in values else sum(values)


def _time(seconds: float | None) -> str:
    return _UNKNOWN if seconds is None else "–" if seconds == 0 else readable_time(seconds)


def _size(count: int | None) -> str:
    return _UNKNOWN if count is None else readable_size(count)

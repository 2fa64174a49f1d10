"""Verbs that run whole experiments."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from pipeline.options import DEVICE, JSON, PATH, options
from pipeline.verbs.verb import Verb, print_rich


def name_list(_: click.Context, __: click.Parameter, value: str | None) -> tuple[str, ...]:
    """Return a comma-separated option as its parts."""
    return tuple(part.strip() for part in (value or "").split(",") if part.strip())


def seed_list(context: click.Context, parameter: click.Parameter, value: str | None) -> tuple[int, ...]:
    """Return a comma-separated option as numbers, each once."""
    parts = name_list(context, parameter, value)
    if not all(part.isdecimal() for part in parts) or len(set(parts)) < len(parts) or (value and not parts):
        raise click.BadParameter(f"expected numbers from 0, each once, as 0,1,2, found {value!r}")
    return tuple(map(int, parts))


@click.command(cls=Verb)
@options(
    click.argument("plan", type=PATH),
    click.option("--cached-teachers", type=PATH, multiple=True, is_flag=False, flag_value="data/teachers.zarr",
                 metavar="[STORE]", help="What the plan's arms distil from; repeat to join several."),
    click.option("--voc-root", type=PATH, help="Folder that holds VOC2007. [the plan's, or data/VOCdevkit]"),
    click.option("--out", type=PATH, help="Folder of everything it makes. [sweeps/NAME of the plan]"),
    click.option("--set", "overrides", multiple=True, metavar="OPTION=VALUE", help="Option of every run."),
    click.option("--seeds", callback=seed_list, metavar="0,1,2", help="Instead of the plan's."),
    click.option("--parallel", type=click.IntRange(1), metavar="K", help="Runs beside each other. [one a device]"),
    click.option("--devices", callback=name_list, metavar="cuda:0,cuda:1", help="Devices to share them out over."),
    click.option("--retries", type=click.IntRange(0), default=2, show_default=True, help="More tries of a failed run."),
    click.option("--dry-run", is_flag=True, help="Check everything; show the runs, and what they will take."),
    click.option("--emit-commands", is_flag=True, help="Print a line a run, for a scheduler."),
    click.option("--live-ratio", type=click.FloatRange(0, min_open=True), metavar="X",
                 help="A step with live teachers takes X times as long: for the break-even."),
    click.option("--measure-live", is_flag=True, help="Measure that on a few steps, once the runs are done."),
    JSON,
)  # fmt: skip
def sweep(
    dry_run: bool, emit_commands: bool, live_ratio: float | None, measure_live: bool, as_json: bool, **flags: Any
) -> None:
    """Work through an experiment plan.

    Every run distils from the store: no teacher is loaded.

    PLAN is a YAML file: arms, grids, seeds; see plans/ and docs/sweeps.md. Running it again goes on: finished runs are
    skipped, interrupted ones resumed. Several processes and machines may share the folder. Exits 1 where a run failed.
    """
    from pipeline.sweep.command import SweepRequest, prepare, run_sweep

    request = SweepRequest(**flags)
    if emit_commands:
        for line in prepare(request).commands():
            click.echo(line)
        return
    if dry_run:
        from pipeline.sweep.dry_run import forecast, forecast_json, forecast_parts

        standing = prepare(request).standing
        ahead = forecast(standing)
        if as_json:
            click.echo(json.dumps(forecast_json(standing, ahead), indent=2))
        else:
            print_rich(*forecast_parts(standing, ahead, request.num_parallel))
        return
    from pipeline.sweep import closing

    done = run_sweep(request)
    live = closing.live_ratio(done.collected, live_ratio, measure_live)
    parts = closing.closing_parts(done, live)
    if as_json:
        click.echo(json.dumps(closing.sweep_json(done), indent=2))
    else:
        print_rich(*parts)
    click.get_current_context().exit(1 if done.failed else 0)


@click.command(cls=Verb)
@options(
    click.option("--out", type=PATH, default="demo", show_default=True, help="Folder of everything it makes."),
    DEVICE,
)
def demo(out: Path, device: str) -> None:
    """Show the whole pipeline on drawn images, in minutes."""
    from pipeline.demo import run_demo

    print_rich(*run_demo(out, device))

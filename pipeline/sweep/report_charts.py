"""The sections of a sweep's report that hold charts: heat maps over what was varied, curves over epochs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from statistics import fmean
from typing import Any

from markupsafe import Markup

from evaluation.report.charts import Series, chart_grid, legend, line_chart
from evaluation.report.heat_map import heat_map
from evaluation.report.page import Section
from evaluation.statistics import spread
from pipeline.sweep.collect import ArmRuns, SweepRuns
from pipeline.sweep.setting_text import setting_name, setting_text
from pipeline.sweep.summary import figure, in_blocks

# By run name: validation mAP of each epoch that was scored.
Curves = Mapping[str, Mapping[int, float]]
# What a map over β and γ may differ in besides: where the targets are from, and that there are any.
_WEIGHTS = ("beta", "gamma")
_NO_MATTER = (*_WEIGHTS, "cached-teachers")


def grids_section(collected: SweepRuns) -> Section | None:
    """Return a map over β × γ for each baseline, and one for each grid of other options; None without any."""
    maps = [*_weight_maps(collected), *_grid_maps(collected)]
    if not maps:
        return None
    note = (
        "Mean validation mAP at the last epoch over seeds, percent. These are the figures that weights are chosen by:"
        " the highest of them looks better than it is."
    )
    return Section("grids", "What was varied", Markup("\n").join(maps), note)


def seed_curves_section(collected: SweepRuns, curves: Curves) -> Section | None:
    """Return validation mAP over epochs, and each arm's paired difference; None where nothing was scored in between."""
    arms = {arm.name: arm for arm in collected.arms}
    by_seed = {name: _by_seed(arm, curves) for name, arm in arms.items()}
    levels, gains = [], []
    for block in blocks_of(collected):
        shown = headline_of(block)
        lines = [_series(arm.name, place, by_seed[arm.name]) for place, arm in enumerate(shown)]
        drawn = [line for line in lines if line is not None and len(line.x) > 1]
        if drawn:
            levels.append((block[0].baseline or block[0].name, drawn))
        for arm in block:
            line = _series(arm.name, 0, _differences(by_seed[arm.name], by_seed.get(arm.baseline or "", {})))
            if line is not None and len(line.x) > 1:
                gains.append((f"{arm.name} − {arm.baseline}", line))
    if not levels:
        return None
    charts = [
        legend([line.name for line in drawn]) + line_chart(
            drawn, title=f"Validation mAP of {name} and its arms", x_label="epoch", y_label="mAP, percent",
            whole_x=True, most_ticks=6,
        )
        for name, drawn in levels
    ]  # fmt: skip
    ends = [0.0, *(end for _, line in gains for part in (line.low, line.high) for end in part or ())]
    small = [
        (title, line_chart([line], title=title, x_label="epoch", y_range=(min(ends), max(ends)), whole_x=True,
                           size=(300, 190), most_ticks=5))
        for title, line in gains
    ]  # fmt: skip
    body = chart_grid([(f"{name} and its arms", chart) for (name, _), chart in zip(levels, charts, strict=True)])
    if small:
        body += Markup("<h3>Difference from the baseline, in points, seed by seed</h3>") + chart_grid(small, small=True)
    note = (
        "Validation mAP: means over seeds, bands of one standard deviation. Of a grid, the member with the highest mean"
        " at the last epoch. The small charts are all on one scale."
    )
    return Section("seed-curves", "Curves over seeds", body, note)


def headline_of(block: Sequence[ArmRuns]) -> list[ArmRuns]:
    """Return the arms of a block that stand for it: those without a grid, and of each grid the highest on val."""
    chosen = [arm for arm in block if arm.grid_of is None and arm.results]
    for name in dict.fromkeys(arm.grid_of for arm in block if arm.grid_of is not None and arm.results):
        chosen.append(max((arm for arm in block if arm.grid_of == name), key=lambda arm: _mean(arm) or 0.0))
    return chosen


def blocks_of(collected: SweepRuns) -> list[list[ArmRuns]]:
    """Return the arms by their baseline, which stands first."""
    return [list(arms) for _, arms in groupby(in_blocks(collected.arms), key=lambda arm: arm.baseline or arm.name)]


def _by_seed(arm: ArmRuns, curves: Curves) -> dict[int, Mapping[int, float]]:
    """Return an arm's curves by seed, of the runs that have one."""
    return {seed: curves[r["run_name"]] for seed, r in arm.results.items() if curves.get(r["run_name"])}


def _differences(
    arm: Mapping[int, Mapping[int, float]], baseline: Mapping[int, Mapping[int, float]]
) -> dict[int, Mapping[int, float]]:
    return {
        seed: {epoch: value - baseline[seed][epoch] for epoch, value in curve.items() if epoch in baseline[seed]}
        for seed, curve in arm.items()
        if seed in baseline
    }


def _series(name: str, place: int, by_seed: Mapping[int, Mapping[int, float]]) -> Series | None:
    """Return mean and band in percent, at the epochs that all seeds have; None without any."""
    found = list(by_seed.values())
    epochs = sorted(set.intersection(*(set(each) for each in found))) if found else []
    if not epochs:
        return None
    over_seeds = [spread([100 * each[epoch] for each in found]) for epoch in epochs]
    means = [each.mean or 0.0 for each in over_seeds]
    stds = [each.std or 0.0 for each in over_seeds]
    low, high = ([m + sign * s for m, s in zip(means, stds, strict=True)] for sign in (-1, 1))
    return Series(name, epochs, means, place, low, high)


def _weight_maps(collected: SweepRuns) -> list[Markup]:
    maps = []
    for block in blocks_of(collected):
        plain = [arm for arm in block if arm.results and set(arm.settings) <= {"backbone", *_NO_MATTER}]
        cells = {weights: arm for arm in reversed(plain) if (weights := _weights(arm)) is not None}
        if len(cells) > 2:  # the baseline and one more make no map
            maps.append(_map(cells, _WEIGHTS, f"{block[0].name}: validation mAP over β and γ"))
    return maps


def _weights(arm: ArmRuns) -> tuple[float, float] | None:
    """Return β and γ as an arm's runs had them, both zero for a baseline; None where runs differ."""
    found = {
        (d["beta"], d["gamma"]) if d["source"] != "none" else (0.0, 0.0)
        for d in (result["config"]["distillation"] for result in arm.results.values())
    }
    return found.pop() if len(found) == 1 else None


def _grid_maps(collected: SweepRuns) -> list[Markup]:
    maps = []
    for name in dict.fromkeys(arm.grid_of for arm in collected.arms if arm.grid_of is not None):
        members = [arm for arm in collected.arms if arm.grid_of == name and arm.varied]
        options = tuple(members[0].varied) if members else ()
        others = [option for arm in members for option in arm.settings if option not in ("backbone", *_NO_MATTER)]
        if len(members) < 2 or not others:  # those over β and γ alone are on the map of their baseline
            continue
        cells = {tuple(arm.varied[option] for option in options): arm for arm in members}
        maps.append(_map(cells, options, f"{name}: validation mAP over {' and '.join(map(setting_name, options))}"))
    return maps


def _map(cells: Mapping[tuple[Any, ...], ArmRuns], options: Sequence[str], title: str) -> Markup:
    """Return a map whose columns are the last option's values, and whose rows are those of the others."""
    ordered = sorted(cells) if all(isinstance(v, int | float) for key in cells for v in key) else list(cells)
    rows = list(dict.fromkeys(key[:-1] for key in ordered))
    columns = list(dict.fromkeys(key[-1] for key in ordered))
    if all(isinstance(column, int | float) for column in columns):
        columns.sort()
    return heat_map(
        [[_mean(cells.get((*row, column))) for column in columns] for row in rows],
        rows=[", ".join(map(setting_text, row)) or "" for row in rows],
        columns=[setting_text(column) for column in columns],
        title=title,
        row_label=", ".join(map(setting_name, options[:-1])),
        column_label=setting_name(options[-1]),
        text=lambda value: f"{100 * value:.2f}",
        details=[[cells[key].name if (key := (*row, column)) in cells else "" for column in columns] for row in rows],
    )


def _mean(arm: ArmRuns | None) -> float | None:
    values = [] if arm is None else [figure(result, "mAP", "last", "val") for result in arm.results.values()]
    known = [value for value in values if value is not None]
    return fmean(known) if known else None

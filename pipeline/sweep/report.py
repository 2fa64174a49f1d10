"""Writes a sweep's `report.html`: its own sections first, then those of a few runs, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from data.errors import TeachOnceError
from data.images import decode_image
from data.voc import read_voc
from evaluation.devkit_files import read_devkit
from evaluation.report.comparison import Comparison, compare
from evaluation.report.contents import report_sections
from evaluation.report.gallery import gallery_section
from evaluation.report.page import Section, build_page
from pipeline.progress import progress
from pipeline.run_folder import RunFolder, read_history, read_run_folder, run_of
from pipeline.sweep.collect import ArmRuns, SweepRuns
from pipeline.sweep.cost import SweepCost
from pipeline.sweep.notes import notes
from pipeline.sweep.report_charts import blocks_of, grids_section, headline_of, seed_curves_section
from pipeline.sweep.report_tables import cost_section, results_section, settings_section
from pipeline.sweep.summary import SweepSummary
from pipeline.whole_files import write_text

FILE = "report.html"
MOST_RUNS = 6
_PICTURES = 12
# Behind the intervals over images: those over seeds are what a sweep is for.
_RESAMPLES = 500


def write_report(collected: SweepRuns, summary: SweepSummary, cost: SweepCost, folder: Path) -> str | None:
    """Write the report into a sweep's folder; return why single runs are not shown in it, None where they are."""
    curves = {path.name: _curve(path) for path in _run_paths(collected, folder)}
    sections: list[Section | None] = [
        results_section(summary),
        grids_section(collected),
        seed_curves_section(collected, curves),
        cost_section(cost),
        settings_section(summary),
    ]
    lacking = None
    try:
        sections += _sections_of_runs(_headline_runs(collected, folder))
    except TeachOnceError as error:
        lacking = f"single runs are not shown in the report: {error.message}"
    page = build_page(
        f"Sweep {summary.plan_name}",
        [section for section in sections if section is not None],
        facts=[
            *([summary.about] if summary.about else []),
            f"{len(summary.arms)} arms, {summary.runs.finished} of {collected.num_runs} runs finished",
            summary.protocol,
        ],
        caveats=notes(summary),
    )
    write_text(folder / FILE, page)
    return lacking


def headline_arms(collected: SweepRuns) -> list[ArmRuns]:
    """Return the arms whose runs are shown: a baseline and what is compared with it, at most MOST_RUNS.

    Of several baselines, the one with most arms. Of each grid, the member with the highest mean validation mAP.
    """
    return max(map(headline_of, blocks_of(collected)), key=len, default=[])[:MOST_RUNS]


def _headline_runs(collected: SweepRuns, folder: Path) -> list[RunFolder]:
    """Return a run of each headline arm: of the lowest seed that all have, or each one's lowest."""
    arms = headline_arms(collected)
    shared = set.intersection(*(set(arm.results) for arm in arms)) if arms else set()
    names = [arm.results[min(shared or arm.results)]["run_name"] for arm in arms]
    return [read_run_folder(folder / "runs" / name) for name in names]


def _sections_of_runs(folders: Sequence[RunFolder]) -> list[Section]:
    if not folders:
        return []
    shown = _compared(folders)
    first, *others = report_sections(shown)
    missing = not any(record.image_path.is_file() for record in shown.records)
    pictures = [] if missing else [gallery_section(shown, decode_image, _PICTURES)]
    seeds = sorted({run.seed for run in shown.runs})
    title = f"Runs of seed {', '.join(map(str, seeds))}"
    return [replace(first, title=title), *others, *pictures]


def _compared(folders: Sequence[RunFolder]) -> Comparison:
    config = folders[0].config
    image_set = "test" if config["test_sets"] else "val"
    records = read_voc(Path(config["voc_root"]), tuple(config[f"{image_set}_sets"]))
    runs = [run_of(f, read_devkit(f.detections(image_set), records)[0], f.name, image_set) for f in folders]
    with progress("resampling images", _RESAMPLES * (2 * len(runs) - 1), "resamples") as tick:
        return compare(runs, 0, folders[0].sets(image_set), records, _RESAMPLES, tick)


def _run_paths(collected: SweepRuns, folder: Path) -> list[Path]:
    return [folder / "runs" / result["run_name"] for arm in collected.arms for result in arm.results.values()]


def _curve(path: Path) -> dict[int, float]:
    """Return the validation mAP of a run's epochs; none where they cannot be read any more."""
    try:
        history = read_history(path / "metrics.jsonl")
    except TeachOnceError:
        return {}
    return {line["epoch"]: line["val"]["mAP"] for line in history if line["val"] and line["val"]["mAP"] is not None}

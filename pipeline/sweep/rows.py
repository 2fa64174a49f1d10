"""A sweep's results as rows for other programs: one a run, and one an arm in each table. Figures are fractions."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.sweep.collect import ArmRuns, SweepRuns
from pipeline.sweep.setting_text import setting_text
from pipeline.sweep.summary import EPOCHS, METRICS, ArmSummary, Row, SweepSummary, SweepTable, figure, reported_images

Cells = dict[str, Any]


def runs_csv(collected: SweepRuns, summary: SweepSummary) -> str:
    """Return every run of the plan as a row, finished or not."""
    rows = []
    missing = {arm.name: arm.missing for arm in summary.arms}
    for arm in collected.arms:
        for seed in sorted({*arm.results, *arm.failed, *missing[arm.name]}):
            rows.append(_run_cells(arm, seed))
    return _csv(rows)


def summary_csv(summary: SweepSummary) -> str:
    """Return every arm as a row, in each of the tables."""
    arms = {arm.name: arm for arm in summary.arms}
    rows = [_row_cells(summary, table, row, arms[row.arm]) for table in summary.tables for row in table.rows]
    return _csv(rows)


def _run_cells(arm: ArmRuns, seed: int) -> Cells:
    result = arm.results.get(seed)
    status = "finished" if result else "failed" if seed in arm.failed else "missing"
    cells: Cells = {
        "arm": arm.name, "grid": arm.grid_of, "baseline": arm.baseline, "seed": seed, "status": status,
        "error": arm.failed.get(seed) if result is None else None,
    }  # fmt: skip
    if result is not None:
        cells |= {
            "run_name": result["run_name"],
            "backbone": result["config"]["student"]["backbone"],
            **_figures(result),
            "best_epoch": result["best"]["epoch"],
            "epochs": result["epochs"],
            "train_images": result["images"]["train"],
            "training_s": result["seconds"]["training"],
            "data_wait_share": result["data_wait_share"],
            "untrained": " ".join(result["targets"].get("untrained", ())),
            "selected_and_reported_on_the_same_images": result["selected_and_reported_on_the_same_images"],
            "device": result["device"],
        }
    return cells | _settings(arm.settings)


def _figures(result: Mapping[str, Any]) -> Cells:
    return {
        f"{images}_{metric}_{epoch}": figure(result, metric, epoch, images)
        for images in reported_images(result)
        for epoch in EPOCHS
        for metric in METRICS
    }


def _row_cells(summary: SweepSummary, table: SweepTable, row: Row, arm: ArmSummary) -> Cells:
    cells: Cells = {
        "arm": row.arm, "grid": arm.grid_of, "baseline": row.baseline, "metric": table.metric, "epoch": table.epoch,
        "images": table.images, "seeds": row.over_seeds.n, "mean": row.over_seeds.mean, "std": row.over_seeds.std,
    }  # fmt: skip
    compared = row.comparison
    if compared is not None:
        found = compared.difference
        cells |= {
            "paired_seeds": found.n, "delta": found.mean, "delta_std": found.std,
            **_ends("interval", found.interval), **_ends("simultaneous", compared.simultaneous),
            "p": found.p, "p_holm": compared.p_holm, "comparisons": table.comparisons,
            "detectable": compared.detectable, "detectable_corrected": compared.detectable_corrected,
            "reading": compared.reading,
        }  # fmt: skip
    cells |= {
        "untrained": " ".join(arm.untrained),
        "selected_and_reported_on_the_same_images": summary.runs.same_images,
        "failed_seeds": " ".join(map(str, arm.failed)),
        "missing_seeds": " ".join(map(str, arm.missing)),
        "chosen": "; ".join(arm.chosen),
    }
    return cells | _settings(arm.settings)


def _ends(name: str, interval: tuple[float, float] | None) -> Cells:
    low, high = interval or (None, None)
    return {f"{name}_low": low, f"{name}_high": high}


def _settings(settings: Mapping[str, Any]) -> Cells:
    return {f"set_{name}": None if value is None else setting_text(value) for name, value in settings.items()}


def _csv(rows: Sequence[Cells]) -> str:
    """Return rows as CSV under the names that any of them has; empty where one lacks it."""
    names = list(dict.fromkeys(name for cells in rows for name in cells))
    # Settings last, also where the first rows have none.
    names.sort(key=lambda name: name.startswith("set_"))
    text = io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()

"""Says at the end of a verb what was done, in a few lines that fit 80 columns. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Any

from rich.table import Table

NOT_MEASURED = "–"


def run_lines(result: dict[str, Any]) -> list[str]:
    """Return what a training run ended with, from its `result.json`."""
    config = result["config"]
    lines = [
        f"run {result['run_name']}: {config['student']['backbone']}, {arm(result)},"
        f" {result['epochs']} epoch{'s' * (result['epochs'] != 1)} of {result['images']['train']} images",
        f"last epoch: val {_scores(result['last']['val'])}",
        f"best epoch ({result['best']['epoch']}): val {_scores(result['best']['val'])}",
    ]
    if result["test"] is not None:
        lines.append(f"test, last epoch: {_scores(result['test']['last'])}; best: {_scores(result['test']['best'])}")
    else:
        lines.append("selected and reported on the same images (for an independent figure: --test-set)")
    if result["targets"].get("untrained"):
        lines.append(f"UNTRAINED teachers: {', '.join(result['targets']['untrained'])}; the figures say nothing of KD")
    if config["student"]["backbone_weights"] == "none" and result["epochs"] <= 20:
        lines.append("random initialisation: this few epochs are far from converged")
    seconds = result["seconds"]
    lines.append(
        f"training took {seconds['training']:.1f} s, waiting for images {100 * result['data_wait_share']:.1f} % of it"
    )
    return lines


def arm(result: dict[str, Any]) -> str:
    """Return what a run distilled, in words."""
    distillation = result["config"]["distillation"]
    weights = f"β = {distillation['beta']:g}, γ = {distillation['gamma']:g}"
    return {"none": "baseline", "store": f"cached KD, {weights}", "live": f"live KD, {weights}"}[distillation["source"]]


def runs_table(results: Sequence[dict[str, Any]], title: str) -> Table:
    """Return several runs side by side, as a table that fits 80 columns."""
    table = Table(title=title, title_justify="left", caption_justify="left")
    table.add_column("run", overflow="fold")
    table.add_column("distilled")
    for column in ("mAP", "AP50", "best mAP", "ms/image"):
        table.add_column(column, justify="right")
    for result in results:
        last = result["last"]["val"]
        table.add_row(
            result["run_name"],
            arm(result),
            percent(last["mAP"]),
            percent(last["per_iou"]["0.50"]),
            percent(result["best"]["val"]["mAP"]),
            f"{1000 * median(result['seconds_by_epoch']) / result['images']['train']:.0f}",
        )
    if not any(result["test"] for result in results):
        table.caption = "last epoch unless said, time of the median one; selected and reported on the same images"
    return table


def percent(fraction: float | None) -> str:
    """Return a fraction as percent with two decimals, a dash where there is none."""
    return NOT_MEASURED if fraction is None else f"{100 * fraction:.2f}"


def _scores(val: dict[str, Any]) -> str:
    return f"mAP {percent(val['mAP'])}, AP@0.50 {percent(val['per_iou']['0.50'])}"

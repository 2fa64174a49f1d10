"""Writes what a sweep came to into its folder, in every format; a sweep that goes on writes it all anew."""

from __future__ import annotations

import json
from pathlib import Path

from rich.console import RenderableType
from rich.text import Text

from pipeline.sweep.collect import SweepRuns
from pipeline.sweep.cost import LiveRatio, cost_lines, read_live_ratio, save_live_ratio, sweep_cost
from pipeline.sweep.hparams import write_hparams
from pipeline.sweep.latex import latex
from pipeline.sweep.markdown import markdown
from pipeline.sweep.report import FILE, write_report
from pipeline.sweep.rows import runs_csv, summary_csv
from pipeline.sweep.summary import summarise
from pipeline.sweep.terminal import summary_tables
from pipeline.text_tables import titled
from pipeline.whole_files import write_text


def write_results(collected: SweepRuns, folder: Path, live: LiveRatio | None = None) -> list[RenderableType]:
    """Write all result files into a sweep's folder and return what to print.

    live: how much longer a step takes with live teachers, where that was measured or given now; it is kept for the next
    time.
    """
    if live is not None:
        save_live_ratio(folder, live)
    summary = summarise(collected)
    cost = sweep_cost(collected, live or read_live_ratio(folder))
    content = {**summary.to_json(), "cost": cost.to_json()}
    write_text(folder / "results.json", json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    write_text(folder / "results.md", markdown(summary, cost))
    write_text(folder / "results.csv", runs_csv(collected, summary))
    write_text(folder / "summary.csv", summary_csv(summary))
    write_text(folder / "results.tex", latex(summary))
    write_hparams(collected, folder / "hparams")
    lacking = write_report(collected, summary, cost, folder)
    files = f"results in {folder}: results.md, .csv, .json, .tex, summary.csv, hparams/"
    return [
        *summary_tables(summary),
        titled("Cost", *cost_lines(cost)),
        "",
        Text(files),
        *([Text(lacking)] if lacking else []),
        Text(f"next: open {folder / FILE}"),
    ]

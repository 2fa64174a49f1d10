import json
import re
from collections.abc import Mapping
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data.voc import read_voc
from evaluation.detections import Detections, ImageDetections
from evaluation.devkit_files import write_devkit
from pipeline.sweep.collect import SweepRuns
from pipeline.sweep.report import headline_arms
from pipeline.sweep.report_tables import short
from pipeline.sweep.results import write_results
from tests.pipeline.sweep.sweeps import ablation, arm, scores, sweep

BASE = {0: 0.30, 1: 0.31, 2: 0.29}
BETTER = {0: 0.32, 1: 0.325, 2: 0.313}


class Page(HTMLParser):
    """What a page holds: the keys of its sections, and its text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.in_table = False
        self.sections: list[str] = []
        self.words: list[str] = []
        self.tables: list[list[list[str]]] = []
        self.feed(html)
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if tag == "section" and values.get("class") == "part":
            self.sections.append(values["id"] or "")
        if tag == "table":
            self.in_table = True
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag: str) -> None:
        if tag == "table":
            self.in_table = False

    def handle_data(self, data: str) -> None:
        self.words.append(data)
        if self.in_table and self.tables[-1] and self.tables[-1][-1]:
            self.tables[-1][-1][-1] += data.strip()


def written(collected: SweepRuns, folder: Path) -> Page:
    write_results(collected, folder)
    return Page((folder / "report.html").read_text(encoding="utf-8"))


def keep_runs(collected: SweepRuns, folder: Path, curves: Mapping[int, float], changes: dict[str, Any]) -> None:
    """Write every run's folder. curves: validation mAP of each epoch over that of the last one."""
    for each in collected.arms:
        for result in each.results.values():
            path = folder / "runs" / result["run_name"]
            path.mkdir(parents=True)
            result["config"].update(changes)
            (path / "config.json").write_text(json.dumps(result["config"]))
            (path / "result.json").write_text(json.dumps(result))
            lines = [
                {"epoch": epoch, "losses": {"total": 1.0}, "val": scores(result["last"]["val"]["mAP"] * share)}
                for epoch, share in curves.items()
            ]
            (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_sections_stand_in_order_and_caveats_before_them(tmp_path: Path) -> None:
    runs = ablation()
    keep_runs(runs, tmp_path, {1: 0.2, 2: 0.9, 20: 1.0}, {})
    page = written(runs, tmp_path)
    assert page.sections == ["results", "grids", "seed-curves", "cost", "arms"]
    assert page.text.index("Before you read the figures") < page.text.index("mAP@[0.50:0.95] on val")
    assert "Selected and reported on the same images" in page.text
    assert "β = 5, chosen on val among 1, 5, 10, 20 of feature" in page.text


def test_every_table_tells_what_its_figures_rest_on(tmp_path: Path) -> None:
    page = written(sweep(arm("base", BASE), arm("kd", BETTER, "base", untrained=["tiny_dino"])), tmp_path)
    assert page.text.count("; selected and reported on the same images; UNTRAINED teachers: tiny_dino") == 4


def test_differences_are_drawn_with_their_intervals(tmp_path: Path) -> None:
    lone = arm("lone", {0: 0.35}, "base")
    write_results(sweep(arm("base", BASE), arm("kd", BETTER, "base"), lone), tmp_path)
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    chart = re.findall(r'<svg class="chart" [^>]*95 % intervals.*?</svg>', html, re.DOTALL)[0]
    points = {float(x) for x in re.findall(r'<circle class="mark" cx="([\d.]+)"', chart)}
    assert len(points) == 2
    assert len(re.findall('<path class="line"', chart)) == 1  # one seed has no interval
    (low, high) = next(map(float, ends) for ends in re.findall(r'class="line" d="M([\d.]+) [\d.]+H([\d.]+)', chart))
    assert any(point == pytest.approx((low + high) / 2, abs=0.2) for point in points)


def test_the_map_over_weights_holds_the_means_on_val(tmp_path: Path) -> None:
    runs = ablation()
    page = written(runs, tmp_path)
    shown = next(table for table in page.tables if table and "γ" in table[0])
    by_beta = {row[0]: row[1:] for row in shown[2:]}
    assert shown[1][1:] == ["0", "0.5", "1", "2", "5"]
    assert list(by_beta) == ["0", "1", "5", "10", "20"]
    means = {each.name: sum(r["last"]["val"]["mAP"] for r in each.results.values()) / 3 for each in runs.arms}
    assert by_beta["0"][0] == f"{100 * means['resnet18']:.2f}"
    assert by_beta["0"][3] == f"{100 * means['logit-gamma2']:.2f}"
    assert by_beta["10"] == [f"{100 * means['feature-beta10']:.2f}", "–", "–", "–", "–"]
    assert by_beta["5"][2] == f"{100 * means['resnet18-both']:.2f}"


def test_a_grid_over_other_options_has_a_map_of_its_own(tmp_path: Path) -> None:
    members = [
        arm(f"loss-{loss}", {0: value}, "base", grid_of="loss", varied={"feature-loss": loss, "beta": beta},
            settings={"feature-loss": loss, "beta": beta}, beta=beta)
        for loss, beta, value in (("mse", 1.0, 0.3), ("pkd", 1.0, 0.4), ("mse", 5.0, 0.5))
    ]  # fmt: skip
    page = written(sweep(arm("base", {0: 0.2}), *members), tmp_path)
    (shown,) = (table for table in page.tables if table[0] == ["", "β"])
    assert shown[1:] == [["feature-loss", "1", "5"], ["mse", "30.00", "50.00"], ["pkd", "40.00", "–"]]


def test_curves_are_left_out_where_nothing_was_scored_in_between(tmp_path: Path) -> None:
    runs = sweep(arm("base", BASE), arm("kd", BETTER, "base"))
    keep_runs(runs, tmp_path, {20: 1.0}, {})
    assert "seed-curves" not in written(runs, tmp_path).sections


def test_single_runs_follow_where_their_detections_are(tmp_path: Path, devkit: Path) -> None:
    runs = sweep(arm("base", BASE), arm("kd", BETTER, "base"))
    keep_runs(runs, tmp_path, {1: 0.5, 20: 1.0}, {"voc_root": str(devkit), "checkpoints_dir": "checkpoints"})
    records = read_voc(devkit, ("2007:val",))
    found = [
        ImageDetections(r.target.boxes_xyxy_orig, r.target.labels, np.full(len(r.target), 0.9, np.float32))
        for r in records
    ]
    for name in ("base-s0", "kd-s0"):
        detections = Detections.from_images([record.id for record in records], found)
        write_devkit(detections, tmp_path / "runs" / name / "detections" / "val")
    page = written(runs, tmp_path)
    assert page.sections[:5] == ["results", "seed-curves", "cost", "arms", "summary"]
    assert "Runs of seed 0" in page.text
    assert page.sections[-1] == "pictures"


def test_what_keeps_single_runs_out_is_told_and_the_report_is_there(tmp_path: Path) -> None:
    said = write_results(sweep(arm("base", BASE), arm("kd", BETTER, "base")), tmp_path)
    assert any("single runs are not shown in the report" in str(line) for line in said)
    assert (tmp_path / "report.html").stat().st_size > 10_000


def test_headline_arms_are_of_one_baseline_and_one_of_each_grid() -> None:
    assert [each.name for each in headline_arms(ablation())] == [
        "resnet18", "resnet18-both", "feature-beta5", "logit-gamma1",
    ]  # fmt: skip
    assert headline_arms(sweep(arm("base", {}))) == []


def test_long_names_are_cut_in_their_middle() -> None:
    assert short("a" * 26) == "a" * 26
    cut = short("features-" + "x" * 40 + "-beta10")
    assert len(cut) <= 26
    assert cut.startswith("features")
    assert cut.endswith("-beta10")

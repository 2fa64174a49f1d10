import csv
import io
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from pipeline.sweep.collect import SweepRuns
from pipeline.sweep.cost import LiveRatio, cost_lines, read_live_ratio, sweep_cost
from pipeline.sweep.latex import escaped
from pipeline.sweep.results import write_results
from tests.pipeline.sweep.sweeps import ablation, arm, sweep

BASE = {0: 0.30, 1: 0.31, 2: 0.29}
BETTER = {0: 0.32, 1: 0.325, 2: 0.313}
FILES = {"results.md", "results.csv", "summary.csv", "results.json", "results.tex", "report.html", "hparams"}


def rows(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(path.read_text(encoding="utf-8"))))


def small(**facts: Any) -> SweepRuns:
    kd = arm("kd_5%", BETTER, "base", settings={"beta": 5.0}, failed={3: "died | & of_$x\nat once"}, **facts)
    return sweep(arm("base", BASE, settings={"backbone": "resnet18"}), kd, store_cost={"seconds": 300.0})


def test_every_format_is_written_and_says_what_matters(tmp_path: Path) -> None:
    printed = Console(width=80, record=True, file=io.StringIO())
    printed.print(*write_results(small(untrained=["tiny_dino"]), tmp_path))
    assert {path.name for path in tmp_path.iterdir()} == FILES
    texts = {name: (tmp_path / name).read_text(encoding="utf-8") for name in FILES - {"hparams"}}
    texts["terminal"] = printed.export_text()
    for name, text in texts.items():
        plain = " ".join(text.replace("\\", "").split())
        assert "tiny_dino" in plain, name
        assert re.search("untrained", plain, re.IGNORECASE), name
        said = "selected_and_reported_on_the_same_images|selected and reported on the same images|same_images"
        assert re.search(said, plain, re.IGNORECASE), name
    told = (tmp_path / "results.md").read_text(encoding="utf-8")
    assert r"kd\_5%, seed 3: failed: died \| & of\_$x at once" in told
    assert "base: not finished: seed 3." in told


def test_csv_has_a_row_a_run_and_a_row_an_arm_in_each_table(tmp_path: Path) -> None:
    write_results(small(), tmp_path)
    runs = rows(tmp_path / "results.csv")
    assert [(run["arm"], run["seed"], run["status"]) for run in runs] == [
        ("base", "0", "finished"), ("base", "1", "finished"), ("base", "2", "finished"), ("base", "3", "missing"),
        ("kd_5%", "0", "finished"), ("kd_5%", "1", "finished"), ("kd_5%", "2", "finished"), ("kd_5%", "3", "failed"),
    ]  # fmt: skip
    assert float(runs[0]["val_mAP_last"]) == 0.30
    assert float(runs[4]["val_AP50_best"]) == pytest.approx(0.53)
    assert (runs[0]["set_beta"], runs[4]["set_beta"], runs[7]["error"]) == ("", "5", "died | & of_$x\nat once")
    arms = rows(tmp_path / "summary.csv")
    assert len(arms) == 2 * 4
    (headline,) = (row for row in arms if (row["arm"], row["metric"], row["epoch"]) == ("kd_5%", "mAP", "last"))
    assert float(headline["delta"]) == pytest.approx(0.058 / 3)
    assert float(headline["interval_low"]) < float(headline["delta"]) < float(headline["interval_high"])
    assert (headline["comparisons"], headline["failed_seeds"], headline["paired_seeds"]) == ("1", "3", "3")


def test_json_holds_the_whole_summary(tmp_path: Path) -> None:
    write_results(ablation(), tmp_path)
    content = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert [arm["name"] for arm in content["arms"]][:2] == ["resnet18", "feature-beta1"]
    assert content["tables"][0]["rows"][1]["comparison"]["difference"]["n"] == 3
    assert content["runs"]["same_images"] is True
    assert content["cost"]["cached_runs"] == 33


def test_markdown_tables_are_as_wide_in_every_row(tmp_path: Path) -> None:
    write_results(small(), tmp_path)
    tables = re.findall(r"(?:^\|.*\n)+", (tmp_path / "results.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert len(tables) == 5
    for table in tables:
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1


def test_latex_is_plain_ascii_with_every_special_character_escaped(tmp_path: Path) -> None:
    write_results(replace(small(), plan_name="a_b", about="100 % & more"), tmp_path)
    text = (tmp_path / "results.tex").read_text(encoding="utf-8")
    assert text.isascii()
    body = "\n".join(line for line in text.splitlines() if not line.startswith("%"))
    assert r"kd\_5\% & 3 & 31.93 $\pm$ 0.60" in body
    assert not re.search(r"(?<!\\)[%#~^]", body.replace("$^{*}$", ""))
    # An underscore may stand bare in a label alone, and there none does.
    assert not re.search(r"(?<!\\)_", body)
    assert re.findall(r"\\label\{([^}]*)\}", body)[0] == "tab:a-b-mAP-last"
    unescaped = re.sub(r"\\[\\{}$&]", "", body)
    assert unescaped.count("{") == unescaped.count("}")
    assert unescaped.count("$") % 2 == 0
    for tabular in re.findall(r"\\toprule(.*?)\\bottomrule", body, re.DOTALL):
        lines = [line for line in tabular.splitlines() if line.endswith(r"\\")]
        assert len(lines) == 3
        assert {len(re.findall(r"(?<!\\)&", line)) for line in lines} == {6}
    assert body.count(r"\begin{table}") == body.count(r"\end{table}") == 4


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a_b & 5 % of #1", r"a\_b \& 5 \% of \#1"),
        ("\\input{/etc/passwd}", r"\textbackslash{}input\{/etc/passwd\}"),
        ("β = 5 − 1 … ±2", r"$\beta$ = 5 $-$ 1 \ldots{} $\pm$2"),
        ("Müller 猫\x07", "Müller ??"),
        ("<0.001*", "$<$0.001$^{*}$"),
    ],
)
def test_latex_escapes(text: str, expected: str) -> None:
    assert escaped(text) == expected


def test_tensorboard_gets_an_entry_a_run(tmp_path: Path) -> None:
    write_results(small(), tmp_path)
    write_results(small(), tmp_path)  # and no second one where it is written again
    folders = sorted(path.name for path in (tmp_path / "hparams").iterdir())
    assert folders == [f"{name}-s{seed}" for name in ("base", "kd_5%") for seed in range(3)]
    events = EventAccumulator(str(tmp_path / "hparams" / "kd_5%-s1")).Reload()
    assert events.Scalars("val mAP, last epoch")[0].value == pytest.approx(0.325)
    assert len(events.Scalars("val AP50, best val epoch")) == 1
    content = events.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    settings = HParamsPluginData.FromString(content).session_start_info.hparams
    assert settings["arm"].string_value == "kd_5%"
    assert settings["beta"].number_value == 5.0


def test_results_can_be_shown_of_nothing(tmp_path: Path) -> None:
    write_results(sweep(arm("base", {}), arm("kd", {}, "base")), tmp_path)
    assert [run["status"] for run in rows(tmp_path / "results.csv")] == []
    assert "No run is finished." in (tmp_path / "results.md").read_text(encoding="utf-8")


def test_break_even_is_where_both_ways_cost_the_same() -> None:
    runs = sweep(arm("base", BASE), arm("kd", BETTER, "base", seconds=100.0), store_cost={"seconds": 330.0})
    cost = sweep_cost(runs, LiveRatio(ratio=2.0, source="given"))
    assert (cost.cached, cost.live, cost.cached_runs, cost.runs) == (100.0, 200.0, 3, 6)
    assert cost.break_even == 4  # 330 + 4 · 100 < 4 · 200, and 330 + 3 · 100 > 3 · 200
    assert cost.training_total == 3 * 120 + 3 * 100
    said = " ".join(cost_lines(cost))
    assert "Break-even after 4 runs; 3 runs so far are still short of it by 30.0 s." in said
    assert "× 2.00, given" in said


@pytest.mark.parametrize(
    ("ratio", "seconds", "expected"),
    [
        (None, 330.0, "not measured, so no break-even"),
        (0.9, 330.0, "does not pay for itself here"),
        (2.0, None, "the store does not say what it took"),
    ],
)
def test_what_is_not_known_is_told_and_not_guessed(ratio: float | None, seconds: float | None, expected: str) -> None:
    runs = sweep(arm("base", BASE), arm("kd", BETTER, "base"), store_cost=seconds and {"seconds": seconds})
    cost = sweep_cost(runs, None if ratio is None else LiveRatio(ratio=ratio, source="given"))
    assert cost.break_even is None
    assert expected in " ".join(cost_lines(cost))


def test_a_sweep_of_baselines_has_nothing_to_pay_for() -> None:
    cost = sweep_cost(sweep(arm("base", BASE)), LiveRatio(ratio=2.0, source="given"))
    assert "No finished run distilled from the store." in cost_lines(cost)


def test_a_ratio_that_was_measured_once_is_there_the_next_time(tmp_path: Path) -> None:
    measured = LiveRatio(ratio=2.5, source="measured", live_s=5.0, cached_s=2.0, said="3 steps on cpu")
    write_results(small(), tmp_path, measured)
    assert read_live_ratio(tmp_path) == measured
    write_results(small(), tmp_path)
    assert "× 2.50, measured: 3 steps on cpu" in (tmp_path / "results.md").read_text(encoding="utf-8")
    (tmp_path / "live-ratio.json").write_text("{}")
    assert read_live_ratio(tmp_path) is None

import io
import re
from collections.abc import Sequence

import pytest
from rich.console import Console
from scipy import stats

from pipeline.sweep.cells import interval_text, p_text, signed, spread_text
from pipeline.sweep.choices import Choice
from pipeline.sweep.collect import SweepRuns
from pipeline.sweep.notes import caption, notes
from pipeline.sweep.summary import SweepSummary, summarise
from pipeline.sweep.terminal import summary_tables
from tests.pipeline.sweep.sweeps import ablation, arm, sweep

BASE = {0: 0.30, 1: 0.31, 2: 0.29}
BETTER = {0: 0.32, 1: 0.325, 2: 0.313}


def shown(summary: SweepSummary, width: int = 80) -> list[str]:
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(*summary_tables(summary), sep="\n")
    return console.export_text().splitlines()


def told(collected: SweepRuns) -> str:
    return "\n".join(notes(summarise(collected)))


def test_a_row_is_the_mean_over_seeds_and_scipys_paired_interval() -> None:
    row = summarise(sweep(arm("base", BASE), arm("kd", BETTER, "base"))).table("mAP", "last").rows[1]
    expected = stats.ttest_rel(list(BETTER.values()), list(BASE.values()))
    assert row.over_seeds.mean == pytest.approx(0.958 / 3)
    assert row.comparison is not None
    assert row.comparison.difference.interval == pytest.approx(tuple(expected.confidence_interval(0.95)))
    assert row.comparison.p_holm == pytest.approx(expected.pvalue)  # alone in its table


def test_values_are_paired_by_seed_and_not_by_order() -> None:
    backwards = dict(reversed(BETTER.items()))
    one, other = (
        summarise(sweep(arm("base", BASE), arm("kd", values, "base"))).tables for values in (BETTER, backwards)
    )
    assert one == other


def test_each_table_is_a_family_of_its_own() -> None:
    summary = summarise(ablation())
    assert [(table.metric, table.epoch, table.comparisons) for table in summary.tables] == [
        ("mAP", "last", 11), ("mAP", "best", 11), ("AP50", "last", 11), ("AP50", "best", 11),
    ]  # fmt: skip
    best = min(summary.tables[0].rows, key=lambda row: row.comparison.p_holm or 1 if row.comparison else 2)
    assert best.comparison is not None
    assert best.comparison.p_holm == pytest.approx(11 * (best.comparison.difference.p or 0))


def test_arms_stand_behind_their_baseline() -> None:
    runs = sweep(arm("a", BASE), arm("b", BASE), arm("a-kd", BASE, "a"), arm("b-kd", BASE, "b"), arm("lone", BASE))
    rows = summarise(runs).tables[0].rows
    assert [row.arm for row in rows] == ["a", "a-kd", "b", "b-kd", "lone"]


def test_seeds_that_the_baseline_lacks_are_left_out_of_the_difference_and_told() -> None:
    runs = sweep(arm("base", {0: 0.30, 1: 0.31}), arm("kd", {1: 0.34, 2: 0.40, 3: 0.5}, "base"))
    row = summarise(runs).tables[0].rows[1]
    assert row.paired == (1,)
    assert row.over_seeds.n == 3
    assert row.comparison is not None
    assert row.comparison.difference.mean == pytest.approx(0.03)
    said = told(runs)
    assert "kd: Δ rests on 1 of 3 seeds, those that base has too (1)." in said
    assert "base: not finished: seeds 2, 3." in said
    assert "too few seeds to tell" in said.lower()


def test_a_baseline_without_a_finished_run_leaves_nothing_to_compare() -> None:
    runs = sweep(arm("base", {}, failed={0: "out of memory"}), arm("kd", BETTER, "base"))
    row = summarise(runs).tables[0].rows[1]
    assert row.comparison is not None
    assert row.comparison.difference.mean is None
    assert "base, seed 0: failed: out of memory" in told(runs)
    assert any("kd" in line and "31.93" in line for line in shown(summarise(runs)))


def test_an_arm_that_waits_is_told() -> None:
    runs = sweep(arm("base", BASE), arm("both", {}, "base"), waiting={"both": "waits for feature"})
    assert "both: not run yet: waits for feature." in told(runs)


def test_a_sweep_without_a_finished_run_can_be_shown() -> None:
    lines = shown(summarise(sweep(arm("base", {}), arm("kd", {}, "base"))))
    assert any("No run is finished" in line for line in lines)


@pytest.mark.parametrize(
    ("seeds", "expected"),
    [
        (1, "One seed an arm at most: too few seeds to tell"),
        (3, "Only 3 seeds: the intervals are wide"),
    ],
)
def test_few_seeds_are_told(seeds: int, expected: str) -> None:
    assert expected in told(ablation(seeds))


def test_enough_seeds_need_no_word() -> None:
    assert "seeds" not in told(ablation(6))


def test_with_test_images_everything_is_reported_on_them() -> None:
    tests = {seed: value - 0.05 for seed, value in BASE.items()}
    runs = sweep(
        arm("base", BASE, tests=tests), arm("kd", BETTER, "base", tests={s: v + 0.01 for s, v in tests.items()})
    )
    summary = summarise(runs)
    assert {table.images for table in summary.tables} == {"test"}
    assert summary.tables[0].rows[0].over_seeds.mean == pytest.approx(0.25)
    assert "chosen on val (2007:val, 2510 images), reported on test (2007:test, 4952 images)" in summary.protocol
    assert not any("same images" in line for table in summary.tables for line in caption(summary, table))


def test_a_run_without_test_figures_puts_all_arms_on_the_validation_images() -> None:
    runs = sweep(arm("base", BASE, tests=dict.fromkeys(BASE, 0.2)), arm("kd", BETTER, "base"))
    assert {table.images for table in summarise(runs).tables} == {"val"}


def test_each_table_tells_what_its_figures_rest_on() -> None:
    runs = sweep(arm("base", BASE), arm("kd", BETTER, "base", untrained=["tiny_dino"], weights="none"))
    summary = summarise(runs)
    for table in summary.tables:
        assert caption(summary, table)[:2] == [
            "selected and reported on the same images", "UNTRAINED teachers: tiny_dino",
        ]  # fmt: skip
    assert notes(summary)[0].startswith("UNTRAINED teachers: tiny_dino.")
    assert "Random initialisation" in told(runs)
    shown_lines = "\n".join(shown(summary))
    assert shown_lines.count("selected and reported on the same images; UNTRAINED") == 2


def test_runs_validated_at_their_end_only_have_no_best_epoch() -> None:
    runs = sweep(arm("base", BASE, evaluate="final-only"), arm("kd", BETTER, "base", evaluate="final-only"))
    summary = summarise(runs)
    assert {table.epoch for table in summary.tables} == {"last"}
    assert "Validated after the last epoch only" in told(runs)


def test_what_was_chosen_is_named_with_what_it_was_chosen_from() -> None:
    members = [arm(f"f-beta{b}", BASE, "base", settings={"beta": float(b)}, grid_of="f") for b in (1, 5)]
    choice = Choice("f", "beta", 5.0, "f-beta5", {"f-beta1": 0.30, "f-beta5": 0.3158})
    runs = sweep(arm("base", BASE), *members, arm("both", BETTER, "base", chosen={"beta": choice}))
    assert "both: β = 5, chosen on val among 1, 5 of f (mean mAP 31.58 at the last epoch)." in told(runs)


def test_no_table_calls_anything_simply_the_best() -> None:
    text = " ".join(" ".join(shown(summarise(ablation()))).split())
    assert "best" in text
    assert not re.search("best(?! val mAP| on val)", text)


def test_fourteen_arms_fit_80_columns_with_a_name_as_long_as_it_may_be() -> None:
    runs = ablation()
    long = arm("l" * 60, BETTER, "resnet18")
    lines = shown(summarise(SweepRuns(**{**vars(runs), "arms": (*runs.arms, long)})))
    assert max(map(len, lines)) <= 80
    assert "".join(line.split()[0] for line in lines if line.startswith("ll")).count("l") == 2 * 60
    assert not any("…" in line.split("…")[0][-1:] for line in lines if line.startswith("l"))


@pytest.mark.parametrize(
    ("value", "expected"), [(0.0123, "+1.23"), (-0.0123, "−1.23"), (-0.00001, "0.00"), (0.0, "0.00"), (None, "–")]
)
def test_differences_have_their_sign(value: float | None, expected: str) -> None:
    assert signed(value) == expected


@pytest.mark.parametrize(
    ("p", "expected"), [(0.2, "0.200"), (0.04, "0.040*"), (0.0001, "<0.001*"), (1.0, "1.000"), (None, "–")]
)
def test_p(p: float | None, expected: str) -> None:
    assert p_text(p) == expected


def test_p_never_rounds_to_the_wrong_side() -> None:
    assert p_text(0.0499) == "0.050*"
    assert interval_text((-0.01, 0.02)) == "−1.00 … +2.00"


def test_one_seed_has_no_spread() -> None:
    def text(values: Sequence[float]) -> str:
        return spread_text(summarise(sweep(arm("a", dict(enumerate(values))))).tables[0].rows[0].over_seeds)

    assert [text([0.3]), text([0.3, 0.4]), text([])] == ["30.00", "35.00 ± 7.07", "–"]

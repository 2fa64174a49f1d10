"""What a report warns of, for runs that differ in one thing each."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from evaluation.detections import Detections
from evaluation.report.caveats import arms_of, caveats
from evaluation.report.run import Run, Teacher, Times

CONFIG = {"seed": "0", "run_name": "baseline", "recipe.epochs": "40", "distillation.source": "none"}
BASELINE = Run(
    name="baseline", arm="baseline", backbone="resnet18", random_weights=True, seed=0, num_epochs=40,
    config=CONFIG, control="", history=(), best_epoch=1, best_mean_ap=None,
    times=Times(1.0, 0.0, 0.0, (1.0,), 4, "cpu"), teachers=(), stores=(), same_images=False,
    detections=Detections.from_images([], []),
)  # fmt: skip


def run(name: str, **changes: Any) -> Run:
    config = {**CONFIG, "run_name": name, **changes.pop("config", {})}
    return replace(BASELINE, name=name, config=config, **changes)


KD = run("kd", config={"distillation.source": "store", "distillation.beta": "5"})


@pytest.mark.parametrize(
    ("runs", "said"),
    [
        ([BASELINE], "One run with one seed: another seed would give other figures."),
        ([BASELINE, KD], "One seed an arm: a difference between arms may be one between seeds"),
        (
            [BASELINE, KD, replace(KD, name="kd-1", seed=1, config={**KD.config, "seed": "1", "run_name": "kd-1"})],
            "1 to 2 seeds an arm, each run shown by itself.",
        ),
        (
            [BASELINE, replace(KD, teachers=(Teacher("tiny_dino", ("features",), True, {}),))],
            "UNTRAINED teachers: tiny_dino (kd). The figures say nothing of what distillation gains.",
        ),
        ([BASELINE, replace(KD, control="another image's targets")], "Control arm: kd (another image's targets)."),
        ([replace(BASELINE, same_images=True)], "Selected and reported on the same images: "),
        ([BASELINE, replace(KD, same_images=True)], "Selected and reported on the same images (kd): "),
        ([replace(BASELINE, num_epochs=1)], "1 epoch from random initialisation: far from converged."),
        (
            [BASELINE, replace(KD, num_epochs=20)],
            "20 epochs from random initialisation: far from converged (kd).",
        ),
        (
            [BASELINE, replace(KD, config={**KD.config, "recipe.epochs": "20", "limit": "8"})],
            "kd differs from baseline in more than distillation: limit, recipe.epochs.",
        ),
    ],
)
def test_caveats(runs: list[Run], said: str) -> None:
    assert [caveat for caveat in caveats(runs, BASELINE) if caveat.startswith(said)]


def test_a_pair_of_good_runs_gets_the_one_caveat_of_seeds():
    assert len(caveats([BASELINE, KD], BASELINE)) == 1


def test_pretrained_weights_are_not_far_from_converged():
    assert not [c for c in caveats([replace(BASELINE, num_epochs=1, random_weights=False)], BASELINE) if "epoch" in c]


def test_arms_are_runs_that_differ_by_seed_alone():
    other_seed = replace(KD, name="kd-1", config={**KD.config, "seed": "1", "run_name": "kd-1", "device": "cuda"})
    assert [[each.name for each in arm] for arm in arms_of([BASELINE, KD, other_seed])] == [
        ["baseline"],
        ["kd", "kd-1"],
    ]

"""Sweeps as `collect` hands them over, without a run: results in the shape of `result.json`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from pipeline.sweep.choices import Choice
from pipeline.sweep.collect import ArmRuns, SweepRuns


def result(
    name: str, seed: int, last: float, best: float | None = None, *, backbone: str = "resnet18", kd: bool = True,
    test: float | None = None, untrained: Sequence[str] = (), epochs: int = 20, seconds: float = 120.0,
    evaluate: str = "every-epoch", weights: str = "imagenet", **settings: Any,
) -> dict[str, Any]:  # fmt: skip
    """A finished run's result: `last` and `best` are val mAP, AP50 is 0.2 above."""
    best = last + 0.01 if best is None else best
    source = "store" if kd else "none"
    return {
        "run_name": f"{name}-s{seed}",
        "config": {
            "run_name": f"{name}-s{seed}", "runs_dir": "runs", "seed": seed, "voc_root": "VOCdevkit",
            "voc_sets": ["2007:train"], "val_sets": ["2007:val"], "test_sets": ["2007:test"] if test else [],
            "evaluate": evaluate, "student": {"backbone": backbone, "backbone_weights": weights},
            "recipe": {"epochs": epochs, "batch_size": 8},
            "distillation": {"source": source, "beta": 1.0, "gamma": 1.0, **settings},
        },
        "targets": {"source": source, "untrained": list(untrained)} if kd else {"source": "none"},
        "images": {"train": 2501, "val": 2510, "test": 4952 if test else 0},
        "epochs": epochs,
        "last": {"epoch": epochs, "val": scores(last)},
        "best": {"epoch": max(1, epochs - 3), "val": scores(best)},
        "test": {"last": scores(test), "best": scores(test + 0.01)} if test else None,
        "selected_and_reported_on_the_same_images": test is None,
        "seconds": {"training": seconds, "data_wait": 0.5, "targets": 0.3},
        "seconds_by_epoch": [seconds / epochs] * epochs,
        "data_wait_share": 0.5 / seconds,
        "device": "cpu",
    }  # fmt: skip


def scores(mean_ap: float) -> dict[str, Any]:
    """What an evaluation says."""
    return {
        "mAP": mean_ap,
        "per_iou": {"0.50": mean_ap + 0.2, "0.75": mean_ap},
        "per_class": {"person": {"mAP": mean_ap, "AP50": mean_ap + 0.2}},
    }


def arm(name: str, values: Mapping[int, float], baseline: str | None = None, **facts: Any) -> ArmRuns:
    """An arm with these last epochs' mAP by seed. facts: of every result, and `settings`, `failed`, `chosen`."""
    own = {key: facts.pop(key) for key in ("settings", "grid_of", "varied", "failed", "chosen") if key in facts}
    tests = facts.pop("tests", {})
    results = {
        seed: result(name, seed, value, kd=baseline is not None, test=tests.get(seed), **facts)
        for seed, value in values.items()
    }
    empty: dict[str, Any] = {"settings": {}, "grid_of": None, "failed": {}, "chosen": {}}
    return ArmRuns(
        **{**empty, "name": name, "baseline": baseline, "results": results, "distils": bool(baseline), **own}
    )


def sweep(*arms: ArmRuns, **facts: Any) -> SweepRuns:
    """A sweep of these arms."""
    seeds = tuple(sorted({seed for arm in arms for seed in (*arm.results, *arm.failed)}))
    empty: dict[str, Any] = {"plan_name": "small", "about": "", "store_cost": None, "settings": {}}
    return SweepRuns(**{**empty, "arms": arms, "seeds": seeds, **facts})


def ablation(seeds: int = 3) -> SweepRuns:
    """The experiment plan with drawn figures: fourteen arms over three backbones."""
    draw = np.random.default_rng(5)
    bases = {"resnet18": 0.312, "mobilenet_v3_small": 0.221, "vit_tiny": 0.264}
    arms = []
    level = {name: value + 0.004 * draw.normal(size=seeds) for name, value in bases.items()}

    def add(name: str, backbone: str, gain: float, grid_of: str | None = None, **weights: float) -> None:
        baseline = backbone if weights else None
        values = level[backbone] + gain + (0.003 * draw.normal(size=seeds) if weights else 0.0)
        settings = {"backbone": backbone, **weights}
        by_seed = dict(enumerate(values.tolist()))
        arms.append(
            arm(
                name,
                by_seed,
                baseline,
                backbone=backbone,
                settings=settings,
                grid_of=grid_of,
                varied=weights,
                **weights,
            )
        )

    for backbone in bases:
        add(backbone, backbone, 0.0)
    for beta, gain in ((1, 0.002), (5, 0.009), (10, 0.012), (20, 0.004)):
        add(f"feature-beta{beta}", "resnet18", gain, "feature", beta=float(beta), gamma=0.0)
    for gamma, gain in ((0.5, 0.0), (1, 0.003), (2, -0.001), (5, -0.012)):
        add(f"logit-gamma{gamma}", "resnet18", gain, "logit", beta=0.0, gamma=float(gamma))
    for backbone in bases:
        add(f"{backbone}-both", backbone, 0.01, beta=5.0, gamma=1.0)
    val_map = {f"feature-beta{beta}": 0.31 + beta / 1000 for beta in (1, 5, 10, 20)}
    arms[-1] = replace(arms[-1], chosen={"beta": Choice("feature", "beta", 5.0, "feature-beta5", val_map)})
    return sweep(*arms, plan_name="voc-ablation", about="Which distillation helps which student, and by how much.")

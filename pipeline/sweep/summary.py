"""What a sweep came to: every arm over its seeds, and its paired difference from its baseline. No torch.

The last epoch is the headline: it was not picked. The best epoch stands beside it and is named for what it is, the best
on the validation images. Where the plan has test images, everything is chosen on the validation images and reported on
the test images; else each table says that both were the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from evaluation.statistics import Comparison, Spread, compare, spread
from pipeline.results import percent
from pipeline.sweep.choices import Choice
from pipeline.sweep.collect import ArmRuns, SweepRuns
from pipeline.sweep.setting_text import setting_name, setting_text

Metric = Literal["mAP", "AP50"]
Epoch = Literal["last", "best"]
Images = Literal["val", "test"]

METRICS: tuple[Metric, ...] = get_args(Metric)
EPOCHS: tuple[Epoch, ...] = get_args(Epoch)
SAME_IMAGES = "selected and reported on the same images"


@dataclass(frozen=True)
class Row:
    """An arm in a table. over_seeds: of all its finished seeds.  comparison: None for a baseline.

    paired: the seeds that it shares with its baseline, which alone make the comparison.
    """

    arm: str
    baseline: str | None
    over_seeds: Spread
    paired: tuple[int, ...]
    comparison: Comparison | None


@dataclass(frozen=True)
class SweepTable:
    """One metric at one epoch, on one set of images, as fractions; its comparisons are corrected together."""

    metric: Metric
    epoch: Epoch
    images: Images
    rows: tuple[Row, ...]
    comparisons: int

    @property
    def title(self) -> str:
        """The table's title, whole."""
        name = "mAP@[0.50:0.95]" if self.metric == "mAP" else "AP@0.50"
        when = "last epoch" if self.epoch == "last" else "epoch with the best val mAP"
        return f"{name} on {self.images}, {when}, percent"


@dataclass(frozen=True)
class ArmSummary:
    """One arm: what was set, chosen, run, and what is missing.

    about: what it is there for.  varied: of its grid.  chosen: sentences.  failed: messages by seed.  waiting: why it
    was not run yet.
    """

    name: str
    about: str
    settings: dict[str, Any]
    varied: dict[str, Any]
    grid_of: str | None
    baseline: str | None
    chosen: tuple[str, ...]
    finished: tuple[int, ...]
    failed: dict[int, str]
    missing: tuple[int, ...]
    waiting: str
    untrained: tuple[str, ...]


@dataclass(frozen=True)
class RunFacts:
    """What holds for the runs together, to be told beside every figure.

    same_images: selected and reported on the same images.  random_initialisation: and no more than 20 epochs.
    """

    finished: int
    untrained: tuple[str, ...]
    same_images: bool
    each_epoch: bool
    random_initialisation: bool
    devices: tuple[str, ...]


@dataclass(frozen=True)
class SweepSummary:
    """A sweep's results. tables: the headline first.  protocol: what was trained on, chosen on and reported on."""

    plan_name: str
    about: str
    protocol: str
    arms: tuple[ArmSummary, ...]
    tables: tuple[SweepTable, ...]
    runs: RunFacts

    def table(self, metric: Metric, epoch: Epoch) -> SweepTable:
        """Return one of the tables; that of the last epoch where no other one was validated."""
        found = [table for table in self.tables if table.metric == metric]
        return next((table for table in found if table.epoch == epoch), found[0])

    def to_json(self) -> dict[str, Any]:
        """Return everything as JSON knows it."""
        return asdict(self)


def summarise(collected: SweepRuns) -> SweepSummary:
    """Return the tables and notes of the runs that are there; what is missing is said."""
    runs = [result for arm in collected.arms for result in arm.results.values()]
    images: Images = "test" if runs and all(run["test"] for run in runs) else "val"
    epochs = EPOCHS if any(_validated_each_epoch(run) for run in runs) else EPOCHS[:1]
    tables = tuple(_table(collected.arms, metric, epoch, images) for metric in METRICS for epoch in epochs)
    settings = {arm.name: arm.settings for arm in collected.arms}
    arms = tuple(_arm(arm, collected, settings) for arm in in_blocks(collected.arms))
    return SweepSummary(
        plan_name=collected.plan_name,
        about=collected.about,
        protocol=_protocol(runs, images),
        arms=arms,
        tables=tables,
        runs=_facts(runs, images),
    )


def figure(result: Mapping[str, Any], metric: Metric, epoch: Epoch, images: Images) -> float | None:
    """Return a run's figure as a fraction; None where no class has ground truth."""
    scores = result[epoch]["val"] if images == "val" else result["test"][epoch]
    value = scores["mAP"] if metric == "mAP" else scores["per_iou"]["0.50"]
    return None if value is None else float(value)


def _table(arms: Sequence[ArmRuns], metric: Metric, epoch: Epoch, images: Images) -> SweepTable:
    values = {
        arm.name: {
            seed: value
            for seed, result in sorted(arm.results.items())
            if (value := figure(result, metric, epoch, images)) is not None
        }
        for arm in arms
    }
    paired = {
        arm.name: tuple(seed for seed in values[arm.name] if seed in values.get(arm.baseline, {}))
        for arm in arms
        if arm.baseline is not None
    }
    compared = compare(
        {
            arm.name: (
                [values[arm.name][seed] for seed in paired[arm.name]],
                [values[arm.baseline][seed] for seed in paired[arm.name]],
            )
            for arm in arms
            if arm.baseline is not None
        }
    )
    rows = tuple(
        Row(arm.name, arm.baseline, spread(list(values[arm.name].values())), paired.get(arm.name, ()),
            compared.get(arm.name))
        for arm in in_blocks(arms)
    )  # fmt: skip
    return SweepTable(metric, epoch, images, rows, sum(found.p_holm is not None for found in compared.values()))


def _arm(arm: ArmRuns, collected: SweepRuns, settings: Mapping[str, Mapping[str, Any]]) -> ArmSummary:
    return ArmSummary(
        name=arm.name,
        about=arm.about,
        settings=arm.settings,
        varied=arm.varied,
        grid_of=arm.grid_of,
        baseline=arm.baseline,
        chosen=tuple(_said(choice, settings) for choice in arm.chosen.values()),
        finished=tuple(sorted(arm.results)),
        failed=dict(sorted(arm.failed.items())),
        missing=tuple(seed for seed in collected.seeds if seed not in arm.results and seed not in arm.failed),
        waiting=collected.waiting.get(arm.name, ""),
        untrained=tuple(sorted({name for run in arm.results.values() for name in run["targets"].get("untrained", ())})),
    )


def _said(choice: Choice, settings: Mapping[str, Mapping[str, Any]]) -> str:
    """Return a choice in words. settings: of every arm, by its name."""
    among = ", ".join(
        setting_text(settings.get(member, {}).get(choice.option.replace("_", "-"), member)) for member in choice.val_map
    )
    chosen = f"{setting_name(choice.option)} = {setting_text(choice.value)}, chosen on val among {among} of {choice.of}"
    return f"{chosen} (mean mAP {percent(choice.val_map[choice.member])} at the last epoch)"


def in_blocks(arms: Sequence[ArmRuns]) -> list[ArmRuns]:
    """Return the arms in the plan's order, but those with the same baseline together and behind it."""
    firsts = list(dict.fromkeys(arm.baseline or arm.name for arm in arms))
    return [arm for first in firsts for arm in sorted(
        (arm for arm in arms if (arm.baseline or arm.name) == first), key=lambda arm: arm.baseline is not None
    )]  # fmt: skip


def _facts(runs: Sequence[Mapping[str, Any]], images: Images) -> RunFacts:
    return RunFacts(
        finished=len(runs),
        untrained=tuple(sorted({name for run in runs for name in run["targets"].get("untrained", ())})),
        same_images=images == "val",
        each_epoch=any(_validated_each_epoch(run) for run in runs),
        random_initialisation=any(
            run["config"]["student"]["backbone_weights"] == "none" and run["epochs"] <= 20 for run in runs
        ),
        devices=tuple(sorted({run["device"] for run in runs})),
    )


def reported_images(result: Mapping[str, Any]) -> tuple[Images, ...]:
    """Return the sets of images that a run has figures of."""
    return ("val", "test") if result["test"] else ("val",)


def _validated_each_epoch(run: Mapping[str, Any]) -> bool:
    return bool(run["config"]["evaluate"] == "every-epoch" and run["epochs"] > 1)


def _protocol(runs: Sequence[Mapping[str, Any]], images: Images) -> str:
    """Return how many images and epochs the runs had, and what they were chosen and reported on, in a sentence."""
    if not runs:
        return "No run is finished."
    trained = _range(sorted({run["images"]["train"] for run in runs}))
    epochs = _range(sorted({run["epochs"] for run in runs}))
    config = runs[0]["config"]
    said = f"Trained on {trained} images of {', '.join(config['voc_sets'])}, {epochs} epoch{'s' * (epochs != '1')}."
    val = f"{', '.join(config['val_sets'])}, {runs[0]['images']['val']} images"
    if images == "val":
        return f"{said} Reported on val ({val})."
    test = f"{', '.join(config['test_sets'])}, {runs[0]['images']['test']} images"
    return f"{said} Epochs and weights of the losses chosen on val ({val}), reported on test ({test})."


def _range(values: Sequence[int]) -> str:
    return str(values[0]) if len(values) == 1 else f"{values[0]} to {values[-1]}"

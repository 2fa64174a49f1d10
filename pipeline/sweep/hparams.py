"""A sweep's runs for TensorBoard's table of settings: `tensorboard --logdir FOLDER/hparams`. No torch."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.hparams import summary_v2
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from pipeline.sweep.collect import ArmRuns, SweepRuns
from pipeline.sweep.setting_text import setting_text
from pipeline.sweep.summary import EPOCHS, METRICS, figure, reported_images


def write_hparams(collected: SweepRuns, folder: Path) -> None:
    """Write an entry a finished run, in a folder of its own; those of an earlier report are replaced."""
    shutil.rmtree(folder, ignore_errors=True)
    for arm in collected.arms:
        for seed, result in arm.results.items():
            _write(folder / result["run_name"], _settings(arm, seed, result), _metrics(result), result["epochs"])


def _settings(arm: ArmRuns, seed: int, result: dict[str, Any]) -> dict[str, str | float | bool]:
    untrained = result["targets"].get("untrained", ())
    return {
        "arm": arm.name,
        "seed": float(seed),
        "backbone": result["config"]["student"]["backbone"],
        **({"untrained teachers": ", ".join(untrained)} if untrained else {}),
        **{name: value if isinstance(value, int | float) else setting_text(value)
           for name, value in arm.settings.items() if value is not None},
    }  # fmt: skip


def _metrics(result: dict[str, Any]) -> dict[str, float]:
    """Return the figures by tag; the tags say which images they are of, and what was picked on them."""
    said = {"last": "last epoch", "best": "best val epoch"}
    figures = {
        f"{images} {metric}, {said[epoch]}": figure(result, metric, epoch, images)
        for images in reported_images(result)
        for epoch in EPOCHS
        for metric in METRICS
    }
    return {tag: value for tag, value in figures.items() if value is not None}


def _write(folder: Path, settings: dict[str, str | float | bool], metrics: dict[str, float], step: int) -> None:
    writer = EventFileWriter(str(folder))
    summaries = [
        summary_v2.hparams_pb(settings, trial_id=folder.name),
        *(Summary(value=[Summary.Value(tag=tag, simple_value=value)]) for tag, value in metrics.items()),
    ]
    for summary in summaries:
        writer.add_event(Event(summary=summary, step=step))
    writer.close()

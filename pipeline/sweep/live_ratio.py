"""Measures how many times as long a training step takes with live teachers, on a sweep's own settings."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import torch

from data.geometry import VIEWS
from data.records import ImageRecord
from data.voc import read_voc
from pipeline.config import Distillation, TrainConfig
from pipeline.dataset import LoadedBatch, SampleKey, TrainingImages, collate_loaded
from pipeline.device import choose_device
from pipeline.progress import say
from pipeline.stored_targets import StoredTargets
from pipeline.sweep.cost import LiveRatio
from pipeline.targets import TargetSource
from pipeline.train import target_source
from pipeline.trainer import Trainer

STEPS = 3


def measure_live_ratio(config: TrainConfig, steps: int = STEPS) -> LiveRatio:
    """Return the ratio of steps taken in turn, from the store and with live teachers, on one decoded batch.

    config: of a run that distils from stores. The live teachers have seeded weights, so none are fetched: a step costs
    the same.

    Raises as `train`, and UsageError or TeacherError where a stored teacher cannot be built without its weights.
    """
    config = config.resolved()
    device = choose_device(config.device)
    records = read_voc(config.voc_root, config.voc_sets, config.limit)[: config.recipe.batch_size]
    stored = target_source(config, records, device)
    assert isinstance(stored, StoredTargets)
    live_config = config.model_copy(update={"distillation": as_live(config.distillation, stored)})
    cached = _step(config, records, stored, device)
    live = _step(live_config, records, target_source(live_config, records, device), device)
    for step in (cached, live):
        step()  # the first one allocates
    taken = []
    for number in range(steps):
        say(f"step {number + 1} of {steps}, from the store and with live teachers")
        taken.append((cached(), live()))
    return LiveRatio(
        ratio=median(with_teachers / without for without, with_teachers in taken),
        source="measured",
        live_s=median(with_teachers for _, with_teachers in taken),
        cached_s=median(without for without, _ in taken),
        said=f"median of {steps} steps of {config.student.backbone}, batch of {len(records)}, on {device}",
    )


def as_live(distillation: Distillation, stored: StoredTargets) -> Distillation:
    """Return the same losses with the stored teachers run live, on seeded weights."""
    choice = stored.choice
    specs = tuple(f"{key}={stored.selection.manifest(key).identity['spec']}" for key in choice.used)
    changes = {
        "source": "live", "stores": (), "expect_fingerprints": (), "teachers": specs, "untrained": True,
        "target_shuffle": None, "feature_teacher": choice.features, "logit_teacher": choice.logits,
        "region_teacher": choice.regions,
    }  # fmt: skip
    return Distillation.model_validate({**distillation.model_dump(), **changes})


def _step(
    config: TrainConfig, records: list[ImageRecord], source: TargetSource | None, device: torch.device
) -> Callable[[], float]:
    """Return what takes one step on a batch decoded before, and returns its seconds."""
    trainer = Trainer(config, records, device, source)
    images = TrainingImages(records, teacher_inputs=() if source is None else source.teacher_inputs)
    views = VIEWS if config.recipe.flip > 0 else VIEWS[:1]
    keys = [SampleKey(index, views[index % len(views)], 0) for index in range(len(records))]
    loaded: LoadedBatch = collate_loaded([images.load(key) for key in keys])

    def run() -> float:
        trainer.step = 1  # no report: its extra gradients are taken every twentieth step only
        start = time.perf_counter()
        trainer.run_step([loaded], len(records))
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    return run

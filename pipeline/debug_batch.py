"""Looks at one batch: every loss, and whether stored and live targets say the same."""

from __future__ import annotations

from dataclasses import replace

import torch
from rich.console import Group
from rich.table import Table

from data.geometry import VIEWS, View
from data.records import ImageRecord
from data.voc import read_voc
from pipeline.config import Distillation, TrainConfig
from pipeline.dataset import LoadedBatch, TrainingImages, collate_loaded
from pipeline.device import choose_device
from pipeline.stored_targets import StoredTargets
from pipeline.targets import LiveTargets, TargetSource, TeacherTargets
from pipeline.teachers import TeacherChoices, build_teachers
from pipeline.train import target_source
from pipeline.trainer import Trainer
from students.losses.logit_kl import logit_kl
from students.losses.pointwise import feature_mse
from students.losses.standardise import standardise

Losses = dict[str, float]


def debug_batch(config: TrainConfig, live: Distillation | None = None) -> dict[str, Losses]:
    """Return the losses of the first training batch by where its targets came from.

    Columns: `none`, `store` or `live` as configured. With a store and `live` teachers besides, also `live`, and
    `wrong view`: the store's targets of the other view, a control that has to differ. Two rows are then added,
    `feature of a mimic` and `logit of a mimic`: the loss of a student that says exactly what the live teacher says.
    An untrained student misses every target alike; a mimic's loss is zero against the right one only.

    Raises as `train`; StoreIncompleteError where the store lacks a view that the control needs.
    """
    config = config.resolved()
    device = choose_device(config.device)
    records = read_voc(config.voc_root, config.voc_sets, config.limit)
    if live is not None:
        return _compare(config, live, records, device)
    source = target_source(config, records, device)
    trainer = Trainer(config, records, device, source)
    loaded = _first_batch(trainer, source)
    return {config.distillation.source: _losses(trainer, loaded, None if source is None else source(loaded))}


def _compare(
    config: TrainConfig, live: Distillation, records: list[ImageRecord], device: torch.device
) -> dict[str, Losses]:
    distillation = config.distillation
    # Both views, whatever the recipe draws: the control needs the other one.
    stored = StoredTargets(distillation, records, VIEWS, device)
    # The weights and teachers of the store's run, so that the same losses of the same teachers are computed.
    chosen = {"feature_teacher": stored.choice.features, "logit_teacher": stored.choice.logits}
    teachers = build_teachers(live.teachers, TeacherChoices(live.weights, live.untrained), device)
    live_source = LiveTargets(teachers, distillation.model_copy(update=chosen), records, device)
    trainer = Trainer(config, records, device, stored)
    loaded = _first_batch(trainer, live_source)
    said = _as_stored(live_source(loaded), stored)
    columns = {"store": stored(loaded), "live": said, "wrong view": stored(_other_views(loaded))}
    return {
        column: _losses(trainer, loaded, targets) | _mimic_losses(trainer, columns["live"], targets)
        for column, targets in columns.items()
    }


def _as_stored(said: TeacherTargets, stored: StoredTargets) -> TeacherTargets:
    """Return what live teachers say as the store keeps it: on its PCA basis, where it has one."""
    pca = None if stored.choice.features is None else stored.selection.pca(stored.choice.features)
    if pca is None or said.features is None:
        return said
    projected = torch.from_numpy(pca.project(said.features.float().cpu().numpy()))
    return replace(said, features=projected.to(said.features.device))


def _mimic_losses(trainer: Trainer, mimicked: TeacherTargets, targets: TeacherTargets) -> Losses:
    objective, losses = trainer.objective, {}
    if targets.features is not None and mimicked.features is not None:
        mean, std = objective.mean, objective.std
        said = mimicked.features.float()
        said = said if mean is None or std is None else (said - mean) / std
        losses["feature of a mimic"] = float(
            feature_mse(said.permute(0, 3, 1, 2), standardise(targets.features, mean, std))
        )
    if targets.logits is not None and mimicked.logits is not None:
        temperature = trainer.config.distillation.temperature
        losses["logit of a mimic"] = float(logit_kl(mimicked.logits, targets.logits, temperature))
    return losses


def _first_batch(trainer: Trainer, source: TargetSource | None) -> LoadedBatch:
    images = TrainingImages(
        trainer.records,
        seed=trainer.config.seed,
        jitter_strength=trainer.config.recipe.jitter,
        teacher_inputs=() if source is None else source.teacher_inputs,
    )
    keys = next(iter(trainer.batches))
    return collate_loaded([images.load(key) for key in keys])


def _losses(trainer: Trainer, loaded: LoadedBatch, targets: TeacherTargets | None) -> Losses:
    with torch.no_grad():
        total, parts = trainer.losses_against(loaded, targets)
    return {"total": float(total), **{name: float(value) for name, value in parts.items()}}


def _other_views(loaded: LoadedBatch) -> LoadedBatch:
    other: dict[View, View] = {"original": "hflip", "hflip": "original"}
    return replace(loaded, keys=tuple(replace(key, view=other[key.view]) for key in loaded.keys))


def losses_table(columns: dict[str, Losses]) -> Group:
    """Return the losses as a table: a row a loss, a column a source of targets."""
    table = Table(title="Losses of the first batch", title_justify="left")
    table.add_column("loss")
    for source in columns:
        table.add_column("baseline" if source == "none" else source, justify="right")
    for name in dict.fromkeys(name for losses in columns.values() for name in losses):
        table.add_row(name, *(f"{losses[name]:.6g}" if name in losses else "–" for losses in columns.values()))
    note = "a mimic says what the live teacher says" if "wrong view" in columns else ""
    return Group(table, note)

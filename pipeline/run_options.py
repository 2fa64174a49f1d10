"""Turns the options of `train` and `debug-batch` into a configuration. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from data.errors import UsageError
from pipeline.config import Distillation, Recipe, TrainConfig, usage_error
from students.config import StudentConfig

DEFAULT_LIVE_TEACHERS = ("dinov2_vits14", "clip_vitb32")


def train_config(options: dict[str, Any]) -> TrainConfig:
    """Return the configuration of a run from the command line's options.

    Raises UsageError naming the field for values that cannot be.
    """
    options = dict(options)
    try:
        student = StudentConfig(**_take(options, StudentConfig.model_fields))
        recipe = Recipe(**_take(options, Recipe.model_fields))
        distillation = _distillation(options)
        name = options.pop("run_name") or _free_name(student, distillation, options)
        return TrainConfig(run_name=name, student=student, recipe=recipe, distillation=distillation, **options)
    except ValidationError as error:
        raise usage_error(error) from None


def live_teachers(teachers: Sequence[str], weights: dict[str, Path], untrained: bool) -> Distillation:
    """Return the configuration of live teachers; the default ones where none is named."""
    return Distillation(
        source="live", teachers=tuple(teachers) or DEFAULT_LIVE_TEACHERS, weights=weights, untrained=untrained
    )


def _distillation(options: dict[str, Any]) -> Distillation:
    stores, live = tuple(options.pop("cached_teachers")), options.pop("distill")
    teachers = tuple(options.pop("teachers"))
    chosen = _take(options, Distillation.model_fields)
    weights, untrained = chosen.pop("weights"), chosen.pop("untrained")
    if not live and (teachers or weights or untrained):
        raise UsageError(
            "live teachers were named (--teacher, --weights, --untrained), but not asked for",
            hint="add --distill, or drop their options; of a store's teachers, choose with --feature-teacher and"
            " --logit-teacher",
        )
    if stores:
        return Distillation(source="store", stores=stores, **chosen)
    if live:
        base = live_teachers(teachers, weights, untrained)
        return base.model_copy(update=Distillation(**chosen).model_dump(include=set(chosen)))
    return Distillation(**chosen)


def _free_name(student: StudentConfig, distillation: Distillation, options: dict[str, Any]) -> str:
    arm = {"none": "baseline", "store": "kd", "live": "live-kd"}[distillation.source]
    weights = "" if distillation.source == "none" else f"-b{distillation.beta:g}-g{distillation.gamma:g}"
    base = f"{student.backbone.replace(':', '-').replace('/', '-')}-{arm}{weights}-s{options['seed']}"
    name, number = base, 1
    while (options["runs_dir"] / name).exists() or (options["checkpoints_dir"] / name).exists():
        number += 1
        name = f"{base}-{number}"
    return name


def _take(options: dict[str, Any], fields: Any) -> dict[str, Any]:
    return {name: options.pop(name) for name in list(options) if name in fields}

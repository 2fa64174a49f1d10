"""Finds the run that `--resume` goes on with, and keeps a new run off the name of another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import ValidationError

from cache.canonical import differences
from data.errors import CheckpointError, UsageError
from pipeline.checkpoint import LATEST, Checkpoint, load_checkpoint
from pipeline.config import TrainConfig
from pipeline.progress import say

# What may change between two sittings: where things are, not what is computed. Stores that were moved are compared by
# the fingerprints of what is read of them.
_FREE: dict[str, Any] = {
    "device": True,
    "workers": True,
    "residency": True,
    "cache_images": True,
    "checkpoint_steps": True,
    "pictures": True,
    "voc_root": True,
    "runs_dir": True,
    "checkpoints_dir": True,
    "distillation": {"stores", "expect_fingerprints"},
}


def refuse_taken_name(config: TrainConfig) -> None:
    """Raise UsageError where a run of this name is already there."""
    for taken in (config.run_dir / "config.json", config.checkpoint_dir / LATEST):
        if taken.exists():
            raise UsageError(
                f"{taken}: a run of this name is already there",
                hint="go on with it: --resume; or choose another --run-name",
            )


def find_resumable(config: TrainConfig) -> Checkpoint | None:
    """Return the latest checkpoint of the run; None where it was ended before its first epoch was.

    Raises CheckpointError where there is no such run, or naming every setting in which it differs.
    """
    path, begun = config.checkpoint_dir / LATEST, config.run_dir / "config.json"
    if path.exists() or not begun.exists():
        checkpoint = load_checkpoint(path)
        _refuse_other_settings(path, as_chosen(checkpoint.config, checkpoint), as_chosen(config, checkpoint))
        return checkpoint
    _refuse_other_settings(begun, _read_config(begun), config)
    say(f"run {config.run_name} ended before its first epoch did: starting anew")
    return None


def as_chosen(config: TrainConfig, checkpoint: Checkpoint | None) -> TrainConfig:
    """Return a run's configuration with the teachers named that its checkpoint was distilled from.

    A store may have got further teachers since: what was the only choice then must not be an open one now.
    """
    teachers = {} if checkpoint is None else checkpoint.targets.get("teachers", {})
    distillation = config.distillation
    named = {
        "feature_teacher": distillation.feature_teacher or teachers.get("features"),
        "logit_teacher": distillation.logit_teacher or teachers.get("logits"),
    }
    return config.model_copy(update={"distillation": distillation.model_copy(update=named)})


def _read_config(path: Path) -> TrainConfig:
    try:
        return TrainConfig.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise CheckpointError(f"{path}: cannot be read as a run's configuration ({error})") from error


def _refuse_other_settings(path: Path, stored: TrainConfig, asked: TrainConfig) -> None:
    before, now = (config.model_dump(mode="json", exclude=_FREE) for config in (stored, asked))
    changed = [
        f"  {field.removeprefix('.')}: stored {old}, found {new}" for field, old, new in differences(before, now, "")
    ]
    if changed:
        raise CheckpointError(
            "\n".join([f"{path}: the run was started with other settings:", *changed]),
            hint="repeat the settings it was started with, or choose another --run-name",
        )


def refuse_other_targets(stored: dict[str, Any], found: dict[str, Any]) -> None:
    """Raise CheckpointError naming every field in which two records of teacher targets differ.

    Where a store lies, what else it holds, and a shard that was written again with other bytes, do not make it another
    store.
    """
    changed = [
        f"  {field.removeprefix('.')}: stored {old}, found {new}"
        for part in (_teachers, _arrays)  # what a teacher is, then the fingerprints that follow from it
        for field, old, new in differences(part(stored), part(found), "")
    ]
    if changed:
        raise CheckpointError(
            "\n".join(["the run was started against other teacher targets:", *changed]),
            hint="give the stores it was started with, in their order, or start a new run with another --run-name",
        )


def _teachers(record: dict[str, Any]) -> dict[str, Any]:
    named = {f"{key}.identity": identity for key, identity in record.get("identities", {}).items()}
    return {name: value for name, value in record.items() if name not in ("identities", "stores")} | named


def _arrays(record: dict[str, Any]) -> dict[str, Any]:
    """Return what was read of each store, by its number: without its path, its other arrays, and its shards' bytes."""
    return {
        f"stores[{number}]": {
            path: {name: value for name, value in array.items() if name != "content"}
            for path, array in store["arrays"].items()
        }
        for number, store in enumerate(record.get("stores", []), start=1)
    }

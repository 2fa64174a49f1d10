"""Reads a finished run's folder as `train` leaves it. No torch."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.errors import ReportError
from evaluation.detections import Detections
from evaluation.report.run import Epoch, Run, Store, Teacher, Times
from pipeline.results import arm

# What is read of `result.json` and of each line of `metrics.jsonl`, by dotted name.
_NEEDED = ("run_name", "config.student.backbone", "config.student.backbone_weights", "config.distillation.source",
           "config.distillation.beta", "config.distillation.gamma", "config.seed", "config.voc_root", "config.val_sets",
           "config.test_sets", "config.checkpoints_dir", "targets", "images.train", "images.val", "epochs",
           "last.val.mAP", "best.epoch", "best.val.mAP", "seconds.training", "seconds.data_wait", "seconds.targets",
           "seconds_by_epoch")  # fmt: skip
_NEEDED_OF_EPOCH = ("epoch", "losses", "val")


@dataclass(frozen=True, eq=False)
class RunFolder:
    """A run's folder and what its files say. history: the lines of `metrics.jsonl`, an epoch each."""

    path: Path
    result: dict[str, Any]
    history: list[dict[str, Any]]

    @property
    def name(self) -> str:
        """The run's name."""
        return str(self.result["run_name"])

    @property
    def config(self) -> dict[str, Any]:
        """The run's configuration, as its result repeats it."""
        config: dict[str, Any] = self.result["config"]
        return config

    def sets(self, image_set: str) -> str:
        """Return the names of the validation or test sets, `2007:val`, joined."""
        return "+".join(self.config[f"{image_set}_sets"])

    def last(self, image_set: str) -> dict[str, Any]:
        """Return the figures of the last epoch on the validation or test images."""
        figures: dict[str, Any] = self.result["last"]["val"] if image_set == "val" else self.result["test"]["last"]
        return figures

    def detections(self, image_set: str) -> Path:
        """Return the folder of what the last epoch's student found.

        Raises ReportError where it is not there.
        """
        folder = self.path / "detections" / image_set
        if not folder.is_dir():
            raise ReportError(
                f"{folder}: no detections (runs of earlier versions did not keep them)",
                hint=f"make them: {self.save_detections(image_set)}",
            )
        return folder

    def save_detections(self, image_set: str) -> str:
        """Return the command that makes the run's detections from its checkpoint."""
        checkpoint = Path(self.config["checkpoints_dir"]) / self.name / "student_latest.pth"
        sets = " ".join(f"--voc-set {name}" for name in self.config[f"{image_set}_sets"])
        folder = self.path / "detections" / image_set
        return f"python cli.py eval --checkpoint {checkpoint} {sets} --save-detections {folder}"


def read_run_folder(path: Path) -> RunFolder:
    """Return a finished run.

    Raises ReportError for a folder that holds no run, an unfinished one, or one whose files cannot be understood.
    """
    if not path.is_dir():
        raise ReportError(f"{path}: no such folder", hint="give the folders of runs, such as runs/*")
    if not (path / "result.json").is_file():
        if not (path / "config.json").is_file():
            raise ReportError(
                f"{path}: no run is in this folder (no config.json)", hint="give the folders of runs, such as runs/*"
            )
        raise ReportError(
            f"{path}: this run is not finished (no result.json)",
            hint=f"finish it: the same train command with --run-name {path.name} --resume",
        )
    result = _read_json(path / "result.json")
    _refuse_lacking(path / "result.json", result, _NEEDED)
    return RunFolder(path, result, read_history(path / "metrics.jsonl"))


def run_of(folder: RunFolder, found: Detections, name: str, image_set: str) -> Run:
    """Return a run as the report knows it.

    found: its detections.  name: what it is called there.  image_set: `val` or `test`, what they are of.
    """
    result, config = folder.result, folder.config
    best, seconds = result["best"], result["seconds"]
    return Run(
        name=name,
        arm=arm(result),
        backbone=config["student"]["backbone"],
        random_weights=config["student"]["backbone_weights"] == "none",
        seed=config["seed"],
        num_epochs=result["epochs"],
        config=dict(_flat(config)),
        control=_control(config["distillation"]),
        history=tuple(_epoch(line) for line in folder.history),
        best_epoch=best["epoch"],
        best_mean_ap=best["val"]["mAP"],
        times=Times(
            training=seconds["training"],
            data_wait=seconds["data_wait"],
            targets=seconds["targets"],
            epochs=tuple(result["seconds_by_epoch"]),
            images=result["images"]["train"],
            device=result.get("device", "not recorded"),
        ),
        teachers=_teachers(result["targets"]),
        stores=_stores(result["targets"]),
        same_images=image_set == "val",
        detections=found,
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ReportError(f"{path}: cannot be read as JSON ({error})") from error
    if not isinstance(content, dict):
        raise ReportError(f"{path}: expected an object, found {type(content).__name__}")
    return content


def read_history(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a run's `metrics.jsonl`, an epoch each.

    Raises ReportError where it cannot be read, or lacks what `train` writes.
    """
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise ReportError(f"{path}: cannot be read as JSON, a line an epoch ({error})") from error
    for line in lines:
        _refuse_lacking(path, line, _NEEDED_OF_EPOCH)
    return lines


def _refuse_lacking(path: Path, content: Any, needed: Sequence[str]) -> None:
    for name in needed:
        found = content
        for part in name.split("."):
            if not isinstance(found, dict) or part not in found:
                raise ReportError(f"{path}: expected what train writes, found no {name!r}")
            found = found[part]


def _epoch(line: Mapping[str, Any]) -> Epoch:
    val = line["val"]
    return Epoch(
        number=line["epoch"],
        losses=line["losses"],
        mean_ap=None if val is None else val["mAP"],
        ap50=None if val is None else val["per_iou"]["0.50"],
    )


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield every setting by its dotted name, as text."""
    for name, value in values.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", _text(value)


def _text(value: Any) -> str:
    if value is None or value == [] or value == {}:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(_text(item) for item in value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def _control(distillation: Mapping[str, Any]) -> str:
    """Return what makes a run a control arm, nothing where it is none."""
    if distillation["source"] == "none":
        return ""
    said = []
    if distillation.get("target_shuffle") is not None:
        said.append("another image's targets")
    if distillation.get("logit_targets") == "labels":
        said.append("the image's own labels instead of the teacher's logits")
    return ", ".join(said)


def _teachers(targets: Mapping[str, Any]) -> tuple[Teacher, ...]:
    roles: dict[str, list[str]] = {}
    for role, key in (targets.get("teachers") or {}).items():
        if key is not None:
            roles.setdefault(key, []).append(role)
    identities, untrained = targets.get("identities") or {}, targets.get("untrained") or []
    return tuple(
        Teacher(key, tuple(served), key in untrained, dict(_flat(identities.get(key, {}))))
        for key, served in roles.items()
    )


def _stores(targets: Mapping[str, Any]) -> tuple[Store, ...]:
    return tuple(
        Store(
            path=str(store.get("store", "")),
            fingerprint=str(store.get("fingerprint", "")),
            arrays=tuple(
                (name, "×".join(map(str, array.get("sample_shape", ()))), str(array.get("dtype", "")))
                for name, array in sorted((store.get("arrays") or {}).items())
            ),
        )
        for store in targets.get("stores") or ()
    )

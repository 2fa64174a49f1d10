"""`eval`: scores a checkpoint, or detections from files. Imports torch only for a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from data.errors import UsageError
from data.records import ImageRecord
from data.voc import read_voc
from evaluation.average_precision import EvaluationResult, evaluate
from evaluation.detection_files import read_detections, write_detections
from evaluation.detections import Detections
from evaluation.matching import Metric

DEFAULT_VOC_ROOT = Path("data/VOCdevkit")
DEFAULT_SETS = ("2007:val",)


@dataclass(frozen=True)
class ScoreRequest:
    """What `eval` was asked for; every field is one of its options. Exactly one of the first two is given."""

    checkpoint: Path | None
    detections: Path | None
    backbone: str | None = None
    voc_root: Path | None = None
    voc_sets: tuple[str, ...] = ()
    metric: Metric = "voc"
    save_detections: Path | None = None
    visualize: int = 0
    out: Path = Path("pictures")
    workers: int | None = None
    device: str = "auto"


def score(request: ScoreRequest) -> tuple[EvaluationResult, list[str]]:
    """Return the figures, and what else was done, one line each.

    Raises UsageError, DatasetError, DetectionsError or CheckpointError.
    """
    records, found, notes = find_detections(request)
    result = evaluate(found, records, request.metric)
    return result, notes + keep(request, records, found)


def find_detections(request: ScoreRequest) -> tuple[list[ImageRecord], Detections, list[str]]:
    """Return the images to score, what was found in them, and notes on it; raises as `score`."""
    if request.detections is None:
        return _detect(request)
    if request.backbone is not None:
        raise UsageError("--backbone goes with --checkpoint: detections do not say what made them")
    records = read_voc(request.voc_root or DEFAULT_VOC_ROOT, request.voc_sets or DEFAULT_SETS)
    return records, *read_detections(request.detections, records)


def keep(request: ScoreRequest, records: list[ImageRecord], found: Detections) -> list[str]:
    """Write the files and pictures that were asked for; return where they are, a line each."""
    notes: list[str] = []
    if request.save_detections is not None:
        write_detections(found, request.save_detections)
        notes.append(f"detections: {request.save_detections}")
    if request.visualize:
        from pipeline.evaluate import draw_curves, draw_pictures

        paths = draw_pictures(found, records, request.out, request.visualize)
        notes.append(f"pictures: {len(paths)} in {request.out}")
        notes.append(f"curves: {draw_curves(found, records, request.out, request.metric)}")
    return notes


def _detect(request: ScoreRequest) -> tuple[list[ImageRecord], Detections, list[str]]:
    from pipeline.checkpoint import load_checkpoint
    from pipeline.device import choose_device
    from pipeline.evaluate import detect
    from pipeline.train import training_workers

    assert request.checkpoint is not None
    device = choose_device(request.device)
    checkpoint = load_checkpoint(request.checkpoint, request.backbone)
    sets = request.voc_sets or checkpoint.config.val_sets
    records = read_voc(request.voc_root or checkpoint.config.voc_root, sets)
    student = checkpoint.build_student(device)
    found = detect(student, records, device, workers=training_workers(request.workers, device))
    notes = [
        f"{request.checkpoint}: {checkpoint.config.student.backbone}, run {checkpoint.config.run_name},"
        f" epoch {checkpoint.epoch}; {'+'.join(sets)}"
    ]
    if checkpoint.targets.get("untrained"):
        notes.append(f"UNTRAINED teachers: {', '.join(checkpoint.targets['untrained'])}")
    return records, found, notes

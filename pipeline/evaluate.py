"""Runs a student over images: its detections, its score, and pictures of both."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cache.image_arrays import StoredImages
from cache.ranks import ALONE, Ranks, exchange
from data.geometry import boxes_from_frame
from data.images import decode_image
from data.records import ImageRecord
from evaluation.average_precision import EvaluationResult, evaluate
from evaluation.curve_figure import curve_figure
from evaluation.curves import precision_recall_curves
from evaluation.detections import Detections, ImageDetections
from evaluation.matching import Metric
from evaluation.pictures import draw_detections
from pipeline.dataset import TrainingImages, collate_loaded, plain_batches
from pipeline.loading import load_batches
from pipeline.progress import progress
from students.detector import Student


def detect(
    student: Student,
    records: Sequence[ImageRecord],
    device: torch.device,
    *,
    batch_size: int = 8,
    workers: int = 0,
    what: str = "detecting",
    ranks: Ranks = ALONE,
    images: StoredImages | None = None,
) -> Detections:
    """Return a student's detections over the records, in pixels of the original images.

    ranks: the processes that share the work; each gets all detections.  images: decoded ones, where they are kept.  The
    student's mode is put back afterwards.

    Raises ImageError for an image that cannot be read.
    """
    mine = records[ranks.rank :: ranks.size]
    found_here = detect_images(student, mine, device, images, batch_size=batch_size, workers=workers, what=what)
    gathered = exchange(ranks, found_here)
    found = [gathered[index % ranks.size][index // ranks.size] for index in range(len(records))]
    return Detections.from_images([record.id for record in records], found)


def detect_images(
    student: Student,
    records: Sequence[ImageRecord],
    device: torch.device,
    images: StoredImages | None,
    *,
    batch_size: int,
    workers: int,
    what: str,
) -> list[ImageDetections]:
    """Return the detections of each record, in their order; raises as `detect`."""
    loader = load_batches(
        TrainingImages(records, images=images).load,
        plain_batches(len(records), batch_size),
        collate_loaded,
        workers=workers,
        device=device,
    )
    found: list[ImageDetections] = []
    was_training = student.training
    student.eval()
    try:
        with torch.inference_mode(), progress(what, len(records)) as tick:
            for loaded in loader:
                batch = loaded.batch.to(device, non_blocking=True)
                results = student(batch.images_float())
                assert isinstance(results, list)
                found.extend(_on_image(r, size) for r, size in zip(results, batch.image_sizes, strict=True))
                tick(len(batch))
    finally:
        student.train(was_training)
    return found


def score_student(
    student: Student,
    records: Sequence[ImageRecord],
    device: torch.device,
    *,
    workers: int = 0,
    what: str = "detecting",
    ranks: Ranks = ALONE,
    images: StoredImages | None = None,
) -> tuple[Detections, EvaluationResult]:
    """Return a student's detections over the records and their average precision, `voc` metric; raises as `detect`."""
    found = detect(student, records, device, workers=workers, what=what, ranks=ranks, images=images)
    return found, evaluate(found, records)


def draw_pictures(detections: Detections, records: Sequence[ImageRecord], folder: Path, count: int) -> list[Path]:
    """Write `count` pictures of detections against ground truth, spread over the records; return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for index in spread_over(len(records), count):
        record = records[index]
        picture = draw_detections(decode_image(record), detections.of_image(record.id), record.target, title=record.id)
        paths.append(folder / f"{record.id.replace('/', '_')}.png")
        picture.save(paths[-1])
    return paths


def draw_curves(detections: Detections, records: Sequence[ImageRecord], folder: Path, metric: Metric) -> Path:
    """Write the precision–recall curves of every class, at an IoU of 0.50 and of 0.75; return their path."""
    lines = {f"IoU ≥ {iou:.2f}": precision_recall_curves(detections, records, metric, iou) for iou in (0.5, 0.75)}
    images = f"{len(records):,} image{'' if len(records) == 1 else 's'}"
    path = folder / "precision-recall.png"
    path.write_bytes(curve_figure(lines, f"Precision and recall ({metric}), {images}"))
    return path


def spread_over(records: int, count: int) -> list[int]:
    """Return which of so many records are drawn: `count` of them, or all, from the first to the last."""
    count = min(count, records)
    chosen: list[int] = np.linspace(0, records - 1, count).round().astype(int).tolist() if count else []
    return chosen


def _on_image(result: dict[str, Tensor], image_size: tuple[int, int]) -> ImageDetections:
    boxes = boxes_from_frame(result["boxes"].float().cpu().numpy(), image_size)
    return ImageDetections(boxes, result["labels"].cpu().numpy(), result["scores"].float().cpu().numpy())

"""Pictures of a run for TensorBoard: what the student finds, and its adapted map beside the teacher's."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from io import BytesIO

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from data.images import decode_image, squash
from data.records import ImageRecord
from evaluation.heatmaps import HeatmapRow, heatmap_figure
from evaluation.pictures import draw_detections
from pipeline.dataset import SampleKey, TrainingImages, collate_loaded
from pipeline.evaluate import detect, spread_over
from pipeline.trainer import Trainer
from students.detector import Student
from students.losses.standardise import standardise


def detection_pictures(
    student: Student, records: Sequence[ImageRecord], device: torch.device, count: int
) -> Iterator[tuple[str, NDArray[np.uint8]]]:
    """Yield pictures of detections with ground truth, by image id: of `count` images, spread over the records."""
    chosen = [records[place] for place in spread_over(len(records), count)]
    found = detect(student, chosen, device, what="drawing")
    for record in chosen:
        drawn = draw_detections(decode_image(record), found.of_image(record.id), record.target, title=record.id)
        yield record.id, np.asarray(drawn.convert("RGB"))


def feature_picture(trainer: Trainer) -> NDArray[np.uint8] | None:
    """Return the student's adapted map above the teacher's, standardised alike, of the first training image.

    None for a run that matches no features.
    """
    objective = trainer.objective
    if trainer.source is None or objective.adapter is None or objective.config.target_shuffle is not None:
        return None
    record = trainer.records[0]
    images = TrainingImages([record], teacher_inputs=trainer.source.teacher_inputs)
    loaded = collate_loaded([images.load(SampleKey(0, "original", 0))])
    student = trainer.student
    training = student.training
    student.eval()
    try:
        with torch.no_grad():
            features, neck = student.tapped_maps(loaded.batch.to(trainer.device).images_float())
            tapped = features if objective.config.feature_tap == "backbone" else neck
            adapted = objective.adapter(tapped).float()[0].permute(1, 2, 0)
            targets = trainer.source(loaded).features
            assert targets is not None
            teacher = standardise(targets, objective.mean, objective.std)[0].permute(1, 2, 0)
    finally:
        student.train(training)
    frame = squash(decode_image(record))
    rows = [
        HeatmapRow(f"student, {record.id}", adapted.cpu().numpy(), frame),
        HeatmapRow("teacher", teacher.float().cpu().numpy(), frame),
    ]
    png = heatmap_figure(rows, "adapted map and target")
    return np.asarray(Image.open(BytesIO(png)).convert("RGB"))

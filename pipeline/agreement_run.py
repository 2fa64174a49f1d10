"""`eval --agreement`: opens what a checkpoint is compared with, measures how close they are, and draws both."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from data.geometry import FRAME_SIZE, boxes_to_frame, cell_of_point
from data.images import decode_image, squash
from data.records import VOC_CLASSES, ImageRecord
from data.voc import read_voc
from evaluation.agreement_table import Agreement
from evaluation.heatmaps import PairedMaps, paired_figure
from pipeline.adapted_student import AdaptedStudent
from pipeline.agreement import measure_agreement
from pipeline.agreement_targets import AgreementRequest, AgreementTargets
from pipeline.checkpoint import Checkpoint, load_checkpoint
from pipeline.dataset import TrainingImages, collate_loaded, plain_batches
from pipeline.device import choose_device
from pipeline.evaluate import spread_over
from pipeline.train import training_workers


@dataclass(frozen=True)
class AgreementRun:
    """A checkpoint and the stored targets of the images it is compared on, opened."""

    checkpoint: Checkpoint
    records: list[ImageRecord]
    targets: AgreementTargets
    device: torch.device
    voc_root: Path
    workers: int

    @classmethod
    def open(
        cls,
        request: AgreementRequest,
        checkpoint_path: Path,
        *,
        backbone: str | None = None,
        voc_root: Path | None = None,
        voc_sets: tuple[str, ...] = (),
        workers: int | None = None,
        device: str = "auto",
    ) -> AgreementRun:
        """Open everything, so that what lacks is told before any image is looked at; options as `eval` has them.

        Raises CheckpointError, DatasetError, and as `AgreementTargets`.
        """
        chosen = choose_device(device)
        checkpoint = load_checkpoint(checkpoint_path, backbone)
        sets = voc_sets or checkpoint.config.val_sets
        root = voc_root or checkpoint.config.voc_root
        records = read_voc(root, sets)
        targets = AgreementTargets(request, checkpoint, records, sets)
        return cls(checkpoint, records, targets, chosen, root, training_workers(workers, chosen))

    def measure(self) -> Agreement:
        """Return how close student and teachers are; raises as `measure_agreement`."""
        student = self.checkpoint.build_student(self.device)
        return measure_agreement(
            self.checkpoint,
            student,
            self.records,
            self.targets,
            self.device,
            voc_root=self.voc_root,
            workers=self.workers,
        )

    def draw(self, folder: Path, count: int) -> list[str]:
        """Write pictures of the student's map beside the teacher's, of the images that `draw_pictures` chooses.

        Return a line that says so, or why there are none: without an adapter, both maps are in no common space.
        """
        if count == 0:
            return []
        if self.targets.feature_teacher is None:
            return ["no pictures of features: no teacher of the store has some"]
        student = AdaptedStudent(self.checkpoint.build_student(self.device), self.checkpoint, self.targets, self.device)
        if student.why_unadapted is not None:
            return [f"no pictures of features: {student.why_unadapted}"]
        folder.mkdir(parents=True, exist_ok=True)
        chosen = spread_over(len(self.records), count)
        for position in chosen:
            image_id = self.records[position].id
            untrained = " (untrained)" if self.targets.feature_teacher in self.targets.untrained else ""
            title = f"{image_id}: {self.targets.feature_teacher}{untrained} and run {self.checkpoint.config.run_name}"
            cell, marked = _marked(self.records[position], self.targets.feature_shape[:2])
            picture = paired_figure(self._maps(student, position, cell), f"{title}; marked: {marked}")
            (folder / f"{image_id.replace('/', '_')}-features.png").write_bytes(picture)
        return [f"pictures of features: {len(chosen)} in {folder}"]

    def _maps(self, student: AdaptedStudent, position: int, cell: tuple[int, int]) -> PairedMaps:
        record = self.records[position]
        images = TrainingImages([record], digests=dict(self.targets.selection.digests))
        (keys,) = plain_batches(1, 1)
        frames = collate_loaded([images.load(key) for key in keys]).batch.to(self.device).images_float()
        with torch.inference_mode():
            adapted = student.adapted(student.look(frames)[0])
            assert adapted is not None
            teacher = student.target(self.targets.features([position]).to(self.device))
        image = np.asarray(squash(decode_image(record)))
        return PairedMaps(teacher[0].cpu().numpy(), adapted[0].cpu().numpy(), image, cell)


def _marked(record: ImageRecord, grid: tuple[int, int]) -> tuple[tuple[int, int], str]:
    """Return the cell in the middle of the largest object and its class; of an image without any, the frame's."""
    rows, columns = grid
    boxes = boxes_to_frame(record.target.boxes_xyxy_orig, record.image_size)
    if not len(boxes):
        return (rows // 2, columns // 2), "the middle"
    largest = int(np.argmax((boxes[:, 2:] - boxes[:, :2]).prod(axis=1)))
    x, y = (boxes[largest, :2] + boxes[largest, 2:]) / 2
    height, width = FRAME_SIZE
    cell = cell_of_point(min(float(x), width - 1.0), min(float(y), height - 1.0), (rows, columns))
    return cell, VOC_CLASSES[record.target.labels[largest] - 1]

"""How close a student is to its teachers on images it is scored on, read from the store: no teacher is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data.errors import DatasetError
from data.records import ImageRecord
from data.voc import list_ids
from evaluation.agreement import CkaMoments, CosineCounts, cell_cosines, cell_regions
from evaluation.agreement_table import Agreement, FeatureAgreement
from evaluation.logit_agreement import LogitAgreement, logit_agreement
from evaluation.multilabel import presence_matrix
from pipeline.adapted_student import AdaptedStudent
from pipeline.agreement_targets import AgreementTargets
from pipeline.checkpoint import LATEST, Checkpoint
from pipeline.config import TrainConfig
from pipeline.dataset import TrainingImages, collate_loaded, plain_batches
from pipeline.loading import load_batches
from pipeline.progress import progress
from pipeline.stored_targets import shuffled_places
from students.detector import Student

_BATCH_SIZE = 8


def measure_agreement(
    checkpoint: Checkpoint,
    student: Student,
    records: Sequence[ImageRecord],
    targets: AgreementTargets,
    device: torch.device,
    *,
    voc_root: Path,
    workers: int = 0,
) -> Agreement:
    """Return how close a student is to stored teachers on the records.

    student: the checkpoint's, on the device.  targets: of the records.  voc_root: where its training sets are listed.

    Raises ImageError; StoreStaleError for an image that is not what the teachers saw.
    """
    features = None
    if targets.feature_teacher is not None:
        whitened = targets.selection.manifest(targets.feature_teacher).pca is not None
        adapted = AdaptedStudent(student, checkpoint, targets, device)
        features = _Features(adapted, CkaMoments(standardise=not whitened))
    why_no_logits = _why_no_logits(checkpoint, targets)
    student_logits = _run(student, records, targets, device, workers, features)
    return Agreement(
        images=len(records),
        trained_on=_trained_on(checkpoint.config, voc_root, records),
        stores=targets.record(),
        untrained=targets.untrained,
        features=None if features is None else features.result(targets, checkpoint.config),
        why_no_features=None if features is not None else "no teacher of the store has features",
        logit_teacher=targets.logit_teacher,
        logits=None if why_no_logits else _logits(checkpoint, student_logits, targets, records),
        why_no_logits=why_no_logits,
        logit_note="" if why_no_logits else _logit_note(checkpoint, targets),
    )


@dataclass
class _Features:
    """Gathers the agreement of maps."""

    student: AdaptedStudent
    cka: CkaMoments
    cosines: CosineCounts = field(default_factory=CosineCounts)

    def add(self, own: Tensor, stored: Tensor, shuffled: Tensor | None, records: Sequence[ImageRecord]) -> None:
        """Count a batch. own: as `AdaptedStudent.look` gives it.  stored, shuffled: [B, Gh, Gw, C], on the device."""
        on_grid = self.student.on_grid(own).cpu().numpy()
        raw = stored.float().cpu().numpy()
        other = None if shuffled is None else shuffled.float().cpu().numpy()
        for place in range(len(records)):
            self.cka.add(on_grid[place], raw[place], None if other is None else other[place])
        adapted = self.student.adapted(own)
        if adapted is None:
            return
        maps = [adapted, *(self.student.target(found) for found in (stored, shuffled) if found is not None)]
        said, target, *others = (found.cpu().numpy() for found in maps)
        for place, record in enumerate(records):
            self.cosines.add(
                cell_cosines(said[place], target[place]),
                cell_regions(record, said.shape[1:3]),
                cell_cosines(said[place], others[0][place]) if others else None,
            )

    def result(self, targets: AgreementTargets, config: TrainConfig) -> FeatureAgreement:
        """Return the figures."""
        assert targets.feature_teacher is not None
        why = self.student.why_unadapted
        return FeatureAgreement(
            teacher=targets.feature_teacher,
            tap=self.student.tap,
            feature_loss=config.distillation.feature_loss if why is None else None,
            cosine=self.cosines.regions() if why is None else None,
            why_no_cosine=why,
            cka=self.cka.value(),
            cka_shuffled=self.cka.value("shuffled"),
            note=self.student.note if why is None else "",
        )


def _run(
    student: Student,
    records: Sequence[ImageRecord],
    targets: AgreementTargets,
    device: torch.device,
    workers: int,
    features: _Features | None,
) -> NDArray[np.float32]:
    """Show the student every image, let `features` see it, and return the logits [N, 20]."""
    places = shuffled_places(len(records), 0) if len(records) > 1 else None
    images = TrainingImages(records, digests=dict(targets.selection.digests))
    batches = plain_batches(len(records), _BATCH_SIZE)
    loader = load_batches(images.load, batches, collate_loaded, workers=workers, device=device)
    said: list[NDArray[np.float32]] = []
    student.eval()
    with torch.inference_mode(), progress("agreement", len(records)) as tick:
        for loaded in loader:
            positions = [key.index for key in loaded.keys]
            frames = loaded.batch.to(device, non_blocking=True).images_float()
            if features is None:
                _, logits = student.distillation_maps(frames)
            else:
                own, logits = features.student.look(frames)
                stored = targets.features(positions).to(device)
                shuffled = None if places is None else targets.features([places[p] for p in positions]).to(device)
                features.add(own, stored, shuffled, [records[p] for p in positions])
            said.append(logits.float().cpu().numpy())
            tick(len(positions))
    return np.concatenate(said)


def _logits(
    checkpoint: Checkpoint, student: NDArray[np.float32], targets: AgreementTargets, records: Sequence[ImageRecord]
) -> LogitAgreement:
    distillation = checkpoint.config.distillation
    teacher = targets.logits().astype(np.float64)
    if distillation.logit_loss == "binary" and _taught(checkpoint):
        assert checkpoint.training is not None
        teacher = teacher - checkpoint.training["objective"]["centre"].double().cpu().numpy()
    return logit_agreement(
        student,
        teacher,
        presence_matrix(records),
        divergence=distillation.logit_loss,
        temperature=distillation.temperature,
        order=np.array(shuffled_places(len(records), 0)) if len(records) > 1 else None,
        taught=_taught(checkpoint),
    )


def _taught(checkpoint: Checkpoint) -> bool:
    """Return whether the auxiliary head was trained to give a teacher's logits."""
    return checkpoint.targets.get("teachers", {}).get("logits") is not None


def _why_no_logits(checkpoint: Checkpoint, targets: AgreementTargets) -> str | None:
    distillation = checkpoint.config.distillation
    if targets.logit_teacher is None:
        return "no teacher of the store has logits"
    if not _taught(checkpoint) and not (distillation.logit_targets == "labels" and distillation.gamma > 0):
        return "the student's auxiliary head was never trained (γ = 0)"
    if distillation.logit_loss == "binary" and _taught(checkpoint) and checkpoint.training is None:
        return f"the mean logits that binary KL takes off are in the run's {LATEST}"
    return None


def _logit_note(checkpoint: Checkpoint, targets: AgreementTargets) -> str:
    distilled = checkpoint.targets.get("teachers", {}).get("logits")
    if distilled is None:
        return "no KL: the auxiliary head was trained on the images' labels"
    if distilled != targets.logit_teacher:
        return f"the auxiliary head was trained on the logits of {distilled}"
    return ""


def _trained_on(config: TrainConfig, voc_root: Path, records: Sequence[ImageRecord]) -> int | None:
    try:
        trained = set(list_ids(voc_root, config.voc_sets)[: config.limit])
    except DatasetError:
        return None
    return sum(record.id in trained for record in records)

"""Where a training step's teacher targets come from: a store, or teachers that run in the step.

Both answer the same question, so that training and its losses cannot tell them apart.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cache.reader import TeacherStore
from data.errors import StoreIncompleteError, StoreStaleError, UsageError
from data.geometry import FRAME_SIZE, VIEWS, View
from data.records import ImageRecord
from features.teacher import Teacher, TeacherInput
from pipeline.config import Distillation
from pipeline.dataset import LoadedBatch, TrainingImages, collate_loaded, plain_batches

# Live teachers have no stored statistics; theirs are measured on the first so many training images.
LIVE_STATISTICS_IMAGES = 256
_MAX_SHOWN = 5


@dataclass(frozen=True)
class TeacherTargets:
    """What the teachers say of a batch, on the training device.

    features: [B, Gh, Gw, C] as stored.  logits: [B, 20] float32.  None for what is not distilled.
    """

    features: Tensor | None = None
    logits: Tensor | None = None


@dataclass(frozen=True)
class ChannelStatistics:
    """Mean and standard deviation of the teacher's channels over the training images, each [C] float32."""

    mean: Tensor
    std: Tensor


@dataclass(frozen=True)
class TeacherChoice:
    """Which teachers are distilled, by key; None for a loss whose weight is zero."""

    features: str | None
    logits: str | None


class TargetSource(ABC):
    """Teacher targets of the batches of one training run.

    feature_shape: (Gh, Gw, C) of the feature teacher, None where features are not distilled.
    teacher_inputs: what the loader must prepare of every image.  digests: SHA-256 by image id to compare, if known.
    untrained: keys of the teachers that were never trained.  record: what `result.json` says of the source.
    """

    feature_shape: tuple[int, int, int] | None = None
    teacher_inputs: tuple[TeacherInput, ...] = ()
    digests: Mapping[str, str] | None = None
    untrained: tuple[str, ...] = ()

    @abstractmethod
    def statistics(self) -> ChannelStatistics:
        """Return the feature teacher's channel statistics over the training images, `original` view."""

    @abstractmethod
    def __call__(self, loaded: LoadedBatch) -> TeacherTargets:
        """Return the targets of a batch."""

    @abstractmethod
    def record(self) -> dict[str, Any]:
        """Return what identifies the targets, for checkpoints and results."""


class StoredTargets(TargetSource):
    """Targets read from a teacher cache through memory maps; no teacher is ever loaded."""

    def __init__(
        self,
        path: Path,
        config: Distillation,
        records: Sequence[ImageRecord],
        views: Sequence[View],
        device: torch.device,
    ) -> None:
        """Open the store and check that it can serve every training image in every view that is drawn.

        Raises StoreMissingError, StoreIncompleteError (ids, views, shards), StoreStaleError (frame) or
        StoreCorruptError; UsageError where the choice of teachers is open.
        """
        self._store = TeacherStore(path)
        self._device = device
        self._views = tuple(views)
        catalog = self._store.catalog
        if catalog.root.frame != FRAME_SIZE:
            raise StoreStaleError(f"{path}: expected frame {FRAME_SIZE}, found {catalog.root.frame}")
        outputs = {
            key: {name for view in teacher.views.values() for name in view.layouts}
            for key, teacher in catalog.teachers.items()
        }
        self.choice = choose_teachers(config, outputs, f"the store {path}")
        self._row_of_id = self._store.row_of_id
        self._rows = self._rows_of(records)
        self._check_committed(views, records)
        if self.choice.features is not None:
            self._features = self._store.targets(self.choice.features, "features", views)
            gh, gw, channels = self._features.sample_shape
            self.feature_shape = (gh, gw, channels)
        if self.choice.logits is not None:
            self._logits = self._store.targets(self.choice.logits, "logits", views)
        self._records = records
        samples = catalog.samples
        self.digests = {samples[row].id: samples[row].sha256 for row in self._rows}
        used = [key for key in (self.choice.features, self.choice.logits) if key is not None]
        self.untrained = tuple(k for k in dict.fromkeys(used) if catalog.teachers[k].manifest.untrained)

    def statistics(self) -> ChannelStatistics:
        """Return the statistics from the stored moments of the training images."""
        assert self.choice.features is not None
        mean, std = self._store.channel_statistics(self.choice.features, self._rows)
        return _statistics(mean, std, self._device)

    def __call__(self, loaded: LoadedBatch) -> TeacherTargets:
        """Return the targets of a batch, each row in the view its image is shown in."""
        rows = [self._row_of_id[image_id] for image_id in loaded.batch.ids]
        views = [key.view for key in loaded.keys]
        features = logits = None
        if self.choice.features is not None:
            features = torch.from_numpy(self._features.gather(rows, views)).to(self._device, non_blocking=True)
        if self.choice.logits is not None:
            logits = torch.from_numpy(self._logits.gather(rows, views)).to(self._device, non_blocking=True)
        return TeacherTargets(features, logits)

    def record(self) -> dict[str, Any]:
        """Return the store's path, and fingerprint and content digest of every array that is read."""
        catalog = self._store.catalog
        arrays = {}
        for key, name in ((self.choice.features, "features"), (self.choice.logits, "logits")):
            if key is None:
                continue
            for view in self._views:
                reader = self._store.array(key, view, name)
                path = reader.layout.path
                arrays[path] = {"fingerprint": catalog.fingerprints[path], "content": reader.content_digest}
        return {
            "source": "store",
            "store": str(catalog.path),
            "teachers": {"features": self.choice.features, "logits": self.choice.logits},
            "untrained": list(self.untrained),
            "arrays": arrays,
        }

    def _rows_of(self, records: Sequence[ImageRecord]) -> list[int]:
        missing = [record.id for record in records if record.id not in self._row_of_id]
        if missing:
            path = self._store.catalog.path
            held = self._store.catalog.root.dataset
            raise StoreIncompleteError(
                f"{path}: {len(missing)} of {len(records)} training images are not in the store"
                f" ({_list(missing)}); it holds {held.samples} images of {'+'.join(held.sets)}",
                hint="train on images that the store holds (--voc-set, --limit), or extract a store of these images",
            )
        return [self._row_of_id[record.id] for record in records]

    def _check_committed(self, views: Sequence[View], records: Sequence[ImageRecord]) -> None:
        wanted = [(self.choice.features, "features"), (self.choice.logits, "logits")]
        if self.choice.features is not None:
            wanted.append((self.choice.features, "moments"))
        for key, name in wanted:
            if key is None:
                continue
            for view in views:
                reader = self._store.array(key, view, name)
                missing = reader.missing_rows(self._rows)
                if missing:
                    samples = self._store.catalog.samples
                    raise StoreIncompleteError(
                        f"{self._store.catalog.path}: {reader.layout.path}: {len(missing)} of {len(records)} training"
                        f" images are not committed ({_list([samples[row].id for row in missing])})",
                        hint="run the same extract-teachers command again: it resumes",
                    )


class LiveTargets(TargetSource):
    """Targets from teachers that run in every step: what a store saves, kept for comparison."""

    def __init__(
        self, teachers: dict[str, Teacher], config: Distillation, records: Sequence[ImageRecord], device: torch.device
    ) -> None:
        self._teachers = teachers
        self._records = records
        self._device = device
        outputs = {key: set(teacher.output_shapes) for key, teacher in teachers.items()}
        self.choice = choose_teachers(config, outputs, "the live teachers")
        used = list(dict.fromkeys(key for key in (self.choice.features, self.choice.logits) if key is not None))
        self.teacher_inputs = tuple(dict.fromkeys(teachers[key].input for key in used))
        self.untrained = tuple(key for key in used if teachers[key].untrained)
        if self.choice.features is not None:
            gh, gw, channels = teachers[self.choice.features].output_shapes["features"]
            self.feature_shape = (gh, gw, channels)

    def statistics(self) -> ChannelStatistics:
        """Return the statistics of the first LIVE_STATISTICS_IMAGES training images, measured now."""
        records = self._records[:LIVE_STATISTICS_IMAGES]
        images = TrainingImages(records, teacher_inputs=self.teacher_inputs)
        total, count = np.zeros(0), 0
        for keys in plain_batches(len(records), 8):
            features = self(collate_loaded([images.load(key) for key in keys])).features
            assert features is not None
            cells = features.flatten(0, 2).double()
            moments = torch.stack([cells.sum(dim=0), cells.square().sum(dim=0)]).cpu().numpy()
            total = moments if count == 0 else total + moments
            count += len(cells)
        mean, mean_square = total / count
        std = np.sqrt(np.maximum(mean_square - mean**2, 0.0))
        return _statistics(mean.astype(np.float32), std.astype(np.float32), self._device)

    def __call__(self, loaded: LoadedBatch) -> TeacherTargets:
        """Return what the teachers say of the batch's views, before jitter."""
        said = {}
        for key in dict.fromkeys(key for key in (self.choice.features, self.choice.logits) if key is not None):
            said[key] = self._teachers[key](loaded.teacher_images[self._teachers[key].input].to(self._device))
        return TeacherTargets(
            features=said[self.choice.features].features if self.choice.features is not None else None,
            logits=said[self.choice.logits].logits if self.choice.logits is not None else None,
        )

    def record(self) -> dict[str, Any]:
        """Return the teachers' identities."""
        return {
            "source": "live",
            "teachers": {"features": self.choice.features, "logits": self.choice.logits},
            "untrained": list(self.untrained),
            "identities": {key: teacher.identity() for key, teacher in self._teachers.items()},
            "statistics_images": min(len(self._records), LIVE_STATISTICS_IMAGES),
        }


def choose_teachers(config: Distillation, outputs: Mapping[str, set[str]], where: str) -> TeacherChoice:
    """Return the teachers to distil: the named ones, or the only ones that have what a loss needs.

    outputs: names of the arrays of every teacher by key.  where: what holds them, for messages.

    Raises UsageError where several would do and none is named, or none will do.
    """

    def choose(array: str, named: str | None, weight: float, flag: str, off: str) -> str | None:
        if weight == 0:
            return None
        candidates = [key for key, names in outputs.items() if array in names]
        if named is not None:
            if named not in candidates:
                listed = ", ".join(candidates) or "none"
                raise UsageError(f"{flag} {named}: {where} has no {array} of it (teachers with {array}: {listed})")
            return named
        if len(candidates) > 1:
            raise UsageError(
                f"several teachers in {where} have {array}: {', '.join(candidates)}", hint=f"choose: {flag} NAME"
            )
        if not candidates:
            listed = ", ".join(outputs) or "no teacher"
            raise UsageError(
                f"no teacher in {where} has {array} (it holds {listed})", hint=f"add one, or turn the loss off: {off} 0"
            )
        return candidates[0]

    return TeacherChoice(
        features=choose("features", config.feature_teacher, config.beta, "--feature-teacher", "--beta"),
        logits=choose("logits", config.logit_teacher, config.gamma, "--logit-teacher", "--gamma"),
    )


def views_drawn(flip: float) -> tuple[View, ...]:
    """Return the views that training with this flip probability draws; statistics always need `original`."""
    return VIEWS if flip > 0 else ("original",)


def _statistics(mean: np.ndarray[Any, Any], std: np.ndarray[Any, Any], device: torch.device) -> ChannelStatistics:
    # A channel that never moves carries nothing; dividing by its zero would make it everything.
    safe = np.where(std > 1e-6 * max(float(std.max()), 1e-12), std, np.inf).astype(np.float32)
    return ChannelStatistics(torch.from_numpy(mean).to(device), torch.from_numpy(safe).to(device))


def _list(ids: Sequence[str]) -> str:
    return ", ".join(ids[:_MAX_SHOWN]) + (f", … {len(ids) - _MAX_SHOWN} more" if len(ids) > _MAX_SHOWN else "")

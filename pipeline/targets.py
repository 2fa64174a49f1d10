"""Where a training step's teacher targets come from: stores, or teachers that run in the step.

The former are in `pipeline.stored_targets`. Both answer the same question, so that training and its losses cannot tell
them apart.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data.errors import UsageError
from data.records import ImageRecord
from features.teacher import Teacher, TeacherInput
from pipeline.config import Distillation
from pipeline.dataset import LoadedBatch, SampleKey, TrainingImages, collate_loaded, plain_batches
from pipeline.teacher_choice import DENSE, TeacherChoice, choose_teachers

# Live teachers have no stored statistics; theirs are measured on the first so many training images.
LIVE_STATISTICS_IMAGES = 256


@dataclass(frozen=True)
class TeacherTargets:
    """What the teachers say of a batch, on the training device.

    features: [B, Gh, Gw, C], float16 or float32 as stored, float32 where int8 is.  logits: [B, 20] float32.
    regions: [B, Gh, Gw, D], dense CLIP features, from which region logits are made.  None for what is not distilled.
    """

    features: Tensor | None = None
    logits: Tensor | None = None
    regions: Tensor | None = None


@dataclass(frozen=True, eq=False)
class RegionText:
    """What makes logits of dense CLIP features. embeddings: [20, D] float32, on the training device."""

    embeddings: Tensor
    logit_scale: float
    logit_bias: float | None


@dataclass(frozen=True)
class ChannelStatistics:
    """Mean and scale of the teacher's channels over the training images, each [C] float32.

    std: the standard deviation of each channel; one and the same for all channels of a PCA basis.
    """

    mean: Tensor
    std: Tensor

    @classmethod
    def of(cls, mean: NDArray[np.float32], std: NDArray[np.float32], device: torch.device) -> Self:
        """Return the statistics on a device. mean, std: [C]; a channel that never moves gets an infinite scale."""
        # A channel that never moves carries nothing; dividing by its zero would make it everything.
        safe = np.where(std > 1e-6 * max(float(std.max()), 1e-12), std, np.inf).astype(np.float32)
        return cls(torch.from_numpy(mean).to(device), torch.from_numpy(safe).to(device))


class TargetSource(ABC):
    """Teacher targets of the batches of one training run.

    choice: which teachers are distilled.
    feature_shape: (Gh, Gw, C) of the feature teacher, None where features are not distilled.
    teacher_inputs: what the loader must prepare of every image.  digests: SHA-256 by image id to compare, if known.
    untrained: keys of the teachers that were never trained.  record: what `result.json` says of the source.
    """

    choice: TeacherChoice
    feature_shape: tuple[int, int, int] | None = None
    teacher_inputs: tuple[TeacherInput, ...] = ()
    digests: Mapping[str, str] | None = None
    untrained: tuple[str, ...] = ()

    @abstractmethod
    def statistics(self) -> ChannelStatistics:
        """Return the feature teacher's channel statistics over the training images, `original` view."""

    @abstractmethod
    def logit_centre(self) -> Tensor:
        """Return the logit teacher's mean logit of each class over the training images, `original` view, [20]."""

    @abstractmethod
    def region_text(self) -> RegionText | None:
        """Return what makes logits of the region teacher's features; None where regions are not distilled."""

    def following(self, batches: Sequence[Sequence[SampleKey]]) -> AbstractContextManager[None]:
        """Return a block in which the targets of exactly these batches are asked for, in this order.

        A source that knows what comes can fetch it ahead. What it returns in the block is valid until the next batch.
        """
        return nullcontext()

    @abstractmethod
    def __call__(self, loaded: LoadedBatch) -> TeacherTargets:
        """Return the targets of a batch, each row in the view its image is shown in."""

    @abstractmethod
    def record(self) -> dict[str, Any]:
        """Return what identifies the targets, for checkpoints and results."""


class LiveTargets(TargetSource):
    """Targets from teachers that run in every step: what a store saves, kept for comparison."""

    def __init__(
        self, teachers: dict[str, Teacher], config: Distillation, records: Sequence[ImageRecord], device: torch.device
    ) -> None:
        self._teachers = teachers
        self._records = records
        self._device = device
        outputs = {key: _outputs_of(teacher) for key, teacher in teachers.items()}
        if config.target_shuffle is not None:
            raise UsageError("--target-shuffle: only stored targets can be shuffled", hint="extract a store first")
        self.choice = choose_teachers(config, outputs, "the live teachers")
        used = self.choice.used
        self.teacher_inputs = tuple(dict.fromkeys(teachers[key].input for key in used))
        self.untrained = tuple(key for key in used if teachers[key].untrained)
        if self.choice.features is not None:
            gh, gw, channels = teachers[self.choice.features].output_shapes["features"]
            self.feature_shape = (gh, gw, channels)

    def logit_centre(self) -> Tensor:
        """Return the mean logits of the first LIVE_STATISTICS_IMAGES training images, measured now."""
        records = self._records[:LIVE_STATISTICS_IMAGES]
        images = TrainingImages(records, teacher_inputs=self.teacher_inputs)
        total = torch.zeros(())
        for keys in plain_batches(len(records), 8):
            logits = self(collate_loaded([images.load(key) for key in keys])).logits
            assert logits is not None
            total = total.to(logits.device) + logits.double().sum(dim=0)
        return (total / len(records)).float()

    def region_text(self) -> RegionText | None:
        """Return the region teacher's text embeddings, scale and bias."""
        if self.choice.regions is None:
            return None
        teacher = self._teachers[self.choice.regions]
        assert teacher.text_embeddings is not None
        return region_text_of(teacher.text_embeddings, teacher.identity(), self._device)

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
        return ChannelStatistics.of(mean.astype(np.float32), std.astype(np.float32), self._device)

    def __call__(self, loaded: LoadedBatch) -> TeacherTargets:
        """Return what the teachers say of the batch's views, before jitter."""
        said = {}
        for key in self.choice.used:
            said[key] = self._teachers[key](loaded.teacher_images[self._teachers[key].input].to(self._device))
        return TeacherTargets(
            features=said[self.choice.features].features if self.choice.features is not None else None,
            logits=said[self.choice.logits].logits if self.choice.logits is not None else None,
            regions=said[self.choice.regions].features if self.choice.regions is not None else None,
        )

    def record(self) -> dict[str, Any]:
        """Return the teachers' identities."""
        return {
            "source": "live",
            "teachers": self.choice.record(),
            "untrained": list(self.untrained),
            "identities": {key: teacher.identity() for key, teacher in self._teachers.items()},
            "statistics_images": min(len(self._records), LIVE_STATISTICS_IMAGES),
        }


def region_text_of(embeddings: NDArray[np.float32], identity: Mapping[str, Any], device: torch.device) -> RegionText:
    """Return what makes region logits, of a dense CLIP teacher's text embeddings [20, D] and identity."""
    bias = identity.get("logit_bias")
    return RegionText(
        torch.from_numpy(np.array(embeddings)).to(device),
        float(identity["logit_scale"]),
        None if bias is None else float(bias),
    )


def _outputs_of(teacher: Teacher) -> set[str]:
    dense = "features" in teacher.output_shapes and teacher.text_embeddings is not None
    return set(teacher.output_shapes) | ({DENSE} if dense else set())

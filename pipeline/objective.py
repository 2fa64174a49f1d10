"""The training objective: L = α · L_det + β · L_feature + γ · L_logit + δ · L_region."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.records import NUM_CLASSES
from features.regions import region_logits
from pipeline.config import Distillation
from pipeline.randomness import stream_seed, torch_stream
from pipeline.targets import RegionText, TargetSource, TeacherTargets
from students.adapter import FeatureAdapter
from students.detector import Student, StudentOutput
from students.losses.binary_kl import binary_kl
from students.losses.feature_loss import FeatureLoss
from students.losses.logit_kl import logit_kl
from students.losses.pearson import OverRanks
from students.losses.region_kl import region_kl
from students.losses.standardise import standardise

# The distillation losses, whose share of the gradient is reported; `detection` is the fourth part.
KD_PARTS = ("feature", "logit", "region")


@dataclass(frozen=True)
class GroundTruth:
    """What is known of a batch without a teacher.

    boxes: [n, 4] xyxy in frame px of each image.  labels: [n] in 1..20.  mask_seeds: one an image, of the stream that a
    feature loss may draw from in this step.
    """

    boxes: Sequence[Tensor]
    labels: Sequence[Tensor]
    mask_seeds: Sequence[int]


class Objective(nn.Module):
    """Joins the losses of a step. Holds what they train beside the student, which is no part of it: the adapter first.

    Its random initialisation comes from a stream of its own, so the student's weights do not depend on it. β and γ are
    state: `kd_weight` may set them anew.
    """

    mean: Tensor | None
    std: Tensor | None
    centre: Tensor | None
    text_embeddings: Tensor | None
    beta: Tensor
    gamma: Tensor

    def __init__(
        self,
        config: Distillation,
        source: TargetSource | None,
        student: Student,
        seed: int,
        over_ranks: OverRanks | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.adapter: FeatureAdapter | None = None
        self.feature_loss: FeatureLoss | None = None
        for name in ("mean", "std", "centre", "text_embeddings"):
            self.register_buffer(name, None)
        self.register_buffer("beta", torch.tensor(config.beta))
        self.register_buffer("gamma", torch.tensor(config.gamma))
        self.text: RegionText | None = None
        if source is None:
            return
        if source.feature_shape is not None:
            self._match_features(source, student, seed, over_ranks)
        if config.logit_loss == "binary" and source.choice.logits is not None:
            self.centre = source.logit_centre()
        self.text = source.region_text()
        if self.text is not None:
            self.text_embeddings = self.text.embeddings

    def _match_features(self, source: TargetSource, student: Student, seed: int, over_ranks: OverRanks | None) -> None:
        assert source.feature_shape is not None
        gh, gw, channels = source.feature_shape
        taps = {"backbone": student.feature_channels, "neck": student.neck_channels}
        with torch_stream(seed, "kd-init"):
            self.adapter = FeatureAdapter(taps[self.config.feature_tap], channels, (gh, gw))
        generator = torch.Generator().manual_seed(stream_seed(seed, "feature-loss-init"))
        self.feature_loss = FeatureLoss(
            self.config.feature_loss, channels, seed_generator=generator, over_ranks=over_ranks
        )
        if self.config.feature_norm == "channel":
            statistics = source.statistics()
            self.mean, self.std = statistics.mean, statistics.std

    def forward(self, output: StudentOutput, targets: TeacherTargets | None, truth: GroundTruth) -> dict[str, Tensor]:
        """Return the unweighted losses by name, scalars: `detection`, its four parts, and the distillation losses."""
        parts = {"detection": torch.stack(list(output.losses.values())).sum(), **output.losses}
        if targets is not None and targets.features is not None:
            parts["feature"] = self._feature(output, targets.features, truth)
        if self.config.logit_targets == "labels":
            if self.config.gamma > 0:
                presence = image_labels(truth.labels, output.logits)
                parts["logit"] = F.binary_cross_entropy_with_logits(output.logits.float(), presence)
        elif targets is not None and targets.logits is not None:
            parts["logit"] = self._logit(output.logits, targets.logits)
        if targets is not None and targets.regions is not None:
            parts["region"] = self._region(output, targets.regions)
        return parts

    def weighted(self, parts: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the terms of the objective by name, α, β, γ and δ applied."""
        config = self.config
        weights: dict[str, Any] = {
            "detection": config.alpha, "feature": self.beta, "logit": self.gamma, "region": config.delta,
        }  # fmt: skip
        return {name: weight * parts[name] for name, weight in weights.items() if name in parts}

    def _feature(self, output: StudentOutput, features: Tensor, truth: GroundTruth) -> Tensor:
        assert self.adapter is not None
        assert self.feature_loss is not None
        tapped = output.features if self.config.feature_tap == "backbone" else output.neck_features
        generators = [torch.Generator().manual_seed(seed) for seed in truth.mask_seeds]
        target = standardise(features, self.mean, self.std)
        loss: Tensor = self.feature_loss(self.adapter(tapped), target, truth.boxes, generators)
        return loss

    def _logit(self, student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
        if self.config.logit_loss == "binary":
            return binary_kl(student_logits, teacher_logits, self.config.temperature, self.centre)
        return logit_kl(student_logits, teacher_logits, self.config.temperature)

    def _region(self, output: StudentOutput, regions: Tensor) -> Tensor:
        assert self.text is not None
        assert self.text_embeddings is not None
        with torch.no_grad():
            said = region_logits(
                regions,
                [boxes.detach() for boxes in output.proposals],
                self.text_embeddings,
                logit_scale=self.text.logit_scale,
                logit_bias=self.text.logit_bias,
            )
        return region_kl(output.class_logits, said, self.config.temperature)


def image_labels(labels: Sequence[Tensor], like: Tensor) -> Tensor:
    """Return which classes each image shows, [B, 20] float32 of 0 and 1, on the device of `like`."""
    presence = torch.zeros(len(labels), NUM_CLASSES - 1, device=like.device)
    for row, shown in zip(presence, labels, strict=True):
        row[shown - 1] = 1.0
    return presence

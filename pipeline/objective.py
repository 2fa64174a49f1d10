"""The training objective: L = α · L_det + β · L_feature + γ · L_logit."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pipeline.config import Distillation
from pipeline.randomness import torch_stream
from pipeline.targets import TargetSource, TeacherTargets
from students.adapter import FeatureAdapter
from students.detector import StudentOutput
from students.losses.feature_mse import feature_mse
from students.losses.logit_kl import logit_kl


class Objective(nn.Module):
    """Joins the losses of a step. Holds the adapter, which is training state and no part of the student.

    Its random initialisation comes from a stream of its own, so the student's weights do not depend on it.
    """

    mean: Tensor | None
    std: Tensor | None

    def __init__(self, config: Distillation, source: TargetSource | None, student_channels: int, seed: int) -> None:
        super().__init__()
        self.config = config
        self.adapter: FeatureAdapter | None = None
        self.register_buffer("mean", None)
        self.register_buffer("std", None)
        if source is not None and source.feature_shape is not None:
            gh, gw, channels = source.feature_shape
            with torch_stream(seed, "kd-init"):
                self.adapter = FeatureAdapter(student_channels, channels, (gh, gw))
            if config.feature_norm == "channel":
                statistics = source.statistics()
                self.mean, self.std = statistics.mean, statistics.std

    def forward(self, output: StudentOutput, targets: TeacherTargets | None) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the total loss and its unweighted parts by name, all scalars."""
        parts = {"detection": torch.stack(list(output.losses.values())).sum(), **output.losses}
        total = self.config.alpha * parts["detection"]
        if targets is not None and targets.features is not None:
            assert self.adapter is not None
            parts["feature"] = feature_mse(self.adapter(output.features), targets.features, self.mean, self.std)
            total = total + self.config.beta * parts["feature"]
        if targets is not None and targets.logits is not None:
            parts["logit"] = logit_kl(output.logits, targets.logits, self.config.temperature)
            total = total + self.config.gamma * parts["logit"]
        return total, parts

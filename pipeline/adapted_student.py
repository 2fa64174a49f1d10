"""A trained student with the adapter that took its map to its teacher's channels, as training left both."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cache.canonical import differences
from pipeline.agreement_targets import AgreementTargets
from pipeline.checkpoint import LATEST, Checkpoint
from students.adapter import FeatureAdapter, to_grid
from students.detector import Student
from students.losses.standardise import standardise

# What their training asks for is another likeness than that of cells.
_NOT_BY_CELL = {
    "cwd": "compares channels over the whole map",
    "attention": "compares only where the maps are strong",
    "mgd": "compares what a further network makes of the adapted map",
    "pkd": "compares maps up to each channel's mean and scale",
}


class AdaptedStudent:
    """A student's map beside a teacher's, in the teacher's space where an adapter leads there.

    tap: `backbone` or `neck`.  why_unadapted: why there is no adapter, in words; None where there is one.  note: what
    is to be known of the cosines; empty for nothing.
    """

    def __init__(
        self, student: Student, checkpoint: Checkpoint, targets: AgreementTargets, device: torch.device
    ) -> None:
        self._student = student.eval()
        distillation = checkpoint.config.distillation
        self.tap = distillation.feature_tap
        self._grid = targets.feature_shape[:2]
        self._adapter: FeatureAdapter | None = None
        self._mean: Tensor | None = None
        self._std: Tensor | None = None
        self.why_unadapted = _why_unadapted(checkpoint, targets)
        reason = _NOT_BY_CELL.get(distillation.feature_loss)
        self.note = f"--feature-loss {distillation.feature_loss} {reason}" if reason is not None else ""
        if self.why_unadapted is None:
            assert checkpoint.training is not None
            state: dict[str, Tensor] = checkpoint.training["objective"]
            weights = {name.removeprefix("adapter."): w for name, w in state.items() if name.startswith("adapter.")}
            channels, own = weights["projection.weight"].shape[:2]
            self._adapter = FeatureAdapter(own, channels, self._grid)
            self._adapter.load_state_dict(weights)
            self._adapter.to(device).eval()
            # The statistics of the training images, which the adapter learnt to meet.
            self._mean, self._std = (state[name].to(device) if name in state else None for name in ("mean", "std"))

    def look(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return the student's own map [B, P, 30, 30] and its logits [B, 20], of frames [B, 3, 480, 480] in 0 … 1."""
        features, logits = self._student.distillation_maps(images)
        return features if self.tap == "backbone" else self._student.tapped_maps(images)[1], logits

    def adapted(self, own: Tensor) -> Tensor | None:
        """Return a map of `look` in the teacher's channels, [B, Gh, Gw, C] float32; None without an adapter."""
        return None if self._adapter is None else self._adapter(own).float().permute(0, 2, 3, 1)

    def on_grid(self, own: Tensor) -> Tensor:
        """Return a map of `look` on the teacher's grid, [B, Gh, Gw, P] float32."""
        return to_grid(own, self._grid).float().permute(0, 2, 3, 1)

    def target(self, features: Tensor) -> Tensor:
        """Return teacher features [B, Gh, Gw, C] standardised as they were in training, float32."""
        return standardise(features, self._mean, self._std).permute(0, 2, 3, 1)


def _why_unadapted(checkpoint: Checkpoint, targets: AgreementTargets) -> str | None:
    """Return why no adapter leads from this student to the compared teacher, in words; None where one does."""
    teacher = targets.feature_teacher
    distilled = checkpoint.targets.get("teachers", {}).get("features")
    if checkpoint.targets["source"] == "none":
        return "the student is a baseline, which has no adapter"
    if distilled is None:
        return "the student was distilled without features (β = 0), so it has no adapter"
    if checkpoint.training is None:
        return f"this checkpoint keeps no adapter: give the run's {LATEST}"
    if distilled != teacher:
        return f"the student's adapter leads to {distilled}, not to {teacher}"
    assert teacher is not None
    manifest = targets.selection.manifest(teacher)
    for field, old, new in differences(checkpoint.targets["identities"][distilled], manifest.identity, ""):
        return f"{teacher} is another teacher than in training ({field.removeprefix('.')}: then {old}, now {new})"
    channels = checkpoint.training["objective"]["adapter.projection.weight"].shape[0]
    if channels != targets.feature_shape[2]:
        return f"the adapter leads to {channels} channels, the store's {teacher} has {targets.feature_shape[2]}"
    if manifest.pca is not None and not _same_array(checkpoint, targets, f"{teacher}/original/features"):
        return f"the store holds {teacher} on another PCA basis than in training"
    return None


def _same_array(checkpoint: Checkpoint, targets: AgreementTargets, path: str) -> bool:
    def fingerprints(stores: list[dict[str, Any]]) -> set[str]:
        return {store["arrays"][path]["fingerprint"] for store in stores if path in store["arrays"]}

    return not fingerprints(targets.record()).isdisjoint(fingerprints(checkpoint.targets.get("stores", [])))

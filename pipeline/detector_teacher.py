"""A trained student of this project as teacher: `detector:CHECKPOINT` distils one's own larger detector.

It sees the frame as its student does, and gives the two things that distillation compares: the backbone's stride-16
map, and image-level class logits. The logits are the detector's own. A checkpoint also holds an auxiliary logit head,
but only a run that distilled logits has trained it, so it is not used.

A convolutional backbone's cell looks 7 to 8 px up and left of its centre (ResNet-18, MobileNetV3), a transformer's does
not: a student of the other kind learns to see through that shift.

Axes: B images, P proposals, C16 channels of the stride-16 map; 21 classes, background first.
"""

from __future__ import annotations

import importlib.metadata
import math
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.image_list import ImageList

from data.errors import UsageError
from data.geometry import FRAME_SIZE, PATCH_GRID
from data.records import VOC_CLASSES
from features.registry import TeacherRequest
from features.teacher import Teacher, TeacherInput, TeacherOutput, weights_digest
from pipeline.checkpoint import Checkpoint, load_checkpoint
from students.anchors import ANCHOR_RATIOS, ANCHOR_SIZES_PX
from students.config import StudentConfig

# Not the path: a checkpoint that was moved or renamed is the same teacher.
_NAME = "detector:CHECKPOINT"
# Where weights came from, what only training reads, and what only picks detections among the scored proposals.
_WITHOUT_EFFECT = {
    "backbone", "backbone_weights", "rpn_samples", "roi_samples", "train_proposals", "score_threshold",
    "detections_per_image",
}  # fmt: skip


@dataclass(kw_only=True, eq=False)
class DetectorTeacher(Teacher):
    """A teacher of features and logits; its module is a `ScoredProposals`."""

    def forward(self, pixels: Tensor) -> TeacherOutput:
        """Return features [B, 30, 30, C16] and logits [B, 20]."""
        features, logits = self.module(pixels)
        return TeacherOutput(features=features.permute(0, 2, 3, 1), logits=logits)

    def identity(self) -> dict[str, Any]:
        """Return the teacher's identity with the order of its classes."""
        return {**super().identity(), "class_order": list(VOC_CLASSES)}

    def provenance(self) -> dict[str, Any]:
        """Return what explains the output, with the version of timm, which computes the backbone."""
        known = super().provenance()
        return {**known, "versions": {**known["versions"], "timm": importlib.metadata.version("timm")}}


class ScoredProposals(nn.Module):
    """A detector up to its class scores: boxes are not refined, thresholded or suppressed, as no logit needs that."""

    def __init__(self, detector: FasterRCNN) -> None:
        super().__init__()
        self.detector = detector

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Return the stride-16 map [B, C16, 30, 30] and logits [B, 20] of normalised pixels [B, 3, 480, 480].

        logits: for each class the largest log-odds of any proposal.
        """
        body, neck = self.detector.backbone.body, self.detector.backbone.neck
        maps = body(pixels)
        pyramid = neck(maps)
        # As in the student: boxes take the dtype of the pyramid, and bfloat16 is 2 px coarse at 480.
        with torch.autocast(pixels.device.type, enabled=False):
            pyramid = OrderedDict((name, level.float()) for name, level in pyramid.items())
            scores = self._scores(pixels, pyramid)
            logits = torch.stack([class_log_odds(of_image).amax(dim=0) for of_image in scores])
        return maps[body.feature_index], logits

    def _scores(self, pixels: Tensor, pyramid: OrderedDict[str, Tensor]) -> tuple[Tensor, ...]:
        """Return the raw class scores [P, 21] of each image's proposals; P ≥ 1."""
        frames = ImageList(pixels, [FRAME_SIZE] * len(pixels))
        proposals, _ = self.detector.rpn(frames, pyramid, None)
        # Where nothing is proposed, the frame itself is what there is to score.
        height, width = FRAME_SIZE
        frame = pixels.new_tensor([[0.0, 0.0, width, height]])
        proposals = [boxes if len(boxes) else frame for boxes in proposals]
        heads = self.detector.roi_heads
        pooled = heads.box_roi_pool(pyramid, proposals, frames.image_sizes)
        scores, _ = heads.box_predictor(heads.box_head(pooled))
        of_images: tuple[Tensor, ...] = scores.split([len(boxes) for boxes in proposals])
        return of_images


def class_log_odds(scores: Tensor) -> Tensor:
    """Return log(p / (1 − p)) of every class but the background, [P, 20], where p is the softmax of the scores.

    scores: [P, 21] raw scores, background first. The log-odds are each score less the log-sum-exp of all others, which
    stays exact where p rounds to 0 or 1.
    """
    itself = torch.eye(scores.shape[1], dtype=torch.bool, device=scores.device)
    others = scores[:, None, :].masked_fill(itself, -math.inf).logsumexp(dim=2)
    return (scores - others)[:, 1:]


def build(request: TeacherRequest) -> Teacher:
    """Return the student of a checkpoint as a teacher, on the CPU. It is trained: `untrained` changes nothing.

    Raises UsageError for weights beside the checkpoint, CheckpointError for a checkpoint that is missing, damaged or
    not one of this project.
    """
    if request.weights is not None:
        raise UsageError(
            f"{request.name}: its weights are those of the checkpoint that is named, found other --weights as well",
            hint="leave --weights out for it, or name the other checkpoint: --teacher KEY=detector:CHECKPOINT",
        )
    path = Path(request.spec.argument)
    checkpoint = load_checkpoint(path)
    # The student draws random weights before it is given its own.
    with torch.random.fork_rng(devices=[]):
        student = checkpoint.build_student(torch.device("cpu"))
    body = student.detector.backbone.body
    (mean_r, mean_g, mean_b), (std_r, std_g, std_b) = body.mean, body.std
    return DetectorTeacher(
        name=request.spec.named(_NAME),
        library="torchvision",
        architecture=_architecture(student.config, student.detector),
        layer="stride-16 backbone map; largest class log-odds of any proposal",
        # A plain transformer's map has passed its final norm, a convolutional one has none.
        norm="final norm" if body.strides == (16,) else "none",
        # The student's own resize and normalisation: the latter is the teacher's here, so that it happens once.
        input=TeacherInput(
            size=FRAME_SIZE, resample="bilinear", mean=(mean_r, mean_g, mean_b), std=(std_r, std_g, std_b)
        ),
        patch_grid=PATCH_GRID,
        output_shapes={"features": (*PATCH_GRID, student.feature_channels), "logits": (len(VOC_CLASSES),)},
        weights_digest=weights_digest(student.detector),
        weights_source=_source(path, checkpoint),
        untrained=False,
        precision=request.precision,
        module=ScoredProposals(student.detector),
    )


def _architecture(config: StudentConfig, detector: FasterRCNN) -> dict[str, Any]:
    # A field that the configuration gains counts, until it is known to have no effect.
    fields = config.model_dump(mode="json", exclude=_WITHOUT_EFFECT)
    return {
        "model": "Faster R-CNN",
        "backbone": f"timm {config.timm_name}",
        **fields,
        "anchor_sizes_px": [list(sizes) for sizes in ANCHOR_SIZES_PX],
        "anchor_ratios": list(ANCHOR_RATIOS),
        "rpn_nms_threshold": detector.rpn.nms_thresh,
        "roi_size": list(detector.roi_heads.box_roi_pool.output_size),
        "roi_sampling_ratio": detector.roi_heads.box_roi_pool.sampling_ratio,
    }


def _source(path: Path, checkpoint: Checkpoint) -> str:
    """Return in words where a checkpoint is and what it was trained on."""
    config, targets = checkpoint.config, checkpoint.targets
    limit = "" if config.limit is None else f", first {config.limit}"
    words = [
        f"{path}: run {config.run_name}, epoch {checkpoint.epoch} of {config.recipe.epochs}",
        f"trained on {' + '.join(config.voc_sets)}{limit} from backbone weights {config.student.backbone_weights}",
    ]
    untrained = targets.get("untrained", [])
    distilled = [
        f"{array} of {key}{' (untrained)' if key in untrained else ''}"
        for array, key in targets.get("teachers", {}).items()
        if key is not None
    ]
    return ", ".join([*words, *([f"distilled from {' and '.join(distilled)}"] if distilled else [])])

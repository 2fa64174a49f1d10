"""The student: torchvision's Faster R-CNN on a timm backbone, which also hands out what distillation compares.

`Student.detector` is the whole deployable detector. The auxiliary logit head is part of the student's training state:
it is saved with it so that training can resume, and nothing in detection reads it. Adapters are not part of a student.

Axes: B batch, C16 channels of the backbone's stride-16 map.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import fastrcnn_loss
from torchvision.ops import MultiScaleRoIAlign

from data.geometry import FRAME_SIZE
from data.records import NUM_CLASSES

from .anchors import FrameAnchorGenerator
from .backbone import Backbone, build_backbone
from .config import StudentConfig
from .neck import LEVELS, build_neck
from .sampling import SeededSampler

Detections = list[dict[str, Tensor]]
# Divided by the anchors drawn; the box head's are divided by the proposals drawn.
RPN_LOSSES = ("loss_objectness", "loss_rpn_box_reg")
DETECTION_LOSSES = (*RPN_LOSSES, "loss_classifier", "loss_box_reg")
STRIDE_16 = LEVELS[1]


@dataclass(frozen=True)
class StudentOutput:
    """What one training step of a student gives.

    losses: `loss_objectness`, `loss_rpn_box_reg`, `loss_classifier`, `loss_box_reg`, scalars.
    normalisers: by what each loss was divided: anchors or proposals drawn, over all images of the step.
    features: [B, C16, 30, 30], the backbone's stride-16 map, before the neck; cell (i, j) covers rows 16i..16i+15,
    columns 16j..16j+15 of the frame.  neck_features: [B, neck_width, 30, 30], the pyramid's level of that stride.
    logits: [B, 20], image-level, before any softmax or sigmoid; column k is label k + 1.
    proposals: [n, 4] xyxy in frame px of each image, those the box head was trained on.  class_logits: [Σn, 21], what
    it says of them, background first.
    """

    losses: dict[str, Tensor]
    normalisers: dict[str, int]
    features: Tensor
    neck_features: Tensor
    logits: Tensor
    proposals: list[Tensor]
    class_logits: Tensor


class PyramidBackbone(nn.Module):
    """Backbone and neck as torchvision's detector wants them: images in, named pyramid levels out."""

    def __init__(self, body: Backbone, neck_width: int) -> None:
        super().__init__()
        self.body = body
        self.neck = build_neck(body.channels, neck_width)
        self.out_channels = neck_width

    def forward(self, images: Tensor) -> OrderedDict[str, Tensor]:
        """Return the levels [B, neck_width, H, W] by name, finest first, of normalised images [B, 3, 480, 480]."""
        levels: OrderedDict[str, Tensor] = self.neck(self.body(images))
        return levels


class Student(nn.Module):
    """A Faster R-CNN on the 480×480 frame that exposes its stride-16 map and an image-level logit head."""

    def __init__(self, config: StudentConfig) -> None:
        super().__init__()
        self.config = config
        body = build_backbone(config)
        self.feature_channels = body.channels[body.feature_index]
        self.neck_channels = config.neck_width
        self.detector = _build_detector(body, config)
        # Image-level: the mean of the deepest map, then one layer, as the backbone's own classifier would do it.
        self.logit_head = nn.Linear(body.channels[-1], NUM_CLASSES - 1)
        self._samplers = [
            SeededSampler(config.rpn_samples, positive_fraction=0.5),
            SeededSampler(config.roi_samples, positive_fraction=0.25),
        ]
        self.detector.rpn.fg_bg_sampler, self.detector.roi_heads.fg_bg_sampler = self._samplers

    def seed_sampling(self, seeds: Sequence[int]) -> None:
        """Set the stream each image of the next training step draws its anchors and proposals from.

        seeds: one an image, in batch order.
        """
        generators = [torch.Generator().manual_seed(int(seed)) for seed in seeds]
        for sampler in self._samplers:
            sampler.generators = generators

    def forward(self, images: Tensor, targets: Sequence[dict[str, Tensor]] | None = None) -> StudentOutput | Detections:
        """Return a `StudentOutput` in training mode, one detection dict an image in evaluation mode.

        images: [B, 3, 480, 480] float in [0, 1]; normalised here, and only here, as the backbone's weights expect.
        targets (training): for each image `boxes` [n, 4] float xyxy in frame px and `labels` [n] int64 in 1..20;
        n may be 0.
        Detections: `boxes` [m, 4] xyxy in frame px, `labels` [m], `scores` [m] falling; m ≤ `detections_per_image`.

        Raises ValueError for images of another size, and in training without targets or without `seed_sampling`.
        """
        if self.training:
            self._check_step(len(images), targets)
        maps = self._maps(images)
        pyramid = self.detector.backbone.neck(maps)
        # Boxes take the dtype of the pyramid, and bfloat16 is 2 px coarse at 480: the heads compute in float32.
        with torch.autocast(images.device.type, enabled=False):
            pyramid = OrderedDict((name, level.float()) for name, level in pyramid.items())
            frames = ImageList(images, [FRAME_SIZE] * len(images))
            if not self.training:
                return self._detect(frames, pyramid)
            assert targets is not None
            losses, proposals, class_logits = self._losses(frames, pyramid, targets)
        num_anchors, num_proposals = (sampler.num_drawn for sampler in self._samplers)
        self.seed_sampling(())  # a stream serves one step: forgetting to seed the next must not repeat this one
        features, logits = self._distillation_maps(maps)
        return StudentOutput(
            losses=losses,
            normalisers={name: num_anchors if name in RPN_LOSSES else num_proposals for name in losses},
            features=features,
            neck_features=pyramid[STRIDE_16],
            logits=logits,
            proposals=proposals,
            class_logits=class_logits,
        )

    def distillation_maps(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return features [B, C16, 30, 30] and logits [B, 20] as in `StudentOutput`, in either mode.

        images: [B, 3, 480, 480] float in [0, 1].
        """
        return self._distillation_maps(self._maps(images))

    def tapped_maps(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return features [B, C16, 30, 30] and neck_features [B, neck_width, 30, 30] as in `StudentOutput`.

        images: [B, 3, 480, 480] float in [0, 1].
        """
        maps = self._maps(images)
        return maps[self.detector.backbone.body.feature_index], self.detector.backbone.neck(maps)[STRIDE_16]

    def _detect(self, frames: ImageList, pyramid: OrderedDict[str, Tensor]) -> Detections:
        proposals, _ = self.detector.rpn(frames, pyramid)
        detections: Detections = self.detector.roi_heads(pyramid, proposals, frames.image_sizes)[0]
        return detections

    def _losses(
        self, frames: ImageList, pyramid: OrderedDict[str, Tensor], targets: Sequence[dict[str, Tensor]]
    ) -> tuple[dict[str, Tensor], list[Tensor], Tensor]:
        """Return the losses by name, the proposals that the box head is trained on, and its class scores of these."""
        proposals, losses = self.detector.rpn(frames, pyramid, targets)
        heads = self.detector.roi_heads
        # As torchvision's own forward does it, which keeps the scores to itself.
        proposals, _, labels, regression_targets = heads.select_training_samples(proposals, targets)
        pooled = heads.box_roi_pool(pyramid, proposals, frames.image_sizes)
        class_logits, box_regression = heads.box_predictor(heads.box_head(pooled))
        classifier, box = fastrcnn_loss(class_logits, box_regression, labels, regression_targets)
        return {**losses, "loss_classifier": classifier, "loss_box_reg": box}, proposals, class_logits

    def _maps(self, images: Tensor) -> list[Tensor]:
        if images.ndim != 4 or tuple(images.shape[1:]) != (3, *FRAME_SIZE) or not images.is_floating_point():
            raise ValueError(
                f"expected float images [B, 3, {FRAME_SIZE[0]}, {FRAME_SIZE[1]}],"
                f" found {images.dtype} {list(images.shape)}"
            )
        # torchvision's transform would also resize and copy; on the frame there is nothing of that to do.
        maps: list[Tensor] = self.detector.backbone.body(self.detector.transform.normalize(images))
        return maps

    def _distillation_maps(self, maps: list[Tensor]) -> tuple[Tensor, Tensor]:
        features = maps[self.detector.backbone.body.feature_index]
        return features, self.logit_head(maps[-1].mean(dim=(2, 3)))

    def _check_step(self, num_images: int, targets: Sequence[dict[str, Tensor]] | None) -> None:
        if targets is None or len(targets) != num_images:
            found = "none" if targets is None else len(targets)
            raise ValueError(f"expected the targets of {num_images} images in training, found {found}")
        num_seeds = len(self._samplers[0].generators)
        if num_seeds != num_images:
            raise ValueError(
                f"expected the sampling streams of {num_images} images, found {num_seeds}:"
                " call seed_sampling(seeds) before each training step"
            )


def _build_detector(body: Backbone, config: StudentConfig) -> FasterRCNN:
    return FasterRCNN(
        PyramidBackbone(body, config.neck_width),
        num_classes=NUM_CLASSES,
        min_size=FRAME_SIZE[0],
        max_size=FRAME_SIZE[1],
        image_mean=list(body.mean),
        image_std=list(body.std),
        rpn_anchor_generator=FrameAnchorGenerator(),
        box_roi_pool=MultiScaleRoIAlign(list(LEVELS[:3]), output_size=7, sampling_ratio=2),
        rpn_pre_nms_top_n_train=config.train_proposals,
        rpn_post_nms_top_n_train=config.train_proposals,
        rpn_pre_nms_top_n_test=config.eval_proposals,
        rpn_post_nms_top_n_test=config.eval_proposals,
        box_score_thresh=config.score_threshold,
        box_detections_per_img=config.detections_per_image,
    )


def build_student(config: StudentConfig) -> Student:
    """Return the configured student in training mode; its random weights are drawn from torch's global generator.

    Raises UsageError for a backbone that is unknown or does not fit, and weights that cannot be had or do not fit.
    """
    return Student(config).train()

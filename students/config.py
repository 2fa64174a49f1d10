"""What defines a student, without torch: names and numbers that the command line and a checkpoint can carry."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

# Our names, and the timm models behind them.
TIMM_NAMES: dict[str, str] = {
    "resnet18": "resnet18",
    "mobilenet_v3_small": "mobilenetv3_small_100",
    "vit_tiny": "vit_tiny_patch16_224",
}
TIMM_PREFIX = "timm:"


class StudentConfig(BaseModel):
    """Everything `build_student` needs. Two equal configs build the same architecture."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    backbone: str = "resnet18"
    """`resnet18`, `mobilenet_v3_small`, `vit_tiny` or `timm:NAME`, any timm model whose maps fit the frame."""
    backbone_weights: str = Field(default="imagenet", min_length=1)
    """`imagenet` (timm's own), `none` (random), or the file of a timm state dict."""
    norms: Literal["auto", "frozen", "trained"] = "auto"
    """Batch norms of the backbone; `auto` freezes them with pretrained weights, trains them with random ones."""
    # Sizes of a light student, not torchvision's (256 channels, 512 of 2,000 proposals, 1,000 when evaluating): a
    # MobileNetV3-Small step at batch 4 on a CPU costs 1.9 times less with 128 channels, and another 1.7 to 2 times less
    # with 128 of 1,000 proposals; evaluation 2.9 times less with 300, as in Ren et al. 2015, Faster R-CNN, section 4.1.
    neck_width: int = Field(default=128, ge=8)
    """Channels of every level of the pyramid."""
    rpn_samples: int = Field(default=256, ge=1)
    """Anchors an image that the proposal loss is computed on; at most half of them are positive."""
    roi_samples: int = Field(default=128, ge=1)
    """Proposals an image that the box head is trained on; at most a quarter of them are positive."""
    train_proposals: int = Field(default=1000, ge=1)
    """Proposals kept an image in training: the best of each level before, of all levels after suppression."""
    eval_proposals: int = Field(default=300, ge=1)
    """Proposals kept an image in evaluation, likewise."""
    score_threshold: float = Field(default=0.001, ge=0, le=1)
    """Detections below this probability are dropped in evaluation."""
    detections_per_image: int = Field(default=100, ge=1)
    """Detections kept an image, best first, over all classes."""

    @field_validator("backbone")
    @classmethod
    def _known_backbone(cls, name: str) -> str:
        if name in TIMM_NAMES or (name.startswith(TIMM_PREFIX) and name != TIMM_PREFIX):
            return name
        raise ValueError(f"expected {', '.join(TIMM_NAMES)} or {TIMM_PREFIX}NAME, found {name!r}")

    @property
    def timm_name(self) -> str:
        """The backbone's name in timm, `resnet18` or `resnet18.a1_in1k`."""
        return TIMM_NAMES.get(self.backbone, self.backbone.removeprefix(TIMM_PREFIX))

    @property
    def freezes_norms(self) -> bool:
        """Whether the backbone's batch norms are constants."""
        # A random network whose batch statistics never move lets its features vanish (std 0.003), so it trains them.
        return self.norms == "frozen" or (self.norms == "auto" and self.backbone_weights != "none")

    def without_weights(self) -> StudentConfig:
        """Return the config of the same architecture with random weights, to load a checkpoint into."""
        norms: Literal["frozen", "trained"] = "frozen" if self.freezes_norms else "trained"
        return self.model_copy(update={"backbone_weights": "none", "norms": norms})

"""The anchors of the 480×480 frame."""

from __future__ import annotations

from torch import Tensor
from torchvision.models.detection.anchor_utils import AnchorGenerator

from .neck import LEVEL_STRIDES

# Two sizes an octave, px. On VOC 2007 test (non-difficult objects squashed to the frame) 96 % of the objects have an
# anchor at IoU ≥ 0.5 and 63 % at ≥ 0.7; with one size an octave it is 83 % and 25 %.
ANCHOR_SIZES_PX = ((32, 45), (64, 91), (128, 181), (256, 362))
ANCHOR_RATIOS = (0.5, 1.0, 2.0)  # height / width


class FrameAnchorGenerator(AnchorGenerator):  # type: ignore[misc]  # torchvision is not typed
    """torchvision's anchors at the pyramid's true strides.

    torchvision divides the frame by the grid: 480 / 8 cells gives the pooled level a stride of 60 where its cells lie
    64 apart, and puts its last anchors 28 px off.
    """

    def __init__(self) -> None:
        super().__init__(ANCHOR_SIZES_PX, (ANCHOR_RATIOS,) * len(ANCHOR_SIZES_PX))

    def grid_anchors(self, grid_sizes: list[list[int]], strides: list[list[Tensor]]) -> list[Tensor]:
        """Return the anchors [n, 4] xyxy of each level, in frame px; `strides` is torchvision's guess, not used."""
        anchors: list[Tensor] = super().grid_anchors(grid_sizes, [[stride, stride] for stride in LEVEL_STRIDES])
        return anchors

"""Builds the neck: from the backbone's maps to a pyramid of strides 8, 16, 32 and 64, all of one width.

Axes: B batch, C channels, H and W of a map.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch.nn.functional as F
from timm.layers import LayerNorm2d
from torch import Tensor, nn
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

# torchvision names the pooled level itself; the region proposals use all four, the box head the first three.
LEVELS = ("8", "16", "32", "pool")
LEVEL_STRIDES = (8, 16, 32, 64)


class FpnNeck(nn.Module):
    """Feature pyramid over maps of strides 8, 16 and 32; stride 64 is every second cell of stride 32.

    Source: Lin et al. 2017, Feature Pyramid Networks for Object Detection, section 3, and 4.1 for the last level.
    """

    def __init__(self, channels: Sequence[int], width: int) -> None:
        super().__init__()
        self.fpn = FeaturePyramidNetwork(list(channels), width, extra_blocks=LastLevelMaxPool())

    def forward(self, maps: Sequence[Tensor]) -> OrderedDict[str, Tensor]:
        """Return the levels [B, width, H, W] by name, finest first, of the maps of strides 8, 16 and 32."""
        levels: OrderedDict[str, Tensor] = self.fpn(OrderedDict(zip(LEVELS, maps, strict=False)))
        return levels


class SimplePyramidNeck(nn.Module):
    """Pyramid over the one map of a plain transformer: each level is up- or downsampled from it alone.

    Source: Li et al. 2022, Exploring Plain Vision Transformer Backbones for Object Detection, section 3.
    """

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        finer = nn.ConvTranspose2d(channels, channels // 2, kernel_size=2, stride=2)
        self.branches = nn.ModuleList(
            [
                nn.Sequential(finer, *_projection(channels // 2, width)),
                nn.Sequential(*_projection(channels, width)),
                nn.Sequential(nn.MaxPool2d(kernel_size=2, stride=2), *_projection(channels, width)),
            ]
        )

    def forward(self, maps: Sequence[Tensor]) -> OrderedDict[str, Tensor]:
        """Return the levels [B, width, H, W] by name, finest first, of the one map of stride 16."""
        levels = [branch(maps[0]) for branch in self.branches]
        levels.append(F.max_pool2d(levels[-1], kernel_size=1, stride=2))
        return OrderedDict(zip(LEVELS, levels, strict=True))


def _projection(channels: int, width: int) -> list[nn.Module]:
    return [
        nn.Conv2d(channels, width, kernel_size=1, bias=False),
        LayerNorm2d(width),
        nn.Conv2d(width, width, kernel_size=3, padding=1, bias=False),
        LayerNorm2d(width),
    ]


def build_neck(channels: Sequence[int], width: int) -> FpnNeck | SimplePyramidNeck:
    """Return the neck for a backbone's maps: three of strides 8, 16 and 32, or one of stride 16."""
    return SimplePyramidNeck(channels[0], width) if len(channels) == 1 else FpnNeck(channels, width)

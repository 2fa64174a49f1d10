"""The feature adapter: from the student's stride-16 map to the teacher's channels and grid. Training state only."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from data.geometry import PATCH_GRID


class FeatureAdapter(nn.Module):
    """A 1×1 convolution to the teacher's channels, on the teacher's grid (`to_grid`).

    Source: Romero et al. 2015, FitNets, section 2.2 (the regressor).
    """

    def __init__(self, in_channels: int, out_channels: int, grid: tuple[int, int] = PATCH_GRID) -> None:
        super().__init__()
        self.grid = grid
        self.projection = nn.Conv2d(in_channels, out_channels, kernel_size=1)
        # Channels of unit variance come out with unit variance: the scale of a standardised target.
        nn.init.normal_(self.projection.weight, std=in_channels**-0.5)
        assert self.projection.bias is not None
        nn.init.zeros_(self.projection.bias)

    def forward(self, features: Tensor) -> Tensor:
        """Return [B, out_channels, Gh, Gw] of the student's stride-16 map [B, in_channels, 30, 30]."""
        projected: Tensor = self.projection(to_grid(features, self.grid))
        return projected


def to_grid(features: Tensor, grid: tuple[int, int]) -> Tensor:
    """Return a map [B, C, H, W] on another grid (Gh, Gw) over the same frame; itself where that is its own.

    A coarser grid takes the mean of the cells under each of its own (area), a finer one interpolates between cell
    centres (bilinear).
    """
    size = features.shape[2:]
    if tuple(size) == grid:
        return features
    if grid[0] <= size[0] and grid[1] <= size[1]:
        return F.interpolate(features, grid, mode="area")
    return F.interpolate(features, grid, mode="bilinear", align_corners=False)

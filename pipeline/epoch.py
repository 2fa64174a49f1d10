"""What has been of an epoch: steps, images and the sums of every loss, over all processes where they are asked for."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from cache.ranks import Ranks, exchange
from pipeline.trainer import Clock


@dataclass
class Epoch:
    """What has been of an epoch. steps: taken.  images: of these steps.  sums: of every loss, over images."""

    steps: int = 0
    images: int = 0
    sums: dict[str, Tensor] = field(default_factory=dict)

    def add(self, losses: dict[str, Tensor], images: int) -> None:
        """Count a step."""
        self.steps += 1
        self.images += images
        for name, value in losses.items():
            self.sums[name] = (
                self.sums.get(name, torch.zeros((), dtype=torch.float64)).to(value.device) + value * images
            )

    def state(self, clock: Clock, ranks: Ranks) -> dict[str, Any]:
        """Return what a checkpoint keeps to go on within the epoch, summed over processes."""
        sums: dict[str, float] = defaultdict(float)
        for mine in exchange(ranks, {name: float(value) for name, value in self.sums.items()}):
            for name, value in mine.items():
                sums[name] += value
        return {"steps": self.steps, "images": self.images, "sums": dict(sums), "seconds": clock.seconds()}

    def means(self, ranks: Ranks) -> dict[str, float]:
        """Return the mean of every loss over the epoch's images."""
        found = self.state(Clock(), ranks)
        # Every process has the same gradient norm; all else are shares that add up.
        found["sums"]["gradient_norm"] /= ranks.size
        return {name: value / found["images"] for name, value in found["sums"].items()}

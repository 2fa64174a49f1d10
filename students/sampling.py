"""Draws the anchors and proposals a training step is computed on, each image from a stream of its own."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler


class SeededSampler(BalancedPositiveNegativeSampler):  # type: ignore[misc]  # torchvision is not typed
    """torchvision's balanced sampler, drawing each image from its own generator instead of the global one.

    An image's samples thus depend on its own seed and labels only: not on the other images of its batch, and not on
    what else draws random numbers. The generators live on the CPU, so a GPU samples alike.
    """

    generators: Sequence[torch.Generator] = ()
    num_drawn: int = 0
    """Anchors or proposals drawn by the last call, over all its images: what the losses are divided by."""

    def __call__(self, matched_idxs: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Return for each image the masks of its drawn positives and negatives, [n] uint8 each.

        matched_idxs: for each image [n]; ≥ 1 is positive, 0 negative, < 0 never drawn.
        """
        positives, negatives = [], []
        drawn = 0
        for matched, generator in zip(matched_idxs, self.generators, strict=True):
            positive = torch.where(matched >= 1)[0]
            negative = torch.where(matched == 0)[0]
            num_positive = min(len(positive), int(self.batch_size_per_image * self.positive_fraction))
            num_negative = min(len(negative), self.batch_size_per_image - num_positive)
            drawn += num_positive + num_negative
            positives.append(_mask_of(positive, num_positive, matched, generator))
            negatives.append(_mask_of(negative, num_negative, matched, generator))
        self.num_drawn = drawn
        return positives, negatives


def _mask_of(candidates: Tensor, count: int, matched: Tensor, generator: torch.Generator) -> Tensor:
    drawn = torch.randperm(len(candidates), generator=generator)[:count].to(matched.device)
    mask = torch.zeros_like(matched, dtype=torch.uint8)
    mask[candidates[drawn]] = 1
    return mask

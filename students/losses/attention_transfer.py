"""Activation-based attention transfer: where a map is strong, whatever in."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from .pairs import paired_maps


def attention_transfer(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the squared distance between L2-normalised attention maps, averaged over images, a scalar in [0, 2].

    An image's attention map is the sum over channels of squared values, at each place. The distance is summed over
    places: 2 − 2 cosine. Scaling an image's features changes nothing.

    student, teacher: [B, C, H, W].

    Raises ValueError for shapes that differ.

    Source: Zagoruyko & Komodakis 2017, Paying More Attention to Attention, section 3.1, equation 2 with F²_sum and
    p = 2; the distance squared, as their code has it, since its root has no gradient at equality. Their code then
    averages over places: H·W times less.
    """
    student, teacher = paired_maps(student, teacher)
    return (_attention(student) - _attention(teacher)).square().sum(dim=1).mean()


def _attention(features: Tensor) -> Tensor:
    """Return [B, H·W], of unit length each; zero for a map of zeros."""
    return F.normalize(features.square().sum(dim=1).flatten(1), dim=1)

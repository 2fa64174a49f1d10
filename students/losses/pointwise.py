"""Distances between feature maps taken place by place: mean squared error and cosine."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from .pairs import paired_maps

# Shorter vectors count as this long. On standardised channels a vector is about √C long; one ten thousand times shorter
# has no direction worth a gradient of its inverse length.
_SHORTEST = 1e-3


def feature_mse(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the mean over all elements of (student − teacher)², a scalar.

    student, teacher: [B, C, H, W].

    Raises ValueError for shapes that differ.

    Source: Romero et al. 2015, FitNets: Hints for Thin Deep Nets, equation 3, there a sum.
    """
    return F.mse_loss(*paired_maps(student, teacher))


def feature_cosine(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the mean over images and places of 1 − cosine between the two channel vectors, a scalar in [0, 2].

    A place counts the same however long its vectors are. One where either vector is zero counts 1.

    student, teacher: [B, C, H, W].

    Raises ValueError for shapes that differ.

    Source: Peng et al. 2022, BEiT v2: Masked Image Modeling with Vector-Quantized Visual Tokenizers, section 2.2, where
    a decoder is trained to a frozen teacher's patch features by their cosine.
    """
    student, teacher = paired_maps(student, teacher)
    cosine = F.normalize(student, dim=1, eps=_SHORTEST) * F.normalize(teacher, dim=1, eps=_SHORTEST)
    return 1 - cosine.sum(dim=1).mean()

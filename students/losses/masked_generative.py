"""Masked generative distillation (MGD): the teacher's map is to be made from part of the student's places.

Source: Yang et al. 2022, Masked Generative Distillation, section 3.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .pairs import paired_maps

# λ of the source's two-stage detectors.
MASKED_SHARE = 0.45


def masked_generative(generated: Tensor, teacher: Tensor) -> Tensor:
    """Return the mean over all elements of (generated − teacher)², masked places and others alike, a scalar.

    generated: [B, C, H, W], what a `MaskedGenerator` makes of the student's map.  teacher: [B, C, H, W].

    Raises ValueError for shapes that differ.

    Source: as above, there a sum.
    """
    return F.mse_loss(*paired_maps(generated, teacher))


class MaskedGenerator(nn.Module):
    """Two 3×3 convolutions with a ReLU between them, on a map of which random places are set to zero.

    Training state, no part of the student. It computes in its weights' dtype.

    seed_generator: on the CPU; the weights are drawn from it.  masked_share: λ, the probability that a place is masked.
    """

    def __init__(self, channels: int, seed_generator: torch.Generator, masked_share: float = MASKED_SHARE) -> None:
        super().__init__()
        self.masked_share = masked_share
        # On `meta` nothing is drawn: elsewhere a convolution draws its weights from the global generator at once.
        self.first = nn.Conv2d(channels, channels, kernel_size=3, padding=1, device="meta").to_empty(device="cpu")
        self.second = nn.Conv2d(channels, channels, kernel_size=3, padding=1, device="meta").to_empty(device="cpu")
        # He et al. 2015: as much variance comes out as goes in, the scale of a standardised target.
        nn.init.kaiming_normal_(self.first.weight, nonlinearity="relu", generator=seed_generator)
        nn.init.kaiming_normal_(self.second.weight, nonlinearity="linear", generator=seed_generator)
        for convolution in (self.first, self.second):
            assert convolution.bias is not None
            nn.init.zeros_(convolution.bias)

    def forward(self, student: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        """Return the generated map [B, C, H, W] of the student's.

        generators: on the CPU, one an image; its mask is drawn from it alone, so neither the batch it stands in nor
        the device changes it.

        Raises ValueError for another number of generators.
        """
        if len(generators) != len(student):
            raise ValueError(f"expected a mask generator for each of {len(student)} images, found {len(generators)}")
        kept = kept_places(generators, (student.shape[2], student.shape[3]), self.masked_share)
        masked = student.to(self.first.weight.dtype) * kept.to(student.device)
        generated: Tensor = self.second(F.relu(self.first(masked)))
        return generated


def kept_places(generators: Sequence[torch.Generator], grid: tuple[int, int], masked_share: float) -> Tensor:
    """Return [B, 1, H, W] bool on the CPU, False where a place is masked: each with probability `masked_share`."""
    drawn = [torch.rand(1, *grid, generator=generator, dtype=torch.float32) for generator in generators]
    return torch.stack(drawn) >= masked_share

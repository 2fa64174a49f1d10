"""Distillation by the Pearson correlation of channels (PKD)."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from .pairs import paired_maps

# Added to the variance. A channel that hardly moves (std below 1e-4) is left small, instead of its rounding noise being
# blown up to unit variance; one of std 0.1 or more is changed by less than 1e-6 of itself.
_SMALLEST_VARIANCE = 1e-8

OverRanks = Callable[[Tensor], Tensor]


def pearson(student: Tensor, teacher: Tensor, over_ranks: OverRanks | None = None) -> Tensor:
    """Return half the mean squared error between channels standardised over images and places, a scalar in [0, 2].

    That is the mean over channels of 1 − r, r the correlation of student and teacher over the batch. Neither side's
    mean and scale of a channel count. A channel that is constant on one side counts ½, on both sides 0.

    student, teacher: [B, C, H, W]; both are standardised here, with the variance that divides by B·H·W.
    over_ranks: the mean of a tensor over the processes of a data-parallel run, differentiable; with it, equal parts of
    a batch give losses and gradients that average to the whole batch's. None where one process has it all.

    Raises ValueError for shapes that differ.

    Source: Cao et al. 2022, PKD: General Distillation Framework for Object Detectors via Pearson Correlation
    Coefficient, section 3 (the loss 1/2m · Σ (ŝ − t̂)² = 1 − r).
    """
    student, teacher = paired_maps(student, teacher)
    return (_standardised(student, over_ranks) - _standardised(teacher, over_ranks)).square().mean() / 2


def _standardised(features: Tensor, over_ranks: OverRanks | None) -> Tensor:
    mean = features.mean(dim=(0, 2, 3), keepdim=True)
    centred = features - (mean if over_ranks is None else over_ranks(mean))
    variance = centred.square().mean(dim=(0, 2, 3), keepdim=True)
    variance = variance if over_ranks is None else over_ranks(variance)
    return centred / (variance + _SMALLEST_VARIANCE).sqrt()

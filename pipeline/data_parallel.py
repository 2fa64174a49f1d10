"""What the processes of one training run add up: gradients, and the counts that losses were divided by."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cache.ranks import Ranks


def sum_over_ranks(tensor: Tensor, ranks: Ranks) -> Tensor:
    """Return the sum of a tensor over all processes, in place; what it was where there is one."""
    if ranks.size > 1:
        dist.all_reduce(tensor)
    return tensor


class MeanOverRanks(torch.autograd.Function):
    """The mean of a tensor over all processes, each counting the same. Gradients flow back to all of them."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        """Return the mean; every process must call it."""
        mean = tensor.clone()
        dist.all_reduce(mean)
        return mean / dist.get_world_size()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        """Return the mean of what the processes say of the mean."""
        summed = gradients[0].clone()
        dist.all_reduce(summed)
        return summed / dist.get_world_size()


def mean_over_ranks(tensor: Tensor) -> Tensor:
    """Return the mean of a tensor over all processes, with gradients."""
    mean: Tensor = MeanOverRanks.apply(tensor)
    return mean


def sum_gradients(modules: Iterable[nn.Module], ranks: Ranks) -> None:
    """Add up the gradients of every trained weight over all processes, in one message.

    A weight without a gradient here, where a process had no image, counts as zero.
    """
    if ranks.size == 1:
        return
    weights = [weight for module in modules for weight in module.parameters() if weight.requires_grad]
    for weight in weights:
        if weight.grad is None:
            weight.grad = torch.zeros_like(weight)
    gradients = [weight.grad for weight in weights if weight.grad is not None]
    flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
    dist.all_reduce(flat)
    for gradient, part in zip(gradients, torch.split(flat, [g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


def detection_shares(normalisers: Mapping[str, int], num_images: int, ranks: Ranks, device: torch.device) -> Tensor:
    """Return this process's share of each normaliser and, last, of the images, over all processes: [n + 1] float64.

    A loss that was divided by its own count, times its share, adds up over processes to the whole batch's.
    """
    if ranks.size == 1:
        return torch.ones(len(normalisers) + 1, dtype=torch.float64)
    mine = torch.tensor([*normalisers.values(), num_images], dtype=torch.float64, device=device)
    whole = sum_over_ranks(mine.clone(), ranks)
    return mine / whole.clamp(min=1)

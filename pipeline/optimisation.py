"""The optimiser and the learning-rate schedule of the recipe."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from pipeline.config import Recipe


def build_optimizer(recipe: Recipe, modules: Iterable[nn.Module]) -> Optimizer:
    """Return the resolved recipe's optimiser over every trainable weight of the modules.

    AdamW spares biases and norms (tensors of one axis) from weight decay.
    """
    assert recipe.learning_rate is not None
    assert recipe.weight_decay is not None
    weights = [p for module in modules for p in module.parameters() if p.requires_grad]
    if recipe.optimizer == "sgd":
        return SGD(weights, lr=recipe.learning_rate, momentum=0.9, weight_decay=recipe.weight_decay)
    groups = [
        {"params": [p for p in weights if p.ndim > 1], "weight_decay": recipe.weight_decay},
        {"params": [p for p in weights if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return AdamW(groups, lr=recipe.learning_rate)


def learning_rate(recipe: Recipe, step: int, total_steps: int) -> float:
    """Return the rate of step 0 … total − 1: a linear warm-up, then a cosine to zero, or what it has come to."""
    assert recipe.learning_rate is not None
    warmup = min(recipe.warmup_max_steps, round(recipe.warmup_fraction * total_steps))
    if step < warmup:
        return recipe.learning_rate * (step + 1) / warmup
    if recipe.schedule == "constant":
        return recipe.learning_rate
    progress = (step - warmup) / max(1, total_steps - warmup)
    return recipe.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))


def set_learning_rate(optimizer: Optimizer, rate: float) -> None:
    """Set the rate of every group."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def clip_gradients(modules: Iterable[nn.Module], largest: float) -> torch.Tensor:
    """Scale the gradients down to a total norm of at most `largest`; return the norm before, a scalar."""
    weights = [p for module in modules for p in module.parameters() if p.grad is not None]
    return nn.utils.clip_grad_norm_(weights, largest)

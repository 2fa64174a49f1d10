"""How much each term of the objective pulls at the backbone, and weights that give distillation a chosen share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from cache.ranks import Ranks, exchange
from pipeline.objective import KD_PARTS, Objective

# Of the old weight, at each report: one batch's gradients waver.
_MEMORY = 0.9
_SMALLEST = 1e-12


def gradient_norms(terms: Mapping[str, Tensor], weights: Sequence[nn.Parameter]) -> dict[str, float]:
    """Return the norm of each term's gradient on the given weights, by name. The graph stays.

    A term that does not reach them has norm 0.
    """
    norms = {}
    for name, term in terms.items():
        gradients = torch.autograd.grad(term, weights, retain_graph=True, allow_unused=True)
        squares = [gradient.double().square().sum() for gradient in gradients if gradient is not None]
        norms[name] = float(torch.stack(squares).sum().sqrt()) if squares else 0.0
    return norms


def shares(norms: Mapping[str, float]) -> dict[str, float]:
    """Return for each distillation term its norm over the sum of its own and detection's, in 0..1."""
    detection = norms.get("detection", 0.0)
    return {name: norms[name] / max(norms[name] + detection, _SMALLEST) for name in KD_PARTS if name in norms}


def reweigh(objective: Objective, norms: Mapping[str, float], ranks: Ranks, *, first: bool) -> None:
    """Set β and γ so that features and logits get `kd_share` of the gradient beside detection, smoothed over reports.

    norms: with the weights as they are; empty for a process without an image, which must call it all the same.  A term
    that does not reach the backbone keeps its weight.
    """
    gathered = [found for found in exchange(ranks, dict(norms)) if found]
    if not gathered:
        return
    mean = {name: sum(found[name] for found in gathered) / len(gathered) for name in gathered[0]}
    wanted = objective.config.kd_share / (1 - objective.config.kd_share)
    for name, weight in (("feature", objective.beta), ("logit", objective.gamma)):
        norm = mean.get(name, 0.0)
        if norm <= _SMALLEST or float(weight) == 0 or mean["detection"] <= _SMALLEST:
            continue
        found = float(weight) * wanted * mean["detection"] / norm
        weight.fill_(found if first else _MEMORY * float(weight) + (1 - _MEMORY) * found)

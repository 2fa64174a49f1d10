"""Kullback–Leibler divergence between softened class distributions.

Axes: B batch, K classes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def logit_kl(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """Return T² · KL(softmax(teacher / T) ‖ softmax(student / T)), averaged over the images, a scalar ≥ 0.

    student_logits: [B, K].  teacher_logits: [B, K] of any float dtype; no gradient reaches them.  temperature: T > 0.
    T² keeps the gradient's size over temperatures. Computed in float32, or float64 where the student is.

    Raises ValueError for shapes that do not match or a temperature that is not positive.

    Source: Hinton et al. 2015, Distilling the Knowledge in a Neural Network, section 2.
    """
    if student_logits.shape != teacher_logits.shape or student_logits.ndim != 2:
        raise ValueError(
            "expected student and teacher logits of one shape [B, K],"
            f" found {list(student_logits.shape)} and {list(teacher_logits.shape)}"
        )
    if not temperature > 0:
        raise ValueError(f"expected a positive temperature, found {temperature}")
    dtype = torch.promote_types(student_logits.dtype, torch.float32)
    student_log_probs = F.log_softmax(student_logits.to(dtype) / temperature, dim=1)
    teacher_log_probs = F.log_softmax(teacher_logits.detach().to(dtype) / temperature, dim=1)
    return temperature**2 * F.kl_div(student_log_probs, teacher_log_probs, reduction="batchmean", log_target=True)

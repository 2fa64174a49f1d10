"""Kullback–Leibler divergence between softened class distributions of images."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from .pairs import check_temperature, paired_logits


def logit_kl(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """Return T² · KL(softmax(teacher / T) ‖ softmax(student / T)), averaged over the images, a scalar ≥ 0.

    student_logits: [B, K].  teacher_logits: [B, K] of any float dtype.  temperature: T > 0. T² keeps the gradient's
    size over temperatures.

    Raises ValueError for shapes that do not match or a temperature that is not positive.

    Source: Hinton et al. 2015, Distilling the Knowledge in a Neural Network, section 2.
    """
    check_temperature(temperature)
    student, teacher = paired_logits(student_logits, teacher_logits)
    student_log_probs = F.log_softmax(student / temperature, dim=1)
    teacher_log_probs = F.log_softmax(teacher / temperature, dim=1)
    return temperature**2 * F.kl_div(student_log_probs, teacher_log_probs, reduction="batchmean", log_target=True)

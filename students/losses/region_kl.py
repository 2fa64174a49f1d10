"""Kullback–Leibler divergence between class distributions of proposals."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from .pairs import check_temperature, paired_regions


def region_kl(student_scores: Tensor, teacher_region_logits: Tensor, temperature: float) -> Tensor:
    """Return T² · KL(softmax(teacher / T) ‖ softmax(student's foreground / T)), averaged over proposals, ≥ 0.

    Only which object it is, is distilled, not whether it is one: the teacher's prompts have no background, so the
    student's background score stands aside and gets no gradient. No proposals at all give 0, with a gradient of zeros.
    Parts of a batch average to the whole when each counts by its number of proposals.

    student_scores: [P, K + 1], the box head's class scores before softmax, background first.  teacher_region_logits:
    [P, K] of any float dtype; column k is label k + 1.  temperature: T > 0.

    Raises ValueError for shapes that do not match or a temperature that is not positive.

    Source: Hinton et al. 2015, Distilling the Knowledge in a Neural Network, section 2; with an image-text model as the
    teacher of a detector's proposals, Gu et al. 2022, Open-vocabulary Object Detection via Vision and Language
    Knowledge Distillation, section 3, which compares embeddings instead.
    """
    check_temperature(temperature)
    student, teacher = paired_regions(student_scores, teacher_region_logits)
    student_log_probs = F.log_softmax(student[:, 1:] / temperature, dim=1)
    teacher_log_probs = F.log_softmax(teacher / temperature, dim=1)
    divergence = F.kl_div(student_log_probs, teacher_log_probs, reduction="sum", log_target=True)
    return temperature**2 * divergence / max(len(student), 1)

"""Channel-wise distillation (CWD): each channel's map as a distribution over places."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from .pairs import check_temperature, paired_maps


def channel_wise_kl(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Return T² · KL(softmax(teacher / T) ‖ softmax(student / T)) over places, averaged over images and channels, ≥ 0.

    Adding a number to a channel of an image changes nothing; where a channel peaks counts most. With growing T it
    tends to half the mean squared error between maps without their means.

    student, teacher: [B, C, H, W].  temperature: T > 0.

    Raises ValueError for shapes that differ or a temperature that is not positive.

    Source: Shu et al. 2021, Channel-wise Knowledge Distillation for Dense Prediction, section 3.2.
    """
    check_temperature(temperature)
    student, teacher = paired_maps(student, teacher)
    num_channels = student.shape[0] * student.shape[1]
    student_log_probs = F.log_softmax(student.flatten(2) / temperature, dim=2)
    teacher_log_probs = F.log_softmax(teacher.flatten(2) / temperature, dim=2)
    divergence = F.kl_div(student_log_probs, teacher_log_probs, reduction="sum", log_target=True)
    return temperature**2 * divergence / num_channels

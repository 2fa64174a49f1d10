"""Kullback–Leibler divergence class by class, for images that show several classes or none."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .pairs import check_temperature, paired_logits


def binary_kl(student_logits: Tensor, teacher_logits: Tensor, temperature: float, centre: Tensor | None) -> Tensor:
    """Return T² · Σ over classes of KL(Bernoulli(teacher) ‖ Bernoulli(student)), averaged over the images, ≥ 0.

    The teacher says that class k is present with probability sigmoid((logit_k − centre_k) / T). A contrastive teacher's
    logit is 100 × cosine, 20 to 30 for every class of every image: without a centre its sigmoid says that all classes
    are present. The student's probability is sigmoid(logit_k / T): it starts near zero by itself, and is not centred.

    Classes are summed: the sum is the divergence between the joint distributions of K independent labels, in nats per
    image as `logit_kl` is, so that a weight means about the same for both, and each class's gradient has the form
    T · (p_student − p_teacher) there and here. A mean would be K times weaker.

    student_logits: [B, K].  teacher_logits: [B, K] of any float dtype.  temperature: T > 0.  centre: [K], the teacher's
    mean logit of each class over the training images; None for logits whose zero means "as likely as not".

    Raises ValueError for shapes that do not match or a temperature that is not positive.

    Source: Yang et al. 2023, Multi-Label Knowledge Distillation, section 3.2 (one versus all, classes summed); T and T²
    from Hinton et al. 2015, section 2. The centre is ours.
    """
    check_temperature(temperature)
    student, teacher = paired_logits(student_logits, teacher_logits)
    student = student / temperature
    teacher = _centred(teacher, centre) / temperature
    present = torch.sigmoid(teacher) * (F.logsigmoid(teacher) - F.logsigmoid(student))
    absent = torch.sigmoid(-teacher) * (F.logsigmoid(-teacher) - F.logsigmoid(-student))
    return temperature**2 * (present + absent).sum(dim=1).mean()


def teacher_probs(teacher_logits: Tensor, temperature: float, centre: Tensor | None) -> Tensor:
    """Return the probabilities [B, K] that `binary_kl` takes a teacher's logits for; arguments as there."""
    check_temperature(temperature)
    _, teacher = paired_logits(teacher_logits, teacher_logits)
    return torch.sigmoid(_centred(teacher, centre) / temperature)


def _centred(teacher: Tensor, centre: Tensor | None) -> Tensor:
    if centre is None:
        return teacher
    if tuple(centre.shape) != (teacher.shape[1],):
        raise ValueError(f"expected a centre of shape [{teacher.shape[1]}], one a class, found {list(centre.shape)}")
    return teacher - centre.detach().to(teacher.dtype)

"""What every loss does first: checks that student and teacher belong together, and brings both to one dtype."""

from __future__ import annotations

import torch
from torch import Tensor


def paired_maps(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Return both maps [B, C, H, W] in the dtype a loss computes in, the teacher without its gradient.

    Raises ValueError for shapes that differ, are no maps, or are empty.
    """
    if student.ndim != 4 or student.shape != teacher.shape or student.numel() == 0:
        raise ValueError(
            "expected student and teacher features of one shape [B, C, H, W], none of them 0,"
            f" found {list(student.shape)} and {list(teacher.shape)}"
        )
    return _in_loss_dtype(student, teacher)


def paired_logits(student_logits: Tensor, teacher_logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return both logits [B, K] in the dtype a loss computes in, the teacher's without their gradient.

    Raises ValueError for shapes that differ or are no logits of images.
    """
    if student_logits.shape != teacher_logits.shape or student_logits.ndim != 2:
        raise ValueError(
            "expected student and teacher logits of one shape [B, K],"
            f" found {list(student_logits.shape)} and {list(teacher_logits.shape)}"
        )
    return _in_loss_dtype(student_logits, teacher_logits)


def paired_regions(student_scores: Tensor, teacher_region_logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return scores [P, K + 1] and logits [P, K] in the dtype a loss computes in, the teacher's without gradient.

    Raises ValueError where the student has not exactly one class more, its background, or the counts differ.
    """
    shape = tuple(teacher_region_logits.shape)
    if len(shape) != 2 or tuple(student_scores.shape) != (shape[0], shape[1] + 1):
        raise ValueError(
            "expected student scores [P, K + 1], background first, for teacher logits [P, K],"
            f" found {list(student_scores.shape)} and {list(shape)}"
        )
    return _in_loss_dtype(student_scores, teacher_region_logits)


def check_temperature(temperature: float) -> None:
    """Raise ValueError for a temperature that is not positive."""
    if not temperature > 0:
        raise ValueError(f"expected a positive temperature, found {temperature}")


def _in_loss_dtype(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    # Half precision would overflow in squares and underflow in softmaxes, and adds up too coarsely.
    dtype = torch.promote_types(student.dtype, torch.float32)
    return student.to(dtype), teacher.detach().to(dtype)

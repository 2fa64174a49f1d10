"""Mean squared error between feature maps.

Axes: B batch, C channels, Gh × Gw the patch grid.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def feature_mse(student: Tensor, teacher: Tensor, mean: Tensor | None = None, std: Tensor | None = None) -> Tensor:
    """Return the mean over all elements of (student − (teacher − mean) / std)², a scalar.

    student: [B, C, Gh, Gw], the adapter's output.  teacher: [B, Gh, Gw, C] of any float dtype, as stored; no gradient
    reaches it.  mean, std: [C], the teacher's statistics, std > 0; None for a teacher taken as it is. Computed in
    float32, or float64 where the student is.

    Raises ValueError for shapes that do not match.

    Source: Romero et al. 2015, FitNets: Hints for Thin Deep Nets, equation 3, there a sum.
    """
    expected = (student.shape[0], student.shape[2], student.shape[3], student.shape[1])
    if tuple(teacher.shape) != expected:
        raise ValueError(
            f"expected teacher features [B, Gh, Gw, C] = {list(expected)} for student features [B, C, Gh, Gw] ="
            f" {list(student.shape)}, found {list(teacher.shape)}"
        )
    dtype = torch.promote_types(student.dtype, torch.float32)
    target = teacher.detach().to(dtype)
    if mean is not None:
        target = target - mean.to(dtype)
    if std is not None:
        target = target / std.to(dtype)
    return F.mse_loss(student.to(dtype), target.permute(0, 3, 1, 2))

"""Teacher features as the feature losses take them: channels first, in float32, standardised per channel.

Axes: B images, C channels, Gh × Gw the patch grid.
"""

from __future__ import annotations

import torch
from torch import Tensor


def standardise(teacher: Tensor, mean: Tensor | None, std: Tensor | None) -> Tensor:
    """Return (teacher − mean) / std as [B, C, Gh, Gw] float32, float64 where the teacher is; without gradient.

    teacher: [B, Gh, Gw, C] of any float dtype, as stored.  mean, std: [C], the teacher's statistics over the training
    images, std > 0, infinite for a channel that never moves (which becomes 0); None for one that is not applied.

    Raises ValueError for other shapes and for a teacher that is not of a float dtype.
    """
    if teacher.ndim != 4 or not teacher.is_floating_point():
        raise ValueError(f"expected float teacher features [B, Gh, Gw, C], found {teacher.dtype} {list(teacher.shape)}")
    for name, statistic in (("mean", mean), ("std", std)):
        if statistic is not None and tuple(statistic.shape) != (teacher.shape[3],):
            raise ValueError(
                f"expected a {name} of shape [{teacher.shape[3]}], one a channel, found {list(statistic.shape)}"
            )
    target = teacher.detach().to(torch.promote_types(teacher.dtype, torch.float32))
    if mean is not None:
        target = target - mean.to(target.dtype)
    if std is not None:
        target = target / std.to(target.dtype)
    return target.permute(0, 3, 1, 2)

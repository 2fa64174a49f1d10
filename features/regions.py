"""Logits of regions: dense features, live or stored, pooled over boxes and compared with text embeddings.

Axes: B images, Gh and Gw cells of the patch grid, D embedding dimensions, K classes, n_i boxes of image i.

Source: RoIAlign, He et al., Mask R-CNN (2017), section 3; the cosine classifier, Radford et al., Learning Transferable
Visual Models From Natural Language Supervision (2021), section 3.1.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from data.geometry import FRAME_SIZE

# Points a side at which a box is read: those of a detector's 7×7 bins with 2×2 points each.
_POINTS = 14


def region_logits(
    features: Tensor,
    boxes_xyxy: Sequence[Tensor],
    text_embeddings: Tensor,
    *,
    logit_scale: float,
    logit_bias: float | None = None,
) -> Tensor:
    """Return the logits [n_0 + … + n_(B−1), K] float32 of boxes, image after image.

    A box's embedding is the mean of the features at points spread evenly over it, L2-normalised; a logit is scale ×
    cosine with a class, plus the bias of a model that has one.

    features: [B, Gh, Gw, D] of any float dtype, not normalised; cell (i, j) covers rows i·480/Gh … and columns
    j·480/Gw … of the frame.  boxes_xyxy: for each image [n_i, 4] float frame pixels, [0, 4] for none.
    text_embeddings: [K, D], each of unit length.

    Raises ValueError for shapes that do not belong together.
    """
    from torchvision.ops import roi_align

    _check_shapes(features, boxes_xyxy, text_embeddings)
    height, width = features.shape[1:3]
    per_pixel = torch.tensor([width / FRAME_SIZE[1], height / FRAME_SIZE[0]] * 2, device=features.device)
    in_cells = [boxes.to(per_pixel) * per_pixel for boxes in boxes_xyxy]
    # With aligned=True a cell's value stands at its centre; without, the map would be read half a cell off.
    pooled = roi_align(
        features.permute(0, 3, 1, 2).float(), in_cells, output_size=1, sampling_ratio=_POINTS, aligned=True
    )
    embeddings = F.normalize(pooled.flatten(1), dim=-1)
    logits: Tensor = logit_scale * (embeddings @ text_embeddings.to(embeddings).T)
    return logits if logit_bias is None else logits + logit_bias


def _check_shapes(features: Tensor, boxes_xyxy: Sequence[Tensor], text_embeddings: Tensor) -> None:
    if features.ndim != 4 or not features.is_floating_point():
        raise ValueError(f"expected float features [B, Gh, Gw, D], found {features.dtype} {list(features.shape)}")
    if len(boxes_xyxy) != len(features) or any(boxes.ndim != 2 or boxes.shape[1] != 4 for boxes in boxes_xyxy):
        shapes = [list(boxes.shape) for boxes in boxes_xyxy]
        raise ValueError(f"expected boxes [n, 4] for each of {len(features)} images, found {shapes}")
    if text_embeddings.ndim != 2 or text_embeddings.shape[1] != features.shape[3]:
        raise ValueError(f"expected text embeddings [K, {features.shape[3]}], found {list(text_embeddings.shape)}")

"""Builds the backbone: any timm model that gives maps of strides 8, 16 and 32, or of stride 16 alone, on the frame.

timm's `forward_intermediates` hands out NCHW maps for every family, so no layout is guessed; which maps there are is
read off one forward pass over an empty frame, so no declaration is trusted.

Axes: B batch, C channels, H and W of a map.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any

import timm
import torch
from timm.layers import freeze_batch_norm_2d
from torch import Tensor, nn

from data.errors import UsageError
from data.geometry import FRAME_SIZE

from .config import StudentConfig
from .weights import create_with_weights, imagenet_file

STRIDES = (8, 16, 32)
_FEATURE_STRIDE = 16


class Backbone(nn.Module):
    """A timm model that returns the maps the detector uses.

    strides: (8, 16, 32), or (16,) for a plain transformer.  channels: of the maps, in the same order.
    mean, std: of the pixels in [0, 1] its weights were trained with, per RGB channel.
    """

    def __init__(self, model: Any, indices: Sequence[int], strides: Sequence[int], channels: Sequence[int]) -> None:
        super().__init__()
        self.model = model
        self.indices = list(indices)
        self.strides = tuple(strides)
        self.channels = tuple(channels)
        self.mean: tuple[float, ...] = tuple(model.pretrained_cfg["mean"])
        self.std: tuple[float, ...] = tuple(model.pretrained_cfg["std"])

    @property
    def feature_index(self) -> int:
        """Which of the maps is the one of stride 16."""
        return self.strides.index(_FEATURE_STRIDE)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return the maps [B, C, 480 / stride, 480 / stride] of normalised images [B, 3, 480, 480], finest first."""
        return _intermediates(self.model, images, self.indices)


def build_backbone(config: StudentConfig) -> Backbone:
    """Return the configured backbone, loaded and in training mode.

    Raises UsageError for an unknown name, maps that do not fit the frame, and weights that cannot be had or do not fit.
    """
    name = config.timm_name
    model = _create(config)
    found = _maps_of(model, name)
    strides = tuple(stride for stride in STRIDES if stride in found)
    if strides != STRIDES and set(found) != {_FEATURE_STRIDE}:
        raise UsageError(
            f"{name}: expected maps of strides 8, 16 and 32, or of stride 16 alone, on the"
            f" {FRAME_SIZE[0]}×{FRAME_SIZE[1]} frame, found strides {', '.join(f'{stride:g}' for stride in found)}",
            hint="choose another --backbone: a convolutional or hierarchical model, or a transformer of patch size 16",
        )
    indices = [found[stride][0] for stride in strides]
    if hasattr(model, "prune_intermediate_layers"):
        # Layers behind the last map would be parameters without a gradient.
        indices = model.prune_intermediate_layers(indices, prune_norm=False, prune_head=True)
    if config.freezes_norms:
        model = freeze_batch_norm_2d(model)
    return Backbone(model, indices, strides, [found[stride][1] for stride in strides])


def _create(config: StudentConfig) -> Any:
    name = config.timm_name
    if not timm.is_model(name):
        close = difflib.get_close_matches(name, timm.list_models(), n=3)
        raise UsageError(
            f"timm has no model {name!r}" + (f"; close names: {', '.join(close)}" if close else ""),
            hint='`python -c "import timm; print(timm.list_models())"` lists them all',
        )
    try:
        # Transformers are built for one size; convolutional models take any and refuse the argument.
        fixed_size = timm.models.get_pretrained_cfg(name).fixed_input_size
        kwargs: dict[str, Any] = {"img_size": FRAME_SIZE} if fixed_size else {}
        if config.backbone_weights == "none":
            return timm.create_model(name, num_classes=0, **kwargs)
    except (RuntimeError, AssertionError, TypeError, ValueError) as error:
        raise UsageError(f"{name}: timm cannot build it for the frame ({error})") from error
    path = imagenet_file(name) if config.backbone_weights == "imagenet" else config.backbone_weights
    return create_with_weights(name, path, **kwargs)


def _maps_of(model: Any, name: str) -> dict[float, tuple[int, int]]:
    """Return the index and channels of the last map of each stride, by stride."""
    training = model.training
    try:
        with torch.no_grad():
            maps = _intermediates(model.eval(), torch.zeros(1, 3, *FRAME_SIZE), None)
    except (AttributeError, AssertionError, RuntimeError, TypeError, ValueError) as error:
        raise UsageError(
            f"{name}: expected a model that gives intermediate maps of a {FRAME_SIZE[0]}×{FRAME_SIZE[1]} image,"
            f" found that timm's fails on it ({error or type(error).__name__})",
            hint="choose another --backbone",
        ) from error
    model.train(training)
    return {FRAME_SIZE[0] / map_.shape[2]: (index, map_.shape[1]) for index, map_ in enumerate(maps)}


def _intermediates(model: Any, images: Tensor, indices: list[int] | None) -> list[Tensor]:
    # The final norm belongs to the map of a plain transformer: without it, tokens of the residual stream have no scale.
    maps: list[Tensor] = model.forward_intermediates(
        images, indices=indices, norm=True, output_fmt="NCHW", intermediates_only=True
    )
    return maps

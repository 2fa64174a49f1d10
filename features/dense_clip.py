"""Dense CLIP features: every patch in the joint space of images and texts, instead of one embedding an image.

The last block's attention is left out and its value path kept: for the tokens x of the block before it, the features
are proj(ln_post(out_proj(v))) with v the value projection of ln_1(x). Neither the block's residual nor its MLP is
added.

Source: Zhou, Loy, Dai, Extract Free Dense Labels from CLIP (2022), section 3: query and key are dropped, the value
projection and the last linear layer act on every place. The code that came with it adds residual and MLP of a ViT's
last block; as in Lan et al., ClearCLIP (2024), both are left out here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.errors import UsageError
from data.geometry import FRAME_SIZE, PATCH_GRID

from .open_clip_models import OpenClipModel
from .patch_tokens import input_for
from .spec import Grid, TeacherOptions
from .teacher import TeacherInput, TeacherOutput
from .zero_shot import ZeroShotTeacher


@dataclass(kw_only=True, eq=False)
class DenseClipTeacher(ZeroShotTeacher):
    """A teacher of patch features that can be compared with its text embeddings; its module is a `DenseImageTower`."""

    patch_grid: Grid

    def forward(self, pixels: Tensor) -> TeacherOutput:
        """Return features [B, Gh, Gw, D], not normalised."""
        return TeacherOutput(features=self.module(pixels))


class DenseImageTower(nn.Module):
    """Maps pixels [B, 3, Gh·P, Gw·P] to dense features [B, Gh, Gw, D]; P is the patch size."""

    def __init__(self, visual: Any, grid: Grid) -> None:
        """Take over one of open_clip's image towers, and its position embeddings for the grid."""
        super().__init__()
        self.visual = visual
        self.grid = grid
        positions = resize_positions(visual.positional_embedding.detach(), visual.grid_size, grid)
        visual.positional_embedding = nn.Parameter(positions, requires_grad=False)

    def forward(self, pixels: Tensor) -> Tensor:
        """Return the features [B, Gh, Gw, D] float32."""
        blocks = self.visual.transformer.resblocks
        tokens = self.visual.forward_intermediates(
            pixels, indices=[len(blocks) - 2], stop_early=True, intermediates_only=True, output_fmt="NLC"
        )["image_intermediates"][0]
        values = value_path(blocks[-1], tokens)
        # As with the image's embedding: cosines are multiplied by 100 later.
        with torch.autocast(pixels.device.type, enabled=False):
            features: Tensor = self.visual.ln_post(values.float()) @ self.visual.proj
        return features.reshape(len(features), *self.grid, -1)


def value_path(block: Any, tokens: Tensor) -> Tensor:
    """Return what a block's attention would add to tokens [B, N, W] if each attended to itself alone; no residual."""
    attention = block.attn
    width = attention.embed_dim
    weight, bias = attention.in_proj_weight[2 * width :], attention.in_proj_bias[2 * width :]
    values: Tensor = block.ls_1(attention.out_proj(F.linear(block.ln_1(tokens), weight, bias)))
    return values


def resize_positions(positions: Tensor, native: Grid, grid: Grid) -> Tensor:
    """Return position embeddings [1 + Gh·Gw, W] for a grid, from those of the native grid [1 + Nh·Nw, W].

    Bicubic and antialiased, as open_clip resizes them on loading; that of the class token stays.
    """
    # Not open_clip.model.resize_pos_embed: it leaves them as they are wherever the number of cells is the same, which
    # scrambles a grid of 7×28 on a tower of 14×14.
    if grid == tuple(native):
        return positions
    of_class, of_cells = positions[:1], positions[1:]
    planes = of_cells.reshape(*native, -1).permute(2, 0, 1)[None]
    resized = F.interpolate(planes, size=grid, mode="bicubic", antialias=True, align_corners=False)
    return torch.cat([of_class, resized[0].permute(1, 2, 0).flatten(0, 1)])


def dense_input(visual: Any, model: OpenClipModel, options: TeacherOptions, name: str) -> tuple[TeacherInput, Grid]:
    """Return the input and the grid (Gh, Gw) of an image tower's dense features.

    name: the teacher's spec, for messages.

    Raises UsageError for a tower without the value path, or a grid that needs too large an input.
    """
    foreign = _without_value_path(visual)
    if foreign is not None:
        raise UsageError(
            f"--teacher {name}: dense features need open_clip's own vision transformer with a class token,"
            f" found {foreign}",
            hint="clip_vitb16@dense has them; leave @dense out for the image's embedding and logits",
        )
    patch_size = visual.patch_size[0]
    if options.grid is None:
        options = replace(options, grid=_default_grid(patch_size))
    return input_for(options, patch_size, resample=model.resample, mean=model.mean, std=model.std, name=name)


def build_dense(
    visual: Any, model: OpenClipModel, teacher_input: TeacherInput, grid: Grid, shared: Mapping[str, Any]
) -> DenseClipTeacher:
    """Return the teacher of an image tower's dense features, at the input and grid of `dense_input`.

    shared: what it has in common with the teacher of the image's embedding, by field.
    """
    native = tuple(visual.grid_size)
    resized = f"{native[0]}x{native[1]} to {grid[0]}x{grid[1]}, bicubic, antialiased"
    return DenseClipTeacher(
        **shared,
        architecture={
            "model": model.architecture,
            **model.config,
            "position_embeddings": "as trained" if grid == native else resized,
        },
        layer="last block, value path, projected (dense)",
        norm="final LayerNorm, projected, not L2",
        input=teacher_input,
        patch_grid=grid,
        output_shapes={"features": (*grid, model.config["embed_dim"])},
        module=DenseImageTower(visual, grid),
    )


def _without_value_path(visual: Any) -> str | None:
    """Return in words what a tower without the value path is, None for one that has it."""
    from open_clip.timm_model import TimmModel
    from open_clip.transformer import VisionTransformer

    if not isinstance(visual, VisionTransformer):
        return "a trunk of timm" if isinstance(visual, TimmModel) else "a residual network"
    blocks = visual.transformer.resblocks
    if visual.attn_pool is not None or visual.pool_type != "tok":
        return "one that pools its patches"
    if not isinstance(blocks[-1].attn, nn.MultiheadAttention):
        return "one with an attention of its own kind"
    if len(blocks) < 2 or len(set(visual.patch_size)) > 1:
        return "one with a single block or with oblong patches"
    return None


def _default_grid(patch_size: int) -> Grid:
    # Patches of 32 px show the 480 px frame in 15×15 cells: 30×30 would be an image of 960 px, four times as large as
    # any that these towers were trained on.
    return PATCH_GRID if patch_size < 32 else (FRAME_SIZE[0] // patch_size, FRAME_SIZE[1] // patch_size)

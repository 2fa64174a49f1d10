"""What the families of vision transformers share: from tokens to the patch grid, and what their options mean."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor, nn

from data.errors import TeacherError, UsageError
from data.geometry import PATCH_GRID
from data.images import Resample

from .spec import Grid, Norm, TeacherOptions
from .teacher import Teacher, TeacherInput, TeacherOutput

# Attention takes the square of the tokens: beyond this a finer grid costs minutes an image, and VOC's photographs,
# 500 px long, have nothing to show for it.
MAX_INPUT_PX = 1024


@dataclass(kw_only=True, eq=False)
class PatchTokenTeacher(Teacher):
    """A teacher of patch tokens.

    num_prefix_tokens: of CLS and the registers, which stand before the patches.  read_tokens: runs the module on
    normalised pixels [B, 3, H, W] and returns tokens [B, num_prefix_tokens + Gh·Gw, C], the patches row by row.
    """

    patch_grid: tuple[int, int]
    num_prefix_tokens: int
    read_tokens: Callable[[nn.Module, Tensor], Tensor] = field(repr=False)

    def forward(self, pixels: Tensor) -> TeacherOutput:
        """Return features [B, Gh, Gw, C].

        Raises TeacherError where the tokens are not as many as the grid has cells.
        """
        tokens = self.read_tokens(self.module, pixels)
        rows, columns = self.patch_grid
        found = tokens.shape[1] - self.num_prefix_tokens
        # A forgotten register or a dropped row could still be reshaped into some grid, and every cell would be off.
        if tokens.ndim != 3 or found != rows * columns:
            raise TeacherError(
                f"{self.name}: expected tokens [B, {self.num_prefix_tokens} + {rows * columns}, C] for the"
                f" {rows}×{columns} grid, found {list(tokens.shape)}"
            )
        patches = tokens[:, self.num_prefix_tokens :]
        return TeacherOutput(features=patches.reshape(len(patches), rows, columns, -1))


def input_for(
    options: TeacherOptions,
    patch_size: int,
    *,
    resample: Resample,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
    name: str,
) -> tuple[TeacherInput, Grid]:
    """Return the input and the grid (Gh, Gw) of a teacher whose patches are `patch_size` px wide: grid × patch size.

    resample, mean, std: as in `TeacherInput`.  name: the teacher's spec, for messages.

    Raises UsageError for a grid that needs an input of more than `MAX_INPUT_PX` a side.
    """
    grid = options.grid or PATCH_GRID
    size = (grid[0] * patch_size, grid[1] * patch_size)
    if max(size) > MAX_INPUT_PX:
        finest = MAX_INPUT_PX // patch_size
        raise UsageError(
            f"--teacher {name}: a grid of {grid[0]}×{grid[1]} cells at patch size {patch_size} needs an input of"
            f" {size[0]}×{size[1]} px; expected at most {MAX_INPUT_PX} px a side",
            hint=f"the finest grid of this teacher is grid={finest}x{finest}",
        )
    return TeacherInput(size=size, resample=resample, mean=mean, std=std), grid


def layer_name(layer: int | None, num_blocks: int, name: str) -> str:
    """Return in words whose tokens are taken: those of a block, counted from 1; None for the last.

    Raises UsageError for a block that the teacher `name` does not have.
    """
    if layer is not None and not 1 <= layer <= num_blocks:
        raise UsageError(
            f"--teacher {name}: expected a layer from 1 to {num_blocks}, found {layer}: it has {num_blocks} blocks"
        )
    # The last block has one name, so that naming it changes nothing that was stored.
    return "last block, patch tokens" if layer in (None, num_blocks) else f"block {layer} of {num_blocks}, patch tokens"


def norm_name(norm: Norm | None) -> str:
    """Return in words which norm the tokens have passed: by default the network's last."""
    return "none" if norm == "none" else "final LayerNorm"

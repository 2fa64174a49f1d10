"""The feature loss of a run, by name: the one place that knows what each needs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from .attention_transfer import attention_transfer
from .channel_wise_kl import channel_wise_kl
from .foreground_mse import foreground_mse
from .masked_generative import MaskedGenerator, masked_generative
from .names import FEATURE_LOSSES
from .pairs import paired_maps
from .pearson import OverRanks, pearson
from .pointwise import feature_cosine, feature_mse

__all__ = ["CWD_TEMPERATURE", "FEATURE_LOSSES", "FeatureLoss"]

# At 4, as in the source's code for segmentation, a place three deviations above its standardised channel's mean weighs
# only twice an average one, and the loss is nearly half a centred mean squared error. At 1 it weighs twenty times.
CWD_TEMPERATURE = 1.0

_PLAIN: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mse": feature_mse,
    "cosine": feature_cosine,
    "cwd": partial(channel_wise_kl, temperature=CWD_TEMPERATURE),
    "attention": attention_transfer,
}


class FeatureLoss(nn.Module):
    """The distance between the adapted student map and the teacher's, with whatever weights it trains.

    name: one of FEATURE_LOSSES.  channels: C of the teacher.  seed_generator: on the CPU; a loss with weights (`mgd`)
    draws them from it, others draw nothing and do without.  over_ranks: as `pearson` takes it, the one loss that looks
    across images.

    Raises ValueError for another name, and for `mgd` without a generator.
    """

    def __init__(
        self,
        name: str,
        channels: int,
        *,
        seed_generator: torch.Generator | None = None,
        over_ranks: OverRanks | None = None,
    ) -> None:
        super().__init__()
        if name not in FEATURE_LOSSES:
            raise ValueError(f"expected a feature loss of {', '.join(FEATURE_LOSSES)}, found {name!r}")
        self.name = name
        self.channels = channels
        self.over_ranks = over_ranks
        self.generator: MaskedGenerator | None = None
        if name == "mgd":
            if seed_generator is None:
                raise ValueError("expected a seed generator for the weights of mgd, found none")
            self.generator = MaskedGenerator(channels, seed_generator)

    def forward(
        self,
        student: Tensor,
        teacher: Tensor,
        boxes: Sequence[Tensor],
        generators: Sequence[torch.Generator] | None = None,
    ) -> Tensor:
        """Return the loss, a scalar, computed without autocast.

        student: [B, C, H, W], the adapter's output.  teacher: [B, C, H, W], as `standardise` gives it.  boxes: for each
        image [n, 4] float xyxy in frame pixels, ground truth in the shown view; only `fgd` reads them.  generators:
        on the CPU, one an image, fresh for each step; only `mgd` draws from them, and needs them.

        Raises ValueError for shapes that do not belong together, and for `mgd` without generators.
        """
        if student.ndim != 4 or student.shape[1] != self.channels:
            raise ValueError(f"expected student features [B, {self.channels}, H, W], found {list(student.shape)}")
        student, teacher = paired_maps(student, teacher)
        with torch.autocast(student.device.type, enabled=False):
            if self.generator is not None:
                return masked_generative(self.generator(student, generators or ()), teacher)
            if self.name == "fgd":
                return foreground_mse(student, teacher, boxes)
            if self.name == "pkd":
                return pearson(student, teacher, self.over_ranks)
            return _PLAIN[self.name](student, teacher)

"""The names of the feature losses, without torch: a configuration and the command line can offer them."""

from __future__ import annotations

from typing import Literal, get_args

FeatureLossName = Literal["mse", "cosine", "cwd", "pkd", "mgd", "attention", "fgd"]
FEATURE_LOSSES: tuple[FeatureLossName, ...] = get_args(FeatureLossName)

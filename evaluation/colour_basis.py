"""Colours of feature maps: parts of one kind share a colour."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class ColourBasis:
    """What makes colours of features: the first principal components of one map, each over its own range.

    mean: [C].  directions: [k, C], k ≤ 3 of unit length.  low, high: [k], what becomes 0 and 1.  explained: the share
    of that map's variance that the components hold.
    """

    mean: NDArray[np.float64]
    directions: NDArray[np.float64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]
    explained: float

    @classmethod
    def of(cls, features: NDArray[np.float64]) -> Self:
        """Return the basis of a map [Gh, Gw, C].

        Signs are fixed so that equal features give equal colours; each component is stretched between its 1st and 99th
        percentile, or outlier tokens would take the whole range. Features of lower rank have fewer components.
        """
        flat = features.reshape(-1, features.shape[2])
        mean = flat.mean(axis=0)
        _, strengths, directions = np.linalg.svd(flat - mean, full_matrices=False)
        rank = int((strengths > 1e-9 * max(np.abs(flat).max(), 1e-300) * len(flat)).sum())
        chosen = directions[: min(3, rank)]
        chosen = chosen * np.sign(chosen[np.arange(len(chosen)), np.abs(chosen).argmax(axis=1)])[:, None]
        low, high = np.percentile((flat - mean) @ chosen.T, [1, 99], axis=0)
        power = strengths**2
        return cls(mean, chosen, low, high, float(power[:3].sum() / power.sum()) if rank else 1.0)

    def colours(self, features: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return a map [Gh, Gw, C] as RGB [Gh, Gw, 3] in 0..1; mid-grey for a component that the basis lacks."""
        colours = np.full((*features.shape[:2], 3), 0.5)
        components = (features - self.mean) @ self.directions.T
        wide = self.high > self.low
        scaled = (components[..., wide] - self.low[wide]) / (self.high - self.low)[wide]
        colours[..., np.flatnonzero(wide)] = scaled.clip(0, 1)
        return colours

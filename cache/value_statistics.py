"""Whether what a store holds is plausible: mean, spread and outlying samples of its arrays, from a bounded number.

Statistics of features come from the stored moments of their view, so no feature is read.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from math import prod

import numpy as np
from numpy.typing import NDArray

from cache.layout import ArrayLayout
from cache.shard import read_shard
from cache.storage import Storage
from data.errors import StoreError

# Enough for three digits of a mean; few enough to be read in a tenth of a second.
MAX_SAMPLES = 4096
# Of what a teacher puts out; scales and moments follow from features.
OF_VALUES = ("features", "logits", "embeddings")
_DEVIATIONS = 6.0
# The standard deviation of a normal distribution over its median absolute deviation.
_MAD_TO_STD = 1.4826
# Unit-norm embeddings differ by rounding alone: a difference below this share of the median is none.
_ROUNDING = 1e-3


@dataclass(frozen=True)
class ArrayStatistics:
    """Figures over the values of some committed samples of one array.

    samples: how many.  mean, std: over all their values.  outliers: rows whose root mean square is out of line (see
    `find_outliers`), the worst first.
    """

    samples: int
    mean: float
    std: float
    outliers: tuple[int, ...]


def view_statistics(
    storage: Storage, layouts: Mapping[str, ArrayLayout], committed: Mapping[str, Collection[int]]
) -> dict[str, ArrayStatistics]:
    """Return the statistics of a view's features, logits and embeddings by array name.

    layouts: of all arrays of the view.  committed: shards by array name.  At most 4,096 samples of each array are read,
    in evenly spaced committed shards. A shard that cannot be read is left out: `find_problems` tells what is wrong with
    it. An array of which nothing can be read is not in the result.
    """
    statistics = {}
    for name in OF_VALUES:
        if name not in layouts:
            continue
        source = "moments" if name == "features" else name
        both = [
            shard for shard in committed[name] if shard in committed[source] and 0 <= shard < layouts[name].num_shards
        ]
        shards = spaced_shards(both, layouts[name].shard_samples)
        rows, sums, squares = _sums(storage, layouts[source], shards)
        # Moments are sums over the cells of a sample; features have as many values as cells and channels.
        found = _statistics(rows, sums, squares, prod(layouts[name].sample_shape))
        if found is not None:
            statistics[name] = found
    return statistics


def spaced_shards(committed: Collection[int], shard_samples: int) -> list[int]:
    """Return evenly spaced ones of the committed shards, first and last included, of at most 4,096 samples in all."""
    shards = sorted(committed)
    count = min(len(shards), max(1, MAX_SAMPLES // shard_samples))
    return [shards[int(place)] for place in np.linspace(0, len(shards) - 1, count).round()] if shards else []


def find_outliers(rms: NDArray[np.float64]) -> NDArray[np.int64]:
    """Return the places of outlying samples, the worst first.

    rms: [n], each sample's root mean square. Outlying is one that differs from the median by more than six robust
    standard deviations, 1.4826 × the median absolute deviation each, and by more than a thousandth of the median; and
    any that is not finite, which only a damaged store holds.

    Source: Rousseeuw and Croux, "Alternatives to the median absolute deviation" (1993), section 1.
    """
    finite = np.isfinite(rms)
    if not finite.any():
        return np.arange(len(rms))
    median = _median(rms[finite])
    distance = np.where(finite, np.abs(rms - median), np.inf)
    spread = _MAD_TO_STD * _median(distance[finite])
    order = np.argsort(-distance, kind="stable")
    return order[distance[order] > max(_DEVIATIONS * spread, _ROUNDING * median)]


def _median(values: NDArray[np.float64]) -> float:
    # Not numpy's own, which imports masked arrays: as long as all that is done here.
    ordered = np.sort(values)
    middle = len(ordered) // 2
    return float(ordered[middle] + ordered[~middle]) / 2


def _sums(
    storage: Storage, layout: ArrayLayout, shards: list[int]
) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.float64]]:
    """Return rows [n], and each one's sum of values and sum of squares [n], of the given shards."""
    rows, sums, squares = [np.empty(0, np.int64)], [np.empty(0)], [np.empty(0)]
    array = storage.array(layout)
    for shard in shards:
        try:
            values = read_shard(array, shard)[:MAX_SAMPLES]
        except (StoreError, OSError):
            continue
        first, _ = layout.shard_range(shard)
        rows.append(np.arange(first, first + len(values)))
        if layout.dimensions[1] == "moment":
            sums.append(values[:, 0].sum(axis=1, dtype=np.float64))
            squares.append(values[:, 1].sum(axis=1, dtype=np.float64))
        else:
            wide = values.reshape(len(values), -1).astype(np.float64)
            sums.append(wide.sum(axis=1))
            squares.append(np.einsum("ij,ij->i", wide, wide))
    return np.concatenate(rows), np.concatenate(sums), np.concatenate(squares)


def _statistics(
    rows: NDArray[np.int64], sums: NDArray[np.float64], squares: NDArray[np.float64], values: int
) -> ArrayStatistics | None:
    """Return the statistics of samples of so many values each; None where no sample is finite."""
    finite = np.isfinite(sums) & np.isfinite(squares) & (squares >= 0)
    if not finite.any():
        return None
    mean = float(sums[finite].mean()) / values
    variance = float(squares[finite].mean()) / values - mean**2
    rms = np.sqrt(np.where(finite, squares, np.nan) / values)
    outliers = tuple(int(row) for row in rows[find_outliers(rms)])
    return ArrayStatistics(len(rows), mean, max(variance, 0.0) ** 0.5, outliers)

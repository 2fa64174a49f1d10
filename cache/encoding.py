"""From a teacher's output to what is stored, and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cache.int8 import LARGEST, dequantise, quantise
from cache.layout import ArrayLayout

Arrays = Mapping[str, NDArray[Any]]


class NotStorableError(ValueError):
    """One sample's features cannot be held as int8: not finite, or of a magnitude of 1e38 or more."""

    def __init__(self, row: int) -> None:
        super().__init__(f"sample {row} of the range cannot be held as int8")
        self.row = row


def encode(
    outputs: Mapping[str, NDArray[np.floating]], layouts: Mapping[str, ArrayLayout]
) -> dict[str, NDArray[np.generic]]:
    """Return the arrays of a view for a range of samples as they are stored, moments and scales computed.

    outputs: [count, …] float16 or float32 by array name; images uint8.  layouts: all arrays of the view.

    Raises NotStorableError; a value that float16 cannot hold becomes infinite, for the writer to refuse.
    """
    stored = {name: _cast(values, layouts[name]) for name, values in outputs.items() if name != "features"}
    if "features" in outputs:
        stored.update(_encode_features(outputs["features"], layouts["features"]))
    return stored


def _encode_features(features: NDArray[np.floating], layout: ArrayLayout) -> dict[str, NDArray[np.generic]]:
    if layout.dtype != "int8":
        cast = _cast(features, layout)
        return {"features": cast, "moments": feature_moments(cast)}
    for row, sample in enumerate(features):
        if not max(float(sample.max()), -float(sample.min())) < LARGEST:  # NaN is below nothing
            raise NotStorableError(row)
    stored = quantise(features)._asdict()
    # One sample at a time: as numbers, a whole shard would be four times what is stored.
    each = [feature_moments(decode({name: values[row : row + 1] for name, values in stored.items()}))
            for row in range(len(features))]  # fmt: skip
    return {**stored, "moments": np.concatenate(each)}


def decode(arrays: Arrays) -> NDArray[np.floating]:
    """Return features as numbers: those of int8 multiplied by their scales, float32; others as they are.

    arrays: `features` of one sample or of several, with `scale_channel` and `scale_token` where they are int8.
    """
    features = arrays["features"]
    if features.dtype != np.int8:
        return features
    return dequantise(features, arrays["scale_channel"], arrays["scale_token"])


def feature_moments(features: NDArray[np.generic]) -> NDArray[np.float32]:
    """Return each sample's channel sums and sums of squares over its cells, [n, 2, C] float32.

    features: [n, Gh, Gw, C] as stored, so that the statistics are those of what a student will read.
    """
    cells = features.reshape(len(features), -1, features.shape[-1])
    moments = np.empty((len(features), 2, features.shape[-1]), dtype="<f4")
    for row, sample in enumerate(cells):  # one at a time: a float64 copy of a whole shard would be 180 MB
        values = sample.astype(np.float64)
        with np.errstate(invalid="ignore", over="ignore"):  # what is not finite is refused by its sample later
            moments[row, 0] = values.sum(axis=0)
            moments[row, 1] = np.einsum("ij,ij->j", values, values)
    return moments


def _cast(values: NDArray[np.floating], layout: ArrayLayout) -> NDArray[np.generic]:
    if layout.dtype == "uint8":  # as they come: a cast would wrap what is no image, where the writer refuses it
        return values
    with np.errstate(over="ignore"):
        return values.astype(layout.numpy_dtype, copy=False)

"""Features as int8 with two scales a sample: one for each channel, one for each token.

A transformer's patch grid holds a few tokens of a norm many times that of the rest. One scale a channel must reach
those tokens and leaves the others few steps; so each token brings a scale of its own.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

STEPS = 127  # values are −127…127; −128 is the fill value, never a feature

# A restored value is at most twice the original one: below this limit it is a finite float32.
LARGEST = 1e38
# No scale is subnormal: where a process flushes those to zero, such a scale would be no scale at all.
_SMALLEST_SCALE = float(np.finfo(np.float32).smallest_normal)


class Quantised(NamedTuple):
    """Features [n, Gh, Gw, C] as int8, and the scales that restore them.

    features: [n, Gh, Gw, C] int8 in −127…127.  scale_channel: [n, C] float32.  scale_token: [n, Gh, Gw] float32.
    Value = features · scale_token · scale_channel. Scales are finite; 0 for a channel or a token of zeros.
    """

    features: NDArray[np.int8]
    scale_channel: NDArray[np.float32]
    scale_token: NDArray[np.float32]


def quantise(features: NDArray[np.floating]) -> Quantised:
    """Return the features as int8, each sample on its own.

    features: [n, Gh, Gw, C] float16 or float32. With t a token's root mean square over its channels, a channel's scale
    is the largest |x / t| over the tokens, and a token's scale the largest |x / channel scale| over the channels,
    divided by 127. Scales are rounded up to float32, so a value is restored to within half a step: half the product
    of its two scales.

    Raises ValueError for another shape or dtype, and for a value that is not finite or whose magnitude is 1e38 or more.
    """
    if features.ndim != 4 or features.dtype not in (np.float16, np.float32) or 0 in features.shape[1:]:
        raise ValueError(
            f"expected features [n, Gh, Gw, C] float16 or float32, found {features.shape} {features.dtype}"
        )
    num_samples, rows, columns, channels = features.shape
    result = Quantised(
        np.empty(features.shape, dtype=np.int8),
        np.empty((num_samples, channels), dtype=np.float32),
        np.empty((num_samples, rows, columns), dtype=np.float32),
    )
    # One at a time: the float64 copies of a whole shard would take gigabytes.
    for sample in range(num_samples):
        tokens = features[sample].reshape(-1, channels).astype(np.float64)
        if not max(tokens.max(), -tokens.min()) < LARGEST:  # NaN is below nothing
            raise ValueError(
                f"sample {sample}: expected finite features of magnitude below {LARGEST:g},"
                f" found {tokens.flat[np.argmin(np.abs(tokens) < LARGEST)]}"
            )
        quantised, scale_channel, scale_token = _quantise_tokens(tokens)
        result.features[sample] = quantised.reshape(rows, columns, channels)
        result.scale_channel[sample] = scale_channel
        result.scale_token[sample] = scale_token.reshape(rows, columns)
    return result


def dequantise(
    features: NDArray[np.int8], scale_channel: NDArray[np.float32], scale_token: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Return the restored features, float32: (features · scale_token) · scale_channel, each product rounded.

    features: [..., Gh, Gw, C] int8.  scale_channel: [..., C] float32.  scale_token: [..., Gh, Gw] float32.
    A single sample has no leading axes; those of a batch broadcast.

    Raises ValueError for other shapes or dtypes.
    """
    if features.dtype != np.int8 or scale_channel.dtype != np.float32 or scale_token.dtype != np.float32:
        raise ValueError(
            "expected int8 features, float32 channel scales and float32 token scales,"
            f" found {features.dtype}, {scale_channel.dtype} and {scale_token.dtype}"
        )
    grid, channels = features.shape[-3:-1], features.shape[-1:]
    if features.ndim < 3 or scale_channel.shape[-1:] != channels or scale_token.shape[-2:] != grid:
        raise ValueError(
            "expected features [..., Gh, Gw, C], channel scales [..., C] and token scales [..., Gh, Gw],"
            f" found {features.shape}, {scale_channel.shape} and {scale_token.shape}"
        )
    leading = np.broadcast_shapes(features.shape[:-3], scale_channel.shape[:-1], scale_token.shape[:-2])
    restored = np.empty((*leading, *grid, *channels), dtype=np.float32)
    np.multiply(features, scale_token[..., np.newaxis], out=restored)
    restored *= scale_channel[..., np.newaxis, np.newaxis, :]
    return restored


def _quantise_tokens(
    tokens: NDArray[np.float64],
) -> tuple[NDArray[np.int8], NDArray[np.float32], NDArray[np.float32]]:
    """Return one sample's tokens [T, C] as int8 [T, C], with the scales of its channels [C] and tokens [T]."""
    rms = np.sqrt(np.einsum("tc,tc->t", tokens, tokens) / tokens.shape[1])
    scale_channel = _round_up(_peaks(tokens * _reciprocal(rms)[:, np.newaxis], axis=0))
    steps = tokens * _reciprocal(scale_channel)
    scale_token = _round_up(_peaks(steps, axis=1) / STEPS)
    steps *= _reciprocal(scale_token)[:, np.newaxis]
    # Scales were rounded up, so no quotient is beyond 127 by more than float64's rounding: nothing is left to clip.
    return np.rint(steps, out=steps).astype(np.int8), scale_channel, scale_token


def _peaks(values: NDArray[np.float64], axis: int) -> NDArray[np.float64]:
    return np.asarray(np.maximum(values.max(axis=axis), -values.min(axis=axis)))


def _reciprocal(values: NDArray[np.floating]) -> NDArray[np.float64]:
    """Return 1 / values in float64; 0 for 0, so that zero tokens and channels stay zero."""
    wide = values.astype(np.float64)
    return np.divide(1.0, wide, out=np.zeros_like(wide), where=wide > 0)


def _round_up(values: NDArray[np.float64]) -> NDArray[np.float32]:
    """Return the smallest normal float32 numbers that are no less than the values; 0 for 0."""
    raised = np.where(values > 0, np.maximum(values, _SMALLEST_SCALE), 0.0)
    rounded = raised.astype(np.float32)
    return np.where(rounded < raised, np.nextafter(rounded, np.float32(np.inf)), rounded)

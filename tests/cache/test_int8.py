from __future__ import annotations

import math
import tracemalloc
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from cache.int8 import dequantise, quantise

Array = np.ndarray[Any, Any]

SMALLEST_NORMAL = 2.0**-126


def gaussian(shape: tuple[int, ...], seed: int = 0) -> Array:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def with_outliers(seed: int = 0) -> Array:
    """A sample [1, 30, 30, 64] with six tokens of thirty times the norm of the rest."""
    features = gaussian((1, 900, 64), seed)
    features[0, np.random.default_rng(seed).choice(900, 6, replace=False)] *= 30
    return features.reshape(1, 30, 30, 64)


def cosines(original: Array, restored: Array) -> Array:
    a, b = (x.reshape(-1, x.shape[-1]).astype(np.float64) for x in (original, restored))
    return np.sum(a * b, axis=1) / np.sqrt(np.sum(a * a, axis=1) * np.sum(b * b, axis=1))


def assert_within_half_a_step(features: Array) -> None:
    quantised, scale_channel, scale_token = quantise(features)
    assert quantised.dtype == np.int8
    assert np.abs(quantised.astype(int)).max() <= 127
    assert (scale_channel.dtype, scale_token.dtype) == (np.float32, np.float32)
    for scale in (scale_channel, scale_token):
        assert np.isfinite(scale).all()
        assert ((scale == 0) | (scale >= SMALLEST_NORMAL)).all()
    restored = dequantise(quantised, scale_channel, scale_token).astype(np.float64)
    step = scale_token.astype(np.float64)[..., None] * scale_channel.astype(np.float64)[:, None, None, :]
    rounding = np.abs(restored) * 2.0**-22 + SMALLEST_NORMAL  # two float32 products
    assert (np.abs(features.astype(np.float64) - restored) <= step / 2 + rounding).all()


def slow_channel_scales(tokens: list[list[float]]) -> list[float]:
    """The rule, word by word, in plain Python."""
    rms = [math.sqrt(math.fsum(x * x for x in token) / len(token)) for token in tokens]
    relative = [[abs(x) / t if t else 0.0 for x in token] for token, t in zip(tokens, rms, strict=True)]
    return [max(column) for column in zip(*relative, strict=True)]


def slow_token_scales(tokens: list[list[float]], channel: list[float]) -> list[float]:
    return [
        max(abs(x) / scale if scale else 0.0 for x, scale in zip(token, channel, strict=True)) / 127 for token in tokens
    ]


def slow_steps(tokens: list[list[float]], channel: Array, token: Array) -> list[list[int]]:
    """x / (token scale · channel scale) for the stored scales, exactly, to the nearest whole number."""
    columns, rows = [Fraction(float(s)) for s in channel], [Fraction(float(s)) for s in token]
    return [
        [round(Fraction(x) / (s * u)) if s * u else 0 for x, s in zip(values, columns, strict=True)]
        for values, u in zip(tokens, rows, strict=True)
    ]


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("zeros", [False, True], ids=["dense", "with zeros"])
def test_scales_and_steps_are_those_of_the_rule(dtype: type, zeros: bool) -> None:
    features = (gaussian((2, 4, 5, 9)) * np.geomspace(0.01, 30, 9, dtype=np.float32)).astype(dtype)
    features[1, 2, 3] *= 20
    if zeros:
        features[:, 1, 2], features[..., 4] = 0, 0
    quantised, scale_channel, scale_token = quantise(features)
    for sample in range(2):
        tokens = features[sample].reshape(-1, 9).astype(np.float64).tolist()
        channel = slow_channel_scales(tokens)
        token = slow_token_scales(tokens, scale_channel[sample].tolist())
        # Rounded up to the next float32, no further.
        for stored, exact in ((scale_channel[sample], channel), (scale_token[sample].ravel(), token)):
            assert (stored >= np.array(exact) * (1 - 1e-15)).all()
            assert (stored <= np.array(exact) * (1 + 2.0**-23) * (1 + 1e-15)).all()
        steps = slow_steps(tokens, scale_channel[sample], scale_token[sample].ravel())
        assert quantised[sample].reshape(-1, 9).tolist() == steps


def test_the_scales_of_a_sample_worked_by_hand() -> None:
    """Tokens (3, 4, 0, 0) and (0, 0, 0, 1): RMS 5/2 and 1/2."""
    features = np.array([[[[3, 4, 0, 0], [0, 0, 0, 1]]]], dtype=np.float32)
    quantised, scale_channel, scale_token = quantise(features)
    np.testing.assert_allclose(scale_channel, [[1.2, 1.6, 0, 2]], rtol=2e-7)
    np.testing.assert_allclose(scale_token, [[[2.5 / 127, 0.5 / 127]]], rtol=3e-7)
    assert quantised.tolist() == [[[[127, 127, 0, 0], [0, 0, 0, 127]]]]


def test_values_are_features_by_token_scale_by_channel_scale() -> None:
    quantised, scale_channel, scale_token = quantise(gaussian((2, 2, 3, 4)))
    restored = dequantise(quantised, scale_channel, scale_token)
    assert restored.dtype == np.float32
    for n, i, j, c in np.ndindex(quantised.shape):
        assert restored[n, i, j, c] == np.float32(quantised[n, i, j, c]) * scale_token[n, i, j] * scale_channel[n, c]


@given(
    arrays(
        st.sampled_from([np.float16, np.float32]),
        st.tuples(*[st.integers(1, size) for size in (2, 3, 3, 5)]),
        elements=st.floats(-65504, 65504, width=16),
    )
)
def test_any_values_are_restored_to_within_half_a_step(features: Array) -> None:
    assert_within_half_a_step(features)


@given(
    st.tuples(*[st.integers(1, size) for size in (2, 3, 4, 12)]),
    st.tuples(st.integers(-45, 37), st.integers(-45, 37)),
    st.integers(0, 2**32 - 1),
)
def test_any_magnitudes_are_restored_to_within_half_a_step(
    shape: tuple[int, int, int, int], exponents: tuple[int, int], seed: int
) -> None:
    """Tokens and channels of magnitudes between two powers of ten, subnormal numbers and zeros among them."""
    rng = np.random.default_rng(seed)
    low, high = sorted(exponents)
    powers = rng.uniform(low, high, shape[:3])[..., None] + rng.uniform(low - high, 0, shape[3])
    values = rng.uniform(-1, 1, shape) * 10.0**powers
    assert_within_half_a_step(values.astype(np.float32))


EXTREMES = {
    "subnormal": 1e-45,
    "barely normal": 1.2e-38,
    "tiny": 1e-30,
    "vast": 1e30,
    "the largest allowed": 9.9e37,
}


@pytest.mark.parametrize("magnitude", EXTREMES.values(), ids=EXTREMES)
def test_extreme_magnitudes_keep_scales_finite(magnitude: float) -> None:
    features = np.sign(gaussian((1, 3, 3, 8))) * np.float32(magnitude)
    assert_within_half_a_step(features)
    mixed = gaussian((1, 3, 3, 8))
    mixed[0, 1], mixed[..., 2] = features[0, 1], features[..., 2]
    assert_within_half_a_step(mixed)


def test_steps_stay_within_127_for_a_million_random_peaks() -> None:
    """Constant rows reach their peak everywhere, so that every rounding of a scale shows."""
    values = np.random.default_rng(1).uniform(0.1, 10, (1, 1000, 1000, 1)).astype(np.float32)
    assert (quantise(values).features == 127).all()


def test_zero_tokens_and_channels_are_exact_zeros() -> None:
    features = with_outliers()
    features[0, 3, 4], features[..., 7] = 0, 0
    quantised, scale_channel, scale_token = quantise(features)
    assert scale_channel[0, 7] == 0
    assert scale_token[0, 3, 4] == 0
    assert np.count_nonzero(scale_channel == 0) == np.count_nonzero(scale_token == 0) == 1
    restored = dequantise(quantised, scale_channel, scale_token)
    assert not restored[0, 3, 4].any()
    assert not restored[..., 7].any()


def test_a_sample_of_zeros_is_zeros() -> None:
    result = quantise(np.zeros((2, 3, 3, 4), dtype=np.float16))
    assert not any(array.any() for array in result)
    assert not dequantise(*result).any()


@pytest.mark.parametrize("seed", range(3))
def test_both_scales_hold_tokens_that_channel_scales_alone_lose(seed: int) -> None:
    features = with_outliers(seed)
    assert np.percentile(cosines(features, dequantise(*quantise(features))), 1) >= 0.9999

    scale = np.abs(features).max(axis=(1, 2), keepdims=True) / 127
    channels_only = np.rint(features / scale) * scale
    assert 0.97 < np.percentile(cosines(features, channels_only), 1) < 0.993


def test_a_sample_is_quantised_and_restored_alone_as_in_a_batch() -> None:
    features = gaussian((3, 4, 4, 6)) * np.array([1, 100, 0.01], dtype=np.float32)[:, None, None, None]
    batch = quantise(features)
    restored = dequantise(*batch)
    for sample in range(3):
        alone = quantise(features[sample : sample + 1])
        assert all((a[0] == b[sample]).all() for a, b in zip(alone, batch, strict=True))
        assert (dequantise(*(array[sample] for array in batch)) == restored[sample]).all()


def test_leading_axes_of_the_scales_broadcast() -> None:
    quantised, scale_channel, scale_token = quantise(gaussian((2, 3, 3, 4)))
    restored = dequantise(quantised, scale_channel[0], scale_token)
    assert (restored[1] == dequantise(quantised[1], scale_channel[0], scale_token[1])).all()
    assert dequantise(quantised[0], scale_channel, scale_token).shape == (2, 3, 3, 4)


def test_no_samples_are_no_samples() -> None:
    result = quantise(np.zeros((0, 3, 3, 4), dtype=np.float32))
    assert [array.shape for array in result] == [(0, 3, 3, 4), (0, 4), (0, 3, 3)]
    assert dequantise(*result).shape == (0, 3, 3, 4)


def test_the_features_given_are_left_as_they_were_and_need_not_be_contiguous() -> None:
    features = gaussian((2, 4, 4, 6))
    before = features.copy()
    mirrored = quantise(features[:, :, ::-1])
    assert (features == before).all()
    assert (mirrored.features == quantise(features).features[:, :, ::-1]).all()


def test_working_memory_is_that_of_one_sample() -> None:
    features = gaussian((40, 10, 10, 64))
    tracemalloc.start()
    try:
        result = quantise(features)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    sample_float64 = features[0].size * 8
    assert peak - sum(array.nbytes for array in result) < 6 * sample_float64


VALUES = {"NaN": np.nan, "infinity": np.inf, "negative infinity": -np.inf, "beyond the largest": -1.1e38}


@pytest.mark.parametrize("value", VALUES.values(), ids=VALUES)
def test_a_value_that_cannot_be_scaled_is_refused_and_its_sample_named(value: float) -> None:
    features = gaussian((2, 2, 2, 3))
    features[1, 0, 1, 2] = value
    with pytest.raises(ValueError, match=r"sample 1: expected finite features of magnitude below 1e\+38, found -?\w"):
        quantise(features)


BAD_FEATURES = {
    "no batch axis": np.zeros((2, 2, 3), np.float32),
    "float64": np.zeros((1, 2, 2, 3), np.float64),
    "integers": np.zeros((1, 2, 2, 3), np.int8),
    "big-endian": np.zeros((1, 2, 2, 3), ">f4"),
    "no tokens": np.zeros((1, 0, 2, 3), np.float32),
    "no channels": np.zeros((1, 2, 2, 0), np.float32),
}


@pytest.mark.parametrize("features", BAD_FEATURES.values(), ids=BAD_FEATURES)
def test_features_of_another_shape_or_dtype_are_refused(features: Array) -> None:
    with pytest.raises(ValueError, match=r"expected features \[n, Gh, Gw, C\] float16 or float32, found \("):
        quantise(features)


BAD_PARTS = {
    "uint8 features": (np.zeros((2, 3, 4), np.uint8), np.zeros(4, np.float32), np.zeros((2, 3), np.float32)),
    "float64 channel scales": (np.zeros((2, 3, 4), np.int8), np.zeros(4), np.zeros((2, 3), np.float32)),
    "float64 token scales": (np.zeros((2, 3, 4), np.int8), np.zeros(4, np.float32), np.zeros((2, 3))),
    "a channel less": (np.zeros((2, 3, 4), np.int8), np.zeros(3, np.float32), np.zeros((2, 3), np.float32)),
    "one channel scale": (np.zeros((2, 3, 4), np.int8), np.zeros(1, np.float32), np.zeros((2, 3), np.float32)),
    "another grid": (np.zeros((2, 3, 4), np.int8), np.zeros(4, np.float32), np.zeros((3, 2), np.float32)),
    "no grid": (np.zeros((3, 4), np.int8), np.zeros(4, np.float32), np.zeros(3, np.float32)),
    "batches that do not match": (
        np.zeros((2, 2, 3, 4), np.int8),
        np.zeros((3, 4), np.float32),
        np.zeros((2, 2, 3), np.float32),
    ),
}


@pytest.mark.parametrize("parts", BAD_PARTS.values(), ids=BAD_PARTS)
def test_parts_that_do_not_belong_together_are_refused(parts: tuple[Array, Array, Array]) -> None:
    with pytest.raises(ValueError, match=r"expected|broadcast"):
        dequantise(*parts)

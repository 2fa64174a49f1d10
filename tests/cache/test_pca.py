from __future__ import annotations

import hashlib
import struct
import tracemalloc
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.linalg import subspace_angles

from cache.pca import Pca, PcaFit

Array = np.ndarray[Any, Any]


def tokens(count: int, channels: int, *, mean: float = 1.0, decay: float = 0.7, seed: int = 0) -> Array:
    """Tokens [count, channels] float32 whose standard deviations fall by `decay` along random directions."""
    rng = np.random.default_rng(seed)
    directions = np.linalg.qr(rng.normal(size=(channels, channels)))[0]
    spread = rng.normal(size=(count, channels)) * decay ** np.arange(channels)
    return (spread @ directions + mean * rng.normal(size=channels)).astype(np.float32)


def fitted(features: Array, components: int) -> Pca:
    fit = PcaFit(features.shape[-1])
    fit.update(features)
    return fit.solve(components)


def svd_pca(features: Array) -> tuple[Array, Array, Array]:
    """Mean, rows of right singular vectors and shares of variance of all tokens at once, in float64."""
    flat = features.reshape(-1, features.shape[-1]).astype(np.float64)
    mean = flat.mean(axis=0)
    _, strengths, rows = np.linalg.svd(flat - mean, full_matrices=False)
    return mean, rows, strengths**2 / np.sum(strengths**2)


def with_positive_peaks(rows: Array) -> Array:
    peaks = [row[np.abs(row).argmax()] for row in rows]
    return rows * np.sign(peaks)[:, None]


CASES = {
    "few channels": tokens(500, 5),
    "more tokens than a block": tokens(3000, 16),
    "float16": tokens(700, 8).astype(np.float16),
    "samples": tokens(480, 12).reshape(4, 12, 10, 12),
    "means a million times the spread": tokens(2000, 6, mean=1e3) * np.float32(1e-3) + np.float32(1e3),
    "as many tokens as channels": tokens(8, 8),
    "six outlier tokens": tokens(900, 12) * np.where(np.arange(900) % 150, 1, 20)[:, None].astype(np.float32),
    "vast": tokens(300, 6) * np.float32(1e30),
    "tiny": tokens(300, 6) * np.float32(1e-30),
}


@pytest.mark.parametrize("features", CASES.values(), ids=CASES)
def test_components_are_those_of_a_singular_value_decomposition(features: Array) -> None:
    kept = min(5, features.shape[-1])
    pca = fitted(features, kept)
    mean, rows, shares = svd_pca(features)
    np.testing.assert_allclose(pca.mean, mean, rtol=1.2e-7, atol=1e-7 * np.abs(mean).max())
    np.testing.assert_allclose(pca.explained, shares[:kept], rtol=1e-5)
    np.testing.assert_allclose(pca.components, with_positive_peaks(rows[:kept]), atol=2e-6)
    assert {array.dtype for array in (pca.mean, pca.components, pca.explained)} == {np.dtype(np.float32)}


def test_components_far_below_the_largest_keep_their_directions() -> None:
    """Variances over twelve decades; products in float32 lose them after six."""
    features = tokens(4000, 40, decay=0.7)
    pca = fitted(features, 39)
    _, rows, shares = svd_pca(features)
    assert shares[38] < 1e-11
    assert np.max(subspace_angles(pca.components.T.astype(np.float64), rows[:39].T)) < 1e-4
    np.testing.assert_allclose(pca.explained, shares[:39], rtol=1e-3)


def test_a_first_batch_far_from_the_rest_costs_no_digits() -> None:
    features = tokens(3000, 6)
    features[:10] += np.float32(1e4)
    fit = PcaFit(6)
    fit.update(features[:10])
    fit.update(features[10:])
    pca, (mean, rows, shares) = fit.solve(6), svd_pca(features)
    np.testing.assert_allclose(pca.mean, mean, rtol=1e-6)
    np.testing.assert_allclose(pca.explained, shares, rtol=1e-4)
    np.testing.assert_allclose(pca.components, with_positive_peaks(rows), atol=1e-5)


@given(st.lists(st.integers(0, 300), max_size=6), st.permutations(range(4)))
def test_neither_cut_nor_order_of_batches_matters(cuts: list[int], order: list[int]) -> None:
    features = tokens(300, 6, mean=100)
    quarters = np.split(features, 4)
    shuffled = np.concatenate([quarters[k] for k in order])
    fit = PcaFit(6)
    for batch in np.split(shuffled, sorted(cuts)):
        fit.update(batch)
    assert fit.num_tokens == 300
    pca, whole = fit.solve(4), fitted(features, 4)
    np.testing.assert_allclose(pca.mean, whole.mean, rtol=1e-6)
    np.testing.assert_allclose(pca.components, whole.components, atol=1e-6)
    np.testing.assert_allclose(pca.explained, whole.explained, rtol=1e-6)


def test_the_components_of_points_on_two_axes_by_hand() -> None:
    """(±2, 0) and (0, ±1) about (10, 20): variances 8 and 2 of 10."""
    pca = fitted(np.array([[12, 20], [8, 20], [10, 21], [10, 19]], dtype=np.float32), 2)
    assert pca.mean.tolist() == [10, 20]
    assert np.abs(pca.components).tolist() == [[1, 0], [0, 1]]
    np.testing.assert_allclose(pca.explained, [0.8, 0.2], rtol=1e-7)
    assert pca.project(np.array([13, 20], dtype=np.float16)).tolist() == [3, 0]
    assert pca.reconstruct(np.array([3, 1], dtype=np.float32)).tolist() == [13, 21]


@pytest.mark.parametrize("seed", range(5))
def test_rows_are_orthonormal_by_falling_variance_with_positive_peaks(seed: int) -> None:
    pca = fitted(tokens(600, 24, seed=seed), 20)
    rows = pca.components.astype(np.float64)
    np.testing.assert_allclose(rows @ rows.T, np.eye(20), atol=1e-6)
    assert (np.diff(pca.explained) <= 0).all()
    assert all(row[np.abs(row).argmax()] > 0 for row in pca.components)


def test_opposite_tokens_give_the_same_components() -> None:
    features = tokens(400, 7)
    assert (fitted(features, 7).components == fitted(-features, 7).components).all()


def test_projection_and_reconstruction_are_those_of_float64() -> None:
    features = tokens(200, 16, mean=50).reshape(2, 10, 10, 16)
    pca = fitted(features, 6)
    rows, mean = pca.components.astype(np.float64), pca.mean.astype(np.float64)
    projected = pca.project(features)
    expected = (features.astype(np.float64) - mean) @ rows.T
    assert (projected.shape, projected.dtype) == ((2, 10, 10, 6), np.float32)
    np.testing.assert_allclose(projected, expected, atol=2e-6)
    restored = pca.reconstruct(projected)
    assert (restored.shape, restored.dtype) == ((2, 10, 10, 16), np.float32)
    np.testing.assert_allclose(restored, expected @ rows + mean, atol=2e-5)


@pytest.mark.parametrize("kept", [1, 4, 9])
def test_what_reconstruction_loses_is_the_variance_not_explained(kept: int) -> None:
    features = tokens(500, 10)
    pca = fitted(features, kept)
    wide = features.astype(np.float64)
    lost = np.sum((wide - pca.reconstruct(pca.project(features))) ** 2) / np.sum((wide - wide.mean(axis=0)) ** 2)
    assert lost == pytest.approx(1 - pca.explained.sum(dtype=np.float64), abs=1e-6)


def test_all_components_restore_the_features() -> None:
    features = tokens(300, 8)
    pca = fitted(features, 8)
    np.testing.assert_allclose(pca.reconstruct(pca.project(features)), features, atol=3e-6)
    assert pca.explained.sum() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_a_sample_is_mapped_alone_as_in_a_batch(dtype: type) -> None:
    features = tokens(5 * 42, 48).reshape(5, 6, 7, 48).astype(dtype)
    pca = fitted(features, 16)
    projected = pca.project(features)
    restored = pca.reconstruct(projected)
    for sample in range(5):
        assert (pca.project(features[sample]) == projected[sample]).all()
        assert (pca.reconstruct(projected[sample]) == restored[sample]).all()


def test_constant_tokens_have_no_variance_and_come_back() -> None:
    features = np.full((2, 3, 3, 4), 0.1, dtype=np.float32)
    pca = fitted(features, 3)
    assert not pca.explained.any()
    np.testing.assert_allclose(pca.components @ pca.components.T, np.eye(3), atol=1e-6)
    assert (pca.reconstruct(pca.project(features)) == features).all()


@pytest.mark.parametrize("seed", range(5))
def test_tokens_of_lower_rank_are_completed_by_rows_without_variance(seed: int) -> None:
    """Whole numbers, so that two directions hold everything exactly."""
    rng = np.random.default_rng(seed)
    features = (rng.integers(-9, 10, (100, 2)) @ rng.integers(-9, 10, (2, 8))).astype(np.float32)
    pca = fitted(features, 8)
    np.testing.assert_allclose(pca.components @ pca.components.T, np.eye(8), atol=1e-6)
    assert pca.explained[:2].sum() == pytest.approx(1, abs=1e-6)
    assert (pca.explained >= 0).all()
    assert pca.explained[2:].max() < 1e-14
    np.testing.assert_allclose(pca.reconstruct(pca.project(features)), features, atol=1e-4)


def test_memory_does_not_grow_with_the_number_of_tokens() -> None:
    fit, batch = PcaFit(32), tokens(20_000, 32)
    fit.update(batch)
    tracemalloc.start()
    try:
        for _ in range(5):
            fit.update(batch)
        kept, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert kept < 3 * 32 * 32 * 8
    assert peak < batch.nbytes / 2


def test_the_features_given_are_left_as_they_were() -> None:
    features = tokens(50, 4)
    before = features.copy()
    pca = fitted(features, 2)
    pca.reconstruct(pca.project(features))
    assert (features == before).all()


def test_a_refused_batch_adds_nothing() -> None:
    features = tokens(2000, 4)
    fit = PcaFit(4)
    fit.update(features)
    bad = features.copy()
    bad[-1, 2] = np.nan
    with pytest.raises(ValueError, match="expected finite features, found NaN or infinity"):
        fit.update(bad)
    assert fit.num_tokens == 2000
    assert fit.solve(4).digest() == fitted(features, 4).digest()


BAD_BATCHES = {
    "another number of channels": np.zeros((3, 5), np.float32),
    "float64": np.zeros((3, 4)),
    "integers": np.zeros((3, 4), np.int8),
    "a number": np.zeros((), np.float32),
}


@pytest.mark.parametrize("batch", BAD_BATCHES.values(), ids=BAD_BATCHES)
def test_tokens_of_another_shape_or_dtype_are_refused(batch: Array) -> None:
    pca = fitted(tokens(50, 4), 4)
    for use in (PcaFit(4).update, pca.project, pca.reconstruct):
        with pytest.raises(ValueError, match=r"expected \[\.\.\., 4\] float16 or float32, found \("):
            use(batch)


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
def test_values_that_are_not_finite_are_refused(value: float) -> None:
    features = tokens(10, 4)
    features[3, 1] = value
    with pytest.raises(ValueError, match="expected finite features"):
        PcaFit(4).update(features)


@pytest.mark.parametrize("components", [-1, 0, 5])
def test_an_impossible_number_of_components_is_refused(components: int) -> None:
    fit = PcaFit(4)
    fit.update(tokens(50, 4))
    with pytest.raises(ValueError, match=f"expected 1 to 4 components, found {components}"):
        fit.solve(components)


def test_more_components_than_tokens_are_refused() -> None:
    fit = PcaFit(4)
    fit.update(tokens(2, 4))
    assert fit.solve(2).components.shape == (2, 4)
    with pytest.raises(ValueError, match="expected at least 3 tokens for 3 components, found 2"):
        fit.solve(3)


def test_no_channels_are_refused() -> None:
    with pytest.raises(ValueError, match="expected at least one channel, found 0"):
        PcaFit(0)


def test_the_digest_is_sha256_over_shapes_and_little_endian_bytes() -> None:
    """Put together by hand."""
    pca = Pca(
        np.array([1, 2, 3], dtype=np.float32), np.array([[0, 1, 0]], dtype=np.float32), np.array([1], dtype=np.float32)
    )
    expected = b'{"components":[1,3],"mean":[3]}' + struct.pack("<6f", 1, 2, 3, 0, 1, 0)
    assert pca.digest() == hashlib.sha256(expected).hexdigest()


def test_the_digest_tells_maps_apart_and_nothing_else() -> None:
    pca = fitted(tokens(50, 4), 2)
    same = Pca(pca.mean.copy(), np.asfortranarray(pca.components), np.zeros(2, np.float32))
    assert same.digest() == pca.digest()
    other_mean, other_rows = pca.mean.copy(), pca.components.copy()
    other_mean[3], other_rows[1, 2] = np.nextafter(other_mean[3], np.float32(9)), 0
    digests = {
        pca.digest(),
        Pca(other_mean, pca.components, pca.explained).digest(),
        Pca(pca.mean, other_rows, pca.explained).digest(),
        Pca(pca.mean, pca.components[:1], pca.explained[:1]).digest(),
    }
    assert len(digests) == 4


MEAN, ROWS, SHARES = np.zeros(3, np.float32), np.eye(2, 3, dtype=np.float32), np.zeros(2, np.float32)
BAD_MAPS = {
    "other channels": ((MEAN[:2], ROWS, SHARES), r"found \(2,\), \(2, 3\), \(2,\)"),
    "other components": ((MEAN, ROWS, SHARES[:1]), r"expected mean \[C\], components \[R, C\], explained \[R\]"),
    "a mean of two axes": ((MEAN[None], ROWS, SHARES), r"found \(1, 3\)"),
    "no components": ((MEAN, ROWS[:0], SHARES[:0]), "expected 1 to 3 components, found 0"),
    "more components than channels": (
        (MEAN, np.zeros((4, 3), np.float32), np.zeros(4, np.float32)),
        "expected 1 to 3 components, found 4",
    ),
    "float64": ((MEAN, ROWS.astype(np.float64), SHARES), "expected finite float32"),
    "NaN": ((MEAN * np.float32("nan"), ROWS, SHARES), "expected finite float32"),
}


@pytest.mark.parametrize(("parts", "message"), BAD_MAPS.values(), ids=BAD_MAPS)
def test_arrays_that_make_no_map_are_refused(parts: tuple[Array, Array, Array], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Pca(*parts)

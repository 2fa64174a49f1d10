from __future__ import annotations

import json
import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from cache.fidelity import Fidelity, FidelityMeter

Array = np.ndarray[Any, Any]


def pair(samples: int = 7, *, mean: float = 0.0, dtype: type = np.float32, seed: int = 0) -> tuple[Array, Array]:
    """Features [samples, 5, 6, 8], their restored copies off by a tenth or so, differing by sample."""
    rng = np.random.default_rng(seed)
    shape = (samples, 5, 6, 8)
    original = rng.normal(size=shape) + mean * rng.normal(size=8)
    restored = original + rng.normal(size=shape) * rng.uniform(0.01, 0.2, (samples, 1, 1, 1))
    return original.astype(dtype), restored.astype(dtype)


def measured(*batches: tuple[Array, Array]) -> Fidelity:
    meter = FidelityMeter()
    for original, restored in batches:
        meter.update(original, restored)
    return meter.result()


def directly(original: Array, restored: Array) -> dict[str, float]:
    """The figures from everything at once, in float64."""
    x, y = (array.reshape(-1, array.shape[-1]).astype(np.float64) for array in (original, restored))
    cosine = np.sum(x * y, axis=1) / np.sqrt(np.sum(x**2, axis=1) * np.sum(y**2, axis=1))
    return {
        "samples": len(original),
        "cosine_mean": cosine.mean(),
        "cosine_p01": np.percentile(cosine, 1),
        "relative_error": np.linalg.norm(x - y) / np.linalg.norm(x),
        "explained_variance": 1 - np.sum((x - y) ** 2) / np.sum((x - x.mean(axis=0)) ** 2),
    }


CASES = {
    "float32": pair(),
    "float16": pair(dtype=np.float16),
    "restored in another dtype": (pair()[0].astype(np.float16), pair()[1]),
    "means far larger than the spread": pair(mean=1e5),
    "vast": tuple(array * np.float32(1e30) for array in pair()),
    "tiny": tuple(array * np.float32(1e-30) for array in pair()),
    "nothing alike": (pair(seed=1)[0], pair(seed=2)[1]),
}


@pytest.mark.parametrize(("original", "restored"), CASES.values(), ids=CASES)
def test_figures_are_those_of_all_tokens_at_once(original: Array, restored: Array) -> None:
    batches = zip(np.split(original, [2, 3]), np.split(restored, [2, 3]), strict=True)
    assert measured(*batches).model_dump() == pytest.approx(directly(original, restored), rel=1e-6, abs=1e-7)


@given(st.lists(st.integers(0, 7), max_size=4), st.permutations(range(7)))
def test_neither_cut_nor_order_of_batches_matters(cuts: list[int], order: list[int]) -> None:
    original, restored = pair(mean=1e3)
    batches = zip(
        np.split(original[order], sorted(cuts)),
        np.split(restored[order], sorted(cuts)),
        strict=True,
    )
    assert measured(*batches).model_dump() == pytest.approx(measured((original, restored)).model_dump(), rel=1e-9)


def test_variance_about_large_means_keeps_its_digits() -> None:
    """Whole numbers 0…8 on top of ten million, an error of one in every other sample: exact in Python's integers."""
    small = np.random.default_rng(0).integers(0, 9, (4, 3, 5, 2))
    original = (10_000_000 + small).astype(np.float32)
    restored = original + np.array([0, 1, 0, 1], dtype=np.float32).reshape(4, 1, 1, 1)
    variances = []
    for channel in small.reshape(60, 2).T.tolist():
        variances.append(sum(x * x for x in channel) - Fraction(sum(channel) ** 2, 60))
    result = measured((original[:1], restored[:1]), (original[1:], restored[1:]))
    assert result.explained_variance == pytest.approx(float(1 - 60 / sum(variances)), rel=1e-10)


def test_figures_worked_by_hand() -> None:
    """(3, 4) for (4, 3): cosine 24/25. (0, 1) for (0, 2): cosine 1. Error 2 + 1 of power 26; mean (1.5, 2.5)."""
    original = np.array([[[[3, 4], [0, 1]]]], dtype=np.float32)
    restored = np.array([[[[4, 3], [0, 2]]]], dtype=np.float32)
    result = measured((original, restored))
    assert result.samples == 1
    assert result.cosine_mean == pytest.approx(0.98)
    assert result.cosine_p01 == pytest.approx(0.96 + 0.01 * 0.04)
    assert result.relative_error == pytest.approx(math.sqrt(3 / 26))
    assert result.explained_variance == pytest.approx(1 - 3 / 9)


def test_the_first_percentile_is_exact_over_all_tokens() -> None:
    """Cosines 0.00, 0.01 … 1.00 over three batches: one of the 101 tokens lies below it."""
    cosine = np.random.default_rng(0).permutation(np.arange(101) / 100)
    restored = np.stack([cosine, np.sqrt(1 - cosine**2)], axis=1).astype(np.float32).reshape(101, 1, 1, 2)
    original = np.zeros_like(restored)
    original[..., 0] = 1
    batches = zip(np.split(original, [40, 41]), np.split(restored, [40, 41]), strict=True)
    assert measured(*batches).cosine_p01 == pytest.approx(0.01, abs=1e-7)


ZEROS = {
    "both": (0.0, 0.0, 1.0),
    "the original": (0.0, 1.0, 0.0),
    "the restored": (1.0, 0.0, 0.0),
    "neither, opposite": (1.0, -1.0, -1.0),
}


@pytest.mark.parametrize(("original", "restored", "cosine"), ZEROS.values(), ids=ZEROS)
def test_zero_tokens_count_as_alike_only_where_both_are(original: float, restored: float, cosine: float) -> None:
    """One such token beside three equal ones."""
    before, after = np.ones((1, 2, 2, 3), np.float32), np.ones((1, 2, 2, 3), np.float32)
    before[0, 1, 1], after[0, 1, 1] = original, restored
    assert measured((before, after)).cosine_mean == pytest.approx((3 + cosine) / 4)


def test_a_perfect_copy_has_perfect_figures() -> None:
    original, _ = pair()
    perfect = {"cosine_mean": 1.0, "cosine_p01": 1.0, "relative_error": 0.0, "explained_variance": 1.0}
    assert measured((original, original)).model_dump() == {"samples": 7, **perfect}
    for constant in (0.0, 0.1):
        features = np.full((3, 5, 6, 8), constant, np.float32)
        assert measured((features, features)).model_dump() == {"samples": 3, **perfect}


def test_an_error_compared_with_nothing_has_no_figure() -> None:
    zeros, constant = np.zeros((2, 3, 3, 4), np.float32), np.full((2, 3, 3, 4), 0.1, np.float32)
    of_zeros, of_constant = measured((zeros, constant)), measured((constant, zeros))
    assert (of_zeros.relative_error, of_zeros.explained_variance) == (None, None)
    assert (of_constant.relative_error, of_constant.explained_variance) == (1.0, None)


@pytest.mark.parametrize("result", [measured(pair()), measured((np.zeros((1, 1, 1, 1)), np.ones((1, 1, 1, 1))))])
def test_figures_go_to_json_and_back(result: Fidelity) -> None:
    text = json.dumps(result.model_dump(), allow_nan=False)
    assert Fidelity.model_validate(json.loads(text)) == result


JSON = {"samples": 1, "cosine_mean": 1.0, "cosine_p01": 0.9, "relative_error": 0.1, "explained_variance": 0.8}
BAD_JSON = {
    "no samples": {**JSON, "samples": 0},
    "an unknown field": {**JSON, "median": 1.0},
    "a missing field": {"samples": 1},
    "NaN": {**JSON, "relative_error": math.nan},
    "minus infinity": {**JSON, "explained_variance": -math.inf},
    "a cosine above one": {**JSON, "cosine_mean": 1.1},
}


@pytest.mark.parametrize("value", BAD_JSON.values(), ids=BAD_JSON)
def test_json_that_cannot_be_figures_is_refused(value: dict[str, float]) -> None:
    assert Fidelity.model_validate(JSON).cosine_p01 == 0.9
    with pytest.raises(ValidationError):
        Fidelity.model_validate(value)


def test_figures_of_nothing_are_refused() -> None:
    meter = FidelityMeter()
    meter.update(np.zeros((0, 2, 2, 3), np.float32), np.zeros((0, 2, 2, 3), np.float32))
    with pytest.raises(ValueError, match="expected at least one sample to compare, found none"):
        meter.result()


GRID = np.ones((2, 2, 3, 4), np.float32)
BAD_PAIRS = {
    "other shapes": (GRID, GRID[:1], r"found \(2, 2, 3, 4\) and \(1, 2, 3, 4\)"),
    "no batch axis": (GRID[0], GRID[0], r"expected two arrays \[n, Gh, Gw, C\]"),
    "no tokens": (GRID[:, :0], GRID[:, :0], r"expected two arrays \[n, Gh, Gw, C\]"),
    "other channels than before": (GRID[..., :3], GRID[..., :3], "expected 4 channels as before, found 3"),
    "NaN": (GRID * np.array([[[[1]]], [[[np.nan]]]]), GRID, "NaN or infinity in original sample 1"),
    "infinity": (GRID, GRID * np.float32(np.inf), "NaN or infinity in restored sample 0"),
}


@pytest.mark.parametrize(("original", "restored", "message"), BAD_PAIRS.values(), ids=BAD_PAIRS)
def test_a_refused_pair_says_why_and_adds_nothing(original: Array, restored: Array, message: str) -> None:
    meter = FidelityMeter()
    meter.update(GRID, GRID / 2)
    before = meter.result()
    with pytest.raises(ValueError, match=message):
        meter.update(original, restored)
    assert meter.result() == before

"""How close restored features are to the originals: the figures kept beside a derived store."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field


class Fidelity(BaseModel):
    """Figures over all tokens of some samples; `model_dump` gives the JSON, `model_validate` takes it back.

    samples: how many were compared.  cosine_mean, cosine_p01: mean and 1st percentile over tokens of the cosine between
    original and restored; two zero tokens count as 1, one as 0.  relative_error: ‖x − x̂‖ / ‖x‖ over everything.
    explained_variance: 1 − Σ‖x − x̂‖² / Σ‖x − mean‖², mean: each channel's over all tokens.

    Where the divisor is zero, the last two are those of a perfect copy if the copy is perfect, else None.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    samples: int = Field(ge=1)
    cosine_mean: float = Field(ge=-1, le=1)
    cosine_p01: float = Field(ge=-1, le=1)
    relative_error: float | None = Field(ge=0)
    explained_variance: float | None = Field(le=1)


class FidelityMeter:
    """Compares restored with original features, batch after batch, in float64.

    It keeps one float32 a token, for the exact percentile: callers pass a bounded number of samples (a thousand of
    30×30 tokens take 3.6 MB).

    Source: Chan, Golub, LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances" (1979):
    the variance about a mean that is known only at the end.
    """

    def __init__(self) -> None:
        self._samples = 0
        self._num_tokens = 0
        self._cosines: list[NDArray[np.float32]] = []
        self._mean: NDArray[np.float64] | None = None
        self._power = 0.0  # Σ ‖x‖²
        self._error = 0.0  # Σ ‖x − x̂‖²
        self._scatter = 0.0  # Σ ‖x − mean‖²

    def update(self, original: NDArray[np.floating], restored: NDArray[np.floating]) -> None:
        """Add samples: two arrays [n, Gh, Gw, C] of float16 or float32.

        Raises ValueError, having added none of them, for other or unequal shapes, for another number of channels than
        before, and for values that are not finite.
        """
        if original.ndim != 4 or original.shape != restored.shape or 0 in original.shape[1:]:
            raise ValueError(f"expected two arrays [n, Gh, Gw, C], found {original.shape} and {restored.shape}")
        channels = original.shape[-1]
        if self._mean is not None and len(self._mean) != channels:
            raise ValueError(f"expected {len(self._mean)} channels as before, found {channels}")
        for name, features in (("original", original), ("restored", restored)):
            for row, sample in enumerate(features):
                if not np.isfinite(sample).all():
                    raise ValueError(f"expected finite features, found NaN or infinity in {name} sample {row}")
        for before, after in zip(original, restored, strict=True):
            self._add(before.reshape(-1, channels).astype(np.float64), after.reshape(-1, channels).astype(np.float64))

    def _add(self, original: NDArray[np.float64], restored: NDArray[np.float64]) -> None:
        """Add one sample's tokens [T, C]."""
        self._cosines.append(_cosines(original, restored).astype(np.float32))
        self._power += _sum_of_squares(original)
        self._error += _sum_of_squares(original - restored)
        mean = original.mean(axis=0)
        self._scatter += _sum_of_squares(original - mean)
        if self._mean is None:
            self._mean = mean
        else:
            share = len(original) / (self._num_tokens + len(original))
            shift = mean - self._mean
            self._scatter += self._num_tokens * share * _sum_of_squares(shift)
            self._mean += share * shift
        self._num_tokens += len(original)
        self._samples += 1

    def result(self) -> Fidelity:
        """Return the figures over everything added so far.

        Raises ValueError where nothing was.
        """
        if not self._samples:
            raise ValueError("expected at least one sample to compare, found none")
        cosines = np.concatenate(self._cosines)
        squared_error = _ratio(self._error, self._power)
        unexplained = _ratio(self._error, self._scatter)
        return Fidelity(
            samples=self._samples,
            cosine_mean=float(cosines.mean(dtype=np.float64)),
            cosine_p01=float(np.percentile(cosines, 1)),
            relative_error=None if squared_error is None else squared_error**0.5,
            explained_variance=None if unexplained is None else 1 - unexplained,
        )


def _cosines(original: NDArray[np.float64], restored: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the cosine [T] of each pair of tokens [T, C]; 1 where both are zero, 0 where one is."""
    norms, restored_norms = np.linalg.norm(original, axis=1), np.linalg.norm(restored, axis=1)
    product = norms * restored_norms
    inner = np.einsum("tc,tc->t", original, restored)
    both_zero = ((norms == 0) & (restored_norms == 0)).astype(np.float64)
    return np.asarray(np.divide(inner, product, out=both_zero, where=product > 0))


def _sum_of_squares(values: NDArray[np.float64]) -> float:
    return float(np.vdot(values, values))


def _ratio(part: float, whole: float) -> float | None:
    """Return part / whole; 0 for nothing of nothing, None for something of nothing."""
    if whole > 0:
        return part / whole
    return 0.0 if part == 0 else None

"""Decimals as short as they can be that still give the same number back."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def shortest(values: NDArray[np.floating], shift: float | NDArray[np.float64] = 0.0) -> NDArray[np.float64]:
    """Return value + shift [n] rounded to the fewest decimals from which `number − shift` is the value again.

    values: [n] float32 or float64; compared in their own dtype.  shift: one number, or [n].
    """
    shifts = np.broadcast_to(np.asarray(shift, dtype=np.float64), values.shape)
    exact = values.astype(np.float64) + shifts
    written = exact.copy()
    pending = np.arange(len(values))
    for decimals in range(16):
        rounded = np.round(exact[pending], decimals)
        enough = (rounded - shifts[pending]).astype(values.dtype) == values[pending]
        written[pending[enough]] = rounded[enough]
        pending = pending[~enough]
    return written

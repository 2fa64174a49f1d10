"""Which images a gallery shows: those that matter, and a spread over all, so that it does not only show failures."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

MOST_ERRORS, MOST_DIFFERENT, SPREAD = "most errors", "runs differ most", "spread over the set"


def choose_images(errors: NDArray[np.int64], count: int) -> dict[int, str]:
    """Return the places of at most `count` images and why each was chosen, in the order of the set.

    errors: [R, N] of each run in each image.  With several runs, a third of the images are those where the runs'
    numbers of errors differ most; then, up to two thirds (one half for a single run), those with most errors over all
    runs; the rest is spread evenly over the images that are left. The earlier image goes first where numbers tie.
    """
    num_runs, num_images = errors.shape
    count = min(count, num_images)
    chosen: dict[int, str] = {}
    if num_runs > 1:
        differing = errors.max(axis=0) - errors.min(axis=0)
        _take(chosen, differing, count // 3, MOST_DIFFERENT)
    _take(chosen, errors.sum(axis=0), count * 2 // 3 if num_runs > 1 else count // 2, MOST_ERRORS)
    left = [place for place in range(num_images) if place not in chosen]
    for place in _evenly(left, count - len(chosen)):
        chosen[place] = SPREAD
    return dict(sorted(chosen.items()))


def how_chosen(reasons: Sequence[str], num_images: int, threshold: float) -> str:
    """Return in words how the images were chosen."""
    if len(reasons) == num_images:
        return f"All {num_images} images."
    counts = {reason: reasons.count(reason) for reason in (MOST_DIFFERENT, MOST_ERRORS, SPREAD)}
    told = ", ".join(f"{number} × {reason}" for reason, number in counts.items() if number)
    return (
        f"{len(reasons)} of {num_images:,} images: {told}. Errors are false positives with a score of {threshold:g}"
        " or more, and objects missed at that score; images are counted over all runs."
    )


def _take(chosen: dict[int, str], rank: NDArray[np.int64], up_to: int, reason: str) -> None:
    """Add the images that rank highest, above zero, until `up_to` are chosen."""
    for place in np.argsort(-rank, kind="stable").tolist():
        if len(chosen) >= up_to or rank[place] <= 0:
            return
        chosen.setdefault(place, reason)


def _evenly(places: Sequence[int], count: int) -> list[int]:
    if count <= 0:
        return []
    return [places[index] for index in np.linspace(0, len(places) - 1, count).round().astype(int).tolist()]

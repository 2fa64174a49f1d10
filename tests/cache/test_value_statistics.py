"""Statistics of what is stored. The referee is numpy over all values, read sample by sample."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from numpy.typing import NDArray

from cache import value_statistics
from cache.catalog import read_catalog
from cache.encoding import decode
from cache.reader import TeacherStore
from cache.value_statistics import ArrayStatistics, find_outliers, spaced_shards, view_statistics
from cache.verify import read_ledgers

if TYPE_CHECKING:
    from tests.cache.conftest import TinyStores


def of_view(store: Path, teacher: str, view: str = "original") -> dict[str, ArrayStatistics]:
    catalog = read_catalog(store)
    ledgers = read_ledgers(catalog)
    layouts = catalog.teachers[teacher].views[view].layouts  # type: ignore[index]
    return view_statistics(
        catalog.storage, layouts, {name: ledgers[layout.path].entries for name, layout in layouts.items()}
    )


def numbers(store: Path, teacher: str, name: str) -> NDArray[np.float64]:
    """All samples of the original view as numbers, [N, values]."""
    opened = TeacherStore(store)
    layouts = opened.catalog.teachers[teacher].views["original"].layouts
    names = [n for n in layouts if n == name or (name == "features" and n.startswith("scale"))]
    rows = range(opened.catalog.root.dataset.samples)
    read = [{n: opened.array(teacher, "original", n).read(row) for n in names} for row in rows]
    values = [decode(arrays) if name == "features" else arrays[name] for arrays in read]
    return np.stack(values).astype(np.float64).reshape(len(values), -1)


@pytest.mark.parametrize("container", ["zarr", "hdf5"])
@pytest.mark.parametrize("dtype", ["float16", "float32", "int8"])
def test_mean_and_std_are_those_of_all_values(stores: TinyStores, dtype: str, container: str) -> None:
    store = stores.build(stores.plan(feature_dtype=dtype, format=container))
    found = {**of_view(store, "dino"), **of_view(store, "clip")}
    assert list(found) == ["features", "logits", "embeddings"]
    for name, statistics_of in found.items():
        values = numbers(store, "dino" if name == "features" else "clip", name)
        assert statistics_of.samples == 7
        assert statistics_of.mean == pytest.approx(values.mean(), rel=1e-5)
        assert statistics_of.std == pytest.approx(values.std(), rel=1e-5)


def test_a_sample_of_other_size_is_an_outlier_in_features_and_in_logits(stores: TinyStores) -> None:
    values = stores.values

    def loud(teacher: str, view: str, name: str, rows: range, *shape: object) -> NDArray[np.float32]:
        size = {4: 100.0, 2: 30.0}
        return np.stack([values(teacher, view, name, [row])[0] * size.get(row, 1.0) for row in rows])

    stores.values = loud  # type: ignore[method-assign]
    store = stores.build(stores.plan(40, teachers=[stores.teacher("dino"), "clip-loud"], shard_samples=3))
    assert of_view(store, "dino")["features"].outliers == (4, 2)  # the worst first
    assert of_view(store, "clip-loud", "hflip")["logits"].outliers == (4, 2)


def test_only_committed_samples_count(stores: TinyStores) -> None:
    store = stores.build(limit=5)  # the first range of all, the second of dino/original
    assert of_view(store, "dino")["features"].samples == 6
    assert of_view(store, "clip", "hflip")["logits"].samples == 3
    assert of_view(stores.build(name="empty.zarr", limit=0), "dino") == {}


def test_features_without_their_moments_are_left_out(store: Path) -> None:
    (store / "dino/original/moments/ledger.jsonl").unlink()
    assert of_view(store, "dino") == {}


@pytest.mark.parametrize("damage", ["flipped", "cut", "gone"])
def test_a_damaged_shard_is_left_out(store: Path, damage: str) -> None:
    shard = store / "dino/original/moments/c/1/0/0"
    data = shard.read_bytes()
    if damage == "gone":
        shard.unlink()
    else:
        shard.write_bytes(data[:7] if damage == "cut" else bytes([data[0] ^ 1]) + data[1:])
    found = of_view(store, "dino")["features"]
    rest = np.delete(numbers(store, "dino", "features"), [3, 4, 5], axis=0)
    assert (found.samples, found.mean) == (4, pytest.approx(rest.mean(), rel=1e-5))


def test_at_most_so_many_samples_are_read_in_evenly_spaced_shards(
    stores: TinyStores, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(value_statistics, "MAX_SAMPLES", 9)
    store = stores.build(stores.plan(21))
    values = numbers(store, "clip", "logits")
    found = of_view(store, "clip")["logits"]
    some = [row for shard in (0, 3, 6) for row in range(3 * shard, 3 * shard + 3)]  # of seven shards
    assert (found.samples, found.mean) == (9, pytest.approx(values[some].mean(), rel=1e-5))
    large = stores.build(stores.plan(12, shard_samples=12), name="large.zarr")
    assert of_view(large, "clip")["logits"].samples == 9


SPACED = {
    "all fit": (range(4), 1024, [0, 1, 2, 3]),
    "none": ((), 64, []),
    "one": ([5], 64, [5]),
    "first and last are among them": (range(259), 1024, [0, 86, 172, 258]),
    "of those committed alone": ([9, 2, 4, 30, 31], 2048, [2, 31]),
    "shards larger than the limit": (range(3), 65536, [0]),
}


@pytest.mark.parametrize(("committed", "shard_samples", "expected"), SPACED.values(), ids=SPACED)
def test_shards_are_evenly_spaced(committed: list[int], shard_samples: int, expected: list[int]) -> None:
    assert spaced_shards(committed, shard_samples) == expected


def test_outliers_lie_beyond_six_robust_standard_deviations() -> None:
    """By hand: with two more samples, one on each side, the median of 96 … 104 stays 100 and the distances from it are
    0, 1, 1, 2, 2, 3, 3, 4, 4 and two larger ones: their median is 3, and six times 1.4826 × 3 is 26.69."""
    usual = [96.0, 97, 98, 99, 100, 101, 102, 103, 104]
    assert list(find_outliers(np.array([*usual, 127, 73]))) == [9, 10]
    assert list(find_outliers(np.array([*usual, 126, 74]))) == []
    assert list(find_outliers(np.array([127, *usual, 70]))) == [10, 0]


def test_a_difference_of_rounding_is_no_outlier() -> None:
    unit = np.full(50, 0.125)
    unit[7], unit[9] = 0.12501, 0.13
    assert list(find_outliers(unit)) == [9]
    assert list(find_outliers(np.zeros(5))) == []


def test_what_is_not_finite_is_an_outlier_of_the_worst_kind() -> None:
    assert list(find_outliers(np.array([5.0, math.nan, 5, 9, 5, math.inf, 5]))) == [1, 5, 3]
    assert list(find_outliers(np.array([math.nan, math.inf]))) == [0, 1]


def test_values_that_are_not_finite_do_not_stop_it(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No commit lets them in, but a forged store may hold them."""
    read_shard = value_statistics.read_shard

    def forged(*arguments: object) -> NDArray[np.generic]:
        values = read_shard(*arguments).copy()  # type: ignore[arg-type]
        values[0] = np.nan
        return values

    monkeypatch.setattr(value_statistics, "read_shard", forged)
    found = of_view(store, "clip")["logits"]
    assert (found.samples, found.outliers) == (7, (0, 3, 6))
    assert math.isfinite(found.mean + found.std)
    monkeypatch.setattr(value_statistics, "read_shard", lambda *a: read_shard(*a) * np.nan)
    assert of_view(store, "clip") == {}

"""A student that learns from the store learns what it would learn from live teachers."""

from pathlib import Path
from typing import Any

import pytest

from data.errors import StoreIncompleteError
from pipeline.config import Distillation
from pipeline.convert import ConvertConfig, convert
from pipeline.debug_batch import Losses, debug_batch, losses_table
from pipeline.extract import extract
from tests.pipeline.small_runs import TINY_TEACHERS, extraction, from_store, small_run

LIVE = Distillation(source="live", teachers=TINY_TEACHERS)


def compare(devkit: Path, store: Path, folder: Path, **changes: Any) -> dict[str, Losses]:
    distillation = changes.pop("distillation", from_store(store))
    return debug_batch(small_run(devkit, folder, distillation=distillation, **changes), LIVE)


@pytest.fixture(scope="module")
def half(devkit: Path, store: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Losses]:
    return compare(devkit, store, tmp_path_factory.mktemp("half"))


@pytest.fixture(scope="module")
def single(devkit: Path, store32: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Losses]:
    return compare(devkit, store32, tmp_path_factory.mktemp("single"))


def miss(columns: dict[str, Losses], column: str, loss: str) -> float:
    """How far a column's loss is off the live one, relative to it."""
    return abs(columns[column][loss] - columns["live"][loss]) / columns["live"][loss]


class TestItIsTheSame:
    def test_the_feature_loss_within_1e_2_at_half_precision(self, half: dict[str, Losses]) -> None:
        assert miss(half, "store", "feature") < 1e-2

    def test_the_feature_loss_within_1e_5_at_single_precision(self, single: dict[str, Losses]) -> None:
        assert miss(single, "store", "feature") < 1e-5

    def test_the_logit_loss_within_1e_5(self, half: dict[str, Losses], single: dict[str, Losses]) -> None:
        assert miss(half, "store", "logit") < 1e-5
        assert miss(single, "store", "logit") < 1e-5

    def test_the_detection_losses_exactly(self, half: dict[str, Losses]) -> None:
        names = {name for name in half["live"] if name.startswith("loss_")} | {"detection"}
        assert len(names) == 5
        for column in ("store", "wrong view"):
            assert {name: half[column][name] for name in names} == {name: half["live"][name] for name in names}

    def test_a_mimic_of_the_live_teacher_has_no_loss_against_the_store(
        self, half: dict[str, Losses], single: dict[str, Losses]
    ) -> None:
        assert half["store"]["feature of a mimic"] < 1e-6
        assert single["store"]["feature of a mimic"] < 1e-9
        assert abs(half["store"]["logit of a mimic"]) < 1e-5


class TestDerivedAndJoinedStores:
    """The mimic of the live teacher has no loss to speak of, the wrong view has a large one."""

    def test_int8(self, devkit: Path, tmp_path: Path) -> None:
        store = extract(extraction(devkit, tmp_path / "s.zarr", dtype="int8")).store
        columns = compare(devkit, store, tmp_path)
        assert miss(columns, "store", "feature") < 1e-2
        assert columns["store"]["feature of a mimic"] < 1e-3
        assert columns["wrong view"]["feature of a mimic"] > 10 * 1e-2

    def test_the_components_of_a_pca(self, devkit: Path, store: Path, tmp_path: Path) -> None:
        """What the live teacher says is projected on the store's basis first."""
        convert(ConvertConfig(source=store, out=tmp_path / "s.zarr", pca=8))
        columns = compare(devkit, tmp_path / "s.zarr", tmp_path)
        assert columns["store"]["feature of a mimic"] < 1e-5
        assert columns["wrong view"]["feature of a mimic"] > 10 * 1e-2

    def test_teachers_from_two_stores(self, devkit: Path, half: dict[str, Losses], tmp_path: Path) -> None:
        stores = [
            extract(extraction(devkit, tmp_path / f"{name}.zarr", teachers=(name,))).store for name in TINY_TEACHERS
        ]
        columns = compare(devkit, stores[0], tmp_path, distillation=from_store(*stores))
        assert columns == half


class TestTheWrongViewIsNot:
    """The control: what the test above accepts must not be what any target would pass."""

    def test_a_mimic_misses_the_wrong_view_by_orders_of_magnitude(self, half: dict[str, Losses]) -> None:
        assert half["wrong view"]["feature of a mimic"] > 10 * 1e-2
        assert half["wrong view"]["feature of a mimic"] > 1e4 * half["store"]["feature of a mimic"]
        assert half["wrong view"]["logit of a mimic"] > 10 * 1e-5

    def test_the_logit_loss_misses_by_ten_times_the_tolerance(self, half: dict[str, Losses]) -> None:
        assert miss(half, "wrong view", "logit") > 10 * 1e-5

    def test_the_feature_loss_misses_by_ten_times_the_tolerance(self, single: dict[str, Losses]) -> None:
        assert miss(single, "wrong view", "feature") > 10 * 1e-5


class TestColumns:
    def test_a_baseline_has_detection_losses_only(self, devkit: Path, tmp_path: Path) -> None:
        columns = debug_batch(small_run(devkit, tmp_path))
        assert list(columns) == ["none"]
        assert not {"feature", "logit"} & columns["none"].keys()
        losses = columns["none"]
        parts = sum(value for name, value in losses.items() if name.startswith("loss_"))
        assert losses["total"] == losses["detection"] == pytest.approx(parts, rel=1e-6)

    def test_the_total_is_the_weighted_sum(self, devkit: Path, store: Path, tmp_path: Path) -> None:
        distillation = from_store(store, alpha=0.5, beta=2, gamma=0.25)
        losses = debug_batch(small_run(devkit, tmp_path, distillation=distillation))["store"]
        expected = 0.5 * losses["detection"] + 2 * losses["feature"] + 0.25 * losses["logit"]
        assert losses["total"] == pytest.approx(expected, rel=1e-6)

    def test_nothing_is_written(self, devkit: Path, tmp_path: Path) -> None:
        debug_batch(small_run(devkit, tmp_path))
        assert list(tmp_path.iterdir()) == []

    def test_a_loss_without_weight_is_compared_nowhere(self, devkit: Path, store: Path, tmp_path: Path) -> None:
        columns = compare(devkit, store, tmp_path, distillation=from_store(store, beta=0))
        assert list(columns) == ["store", "live", "wrong view"]
        assert all("feature" not in losses and "logit" in losses for losses in columns.values())

    def test_the_control_needs_no_flip_in_the_recipe(self, devkit: Path, store: Path, tmp_path: Path) -> None:
        columns = compare(devkit, store, tmp_path, recipe={"flip": 0.0})
        assert columns["wrong view"]["feature of a mimic"] > 0.1

    def test_a_store_without_the_other_view_cannot_be_controlled(self, devkit: Path, tmp_path: Path) -> None:
        store = extract(extraction(devkit, tmp_path / "s.zarr", views=("original",))).store
        with pytest.raises(StoreIncompleteError, match="view 'hflip' is not in the store"):
            compare(devkit, store, tmp_path, recipe={"flip": 0.0})

    def test_the_table_holds_every_loss(self, half: dict[str, Losses]) -> None:
        table = losses_table(half).renderables[0]
        assert table.row_count == len(half["live"])  # type: ignore[attr-defined]

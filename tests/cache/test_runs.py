"""What runs noted: costs and fidelity, added up by hand."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from cache.catalog import read_catalog
from cache.fidelity import Fidelity, FidelityMeter
from cache.runs import Cost, array_fidelity, combined_fidelity, teacher_cost, teacher_map, total_cost

if TYPE_CHECKING:
    from tests.cache.conftest import TinyStores


def note(store: Path, teacher: str, view: str, **facts: Any) -> None:
    """Append a note to every array of a view."""
    catalog = read_catalog(store)
    for layout in catalog.teachers[teacher].views[view].layouts.values():  # type: ignore[index]
        catalog.storage.array(layout).append_provenance({"time": "2026-01-02T03:04:05+00:00", **facts})


def cost(store: Path, teacher: str) -> Cost | None:
    catalog = read_catalog(store)
    return teacher_cost(catalog, catalog.teachers[teacher])


def test_a_run_over_two_views_costs_its_seconds_once(store: Path) -> None:
    for view in ("original", "hflip"):
        note(store, "dino", view, host="a", device="GPU", samples=7, teacher_seconds_all_views=10.5)
    stamp = "2026-01-02T03:04:05+00:00"
    assert cost(store, "dino") == Cost(1, 10.5, 14, ("GPU",), ("a",), (16,), stamp, stamp)


def test_several_runs_add_up(store: Path) -> None:
    for view in ("original", "hflip"):
        note(store, "dino", view, host="a", device="GPU", samples=3, teacher_seconds_all_views=4.0)
    note(store, "dino", "original", host="b", device="CPU", samples=4, teacher_seconds_all_views=6.0)
    # Two runs on one view that took equally long are still two.
    for day in ("05", "07"):
        note(store, "dino", "hflip", host="b", device="CPU", samples=2, teacher_seconds_all_views=1.5,
             time=f"2026-02-{day}T00:00:00+00:00")  # fmt: skip
    found = cost(store, "dino")
    assert found is not None
    assert (found.runs, found.seconds, found.outputs) == (4, 4.0 + 6.0 + 2 * 1.5, 3 + 3 + 4 + 2 + 2)
    assert (found.devices, found.hosts) == (("GPU", "CPU"), ("a", "b"))
    assert (found.first[:10], found.last[:10]) == ("2026-01-02", "2026-02-07")


def test_what_no_extraction_noted_costs_nothing_known(store: Path) -> None:
    assert cost(store, "dino") is None
    note(store, "dino", "original", host="a", command="python cli.py convert-cache a b", samples=7)
    assert cost(store, "dino") is None
    assert total_cost([]) is None


DAMAGED: dict[str, dict[str, Any]] = {
    "seconds that are no number": {"teacher_seconds_all_views": "long"},
    "negative seconds": {"teacher_seconds_all_views": -1},
    "no time": {"time": "yesterday"},
    "a list for a host": {"host": ["a"]},
    "half a sample": {"samples": 0.5},
    "a fidelity of other fields": {"fidelity": {"cosine": 1}},
}


@pytest.mark.parametrize("damage", DAMAGED.values(), ids=DAMAGED)
def test_a_note_that_no_run_would_write_is_left_out(store: Path, damage: dict[str, Any]) -> None:
    sound = {"host": "a", "device": "GPU", "samples": 7, "teacher_seconds_all_views": 2.0}
    note(store, "dino", "original", **sound)
    before = cost(store, "dino")
    note(store, "dino", "original", **{**sound, **damage})
    assert cost(store, "dino") == before


def test_teachers_add_up() -> None:
    one = Cost(2, 1.5, 10, ("GPU",), ("a",), (16,), "2026-01-01", "2026-01-03")
    other = Cost(1, 2.25, 20, ("GPU", "CPU"), ("b",), (8,), "2026-01-02", "2026-01-05")
    together = Cost(2, 3.75, 30, ("GPU", "CPU"), ("a", "b"), (8, 16), "2026-01-01", "2026-01-05")
    assert total_cost([one, other]) == together


def fidelity(samples: int, mean: float, p01: float, error: float | None, explained: float | None) -> Fidelity:
    return Fidelity(
        samples=samples, cosine_mean=mean, cosine_p01=p01, relative_error=error, explained_variance=explained
    )


def test_fidelities_are_weighted_by_samples_and_else_the_worst_counts() -> None:
    both = combined_fidelity([fidelity(10, 0.98, 0.9, 0.2, 0.95), fidelity(30, 0.94, 0.8, 0.1, 0.99)])
    assert both is not None
    assert both.model_dump() == pytest.approx(
        {"samples": 40, "cosine_mean": 0.95, "cosine_p01": 0.8, "relative_error": 0.2, "explained_variance": 0.95}
    )
    unknown = combined_fidelity([fidelity(1, 1, 1, None, 1), fidelity(1, 1, 1, 0.5, None)])
    assert unknown == fidelity(2, 1, 1, None, None)
    assert combined_fidelity([]) is None


def test_what_is_said_of_all_samples_holds_for_all_of_them() -> None:
    """The referee is the meter over everything at once."""
    rng = np.random.default_rng(0)
    whole, parts = FidelityMeter(), []
    for noise, count in ((0.01, 5), (0.3, 2), (0.05, 9)):
        original = rng.normal(size=(count, 4, 4, 8)) + rng.normal(size=8) * 3
        original = original.astype(np.float32)
        restored = original + rng.normal(size=original.shape).astype(np.float32) * np.float32(noise)
        meter = FidelityMeter()
        for one in (meter, whole):
            one.update(original, restored)
        parts.append(meter.result())
    found, truth = combined_fidelity(parts), whole.result()
    assert found is not None
    assert (found.samples, found.cosine_mean) == (truth.samples, pytest.approx(truth.cosine_mean))
    assert found.cosine_p01 <= truth.cosine_p01
    assert found.relative_error is not None
    assert truth.relative_error is not None
    assert found.relative_error >= truth.relative_error
    assert found.explained_variance is not None
    assert truth.explained_variance is not None
    assert found.explained_variance <= truth.explained_variance


def test_each_extraction_measures_what_it_wrote_and_a_conversion_the_whole(store: Path) -> None:
    catalog = read_catalog(store)
    layout = catalog.teachers["dino"].views["original"].layouts["features"]
    assert array_fidelity(catalog, layout) is None
    first, second = fidelity(1, 0.5, 0.5, 0.5, 0.5), fidelity(3, 0.9, 0.9, 0.1, 0.9)
    note(store, "dino", "original", fidelity=first.model_dump())
    note(store, "dino", "original", fidelity=second.model_dump())
    assert array_fidelity(catalog, layout) == combined_fidelity([first, second])
    note(store, "dino", "original", command="python cli.py convert-cache a b")  # at its start
    for measured in (first, second):
        note(store, "dino", "original", command="python cli.py convert-cache a b", fidelity=measured.model_dump())
    assert array_fidelity(catalog, layout) == second


def test_int8_features_bring_the_fidelity_that_was_measured_when_they_were_extracted(stores: TinyStores) -> None:
    from cache.writer import open_writer

    with open_writer(stores.folder / "s.zarr", stores.plan(feature_dtype="int8", views=("original",))) as writer:
        stores.fill(writer)
        writer.note_provenance("dino", "original", {"teacher_seconds_all_views": 1.0})
    catalog = read_catalog(stores.folder / "s.zarr")
    layouts = catalog.teachers["dino"].views["original"].layouts
    found = array_fidelity(catalog, layouts["features"])
    assert found is not None
    assert (found.samples, found.cosine_mean > 0.999) == (3, True)  # one of each shard
    assert array_fidelity(catalog, layouts["scale_token"]) is None


def test_what_held_runs_up_is_told_and_unknown_stages_are_not(store: Path) -> None:
    for stage in ("decode", "disk", "decode"):
        note(store, "dino", "original", teacher_seconds_all_views=1.0, **{"pass": {"bottleneck": stage}})
    note(store, "dino", "original", teacher_seconds_all_views=1.0, **{"pass": {"bottleneck": "\x1b[2J"}})
    found = cost(store, "dino")
    assert found is not None
    assert found.bottlenecks == ("decode", "disk")


def test_the_last_multilabel_map_beside_the_logits_counts(store: Path) -> None:
    catalog = read_catalog(store)
    assert teacher_map(catalog, catalog.teachers["clip"]) is None
    for value in (0.25, 0.5, None, 7.0):
        note(store, "clip", "original", multilabel_map=value)
    assert teacher_map(catalog, catalog.teachers["clip"]) == 0.5
    assert teacher_map(catalog, catalog.teachers["dino"]) is None

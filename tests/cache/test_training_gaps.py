"""What a training run would miss in a store that is sound."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from cache.catalog import read_catalog
from cache.training_gaps import Gap, find_gaps, listed
from cache.verify import read_ledgers

if TYPE_CHECKING:
    from tests.cache.conftest import TinyStores


def gaps(store: Path) -> list[Gap]:
    catalog = read_catalog(store)
    return find_gaps(catalog, read_ledgers(catalog))


def test_a_whole_store_of_one_feature_and_one_logit_teacher_lacks_nothing(whole_store: Path) -> None:
    assert gaps(whole_store) == []


PLANS: dict[str, tuple[dict[str, Any], list[tuple[str | None, str, str]]]] = {
    "no feature teacher": (
        {"teachers": ["clip"]}, [(None, "no teacher has features", "add one, or train with --beta 0")],
    ),
    "no logit teacher": ({"teachers": ["dino"]}, [(None, "no teacher has logits", "add one, or train with --gamma 0")]),
    "two feature teachers": (
        {"teachers": ["dino", "dino-b", "clip"]},
        [(None, "2 teachers have features: dino, dino-b", "name one: --feature-teacher dino")],
    ),
    "two logit teachers": (
        {"teachers": ["dino", "clip-b", "clip"]},
        [(None, "2 teachers have logits: clip, clip-b", "name one: --logit-teacher clip")],
    ),
    "no flipped view": (
        {"views": ("original",)},
        [(key, "no view hflip: training with flips reads it",
          f"train with --flip 0, or add it: python cli.py extract-teachers --voc-root DIR --voc-set 2007:train"
          f" --teacher {key} --untrained --view hflip --shard-samples 3 --out STORE")
         for key in ("clip", "dino")],
    ),
    "only the flipped view": (
        {"views": ("hflip",), "teachers": ["dino", "clip"]},
        [(key, "no view original: every training run reads original",
          f"add it: python cli.py extract-teachers --voc-root DIR --voc-set 2007:train"
          f" --teacher {key} --untrained --view original --shard-samples 3 --out STORE")
         for key in ("clip", "dino")],
    ),
    "another frame": (
        {"frame": (320, 640)},
        [(None, "its frame is 320×640, students see 480×480", "extract a store in that frame")],
    ),
}  # fmt: skip


@pytest.mark.parametrize(("changes", "expected"), PLANS.values(), ids=PLANS)
def test_what_a_plan_leaves_out_is_told(
    stores: TinyStores, changes: dict[str, Any], expected: list[tuple[str | None, str, str]]
) -> None:
    store = stores.build(stores.plan(**changes))
    told = [(gap.teacher, gap.problem, gap.hint.replace(str(store), "STORE")) for gap in gaps(store)]
    assert told == expected


def test_a_store_without_teachers_has_neither_output(stores: TinyStores) -> None:
    assert [gap.problem for gap in gaps(stores.build(stores.plan(teachers=[])))] == [
        "no teacher has features", "no teacher has logits",
    ]  # fmt: skip


def test_uncommitted_samples_are_counted_by_teacher_and_view_with_the_first_ids(stores: TinyStores) -> None:
    store = stores.build(limit=5)  # the first range of all, the second of dino/original
    told = [(gap.teacher, gap.problem) for gap in gaps(store)]
    four = "4 of 7 samples not committed (VOC2007/000004, VOC2007/000005, VOC2007/000006, … 1 more)"
    assert told == [
        ("clip", f"original: {four}"),
        ("clip", f"hflip: {four}"),
        ("dino", "original: 1 of 7 samples not committed (VOC2007/000007)"),
        ("dino", f"hflip: {four}"),
    ]
    for gap in gaps(store):
        assert gap.hint.startswith("the same command again resumes: python cli.py extract-teachers ")
        assert f" --teacher {gap.teacher} " in gap.hint


LEDGERS: dict[str, tuple[Callable[[Path], Path], int]] = {
    "moments": (lambda s: s / "dino/original/moments", 1),
    "features": (lambda s: s / "dino/original/features", 1),
    "embeddings, which no loss reads": (lambda s: s / "clip/original/embeddings", 0),
}


@pytest.mark.parametrize(("array", "expected"), LEDGERS.values(), ids=LEDGERS)
def test_only_what_a_loss_reads_counts(store: Path, array: Callable[[Path], Path], expected: int) -> None:
    (array(store) / "ledger.jsonl").unlink()
    assert len(gaps(store)) == expected


def test_int8_features_need_their_scales(stores: TinyStores) -> None:
    store = stores.build(stores.plan(feature_dtype="int8"))
    assert gaps(store) == []
    (store / "dino/original/scale_token/ledger.jsonl").unlink()
    assert [gap.teacher for gap in gaps(store)] == ["dino"]


def test_a_view_that_a_derived_store_lacks_is_not_to_be_extracted_into_it(stores: TinyStores) -> None:
    store = stores.build(stores.plan(views=("original",)))
    catalog = read_catalog(store)
    for layout in catalog.layouts():
        catalog.storage.array(layout).append_provenance({"command": "python cli.py convert-cache a b"})
    assert {gap.hint for gap in gaps(store)} == {
        "train with --flip 0, or convert it from a store that has it (--view hflip)"
    }


def test_rows_are_named_by_number_where_the_ids_are_damaged(store: Path) -> None:
    (store / "samples.jsonl").write_bytes(b"")
    (store / "dino/original/features/ledger.jsonl").unlink()
    (gap,) = gaps(store)
    assert "(sample 0, sample 1, sample 2, … 4 more)" in gap.problem


def test_a_list_names_three_and_counts_the_rest() -> None:
    assert listed(["a"]) == "a"
    assert listed(["a", "b", "c"]) == "a, b, c"
    assert listed(["a", "b", "c", *"d" * 2000]) == "a, b, c, … 2,000 more"

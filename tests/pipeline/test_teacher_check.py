"""Logit teachers judged by the annotations, over one store and over several."""

from pathlib import Path

import numpy as np
import pytest

from cache.reader import TeacherStore
from data.errors import StoreIncompleteError
from data.records import ImageRecord
from data.voc import read_voc
from evaluation.multilabel import multilabel_map, presence_matrix
from pipeline.extract import extract
from pipeline.teacher_check import logit_teacher_maps
from tests.pipeline.small_runs import extraction


def test_stores_that_are_joined_are_judged_as_one(devkit: Path, tmp_path: Path) -> None:
    teachers = ("tiny_clip",)
    parts = [
        extract(extraction(devkit, tmp_path / f"{name}.zarr", voc_sets=(f"2007:{name}",), teachers=teachers)).store
        for name in ("train", "val")
    ]
    records = read_voc(devkit, ("2007:train", "2007:val"))
    logits = np.concatenate([TeacherStore(p).array("tiny_clip", "original", "logits").gather(range(n))
                             for p, n in zip(parts, (12, 6), strict=True)])  # fmt: skip
    assert logit_teacher_maps(parts, records) == {"tiny_clip": multilabel_map(logits, presence_matrix(records))[0]}
    assert logit_teacher_maps(parts[0], records) == {}


def test_int8_features_beside_them_do_not_matter(
    devkit: Path, store: Path, records: list[ImageRecord], tmp_path: Path
) -> None:
    quantised = extract(extraction(devkit, tmp_path / "s.zarr", dtype="int8")).store
    assert logit_teacher_maps(quantised, records) == logit_teacher_maps(store, records)


def test_a_teacher_that_is_not_whole_is_left_out(devkit: Path, tmp_path: Path, records: list[ImageRecord]) -> None:
    store = extract(extraction(devkit, tmp_path / "s.zarr")).store
    (store / "tiny_clip/original/logits/ledger.jsonl").unlink()
    assert logit_teacher_maps(store, records) == {}
    with pytest.raises(StoreIncompleteError):
        TeacherStore(store).array("tiny_clip", "original", "logits").read(0)

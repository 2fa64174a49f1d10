"""Facts about the real images; skipped where they are absent."""

from pathlib import Path

import numpy as np
import pytest

from data.check import check_voc
from data.sample import load_sample
from data.voc import read_voc

pytestmark = pytest.mark.voc


def test_the_first_64_images_load_in_both_views(voc_root: Path) -> None:
    for record in read_voc(voc_root, ["2007:trainval"], limit=64):
        original, mirrored = load_sample(record, "original"), load_sample(record, "hflip")
        assert original.image.shape == mirrored.image.shape == (480, 480, 3)
        assert np.abs(original.image[:, ::-1].astype(int) - mirrored.image).max() <= 1
        assert len(record.target) > 0


def test_the_annotations_of_trainval_have_no_problem(voc_root: Path) -> None:
    report = check_voc(voc_root, ["2007:trainval"], decode=False)
    assert report.problems == ()
    assert report.images_without_objects == 0
    assert all(count > 200 for count in report.per_class.values())


def test_an_annotation_reads_as_its_xml_says(voc_root: Path) -> None:
    # 000005.xml by eye: 500×375, five chairs; the first at 263, 211 to 324, 339.
    (record,) = (found for found in read_voc(voc_root, ["2007:trainval"], limit=20) if found.id == "VOC2007/000005")
    assert record.image_size == (375, 500)
    assert record.target.labels.tolist() == [9] * 5
    assert record.target.boxes_xyxy_orig[0].tolist() == [262, 210, 324, 339]
    assert record.target.difficult.tolist() == [False, False, True, False, True]

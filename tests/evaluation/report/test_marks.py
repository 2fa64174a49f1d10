"""The boxes over a picture, on a scene small enough to judge by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from data.records import LABEL_OF_CLASS, ImageRecord, Target
from evaluation.detections import Detections, ImageDetections
from evaluation.error_breakdown import error_breakdown
from evaluation.report.marks import MARK_KINDS, MOST_MARKS, Mark, Marks

CAT, DOG, CAR = (LABEL_OF_CLASS[name] for name in ("cat", "dog", "car"))


def record(image_id: str, objects: list[tuple[int, tuple[float, ...], bool]]) -> ImageRecord:
    target = Target(
        np.array([box for _, box, _ in objects], np.float32).reshape(-1, 4),
        np.array([label for label, _, _ in objects], np.int64),
        np.array([hard for _, _, hard in objects], np.bool_),
    )
    return ImageRecord(image_id, Path("a.jpg"), Path("a.xml"), (100, 100), target)


def found(*rows: tuple[int, tuple[float, ...], float]) -> ImageDetections:
    return ImageDetections(
        np.array([box for _, box, _ in rows], np.float32).reshape(-1, 4),
        np.array([label for label, _, _ in rows], np.int64),
        np.array([score for _, _, score in rows], np.float32),
    )


A, B, C, FAR = (0, 0, 20, 20), (40, 40, 60, 60), (70, 0, 90, 20), (0, 80, 10, 90)
RECORDS = [record("V/2", [(CAT, A, False), (DOG, B, False), (CAR, C, True)]), record("V/1", [(CAT, B, False)])]
DETECTIONS = Detections.from_images(
    ["V/1", "V/2"],  # another order than the records'
    [
        found((DOG, FAR, 0.04), (CAT, (40, 40, 60, 46), 0.6)),  # background; IoU 6/20 with the cat
        found(
            (CAT, A, 0.5), (CAT, A, 0.4), (CAT, B, 0.3), (CAR, C, 0.2)
        ),  # true, duplicate, dog taken for cat, ignored
    ],
)


@pytest.fixture
def marks() -> Marks:
    return Marks(DETECTIONS, error_breakdown(DETECTIONS, RECORDS), RECORDS)


def test_every_detection_has_its_kind_and_every_object_its_score(marks: Marks) -> None:
    told = [(mark.kind, mark.class_name, round(mark.score, 2)) for mark in marks.of_image("V/2", 0.0)]
    assert told == [
        ("true positive", "cat", 0.5), ("duplicate", "cat", 0.4), ("classification", "cat", 0.3),
        ("ignored", "car", 0.2), ("missed", "cat", 0.5), ("missed", "dog", 0.0), ("difficult", "car", 0.0),
    ]  # fmt: skip
    assert [mark.kind for mark in marks.of_image("V/1", 0.0)] == ["localisation", "background", "missed"]
    assert [mark.kind for mark in marks.of_image("V/1", 0.05)] == ["localisation", "missed"]


@pytest.mark.parametrize(
    ("threshold", "shown"),
    [
        (0.3, ["true positive", "duplicate", "classification", "missed", "difficult"]),
        (0.45, ["true positive", "missed", "difficult"]),
        (0.51, ["missed", "missed", "difficult"]),  # now the cat is missed, too
    ],
)
def test_what_is_shown_goes_by_the_threshold(marks: Marks, threshold: float, shown: list[str]) -> None:
    assert [mark.kind for mark in marks.of_image("V/2", 0.0) if mark.is_shown(threshold)] == shown


@pytest.mark.parametrize(("threshold", "errors"), [(0.3, [3, 2]), (0.45, [1, 2]), (0.7, [2, 1])])
def test_errors_are_false_positives_and_missed_objects(marks: Marks, threshold: float, errors: list[int]) -> None:
    assert marks.errors(["V/2", "V/1"], threshold).tolist() == errors


def test_an_image_shows_its_best_detections_only() -> None:
    crowd = found(*((CAT, FAR, 0.1 + 0.01 * n) for n in range(60)))
    detections = Detections.from_images(["V/1", "V/2"], [crowd, found()])
    marks = Marks(detections, error_breakdown(detections, RECORDS), RECORDS).of_image("V/1", 0.05)
    scores = [mark.score for mark in marks if not mark.is_object]
    assert len(scores) == MOST_MARKS
    assert min(scores) == pytest.approx(0.3)


def test_all_kinds_that_occur_are_in_the_legend(marks: Marks) -> None:
    kinds = {mark.kind for image_id in ("V/1", "V/2") for mark in marks.of_image(image_id, 0.0)}
    assert kinds < set(MARK_KINDS)
    assert Mark("both", "cat", (0, 0, 1, 1), 0.5).kind in MARK_KINDS

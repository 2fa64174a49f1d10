from pathlib import Path

import numpy as np
import pytest

from data.records import LABEL_OF_CLASS, VOC_CLASSES, ImageRecord, Target
from evaluation.multilabel import multilabel_map, presence_matrix

CAT, DOG, CAR = (LABEL_OF_CLASS[name] - 1 for name in ("cat", "dog", "car"))


def record(*objects):
    """Each object is (class, difficult)."""
    target = Target(
        boxes_xyxy_orig=np.zeros((len(objects), 4), np.float32),
        labels=np.array([LABEL_OF_CLASS[name] for name, _ in objects], np.int64),
        difficult=np.array([difficult for _, difficult in objects], np.bool_),
    )
    return ImageRecord("VOC2007/000001", Path("image.jpg"), Path("image.xml"), (10, 10), target)


def only(column, values):
    """[N, 20] zeros with one column filled."""
    matrix = np.zeros((len(values), 20))
    matrix[:, column] = values
    return matrix


def test_presence_tells_present_absent_and_difficult_only():
    presence = presence_matrix(
        [record(("cat", False), ("cat", True), ("dog", True)), record(), record(("dog", True), ("dog", False))]
    )
    assert presence.shape == (3, 20)
    assert presence[:, CAT].tolist() == [1, 0, 0]
    assert presence[:, DOG].tolist() == [-1, 0, 1]
    assert presence[:, CAR].tolist() == [0, 0, 0]


# Presence in the order of falling logits, and the AP by hand.
HAND_WORKED = {
    "all first": ([1, 1, 0, 0], 1),
    # Precision 1 at recall 1/2 and 2/3 at 1.
    "one too early": ([1, 0, 1, 0], (1 + 2 / 3) / 2),
    "difficult-only images take no rank": ([-1, 1, -1, 0, -1, 1], (1 + 2 / 3) / 2),
    # Precision 1/4 and 2/5: the monotone curve holds 2/5 all along.
    "all late": ([0, 0, 0, 1, 1], 2 / 5),
}


@pytest.mark.parametrize(("ranked", "expected"), HAND_WORKED.values(), ids=HAND_WORKED)
def test_hand_worked_ranking(ranked, expected):
    order = np.random.default_rng(0).permutation(len(ranked))
    logits = only(CAT, np.linspace(3, -20, len(ranked))[order]).astype(np.float16)
    mean, per_class = multilabel_map(logits, only(CAT, np.array(ranked)[order]).astype(np.int8))
    assert per_class["cat"] == pytest.approx(expected, abs=1e-15)
    assert mean == pytest.approx(expected, abs=1e-15)
    assert [name for name, ap in per_class.items() if ap is None] == [n for n in VOC_CLASSES if n != "cat"]


def test_mean_is_over_the_classes_that_are_shown():
    presence = (only(CAT, [1, 0]) + only(DOG, [0, 1])).astype(np.int8)
    mean, per_class = multilabel_map(only(CAT, [1, 0]) + only(DOG, [1, 0]), presence)
    assert (per_class["cat"], per_class["dog"], mean) == (1, 0.5, 0.75)


def test_no_class_shown_has_no_mean():
    assert multilabel_map(np.zeros((2, 20)), np.zeros((2, 20), np.int8))[0] is None


def test_a_shift_and_scale_of_a_class_changes_nothing():
    rng = np.random.default_rng(0)
    logits, presence = rng.normal(size=(50, 20)), rng.integers(-1, 2, (50, 20)).astype(np.int8)
    moved = logits * rng.uniform(1, 100, 20) + rng.normal(size=20)
    assert multilabel_map(moved, presence) == multilabel_map(logits, presence)


@pytest.mark.parametrize(
    ("logits", "presence", "message"),
    [
        (np.zeros((2, 21)), np.zeros((2, 21)), r"expected logits and presence \[N, 20\], found \(2, 21\)"),
        (np.zeros((3, 20)), np.zeros((2, 20)), r"found \(3, 20\) and \(2, 20\)"),
        (np.full((2, 20), np.nan), np.zeros((2, 20)), "expected finite logits"),
    ],
)
def test_what_cannot_be_ranked_is_refused(logits, presence, message):
    with pytest.raises(ValueError, match=message):
        multilabel_map(logits, presence)

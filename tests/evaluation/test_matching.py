"""The devkit's matching rule, on cases small enough to work by hand.

Boxes are 0-based half-open: (0, 0, 10, 10) holds 100 pixels, the devkit's `1 1 10 10`.
"""

import numpy as np
import pytest

from data.records import LABEL_OF_CLASS, Target
from evaluation.detections import Detections, ImageDetections
from evaluation.matching import IOU_THRESHOLDS, ClassMatches, match_detections

CAT, DOG = LABEL_OF_CLASS["cat"], LABEL_OF_CLASS["dog"]
WHOLE = (0, 0, 10, 10)


def target(*objects):
    """Each object is (box, difficult) or (box, difficult, label); a cat unless said."""
    return Target(
        boxes_xyxy_orig=np.array([o[0] for o in objects], dtype=np.float32).reshape(-1, 4),
        labels=np.array([o[2] if len(o) > 2 else CAT for o in objects], dtype=np.int64),
        difficult=np.array([o[1] for o in objects], dtype=np.bool_),
    )


def found(*boxes_and_scores, label=CAT):
    boxes, scores = zip(*boxes_and_scores, strict=True) if boxes_and_scores else ((), ())
    return ImageDetections(
        np.array(boxes, dtype=np.float32).reshape(-1, 4),
        np.full(len(boxes), label, dtype=np.int64),
        np.array(scores, dtype=np.float32),
    )


def match_one(detections: ImageDetections, objects: Target, iou: float = 0.5) -> ClassMatches:
    return match_detections(Detections.from_images(["a"], [detections]), [objects], thresholds=[iou])["cat"]


def outcomes(matches: ClassMatches) -> str:
    """One letter a detection, by falling score: T true positive, F false positive, - ignored."""
    letters = {(True, False, False): "T", (False, True, False): "F", (False, False, True): "-"}
    columns = zip(matches.true_positive[0], matches.false_positive[0], matches.ignored[0], strict=True)
    return "".join(letters[tuple(map(bool, column))] for column in columns)


LEFT, RIGHT = (0, 0, 10, 10), (4, 0, 14, 10)
HAND_WORKED = {
    "exact hit": (found((WHOLE, 0.9)), target((WHOLE, False)), "T"),
    "no object at all": (found((WHOLE, 0.9)), target(), "F"),
    "beside the object": (found(((20, 20, 30, 30), 0.9)), target((WHOLE, False)), "F"),
    # 50 of 100 pixels. Without the inclusive +1 it would be 9 × 4 / (9 × 9) = 0.44.
    "half of the object is IoU 0.5 exactly": (found(((0, 0, 10, 5), 0.9)), target((WHOLE, False)), "T"),
    "one pixel row less than half": (found(((0, 0, 10, 4), 0.9)), target((WHOLE, False)), "F"),
    "the second on one object is a false positive": (
        found((WHOLE, 0.9), ((0, 0, 10, 9), 0.8)),
        target((WHOLE, False)),
        "TF",
    ),
    "the higher score takes the object, whatever the order": (
        found((WHOLE, 0.3), ((0, 0, 10, 6), 0.8)),
        target((WHOLE, False)),
        "TF",
    ),
    "on a difficult object all are ignored": (
        found((WHOLE, 0.9), ((0, 0, 10, 9), 0.8)),
        target((WHOLE, True)),
        "--",
    ),
    # (1, 0, 11, 10): 90 / 110 = 0.82 with LEFT and 70 / 130 = 0.54 with RIGHT. COCO would hand it on to RIGHT.
    "a taken object does not pass on to the next best": (
        found((LEFT, 0.9), ((1, 0, 11, 10), 0.8)),
        target((LEFT, False), (RIGHT, False)),
        "TF",
    ),
    "overlapping a difficult object more than another ignores it": (
        found(((1, 0, 11, 10), 0.8)),
        target((LEFT, True), (RIGHT, False)),
        "-",
    ),
    "overlapping an ordinary object more than a difficult one counts": (
        found(((1, 0, 11, 10), 0.8)),
        target((LEFT, False), (RIGHT, True)),
        "T",
    ),
    # (2, 0, 12, 10) overlaps both by 80 / 120: the first in the annotation wins, so the second hit finds it taken.
    "of two equal overlaps the earlier object wins": (
        found((LEFT, 0.9), ((2, 0, 12, 10), 0.8)),
        target((LEFT, False), (RIGHT, False)),
        "TF",
    ),
    "an object of another class is no object": (found((WHOLE, 0.9)), target((WHOLE, False, DOG)), "F"),
    "an empty box hits nothing": (found(((5, 5, 5, 5), 0.9)), target((WHOLE, False)), "F"),
    "two empty boxes have no overlap": (found(((5, 5, 5, 5), 0.9)), target(((5, 5, 5, 5), False)), "F"),
}


@pytest.mark.parametrize(("detections", "objects", "expected"), HAND_WORKED.values(), ids=HAND_WORKED)
def test_hand_worked_case(detections, objects, expected):
    assert outcomes(match_one(detections, objects)) == expected


def test_equal_scores_go_by_their_boxes_whatever_the_order_of_rows():
    # The lower box covers 60 % of the object, the other all of it; y2 of the first is less, so it takes the object.
    lower, whole = ((0, 0, 10, 6), 0.5), (WHOLE, 0.5)
    for rows, expected in (((lower, whole), [0, 1]), ((whole, lower), [1, 0])):
        matches = match_one(found(*rows), target((WHOLE, False)))
        assert outcomes(matches) == "TF"
        assert matches.detections.tolist() == expected
        assert matches.iou.tolist() == [0.6, 1.0]


def test_images_do_not_see_each_others_objects():
    detections = Detections.from_images(["a", "b"], [found((WHOLE, 0.9)), found((WHOLE, 0.8))])
    matches = match_detections(detections, [target(), target((WHOLE, False))], thresholds=[0.5])["cat"]
    assert outcomes(matches) == "FT"
    assert matches.objects.tolist() == [-1, 0]


def test_classes_are_counted_apart_and_difficult_objects_not_at_all():
    objects = target((WHOLE, False), (WHOLE, True), (WHOLE, False, DOG), (RIGHT, False, DOG))
    matches = match_detections(Detections.from_images(["a"], [found()]), [objects])
    assert {name: m.num_positives for name, m in matches.items() if m.num_positives} == {"cat": 1, "dog": 2}
    assert list(matches) == list(LABEL_OF_CLASS)


@pytest.mark.parametrize(
    ("rows", "reached"),
    [
        (49, 0),
        (50, 1),
        (54, 1),
        (55, 2),
        (60, 3),
        (65, 4),
        (70, 5),
        (75, 6),
        (80, 7),
        (85, 8),
        (90, 9),
        (94, 9),
        (95, 10),
    ],
)
def test_overlap_of_whole_percents_reaches_exactly_the_thresholds_up_to_it(rows, reached):
    # rows of 100 rows: an IoU of rows / 100, the same double as the threshold.
    detections = Detections.from_images(["a"], [found(((0, 0, 7, rows), 0.9))])
    matches = match_detections(detections, [target(((0, 0, 7, 100), False))])["cat"]
    assert matches.true_positive[:, 0].tolist() == [True] * reached + [False] * (10 - reached)


def test_a_duplicate_becomes_the_finder_where_the_first_misses_the_threshold():
    # IoU 0.6 first, 0.9 second: from 0.65 on the second is the one that finds the object.
    detections = Detections.from_images(["a"], [found(((0, 0, 10, 6), 0.9), ((0, 0, 10, 9), 0.8))])
    matches = match_detections(detections, [target((WHOLE, False))])["cat"]
    assert matches.true_positive[:, 0].tolist() == [True] * 3 + [False] * 7
    assert matches.true_positive[:, 1].tolist() == [False] * 3 + [True] * 6 + [False]


def test_nothing_at_all_is_matched_to_nothing():
    matches = match_detections(Detections.from_images([], []), [])
    assert all(m.true_positive.shape == (len(IOU_THRESHOLDS), 0) and m.num_positives == 0 for m in matches.values())


def test_targets_of_other_images_are_refused():
    with pytest.raises(ValueError, match="expected targets of 1 images, found 2"):
        match_detections(Detections.from_images(["a"], [found()]), [target(), target()])

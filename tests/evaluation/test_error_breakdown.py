"""Kinds of mistakes and their costs: hand-worked, and against corrections carried out on the data itself.

The referee for costs corrects boxes, classes, detections and objects literally and evaluates again; the referee for
kinds goes detection by detection, object by object.
"""

import json

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from data.errors import DetectionsError
from data.records import LABEL_OF_CLASS, VOC_CLASSES, Target
from evaluation.average_precision import average_precision
from evaluation.detections import Detections, ImageDetections
from evaluation.error_breakdown import ERRORS, KINDS, TOTALS, error_breakdown
from evaluation.error_costs import average_after
from evaluation.error_kinds import FALSE_POSITIVES, judge
from evaluation.ground_truth import join_ground_truth
from evaluation.matching import match_detections
from tests.evaluation.random_cases import as_records, random_case, replaced, subset

A, B, C, FAR = (0, 0, 100, 100), (200, 0, 300, 100), (0, 200, 100, 300), (400, 400, 450, 450)
A_TWO_FIFTHS, B_TWO_FIFTHS = (0, 0, 40, 100), (200, 0, 240, 100)  # IoU 0.4 with A and with B
METRICS = ("voc", "voc07", "coco")


def one_image(objects, found):
    """objects: (class, box[, difficult]); found: (class, box, score). Returns detections and records of one image."""
    target = Target(
        np.array([box for _, box, *_ in objects], np.float32).reshape(-1, 4),
        np.array([LABEL_OF_CLASS[name] for name, *_ in objects], np.int64),
        np.array([bool(rest) for _, _, *rest in objects], np.bool_),
    )
    detections = Detections.from_images(
        ["VOC2007/000000"],
        [
            ImageDetections(
                np.array([box for _, box, _ in found], np.float32).reshape(-1, 4),
                np.array([LABEL_OF_CLASS[name] for name, _, _ in found], np.int64),
                np.array([score for *_, score in found], np.float32),
            )
        ],
    )
    return detections, as_records([target])


CAT_DOG = [("cat", A), ("dog", B)]
# Objects, detections by falling score, their kinds, AP before, the one kind to put right, AP after.
HAND_WORKED = {
    # Cat: F T, 1/2; dog: nothing found, 0. With the dog called a dog both are 1.
    "classification": (CAT_DOG, [("cat", B, 0.9), ("cat", A, 0.8)], ["classification", "true positive"], 1 / 4, 1),
    "localisation": ([("cat", A)], [("cat", A_TWO_FIFTHS, 0.9)], ["localisation"], 0, 1),
    # Cat: F T, 1/2, then T, 1; the dog stays missed.
    "both": (CAT_DOG, [("cat", B_TWO_FIFTHS, 0.9), ("cat", A, 0.8)], ["both", "true positive"], 1 / 4, 1 / 2),
    # T F T of two: (1 + 2/3) / 2.
    "duplicate": (
        [("cat", A), ("cat", C)],
        [("cat", A, 0.9), ("cat", A, 0.8), ("cat", C, 0.7)],
        ["true positive", "duplicate", "true positive"],
        5 / 6,
        1,
    ),
    "background": ([("cat", A)], [("cat", FAR, 0.9), ("cat", A, 0.8)], ["background", "true positive"], 1 / 2, 1),
    # One of two found: 1/2; with the other one no longer asked for: 1.
    "missed": ([("cat", A), ("cat", C)], [("cat", A, 0.9)], ["true positive"], 1 / 2, 1),
    "false positive": (
        [("cat", A)],
        [("cat", FAR, 0.9), ("cat", A, 0.8), ("cat", A, 0.7)],
        ["background", "true positive", "duplicate"],
        1 / 2,
        1,
    ),
    # F T of two: 1/4. The object that the localisation error points at is not found either: 1/2 without it.
    "false negative": (
        [("cat", A), ("cat", C)],
        [("cat", A_TWO_FIFTHS, 0.9), ("cat", C, 0.8)],
        ["localisation", "true positive"],
        1 / 4,
        1 / 2,
    ),
}


@pytest.mark.parametrize(("kind", "case"), HAND_WORKED.items(), ids=HAND_WORKED)
def test_hand_worked_error(kind, case):
    objects, found, kinds, before, after = case
    breakdown = error_breakdown(*one_image(objects, found))
    assert [KINDS[index] for index in breakdown.kind_of_detection] == kinds
    assert breakdown.average_precision == pytest.approx(before, abs=1e-15)
    assert breakdown.cost[kind] == pytest.approx(after - before, abs=1e-15)


def kinds_of(objects, found):
    breakdown = error_breakdown(*one_image(objects, found))
    return [KINDS[index] for index in breakdown.kind_of_detection], breakdown


def test_of_two_errors_on_one_object_the_higher_scored_is_put_right_and_the_other_vanishes():
    kinds, breakdown = kinds_of(
        CAT_DOG, [("dog", B_TWO_FIFTHS, 0.9), ("dog", B_TWO_FIFTHS, 0.8), ("dog", FAR, 0.7), ("cat", A, 0.6)]
    )
    assert kinds == ["localisation", "localisation", "background", "true positive"]
    # Dog: F F F, 0, then T F, 1. Cat is 1 all along.
    assert breakdown.average_precision == 1 / 2
    assert breakdown.cost["localisation"] == 1 / 2
    assert breakdown.counts["missed"] == 0  # an error points at the dog


def test_error_on_an_object_that_is_found_already_vanishes():
    kinds, breakdown = kinds_of(CAT_DOG, [("cat", B, 0.9), ("dog", B, 0.8), ("cat", A, 0.7)])
    assert kinds == ["classification", "true positive", "true positive"]
    # Cat: F T, 1/2, then T, 1; the dog keeps its one true positive.
    assert breakdown.average_precision == 3 / 4
    assert breakdown.cost["classification"] == 1 / 4


def test_errors_near_difficult_objects_vanish_and_such_objects_are_never_missed():
    objects = [("cat", A), ("cat", C, "difficult"), ("dog", B, "difficult")]
    found = [("cat", (0, 200, 40, 300), 0.9), ("cat", B, 0.8), ("cat", C, 0.7), ("cat", C, 0.6), ("cat", A, 0.5)]
    kinds, breakdown = kinds_of(objects, found)
    assert kinds == ["localisation", "classification", "ignored", "ignored", "true positive"]
    assert breakdown.average_precision == pytest.approx(1 / 3)  # F F T
    assert breakdown.cost["localisation"] == pytest.approx(1 / 2 - 1 / 3)
    assert breakdown.cost["classification"] == pytest.approx(1 / 2 - 1 / 3)
    assert breakdown.counts["missed"] == breakdown.counts["false negative"] == 0
    assert not breakdown.missed_objects.any()


def test_a_class_with_nothing_left_to_find_is_perfect():
    _, breakdown = kinds_of(CAT_DOG, [("cat", A, 0.9)])
    assert breakdown.average_precision == 1 / 2
    assert breakdown.cost["missed"] == breakdown.cost["false negative"] == 1 / 2
    assert breakdown.missed_objects.tolist() == [False, True]


@pytest.mark.parametrize(
    ("overlap_px", "kind"),
    # A box of 100 × 100 covered by k of 100 columns has IoU k / 100; both bounds belong to the upper kind.
    [(9, "background"), (10, "localisation"), (49, "localisation"), (50, "true positive")],
)
def test_bounds_of_overlap(overlap_px, kind):
    assert kinds_of([("cat", A)], [("cat", (0, 0, overlap_px, 100), 0.9)])[0] == [kind]


def test_nothing_to_find_has_no_costs():
    _, breakdown = kinds_of([("cat", A, "difficult")], [("cat", FAR, 0.9)])
    assert breakdown.average_precision is None
    assert breakdown.cost == {}
    assert breakdown.counts["background"] == 1


def test_coco_leaves_out_what_is_beyond_a_hundred_detections_of_an_image():
    found = [("cat", FAR, 0.9 - k / 1000) for k in range(100)] + [("cat", A, 0.1)]
    detections, records = one_image([("cat", A)], found)
    assert error_breakdown(detections, records, "voc").counts["true positive"] == 1
    breakdown = error_breakdown(detections, records, "coco")
    assert (breakdown.counts["ignored"], breakdown.counts["missed"]) == (1, 1)


@pytest.mark.parametrize("bounds", [{"background_iou": 0.0}, {"background_iou": 0.6}, {"iou": 1.1}])
def test_bounds_that_mean_nothing_are_refused(bounds):
    with pytest.raises(ValueError, match="0 < background_iou ≤ iou ≤ 1"):
        error_breakdown(*one_image([("cat", A)], []), **bounds)


def test_other_images_are_refused():
    detections, records = one_image([("cat", A)], [])
    with pytest.raises(DetectionsError, match="VOC2007/000000 is in only one"):
        error_breakdown(replaced(detections, image_ids=("VOC2007/000009",)), records)


# --- random cases ----------------------------------------------------------------------------------------------------


def iou_of(a, b):
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    area = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (a, b))
    return width * height / (area - width * height)


def slow_kinds(detections, targets, breakdown):
    """Return the kind of each detection, the object it points at, and the missed objects (image, place)."""
    kinds, pointed, touched = [], [], set()
    boxes = detections.boxes_xyxy_orig.astype(np.float64).tolist()
    for row, box in enumerate(boxes):
        kind = KINDS[breakdown.kind_of_detection[row]]
        image, label = int(detections.image_index[row]), detections.labels[row]
        objects = list(zip(targets[image].labels, targets[image].boxes_xyxy_orig.astype(np.float64), strict=True))
        overlaps = [(iou_of(box, other), other_label == label) for other_label, other in objects]
        own, other = (
            max(((iou, -place) for place, (iou, same) in enumerate(overlaps) if same == wanted), default=(0.0, 0))
            for wanted in (True, False)
        )
        at = None
        if kind not in ("true positive", "ignored"):
            if 0.1 <= own[0] < 0.5:
                kind, at = "localisation", (image, -own[1])
            elif other[0] >= 0.5:
                kind, at = "classification", (image, -other[1])
            elif own[0] >= 0.5:
                kind = "duplicate"
            else:
                kind = "background" if max(own[0], other[0]) < 0.1 else "both"
        touched.add(at)
        kinds.append(kind)
        pointed.append(at)
    return kinds, pointed, touched


def places(targets):
    return [(image, place) for image, target in enumerate(targets) for place in range(len(target))]


@given(st.integers(0, 2**32 - 1), st.sampled_from(METRICS))
def test_kinds_are_those_of_the_slow_referee(seed, metric):
    detections, targets = random_case(seed)
    breakdown = error_breakdown(detections, as_records(targets), metric)
    kinds, _, touched = slow_kinds(detections, targets, breakdown)
    assert [KINDS[index] for index in breakdown.kind_of_detection] == kinds
    found = found_objects(detections, targets, metric)
    missed = [
        not targets[image].difficult[place] and number not in found and (image, place) not in touched
        for number, (image, place) in enumerate(places(targets))
    ]
    assert breakdown.missed_objects.tolist() == missed


def found_objects(detections, targets, metric):
    matches = match_detections(detections, targets, metric, [0.5]).values()
    return {int(number) for match in matches for number in match.matched[0][match.true_positive[0]]}


@given(st.integers(0, 2**32 - 1), st.sampled_from(METRICS))
def test_counts_add_up(seed, metric):
    detections, targets = random_case(seed)
    breakdown = error_breakdown(detections, as_records(targets), metric)
    counts = breakdown.counts
    assert sum(counts[kind] for kind in KINDS) == len(detections)
    assert sum(counts[kind] for kind in FALSE_POSITIVES) == counts["false positive"]
    objects = sum(int((~target.difficult).sum()) for target in targets)
    assert counts["true positive"] + counts["false negative"] == objects
    assert counts["missed"] == breakdown.missed_objects.sum() <= counts["false negative"]
    for kind, count in counts.items():
        assert sum(of_class[kind] for of_class in breakdown.per_class.values()) == count
    json.dumps(breakdown.to_json(), allow_nan=False)


@settings(max_examples=40)
@given(st.integers(0, 2**32 - 1), st.sampled_from(METRICS))
def test_costs_are_what_literal_corrections_gain(seed, metric):
    detections, targets = random_case(seed, distinct_scores=True)
    for target in targets:  # equal boxes of one class: which one a corrected detection takes is no one's business
        rows = np.column_stack([target.labels, target.boxes_xyxy_orig]).tolist()
        assume(len({tuple(row) for row in rows}) == len(rows))
    breakdown = error_breakdown(detections, as_records(targets), metric)
    assume(breakdown.average_precision is not None)
    kinds, pointed, _ = slow_kinds(detections, targets, breakdown)
    found = {places(targets)[number] for number in found_objects(detections, targets, metric)}
    before = mean_ap50(detections, targets, targets, metric)
    assert breakdown.average_precision == pytest.approx(before, abs=1e-12)
    for kind in FALSE_POSITIVES:
        corrected = correct(detections, targets, kinds, pointed, found, kind)
        assert breakdown.cost[kind] == pytest.approx(mean_ap50(corrected, targets, targets, metric) - before, abs=1e-12)
    true_only = subset(detections, np.array([k in ("true positive", "ignored") for k in kinds], bool))
    gain = mean_ap50(true_only, targets, targets, metric) - before
    assert breakdown.cost["false positive"] == pytest.approx(gain, abs=1e-12)
    missed = {place for place, lost in zip(places(targets), breakdown.missed_objects, strict=True) if lost}
    not_found = {(image, place) for image, place in places(targets) if not targets[image].difficult[place]} - found
    for kind, removed in (("missed", missed), ("false negative", not_found)):
        left = [without(target, image, removed) for image, target in enumerate(targets)]
        gain = mean_ap50(detections, left, targets, metric) - before
        assert breakdown.cost[kind] == pytest.approx(gain, abs=1e-12)


def correct(detections, targets, kinds, pointed, found, kind):
    """Return the detections with those of one kind moved onto their objects, highest score first, or removed."""
    boxes, labels = detections.boxes_xyxy_orig.copy(), detections.labels.copy()
    keep, taken = np.ones(len(detections), np.bool_), set(found)
    for row in np.argsort(-detections.scores):
        if kinds[row] != kind:
            continue
        at = pointed[row]
        if at is None or at in taken or targets[at[0]].difficult[at[1]]:
            keep[row] = False
            continue
        taken.add(at)
        boxes[row], labels[row] = targets[at[0]].boxes_xyxy_orig[at[1]], targets[at[0]].labels[at[1]]
    return subset(replaced(detections, boxes_xyxy_orig=boxes, labels=labels), keep)


def without(target, image, removed):
    keep = np.array([(image, place) not in removed for place in range(len(target))], np.bool_)
    return Target(target.boxes_xyxy_orig[keep], target.labels[keep], target.difficult[keep])


def mean_ap50(detections, targets, original, metric):
    """Return the mean AP50; a class that had objects to find and has none left counts as 1."""
    had = {VOC_CLASSES[label - 1] for target in original for label in target.labels[~target.difficult]}
    averages = []
    for name, match in match_detections(detections, targets, metric, [0.5]).items():
        if name in had:
            ap = average_precision(match.true_positive, match.ignored, match.num_positives, metric)[0]
            averages.append(1.0 if np.isnan(ap) else ap)
    return np.mean(averages)


@given(st.integers(0, 2**32 - 1), st.sampled_from(METRICS))
def test_no_cost_is_negative_and_without_any_mistake_all_is_found(seed, metric):
    detections, targets = random_case(seed)
    records = as_records(targets)
    breakdown = error_breakdown(detections, records, metric)
    assert all(cost >= -1e-12 for cost in breakdown.cost.values())
    assert list(breakdown.cost) in ([*ERRORS, *TOTALS], [])
    truth = join_ground_truth(detections, records)
    judged = judge(detections, truth, match_detections(detections, targets, metric, [0.5]), 0.5, 0.1)
    for everything in (ERRORS, TOTALS):
        assert average_after(judged, everything, metric) in (None, pytest.approx(1.0, abs=1e-12))


# --- the confusion matrix --------------------------------------------------------------------------------------------


def test_hand_worked_confusion():
    objects = [("cat", A), ("dog", B), ("cow", C, "difficult"), ("bus", (500, 0, 600, 100))]
    found = [
        ("dog", A, 0.9),  # IoU 1 with the cat …
        ("cat", (0, 0, 90, 100), 0.95),  # … which this one overlaps by 0.9 only: nothing is left for it
        ("dog", B, 0.5),
        ("sheep", C, 0.6),  # on a difficult object: nowhere
        ("bird", FAR, 0.4),
        ("bus", (500, 0, 600, 100), 0.29),  # below the threshold: the bus has no detection
    ]
    matrix = error_breakdown(*one_image(objects, found)).confusion
    expected = np.zeros((21, 21), np.int64)
    label = LABEL_OF_CLASS
    expected[label["cat"], label["dog"]] = 1
    expected[0, label["cat"]] = 1
    expected[label["dog"], label["dog"]] = 1
    expected[0, label["bird"]] = 1
    expected[label["bus"], 0] = 1
    np.testing.assert_array_equal(matrix, expected)


def test_most_confused_are_named_with_the_object_first():
    _, breakdown = kinds_of(CAT_DOG, [("dog", A, 0.9), ("dog", B, 0.8)])
    assert breakdown.most_confused() == [("cat", "dog", 1)]


def slow_confusion(detections, targets, threshold):
    matrix = np.zeros((21, 21), np.int64)
    for image, target in enumerate(targets):
        rows = [r for r in np.flatnonzero(detections.image_index == image) if detections.scores[r] >= threshold]
        pairs = [
            (-iou_of(detections.boxes_xyxy_orig[r].astype(float), box), -detections.scores[r], r, place)
            for r in rows
            for place, box in enumerate(target.boxes_xyxy_orig.astype(float))
        ]
        gone, assigned = set(), {}
        for overlap, _, r, place in sorted(pairs):
            if -overlap < 0.5 or r in gone or place in assigned:
                continue
            gone.add(r)
            if not target.difficult[place]:
                assigned[place] = detections.labels[r]
        for place, label in enumerate(target.labels):
            if not target.difficult[place]:
                matrix[label, assigned.get(place, 0)] += 1
        for r in rows:
            matrix[0, detections.labels[r]] += r not in gone
    return matrix


@given(st.integers(0, 2**32 - 1), st.sampled_from([0.0, 0.3, 0.6]))
def test_confusion_is_the_slow_referees(seed, threshold):
    detections, targets = random_case(seed, distinct_scores=True)
    detections = replaced(detections, scores=detections.scores * 30)
    breakdown = error_breakdown(detections, as_records(targets), confusion_score=threshold)
    np.testing.assert_array_equal(breakdown.confusion, slow_confusion(detections, targets, threshold))

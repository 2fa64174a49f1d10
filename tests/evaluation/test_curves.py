"""Precision–recall curves against hand-worked numbers, the area they enclose, and every threshold tried."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.records import VOC_CLASSES, Target
from evaluation.average_precision import evaluate
from evaluation.curves import Curve, precision_recall_curves
from evaluation.detections import Detections, ImageDetections
from tests.evaluation.random_cases import as_records, random_case

METRICS = ("voc", "voc07", "coco")


def cats(scores_and_boxes, objects, difficult=()):
    target = Target(
        np.array(objects, np.float32),
        np.full(len(objects), 8),
        np.isin(np.arange(len(objects)), difficult),
    )
    boxes = np.array([box for _, box in scores_and_boxes], np.float32)
    scores = np.array([score for score, _ in scores_and_boxes], np.float32)
    found = ImageDetections(boxes, np.full(len(scores), 8), scores)
    return Detections.from_images(["VOC2007/000000"], [found]), as_records([target])


def test_hand_worked_curve():
    one, two, hard, far = (0, 0, 10, 10), (50, 0, 60, 10), (90, 0, 99, 10), (0, 80, 10, 90)
    case = cats([(0.9, one), (0.8, far), (0.7, hard), (0.6, two), (0.5, far)], [one, two, hard], difficult=[2])
    curves = precision_recall_curves(*case)
    assert list(curves) == ["cat"]
    curve = curves["cat"]
    # T F - T F of two; the one on the difficult object takes no place.
    np.testing.assert_allclose(curve.recall, [1 / 2, 1 / 2, 1, 1])
    np.testing.assert_allclose(curve.precision, [1, 1 / 2, 2 / 3, 1 / 2])
    np.testing.assert_allclose(curve.envelope, [1, 2 / 3, 2 / 3, 1 / 2])
    np.testing.assert_array_equal(curve.scores, np.float32([0.9, 0.8, 0.6, 0.5]))
    assert curve.num_positives == 2
    assert curve.average_precision == pytest.approx((1 + 2 / 3) / 2)
    # F1: 2/3, 1/2, 4/5, 2/3.
    best = curve.best_f1
    assert (best.score, best.precision, best.recall) == pytest.approx((0.6, 2 / 3, 1))
    assert best.f1 == pytest.approx(4 / 5)


def test_a_threshold_between_equal_scores_does_not_exist():
    one, two, far = (0, 0, 10, 10), (50, 0, 60, 10), (0, 80, 10, 90)
    curve = precision_recall_curves(*cats([(0.9, one), (0.9, far), (0.1, two)], [one, two]))["cat"]
    # After the first: precision 1, recall 1/2, F1 2/3, but 0.9 keeps the second, too: 1/2. All three: 4/5.
    assert curve.best_f1.f1 == pytest.approx(4 / 5)


def test_a_class_of_which_nothing_is_found_has_an_empty_curve():
    curve = precision_recall_curves(*cats([], [(0, 0, 10, 10)]))["cat"]
    assert len(curve.recall) == 0
    assert curve.best_f1 is None
    assert curve.average_precision == 0
    assert curve.to_json()["recall"] == []


@settings(max_examples=40)
@given(st.integers(0, 2**32 - 1), st.sampled_from(METRICS))
def test_curves_are_those_behind_the_average_precision(seed, metric):
    detections, targets = random_case(seed)
    result = evaluate(detections, as_records(targets), metric)
    curves = precision_recall_curves(detections, as_records(targets), metric)
    assert list(curves) == [name for name in VOC_CLASSES if result.per_class[name]["AP50"] is not None]
    for name, curve in curves.items():
        assert curve.average_precision == pytest.approx(result.per_class[name]["AP50"], abs=1e-12)
        if metric == "voc":
            assert area(curve.recall, curve.envelope) == pytest.approx(curve.average_precision, abs=1e-12)
        assert np.all(np.diff(curve.envelope) <= 0)
        assert np.all(curve.envelope >= curve.precision)
        best = curve.best_f1
        slow = best_f1_slowly(curve)
        assert (0.0 if best is None else best.f1) == pytest.approx(slow, abs=1e-12)


def area(recall, envelope):
    return float((np.diff(recall, prepend=0) * envelope).sum())


def best_f1_slowly(curve):
    values = [0.0]
    for score in curve.scores:
        kept = int((curve.scores >= score).sum())
        true = curve.recall[kept - 1] * curve.num_positives
        values.append(2 * true / (kept + curve.num_positives))  # 2 TP / (2 TP + FP + FN)
    return max(values)


def long_curve(seed, count=20_000, positives=3_000):
    rng = np.random.default_rng(seed)
    true = rng.random(count) < np.linspace(0.9, 0.0, count) ** 3
    true &= true.cumsum() <= positives
    found = true.cumsum()
    precision = found / np.arange(1, count + 1)
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    recall = found / positives
    scores = np.linspace(1, 0, count).astype(np.float32)
    return Curve(recall, precision, envelope, scores, positives, area(recall, envelope))


@pytest.mark.parametrize("points", [20, 200])
def test_thinned_curve_keeps_ends_corners_and_area(points):
    curve = long_curve(0)
    printed = json.loads(json.dumps(curve.to_json(points), allow_nan=False))
    recall, envelope = np.array(printed["recall"]), np.array(printed["envelope"])
    assert 4 <= len(recall) <= points
    assert (recall[0], recall[-1]) == pytest.approx((curve.recall[0], curve.recall[-1]), abs=1e-6)
    # At most 1 / (points / 2 − 1) of a length of at most 2 lies between two points that are kept.
    step = 2 / (points // 2 - 1)
    assert np.all(np.minimum(np.diff(recall), -np.diff(envelope)) <= step)
    assert abs(area(recall, envelope) - curve.average_precision) <= step**2 * points / 2
    assert printed["best_f1"]["f1"] == curve.best_f1.f1
    assert printed["average_precision"] == curve.average_precision


def test_both_sides_of_a_drop_are_kept():
    recall = np.concatenate([np.linspace(0.001, 0.5, 500), np.linspace(0.501, 1, 500)])
    envelope = np.repeat([1.0, 0.2], 500)
    curve = Curve(recall, envelope, envelope, np.linspace(1, 0, 1000).astype(np.float32), 1000, 0.6)
    printed = curve.to_json(12)
    edge = printed["recall"].index(0.5)
    assert printed["envelope"][edge : edge + 2] == [1.0, 0.2]
    assert printed["recall"][edge + 1] == pytest.approx(0.501)


def test_a_short_curve_is_kept_whole_and_too_few_points_are_refused():
    curve = long_curve(0, count=50, positives=40)
    assert len(curve.to_json(50)["recall"]) == 50
    with pytest.raises(ValueError, match="at least 4"):
        curve.to_json(3)

"""Reliability of scores: hand-worked bins, and torchmetrics' calibration error."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binned_statistic

from data.errors import DetectionsError
from data.records import Target
from evaluation.calibration import calibration
from evaluation.detections import Detections, ImageDetections
from evaluation.matching import match_detections
from tests.evaluation.random_cases import as_records, random_case, replaced

ONE, HARD, FAR = (0, 0, 10, 10), (50, 0, 60, 10), (0, 80, 10, 90)


def case(found):
    target = Target(np.array([ONE, HARD], np.float32), np.array([8, 8]), np.array([False, True]))
    boxes, scores = [box for box, _ in found], [score for _, score in found]
    detections = ImageDetections(
        np.array(boxes, np.float32).reshape(-1, 4), np.full(len(found), 8), np.array(scores, np.float32)
    )
    return Detections.from_images(["VOC2007/000000"], [detections]), as_records([target])


def test_hand_worked_bins():
    found = [(ONE, 0.75), (FAR, 0.5), (HARD, 0.6), (FAR, 0.25), (FAR, 0.125)]
    result = calibration(*case(found), bins=2, min_score=0.2)
    np.testing.assert_allclose(result.edges, [0.2, 0.6, 1.0])
    # Lower bin: 0.5 and 0.25, none true. Upper: 0.75, true; 0.6 is on a difficult object; 0.125 is below.
    np.testing.assert_allclose(result.confidence, [0.375, 0.75])
    np.testing.assert_allclose(result.precision, [0, 1])
    np.testing.assert_array_equal(result.counts, [2, 1])
    assert result.expected_calibration_error == pytest.approx((2 * 0.375 + 1 * 0.25) / 3)
    assert result.overconfidence == pytest.approx((2 * 0.375 - 1 * 0.25) / 3)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_score_on_an_edge_belongs_to_the_bin_above_and_one_belongs_to_the_last(dtype):
    detections, records = case([(ONE, 1.0), (FAR, 0.3), (FAR, 0.7)])
    detections = replaced(detections, scores=np.array([1.0, 0.3, 0.7], dtype))
    np.testing.assert_array_equal(calibration(detections, records, bins=10, min_score=0).counts.nonzero()[0], [3, 7, 9])


def test_empty_bins_are_null_and_nothing_at_all_has_no_error():
    result = calibration(*case([(ONE, 0.9)]), bins=4)
    assert result.to_json()["precision"] == [None, None, None, 1.0]
    json.dumps(result.to_json(), allow_nan=False)
    nothing = calibration(*case([(ONE, 0.01)]))
    assert nothing.expected_calibration_error is None
    assert nothing.overconfidence is None


def test_scores_that_are_no_fractions_are_refused():
    with pytest.raises(DetectionsError, match=r"expected scores in 0\.\.1 to judge them as probabilities, found 1\.5"):
        calibration(*case([(ONE, 1.5)]))


@pytest.mark.parametrize("options", [{"bins": 0}, {"min_score": 1.0}, {"min_score": -0.1}])
def test_bins_that_mean_nothing_are_refused(options):
    with pytest.raises(ValueError, match="bins ≥ 1 and 0 ≤ min_score < 1"):
        calibration(*case([]), **options)


@settings(max_examples=40)
@given(st.integers(0, 2**32 - 1), st.sampled_from(["voc", "coco"]))
def test_bins_and_error_are_scipys(seed, metric):
    result, kept, true = random_calibration(seed, metric)
    if not kept:
        assert result.expected_calibration_error is None
        return
    confidence, precision, counts = (
        binned_statistic(kept, values, statistic, bins=10, range=(0, 1)).statistic
        for values, statistic in ((kept, "mean"), (true, "mean"), (kept, "count"))
    )
    np.testing.assert_allclose(result.confidence, confidence)
    np.testing.assert_allclose(result.precision, precision)
    np.testing.assert_allclose(result.counts, counts)
    error = np.nansum(counts * np.abs(confidence - precision)) / len(kept)
    assert result.expected_calibration_error == pytest.approx(error, abs=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_error_is_torchmetrics(seed):
    import torch
    from torchmetrics.functional.classification import binary_calibration_error

    result, kept, true = random_calibration(seed, "voc")
    if kept:
        referee = binary_calibration_error(torch.tensor(np.array(kept)), torch.tensor(true).int(), 10, "l1")
        assert result.expected_calibration_error == pytest.approx(float(referee), abs=1e-5)


def random_calibration(seed, metric):
    """Return the calibration of a random case, and the scores and truths of the detections that count."""
    detections, targets = random_case(seed)
    scores = np.random.default_rng(seed).uniform(0.001, 0.999, len(detections)).astype(np.float32)
    detections = replaced(detections, scores=scores)
    result = calibration(detections, as_records(targets), metric, min_score=0)
    kept, true = [], []
    for match in match_detections(detections, targets, metric, [0.5]).values():
        kept.extend(scores[match.detections[~match.ignored[0]]])
        true.extend(match.true_positive[0][~match.ignored[0]])
    return result, kept, true

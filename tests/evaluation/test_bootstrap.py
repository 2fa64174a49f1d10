"""Intervals over images: resamples against image sets that are literally repeated, and what intervals promise."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.stats import binom

from data.errors import DetectionsError
from data.records import VOC_CLASSES, Target
from evaluation import bootstrap as module
from evaluation.average_precision import average_precision, evaluate
from evaluation.bootstrap import bootstrap, draw_weights, paired_bootstrap, weighted_evaluation
from evaluation.detections import Detections, ImageDetections
from evaluation.matching import match_detections
from tests.evaluation.random_cases import as_records, random_case, replaced, subset

METRICS = ("voc", "voc07", "coco")


def searchable(seed, **options):
    detections, targets = random_case(seed, **options)
    assume(any((~target.difficult).any() for target in targets))
    return detections, targets


def plain_table(detections, targets, metric):
    matches = match_detections(detections, targets, metric).values()
    return np.array([average_precision(m.true_positive, m.ignored, m.num_positives, metric) for m in matches])


@given(st.integers(0, 2**32 - 1), st.sampled_from(METRICS))
def test_weights_of_one_change_nothing(seed, metric):
    detections, targets = searchable(seed)
    ones = np.ones((len(targets), 2), np.int32)
    table = weighted_evaluation(detections, as_records(targets), ones, metric)
    expected = plain_table(detections, targets, metric)
    for weighting in table:
        np.testing.assert_allclose(weighting, expected, rtol=0, atol=1e-12)


@settings(max_examples=40)
@given(st.integers(0, 2**32 - 1), st.sampled_from(METRICS))
def test_a_resample_is_the_set_with_its_images_repeated(seed, metric):
    detections, targets = searchable(seed)
    # Scores may tie between images, not within one: the copies of two tied rows of one image interleave.
    rank = np.concatenate([np.arange(n) for n in np.bincount(detections.image_index, minlength=len(targets))])
    detections = replaced(detections, scores=(1 - rank / 100).astype(np.float32))
    weights = np.random.default_rng(seed).integers(0, 4, (len(targets), 3)).astype(np.int32)
    table = weighted_evaluation(detections, as_records(targets), weights, metric)
    for weighting, found in zip(weights.T, table, strict=True):
        expected = plain_table(*repeated(detections, targets, weighting), metric)
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)


def repeated(detections, targets, weighting):
    """Return the set with image i there weighting[i] times, under names of their own."""
    names, found, objects = [], [], []
    for index, image_id in enumerate(detections.image_ids):
        for copy in range(weighting[index]):
            names.append(f"{image_id}-{copy}")
            found.append(detections.of_image(image_id))
            objects.append(targets[index])
    return Detections.from_images(names, found), objects


@pytest.mark.parametrize("metric", METRICS)
def test_estimates_are_what_evaluate_says(metric):
    detections, targets = random_case(5)
    records = as_records(targets)
    result = evaluate(detections, records, metric)
    intervals = bootstrap(detections, records, metric, resamples=50)
    assert intervals["mAP"].estimate == pytest.approx(result.mAP, abs=1e-12)
    assert intervals["AP50"].estimate == pytest.approx(result.per_iou["0.50"], abs=1e-12)
    for interval in intervals.values():
        assert 0 <= interval.low <= interval.estimate <= interval.high <= 1
        assert interval.level == 0.95


def test_an_interval_is_the_resamples_percentiles_moved_onto_the_estimate():
    detections, targets = simulated(np.random.default_rng(3), 30)
    weights = draw_weights(np.random.default_rng(7), 30, 200)
    resampled = np.nanmean(weighted_evaluation(detections, as_records(targets), weights)[:, :, 0], axis=1)
    interval = bootstrap(detections, as_records(targets), resamples=200, seed=7, level=0.8)["AP50"]
    offset = interval.estimate - resampled.mean()
    assert (interval.low, interval.high) == pytest.approx(np.percentile(resampled, [10, 90]) + offset, abs=1e-12)


def test_resamples_draw_as_many_images_as_there_are_and_each_as_often_as_chance_has_it():
    weights = draw_weights(np.random.default_rng(0), 20, 5000)
    np.testing.assert_array_equal(weights.sum(axis=0), 20)
    counts = np.bincount(weights.ravel(), minlength=6)[:6] / weights.size
    np.testing.assert_allclose(counts, binom.pmf(np.arange(6), 20, 1 / 20), atol=0.005)


def test_intervals_are_the_same_however_images_are_ordered_and_resamples_cut(monkeypatch):
    detections, targets = simulated(np.random.default_rng(0), 25)
    records = as_records(targets)
    intervals = bootstrap(detections, records, resamples=50)
    assert bootstrap(detections, records[::-1], resamples=50) == intervals
    backwards = Detections.from_images(
        detections.image_ids[::-1], [detections.of_image(image_id) for image_id in detections.image_ids[::-1]]
    )
    assert bootstrap(backwards, records, resamples=50) == intervals
    ticks = []
    monkeypatch.setattr(module, "_CHUNK", 7)
    assert bootstrap(detections, records, resamples=50, tick=ticks.append) == intervals
    assert sum(ticks) == 50
    assert bootstrap(detections, records, resamples=50, seed=1) != intervals


@pytest.mark.parametrize("metric", METRICS)
def test_a_detector_does_not_differ_from_itself(metric):
    detections, targets = random_case(5)
    differences = paired_bootstrap(detections, detections, as_records(targets), metric, resamples=40)
    for found in differences.values():
        assert (found.estimate, found.low, found.high, found.share_below_zero) == (0, 0, 0, 0)
        assert found.holds_zero


def test_the_other_way_round_the_difference_is_the_negative():
    first, targets = random_case(5)
    second, records = subset(first, np.arange(0, len(first), 2)), as_records(targets)
    one, other = (paired_bootstrap(*pair, records, resamples=60) for pair in ((first, second), (second, first)))
    for name, found in one.items():
        assert (found.estimate, found.low, found.high) == pytest.approx(
            (-other[name].estimate, -other[name].high, -other[name].low), abs=1e-12
        )


def test_differences_are_those_of_evaluate_and_list_the_classes_with_objects():
    first, targets = random_case(5)
    second, records = subset(first, np.arange(0, len(first), 2)), as_records(targets)
    differences = paired_bootstrap(first, second, records, resamples=20)
    before, after = (evaluate(found, records) for found in (first, second))
    assert differences["mAP"].estimate == pytest.approx(after.mAP - before.mAP, abs=1e-12)
    classes = [name for name in VOC_CLASSES if before.per_class[name]["AP50"] is not None]
    assert list(differences) == ["mAP", "AP50", *classes]
    for name in classes:
        change = after.per_class[name]["AP50"] - before.per_class[name]["AP50"]
        assert differences[name].estimate == pytest.approx(change, abs=1e-12)


def test_a_detector_worse_on_every_image_is_told_apart_and_pairing_narrows_the_interval():
    rng = np.random.default_rng(0)
    first, targets = simulated(rng, 120)
    second = subset(first, np.flatnonzero(rng.random(len(first)) < 0.8))
    difference = paired_bootstrap(first, second, as_records(targets), resamples=200)["AP50"]
    assert difference.high < 0
    assert difference.share_below_zero == 1
    single = bootstrap(first, as_records(targets), resamples=200)["AP50"]
    assert difference.high - difference.low < single.high - single.low


def test_a_detector_that_finds_nothing_has_zero():
    detections, targets = random_case(5)
    nothing = subset(detections, np.zeros(0, np.int64))
    interval = bootstrap(nothing, as_records(targets), resamples=20)["AP50"]
    assert (interval.estimate, interval.low, interval.high) == (0, 0, 0)


def test_images_without_an_object_to_find_are_refused():
    detections, _ = simulated(np.random.default_rng(0), 1)
    target = Target(np.array([[0, 0, 9, 9]], np.float32), np.array([8]), np.array([True]))
    with pytest.raises(DetectionsError, match="no AP to resample"):
        bootstrap(detections, as_records([target]))


def test_other_images_are_refused():
    detections, targets = random_case(5)
    strange = replace(as_records(targets)[0], id="VOC2012/000001")
    with pytest.raises(DetectionsError, match="is in only one"):
        bootstrap(detections, [*as_records(targets)[1:], strange])


def simulated(rng, images, skill=0.7):
    """A detector of two classes whose images differ in how hard they are: finds, near misses and noise."""
    targets, results = [], []
    for _ in range(images):
        count = 1 + rng.poisson(1.0)
        corners = np.column_stack([200.0 * np.arange(count), np.zeros(count)])
        objects = np.concatenate([corners, corners + 100], axis=1).astype(np.float32)
        labels = rng.integers(1, 3, count)
        targets.append(Target(objects, labels, np.zeros(count, np.bool_)))
        found = rng.random(count) < rng.beta(4 * skill, 4 * (1 - skill))
        near = objects[found] + rng.normal(0, 6, (found.sum(), 4))
        noise = rng.poisson(1.5)
        far = np.tile([0, 500, 60, 560], (noise, 1))
        results.append(
            ImageDetections(
                np.concatenate([near, far]).astype(np.float32),
                np.concatenate([labels[found], rng.integers(1, 3, noise)]),
                np.concatenate([rng.beta(4, 2, found.sum()), rng.beta(2, 4, noise)]).astype(np.float32),
            )
        )
    return Detections.from_images([f"VOC2007/{k:06d}" for k in range(images)], results), targets


@pytest.mark.slow
@pytest.mark.parametrize("metric", METRICS)
def test_intervals_hold_the_expected_figure_about_as_often_as_they_promise(metric):
    """400 sets of 100 images each: of 95 % intervals, 92 to 98 % hold what the figure is on average."""
    estimates, intervals = [], []
    for repeat in range(400):
        detections, targets = simulated(np.random.default_rng(repeat), 100)
        found = bootstrap(detections, as_records(targets), metric, resamples=300)
        estimates.append([found[name].estimate for name in ("mAP", "AP50")])
        intervals.append([(found[name].low, found[name].high) for name in ("mAP", "AP50")])
    expected = np.mean(estimates, axis=0)
    low, high = np.moveaxis(np.array(intervals), 2, 0)
    covered = ((low <= expected) & (expected <= high)).mean(axis=0)
    assert np.all((covered >= 0.92) & (covered <= 0.98)), covered


@pytest.mark.slow
def test_differences_hold_the_expected_difference_about_as_often_as_they_promise():
    estimates, intervals = [], []
    for repeat in range(400):
        rng = np.random.default_rng(repeat)
        first, targets = simulated(rng, 100)
        second = subset(first, np.flatnonzero(rng.random(len(first)) < 0.95))
        found = paired_bootstrap(first, second, as_records(targets), resamples=300)
        estimates.append([found[name].estimate for name in ("mAP", "AP50")])
        intervals.append([(found[name].low, found[name].high) for name in ("mAP", "AP50")])
    expected = np.mean(estimates, axis=0)
    low, high = np.moveaxis(np.array(intervals), 2, 0)
    covered = ((low <= expected) & (expected <= high)).mean(axis=0)
    assert np.all((covered >= 0.92) & (covered <= 0.98)), covered

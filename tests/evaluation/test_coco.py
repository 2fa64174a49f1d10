"""`coco` against hand-worked numbers, pycocotools, faster-coco-eval and torchmetrics."""

import contextlib
import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.records import LABEL_OF_CLASS, VOC_CLASSES, Target
from evaluation.average_precision import average_precision, evaluate
from evaluation.detections import Detections, ImageDetections
from evaluation.matching import IOU_THRESHOLDS, Matcher, match_detections
from evaluation.pairing import pair
from evaluation.ranking import ranking
from evaluation.sizes import SIZES
from tests.evaluation.coco_referee import coco_ap, coco_files
from tests.evaluation.devkit_transcript import transcript
from tests.evaluation.random_cases import as_records, random_case, replaced

CAT = LABEL_OF_CLASS["cat"]
LEFT, RIGHT, WHOLE = (0, 0, 10, 10), (4, 0, 14, 10), (0, 0, 10, 10)


def cats(*rows):
    """Detections of one image: (box, score)."""
    boxes, scores = zip(*rows, strict=True)
    found = ImageDetections(np.array(boxes, np.float32), np.full(len(rows), CAT), np.array(scores, np.float32))
    return Detections.from_images(["VOC2007/000001"], [found])


def objects(*rows):
    """Cats of one image: (box, difficult)."""
    boxes, difficult = zip(*rows, strict=True)
    return Target(np.array(boxes, np.float32).reshape(-1, 4), np.full(len(rows), CAT), np.array(difficult))


def outcomes(matches):
    return "".join(
        "T" if t else "-" if i else "F" for t, i in zip(matches.true_positive[0], matches.ignored[0], strict=True)
    )


HAND_WORKED = {
    # (1, 0, 11, 10): 90 / 110 = 0.82 with LEFT and 70 / 130 = 0.54 with RIGHT. The devkit's rule would say TF.
    "a taken object passes on to the next best": (
        cats((LEFT, 0.9), ((1, 0, 11, 10), 0.8)), objects((LEFT, False), (RIGHT, False)), "TT", [[0], [1]],
    ),
    # The devkit's rule looks at LEFT alone and would ignore it.
    "an ordinary object goes before a difficult one that is nearer": (
        cats(((1, 0, 11, 10), 0.8)), objects((LEFT, True), (RIGHT, False)), "T", [[1]],
    ),
    # The devkit's rule would ignore both.
    "a difficult object is taken once": (
        cats((WHOLE, 0.9), ((0, 0, 10, 9), 0.8)), objects((WHOLE, True)), "-F", [[0], [-1]],
    ),
    # (2, 0, 12, 10) overlaps both by 80 / 120; the devkit's rule takes the earlier, and LEFT has been taken.
    "of two equal overlaps the later object wins": (
        cats(((2, 0, 12, 10), 0.9), (RIGHT, 0.8)), objects((LEFT, False), (RIGHT, False)), "TF", [[1], [-1]],
    ),
    "half of the object is IoU 0.5 exactly": (cats(((0, 0, 10, 5), 0.9)), objects((WHOLE, False)), "T", [[0]]),
    "one pixel row less than half": (cats(((0, 0, 10, 4), 0.9)), objects((WHOLE, False)), "F", [[-1]]),
    "a duplicate with no next best": (
        cats((WHOLE, 0.9), ((0, 0, 10, 9), 0.8)), objects((WHOLE, False)), "TF", [[0], [-1]],
    ),
}  # fmt: skip


@pytest.mark.parametrize(("detections", "target", "expected", "matched"), HAND_WORKED.values(), ids=HAND_WORKED)
def test_hand_worked_case(detections, target, expected, matched):
    matches = match_detections(detections, [target], "coco", [0.5])["cat"]
    assert outcomes(matches) == expected
    assert matches.matched.T.tolist() == matched


def test_hand_worked_points():
    # TFT of 3: recall 1/3 at precision 1, 2/3 at 2/3. Recalls 0 … .33 are 34 points, .34 … .66 are 33.
    letters = np.array([list("TFT")])
    ap = average_precision(letters == "T", letters == "-", 3, "coco")
    assert ap == pytest.approx([(34 * 1 + 33 * 2 / 3) / 101], abs=1e-15)


def test_a_recall_reaches_the_points_that_pycocotools_says_it_reaches():
    # 7 of 20 are 0.35, and its point 35 is 0.35000000000000003: points 0 … 34.
    found = np.ones((1, 7), np.bool_)
    assert average_precision(found, ~found, 20, "coco") == pytest.approx([35 / 101], abs=1e-15)


def test_the_hundred_and_first_of_an_image_and_class_is_not_judged():
    # A hundred misses, and the hit below them.
    rows = [((20 + k, 20, 30 + k, 30), 0.9 - k / 1000) for k in range(100)]
    target = objects((WHOLE, False))
    assert match_detections(cats(*rows, (WHOLE, 0.1)), [target], "coco")["cat"].true_positive.shape == (10, 100)
    assert match_detections(cats(*rows[1:], (WHOLE, 0.1)), [target], "coco")["cat"].true_positive[0].sum() == 1
    assert match_detections(cats(*rows, (WHOLE, 0.1)), [target], "voc")["cat"].true_positive[0].sum() == 1


# --- pycocotools -----------------------------------------------------------------------------------------------------

SEEDS = st.integers(0, 2**32 - 1)


def our_ap(detections, targets):
    """AP [20, 10, 4] by class, IoU and area."""
    matcher = Matcher(pair(detections, targets, IOU_THRESHOLDS[0]), "coco")
    columns = [
        [average_precision(m.true_positive, m.ignored, m.num_positives, "coco") for m in matcher.matches(area).values()]
        for area in (None, *SIZES.values())
    ]
    return np.moveaxis(np.array(columns), 0, -1)


def scaled(detections, targets, factor):
    """The same case in larger pixels, so that all three sizes occur."""
    larger = [Target(t.boxes_xyxy_orig * np.float32(factor), t.labels, t.difficult) for t in targets]
    return replaced(detections, boxes_xyxy_orig=detections.boxes_xyxy_orig * np.float32(factor)), larger


@settings(max_examples=60)
@given(SEEDS, st.sampled_from([1, 6, 12]), st.sampled_from([0.0, 0.3]))
def test_every_cell_is_pycocotools(seed, factor, difficult):
    # Full of ties: of scores, of boxes, of overlaps.
    detections, targets = scaled(*random_case(seed, difficult=difficult), factor)
    if len(detections):  # pycocotools cannot read an empty list
        np.testing.assert_allclose(our_ap(detections, targets), coco_ap(detections, targets), atol=1e-12)


@pytest.fixture(scope="module")
def crowded():
    """More than 100 detections of a class in an image, with many equal scores."""
    rng = np.random.default_rng(5)
    targets, found = [], []
    for _ in range(12):
        corners = rng.integers(0, 300, (8, 2))
        target_boxes = np.concatenate([corners, corners + rng.integers(10, 150, (8, 2))], axis=1).astype(np.float32)
        targets.append(Target(target_boxes, rng.integers(1, 3, 8), np.zeros(8, np.bool_)))
        source = rng.integers(0, 8, 300)
        boxes = target_boxes[source] + rng.normal(0, 6, (300, 4))
        boxes = np.concatenate([np.minimum(boxes[:, :2], boxes[:, 2:]), np.maximum(boxes[:, :2], boxes[:, 2:])], axis=1)
        scores = (rng.integers(0, 40, 300) / 40).astype(np.float32)
        found.append(ImageDetections(boxes.astype(np.float32), targets[-1].labels[source], scores))
    return Detections.from_images([f"VOC2007/{k:06d}" for k in range(12)], found), targets


def test_beyond_a_hundred_every_cell_is_pycocotools(crowded):
    detections, targets = crowded
    assert np.bincount(detections.image_index * 21 + detections.labels).max() > 100
    ours = our_ap(detections, targets)
    np.testing.assert_allclose(ours, coco_ap(detections, targets), atol=1e-12)
    assert 0.1 < np.nanmean(ours[..., 0]) < 0.9


def test_means_are_those_of_faster_coco_eval(crowded):
    from faster_coco_eval import COCO, COCOeval_faster

    detections, targets = crowded
    dataset, results = coco_files(detections, targets, ranking(detections))
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(dataset)
        run = COCOeval_faster(truth, truth.loadRes(results), "bbox")
        run.evaluate()
        run.accumulate()
        run.summarize()
    result = evaluate(detections, as_records(targets), "coco")
    ours = [result.mAP, result.per_iou["0.50"], result.per_iou["0.75"], *(v["mAP"] for v in result.by_size.values())]
    assert ours == pytest.approx(run.stats[:6].tolist(), abs=1e-9)


@pytest.mark.slow  # importing it takes seventeen seconds
def test_means_are_those_of_torchmetrics(crowded):
    import torch
    from torchmetrics.detection import MeanAveragePrecision

    detections, targets = crowded
    rows = ranking(detections)
    metric = MeanAveragePrecision(class_metrics=True)
    metric.warn_on_many_detections = False
    for image, target in enumerate(targets):
        of_image = rows[detections.image_index[rows] == image]
        metric.update(
            [
                {
                    "boxes": torch.from_numpy(detections.boxes_xyxy_orig[of_image]),
                    "scores": torch.from_numpy(detections.scores[of_image]),
                    "labels": torch.from_numpy(detections.labels[of_image]),
                }
            ],
            [{"boxes": torch.from_numpy(target.boxes_xyxy_orig), "labels": torch.from_numpy(target.labels)}],
        )
    expected = metric.compute()
    result = evaluate(detections, as_records(targets), "coco")
    assert [result.mAP, result.per_iou["0.50"]] == pytest.approx(
        [float(expected[k]) for k in ("map", "map_50")], abs=1e-6
    )
    per_class = [result.per_class[VOC_CLASSES[int(label) - 1]]["mAP"] for label in expected["classes"]]
    assert per_class == pytest.approx(expected["map_per_class"].tolist(), abs=1e-6)


# --- sizes by the devkit's rule --------------------------------------------------------------------------------------


def test_hand_worked_sizes_by_the_devkits_rule():
    # Areas 20 × 20 = 400 (small), 50 × 50 = 2,500 (medium). A hit on each, a miss of each size.
    small, medium = (0, 0, 20, 20), (100, 100, 150, 150)
    missed_small, missed_medium = (300, 0, 320, 20), (300, 300, 350, 350)
    detections = cats((missed_medium, 0.9), (small, 0.8), (missed_small, 0.7), (medium, 0.6))
    records = as_records([objects((small, False), (medium, False))])
    detections = replaced(detections, image_ids=(records[0].id,))
    result = evaluate(detections, records, "voc")
    # Small: the miss of medium size is ignored, and so is the hit on the medium object; the hit comes first.
    assert result.by_size["small"] == {"mAP": 1.0, "AP50": 1.0, "objects": 1}
    # Medium: a miss first, then the hit: 1/2.
    assert result.by_size["medium"] == {"mAP": 0.5, "AP50": 0.5, "objects": 1}
    assert result.by_size["large"] == {"mAP": None, "AP50": None, "objects": 0}
    # All: miss, hit, miss, hit: precision 1/2 at recall 1/2 and at recall 1.
    assert result.mAP == 0.5


@settings(max_examples=40)
@given(SEEDS, st.sampled_from([2, 6, 12]), st.sampled_from(list(SIZES)))
def test_sizes_by_the_devkits_rule_are_the_transcripts(seed, factor, size):
    """Objects of other sizes as if they were difficult; then misses of other sizes struck out."""
    detections, targets = scaled(*random_case(seed), factor)
    low, high = SIZES[size]

    def outside(boxes):
        width, height = (boxes[:, 2:] - boxes[:, :2]).astype(np.float64).T
        return (width * height < low) | (width * height > high)

    as_difficult = [Target(t.boxes_xyxy_orig, t.labels, t.difficult | outside(t.boxes_xyxy_orig)) for t in targets]
    matches = Matcher(pair(detections, targets, IOU_THRESHOLDS[0]), "voc").matches(SIZES[size])
    for label, match in enumerate(matches.values(), start=1):
        letters, positives = transcript(detections, as_difficult, label)
        assert match.num_positives == positives
        other_size = outside(detections.boxes_xyxy_orig[match.detections])
        for row, text in enumerate(letters):
            pairs = zip(text, other_size, strict=True)
            expected = ["-" if letter == "F" and other else letter for letter, other in pairs]
            assert [*match.true_positive[row]] == [letter == "T" for letter in expected]
            assert [*match.ignored[row]] == [letter == "-" for letter in expected]


def test_an_object_on_the_boundary_is_of_both_sizes():
    records = as_records([objects(((0, 0, 32, 32), False))])
    detections = replaced(cats(((0, 0, 32, 32), 0.9)), image_ids=(records[0].id,))
    sizes = evaluate(detections, records).by_size
    assert [size["objects"] for size in sizes.values()] == [1, 1, 0]

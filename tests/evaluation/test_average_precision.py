"""Average precision against hand-worked numbers, a slow transcript of the devkit's rule, and COCO's code.

The transcript works in the devkit's own 1-based inclusive boxes, one detection, one threshold at a time, with its
recall and precision arrays; nothing of it is shared with the code under test.
"""

import contextlib
import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from data.errors import DetectionsError
from data.records import VOC_CLASSES, ImageRecord, Target
from evaluation.average_precision import average_precision, evaluate
from evaluation.detections import Detections, ImageDetections
from evaluation.matching import IOU_THRESHOLDS, match_detections

PERCENTS = range(50, 100, 5)


def flags(text: str) -> tuple[np.ndarray, np.ndarray]:
    """True positives T, false positives F and ignored detections - by falling score, as [1, n] arrays."""
    letters = np.array([list(text)])
    return letters == "T", letters == "-"


# Text, number of positives, area, eleven points.
HAND_WORKED = {
    "all found": ("TTT", 3, 1, 1),
    "nothing found": ("FF", 3, 0, 0),
    "no detections": ("", 3, 0, 0),
    # Recall 1/3 at precision 1, 2/3 at 2/3. Recalls 0, .1, .2, .3 have precision 1; .4, .5, .6 have 2/3; others 0.
    "one in the middle is wrong": ("TFT", 3, (1 + 2 / 3) / 3, (4 * 1 + 3 * 2 / 3) / 11),
    # Precision 0, 1/2, 2/3: the monotone curve is 2/3 all along.
    "the first is wrong": ("FTT", 2, 2 / 3, 2 / 3),
    # Ignored ones take no rank, so this is TFT again.
    "ignored detections do not count": ("-T--F-T-", 3, (1 + 2 / 3) / 3, (4 * 1 + 3 * 2 / 3) / 11),
    # Recall 3/10 reaches the point 0.3, though 3 × 0.1 > 0.3 in floating point: four of eleven points.
    "three of ten": ("TTT", 10, 0.3, 4 / 11),
    "seven of ten": ("TTTTTTT", 10, 0.7, 8 / 11),
    # Recall 1/20 is 0.05: only the point 0 is reached.
    "one of twenty": ("T", 20, 1 / 20, 1 / 11),
}


@pytest.mark.parametrize(("text", "positives", "area", "eleven"), HAND_WORKED.values(), ids=HAND_WORKED)
def test_hand_worked_curve(text, positives, area, eleven):
    assert average_precision(*flags(text), positives, "voc") == pytest.approx([area], abs=1e-15)
    assert average_precision(*flags(text), positives, "voc07") == pytest.approx([eleven], abs=1e-15)


def test_class_without_positives_has_no_precision():
    assert np.isnan(average_precision(*flags("F-"), 0)).all()


# --- the devkit's rule, slowly ---------------------------------------------------------------------------------------


def devkit_boxes(boxes_xyxy_orig):
    return [(x1 + 1, y1 + 1, x2, y2) for x1, y1, x2, y2 in np.asarray(boxes_xyxy_orig, dtype=np.float64).tolist()]


def devkit_match(detections, objects, threshold):
    """detections: [(image, score, box)]; objects: {image: [(box, difficult)]}. Returns the letters."""
    taken, letters = set(), []
    for image, _, box in sorted(detections, key=lambda row: (-row[1], row[0], row[2])):
        highest, which = -math.inf, None
        for number, (other, _) in enumerate(objects[image]):
            width = min(box[2], other[2]) - max(box[0], other[0]) + 1
            height = min(box[3], other[3]) - max(box[1], other[1]) + 1
            if width > 0 and height > 0:
                areas = [(b[2] - b[0] + 1) * (b[3] - b[1] + 1) for b in (box, other)]
                iou = width * height / (sum(areas) - width * height)
                if iou > highest:
                    highest, which = iou, number
        if highest < threshold:
            letters.append("F")
        elif objects[image][which][1]:
            letters.append("-")
        elif (image, which) in taken:
            letters.append("F")
        else:
            taken.add((image, which))
            letters.append("T")
    return "".join(letters)


def devkit_curve(letters, positives):
    recall, precision, true, false = [], [], 0, 0
    for letter in letters:
        true, false = true + (letter == "T"), false + (letter == "F")
        recall.append(true / positives)
        precision.append(true / (true + false) if true + false else 0.0)
    return recall, precision


def devkit_area(letters, positives):
    recall, precision = devkit_curve(letters, positives)
    recall, precision = [0.0, *recall, 1.0], [0.0, *precision, 0.0]
    for k in reversed(range(len(precision) - 1)):
        precision[k] = max(precision[k], precision[k + 1])
    return sum((recall[k] - recall[k - 1]) * precision[k] for k in range(1, len(recall)))


def devkit_eleven_points(letters, positives):
    recall, precision = devkit_curve(letters, positives)
    # 1e-9 below each point: the devkit's own 0:0.1:1 misses a recall of exactly 3/10 by rounding.
    points = [[p for r, p in zip(recall, precision, strict=True) if r >= k / 10 - 1e-9] for k in range(11)]
    return sum(max(point, default=0.0) for point in points) / 11


def transcript(detections, targets, label):
    """Return the letters at ten thresholds and the number of positives of one class."""
    boxes = devkit_boxes(detections.boxes_xyxy_orig)
    rows = [
        (int(detections.image_index[k]), float(detections.scores[k]), boxes[k])
        for k in np.flatnonzero(detections.labels == label)
    ]
    objects = {
        image: [
            (box, bool(hard))
            for box, lab, hard in zip(devkit_boxes(t.boxes_xyxy_orig), t.labels, t.difficult, strict=True)
            if lab == label
        ]
        for image, t in enumerate(targets)
    }
    positives = sum(not hard for image in objects.values() for _, hard in image)
    return [devkit_match(rows, objects, percent / 100) for percent in PERCENTS], positives


# --- random cases ----------------------------------------------------------------------------------------------------


def random_case(seed, *, distinct_scores=False, num_classes=3, difficult=0.25):
    """A few crowded images on a small grid: ties of scores and overlaps, duplicates, images without either side."""
    rng = np.random.default_rng(seed)
    targets, results = [], []
    for _ in range(rng.integers(1, 7)):
        count = int(rng.integers(0, 6))
        targets.append(
            Target(
                boxes_xyxy_orig=random_boxes(rng, count),
                labels=rng.integers(1, num_classes + 1, count),
                difficult=rng.random(count) < difficult,
            )
        )
        near = random_boxes(rng, 0)
        labels = rng.integers(1, num_classes + 2, 0)
        if count:
            source = rng.integers(0, count, rng.integers(0, 12))
            shift = rng.integers(-2, 3, (len(source), 4)) if rng.random() < 0.7 else rng.normal(0, 1, (len(source), 4))
            near = ordered(targets[-1].boxes_xyxy_orig[source] + shift)
            labels = targets[-1].labels[source]
        far = random_boxes(rng, int(rng.integers(0, 6)))
        boxes = np.concatenate([near, far])
        labels = np.concatenate([labels, rng.integers(1, num_classes + 2, len(far))])
        results.append(ImageDetections(boxes, labels, (rng.integers(1, 6, len(boxes)) / 5).astype(np.float32)))
    detections = Detections.from_images([f"VOC2007/{k:06d}" for k in range(len(targets))], results)
    if distinct_scores:
        scores = (rng.permutation(len(detections)) + 1).astype(np.float32) / 1000
        detections = replaced(detections, scores=scores)
    return detections, targets


def ordered(boxes):
    boxes = np.asarray(boxes, dtype=np.float32)
    return np.concatenate([np.minimum(boxes[:, :2], boxes[:, 2:]), np.maximum(boxes[:, :2], boxes[:, 2:]) + 1], axis=1)


def random_boxes(rng, count):
    corners = rng.integers(0, 12, (count, 2))
    return np.concatenate([corners, corners + rng.integers(2, 12, (count, 2))], axis=1).astype(np.float32)


def replaced(detections, **changes):
    names = ("image_ids", "image_index", "labels", "scores", "boxes_xyxy_orig")
    return Detections(**{name: changes.get(name, getattr(detections, name)) for name in names})


def subset(detections, rows):
    arrays = ("image_index", "labels", "scores", "boxes_xyxy_orig")
    return replaced(detections, **{name: getattr(detections, name)[rows] for name in arrays})


def as_records(targets):
    return [
        ImageRecord(f"VOC2007/{k:06d}", Path("image.jpg"), Path("image.xml"), (100, 100), target)
        for k, target in enumerate(targets)
    ]


def ap_table(detections, targets, metric="voc"):
    matches = match_detections(detections, targets)
    return np.array([average_precision(m.true_positive, m.ignored, m.num_positives, metric) for m in matches.values()])


SEEDS = st.integers(0, 2**32 - 1)


@settings(max_examples=150)
@given(SEEDS)
def test_flags_and_precision_are_the_transcripts(seed):
    detections, targets = random_case(seed)
    tables = {"voc": ap_table(detections, targets), "voc07": ap_table(detections, targets, "voc07")}
    for number, match in enumerate(match_detections(detections, targets).values()):
        letters, positives = transcript(detections, targets, number + 1)
        assert match.num_positives == positives
        for row, expected in enumerate(letters):
            true, ignored = flags(expected)
            np.testing.assert_array_equal(match.true_positive[row], true.reshape(-1))
            np.testing.assert_array_equal(match.ignored[row], ignored.reshape(-1))
            np.testing.assert_array_equal(match.false_positive[row], ~(true | ignored).reshape(-1))
            if positives:
                assert tables["voc"][number, row] == pytest.approx(devkit_area(expected, positives), abs=1e-12)
                slow = devkit_eleven_points(expected, positives)
                assert tables["voc07"][number, row] == pytest.approx(slow, abs=1e-12)
            else:
                assert np.isnan(tables["voc"][number, row])


@given(SEEDS, st.sampled_from(["voc", "voc07"]))
def test_result_holds_the_transcripts_means(seed, metric):
    detections, targets = random_case(seed)
    slow_ap = {"voc": devkit_area, "voc07": devkit_eleven_points}[metric]
    expected = {}
    for label, name in enumerate(VOC_CLASSES, start=1):
        letters, positives = transcript(detections, targets, label)
        if positives:
            expected[name] = [slow_ap(text, positives) for text in letters]
    # Records in another order: they are joined by id.
    result = evaluate(detections, as_records(targets)[::-1], metric)
    assert result.images == len(targets)
    for name, values in result.per_class.items():
        if name in expected:
            assert values["mAP"] == pytest.approx(np.mean(expected[name]), abs=1e-12)
            assert values["AP50"] == pytest.approx(expected[name][0], abs=1e-12)
        else:
            assert values == {"mAP": None, "AP50": None}
    if expected:
        table = np.array(list(expected.values()))
        assert result.mAP == pytest.approx(table.mean(), abs=1e-12)
        assert list(result.per_iou.values()) == pytest.approx(table.mean(axis=0), abs=1e-12)


@pytest.mark.parametrize("seed", range(8))
def test_area_is_cocos_where_the_rules_coincide(seed):
    """One object a class and image leaves no next best to pass on to; recalls k/n for n objects give the area."""
    rng = np.random.default_rng(seed)
    number = 16
    sizes = rng.uniform(20, 60, (number, 2))
    objects = np.concatenate([np.full((number, 2), 30), 30 + sizes], axis=1).astype(np.float32)
    image_index = rng.integers(0, number, 80)
    boxes = ordered(objects[image_index] + rng.normal(0, 1, (80, 4)) * rng.uniform(0, 8, (80, 1)))
    scores = (rng.permutation(80) / 80).astype(np.float32)
    detections = Detections(
        tuple(f"VOC2007/{k:06d}" for k in range(number)), image_index, np.ones(80, np.int64), scores, boxes
    )
    targets = [Target(box[None], np.ones(1, np.int64), np.zeros(1, np.bool_)) for box in objects]
    ours = ap_table(detections, targets)[0]
    assert ours[-1] < ours[5] < ours[0] < 1
    assert ours == pytest.approx(coco_area(objects, detections), abs=1e-9)


def coco_area(objects, detections):
    def xywh(box):
        return [float(v) for v in (box[0], box[1], box[2] - box[0], box[3] - box[1])]

    truth = COCO()
    with contextlib.redirect_stdout(io.StringIO()):
        truth.dataset = {
            "images": [{"id": k} for k in range(len(objects))],
            "categories": [{"id": 1}],
            "annotations": [
                {"id": k + 1, "image_id": k, "category_id": 1, "bbox": xywh(box), "area": 1.0, "iscrowd": 0}
                for k, box in enumerate(objects.astype(np.float64))
            ],
        }
        truth.createIndex()
        rows = zip(
            detections.image_index, detections.scores, detections.boxes_xyxy_orig.astype(np.float64), strict=True
        )
        found = truth.loadRes(
            [
                {"image_id": int(image), "category_id": 1, "bbox": xywh(box), "score": float(score)}
                for image, score, box in rows
            ]
        )
        run = COCOeval(truth, found, "bbox")
        run.params.iouThrs = np.array(IOU_THRESHOLDS)
        run.params.recThrs = np.arange(1, len(objects) + 1) / len(objects)
        run.evaluate()
        run.accumulate()
    return run.eval["precision"][:, :, 0, 0, -1].mean(axis=1)


# --- what must hold of any case --------------------------------------------------------------------------------------


@given(SEEDS)
def test_order_of_rows_changes_nothing_where_scores_are_distinct(seed):
    detections, targets = random_case(seed, distinct_scores=True)
    shuffled = subset(detections, np.random.default_rng(seed).permutation(len(detections)))
    np.testing.assert_array_equal(ap_table(shuffled, targets), ap_table(detections, targets))


@given(SEEDS)
def test_only_the_order_of_scores_matters(seed):
    detections, targets = random_case(seed)
    scaled = replaced(detections, scores=detections.scores * 4 - 7)
    np.testing.assert_array_equal(ap_table(scaled, targets), ap_table(detections, targets))


@given(SEEDS)
def test_duplicates_never_help(seed):
    detections, targets = random_case(seed)
    doubled = subset(detections, np.repeat(np.arange(len(detections)), 2))
    assert np.all((ap_table(doubled, targets) <= ap_table(detections, targets) + 1e-12) | no_truth(targets))


@given(SEEDS, st.sampled_from(["voc", "voc07"]))
def test_a_false_positive_below_all_others_changes_nothing(seed, metric):
    detections, targets = random_case(seed)
    stray = replaced(
        detections,
        image_index=np.append(detections.image_index, 0),
        labels=np.append(detections.labels, 1),
        scores=np.append(detections.scores, np.float32(0.01)),
        boxes_xyxy_orig=np.append(detections.boxes_xyxy_orig, np.float32([[500, 500, 510, 510]]), axis=0),
    )
    np.testing.assert_array_equal(ap_table(stray, targets, metric), ap_table(detections, targets, metric))


@given(SEEDS)
def test_precision_is_a_fraction(seed):
    table = ap_table(*random_case(seed))
    known = table[~np.isnan(table)]
    assert np.all((known >= 0) & (known <= 1 + 1e-12))


def no_truth(targets):
    have = {int(label) for t in targets for label in t.labels[~t.difficult]}
    return np.array([[label not in have] for label in range(1, 21)])


# --- the result ------------------------------------------------------------------------------------------------------


def perfect(targets):
    return Detections.from_images(
        [f"VOC2007/{k:06d}" for k in range(len(targets))],
        [ImageDetections(t.boxes_xyxy_orig, t.labels, np.ones(len(t), np.float32)) for t in targets],
    )


def one_object(label=8, difficult=False):
    return Target(np.array([[0, 0, 10, 10]], np.float32), np.array([label]), np.array([difficult]))


@pytest.mark.parametrize("metric", ["voc", "voc07"])
def test_json_is_the_contract(metric):
    targets = [one_object(8), one_object(8), one_object(12, difficult=True)]
    printed = json.loads(json.dumps(evaluate(perfect(targets), as_records(targets), metric).to_json(), allow_nan=False))
    assert printed == {
        "images": 3,
        "metric": metric,
        "mAP": 1.0,
        "per_iou": {f"0.{percent}": 1.0 for percent in PERCENTS},
        # Dogs are all difficult: nothing was there to find.
        "per_class": {
            name: {"mAP": 1.0, "AP50": 1.0} if name == "cat" else {"mAP": None, "AP50": None} for name in VOC_CLASSES
        },
    }
    assert list(printed["per_class"]) == list(VOC_CLASSES)


def test_nothing_to_find_anywhere_is_null_not_zero():
    targets = [one_object(difficult=True)]
    result = evaluate(perfect(targets), as_records(targets))
    assert result.mAP is None
    assert set(result.per_iou.values()) == {None}


def test_a_class_that_was_missed_is_zero_and_counts():
    targets = [one_object(8), one_object(12)]
    detections = perfect(targets)
    result = evaluate(subset(detections, np.array([0])), as_records(targets))
    assert result.per_class["dog"] == {"mAP": 0.0, "AP50": 0.0}
    assert result.mAP == 0.5


@pytest.mark.parametrize(("evaluated", "scored", "odd"), [(2, 1, "VOC2007/000001"), (1, 3, "VOC2007/000001")])
def test_other_images_than_were_evaluated_are_refused(evaluated, scored, odd):
    message = f"exactly the {scored} images to score, found those of {evaluated}; {odd} is in only one of the two"
    with pytest.raises(DetectionsError, match=message):
        evaluate(perfect([one_object()] * evaluated), as_records([one_object()] * scored))

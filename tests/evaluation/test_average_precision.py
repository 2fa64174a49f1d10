"""Average precision against hand-worked numbers, a slow transcript of the devkit's rule, and COCO's code."""

import contextlib
import io
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from data.errors import DetectionsError
from data.records import VOC_CLASSES, Target
from evaluation.average_precision import average_precision, evaluate
from evaluation.detections import Detections, ImageDetections
from evaluation.matching import IOU_THRESHOLDS, METRICS, match_detections
from tests.evaluation.devkit_transcript import PERCENTS, devkit_area, devkit_eleven_points, transcript
from tests.evaluation.random_cases import as_records, ordered, random_case, replaced, subset


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


def ap_table(detections, targets, metric="voc"):
    matches = match_detections(detections, targets, metric)
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


ALL = st.sampled_from(METRICS)


@given(SEEDS, ALL)
def test_order_of_rows_and_of_images_changes_nothing(seed, metric):
    # The cases are full of equal scores, equal boxes too.
    detections, targets = random_case(seed)
    rng = np.random.default_rng(seed)
    images = rng.permutation(len(targets))
    shuffled = subset(detections, rng.permutation(len(detections)))
    shuffled = replaced(
        shuffled,
        image_ids=tuple(detections.image_ids[image] for image in images),
        image_index=np.argsort(images)[shuffled.image_index],
    )
    expected = ap_table(detections, targets, metric)
    np.testing.assert_array_equal(ap_table(shuffled, [targets[image] for image in images], metric), expected)


@given(SEEDS, ALL)
def test_only_the_order_of_scores_matters(seed, metric):
    detections, targets = random_case(seed)
    scaled = replaced(detections, scores=1 / (1 + np.exp(-detections.scores.astype(np.float64))))
    np.testing.assert_array_equal(ap_table(scaled, targets, metric), ap_table(detections, targets, metric))


@given(SEEDS)
def test_duplicates_never_help(seed):
    detections, targets = random_case(seed)
    doubled = subset(detections, np.repeat(np.arange(len(detections)), 2))
    assert np.all((ap_table(doubled, targets) <= ap_table(detections, targets) + 1e-12) | no_truth(targets))


@given(SEEDS)
def test_a_duplicate_below_all_scores_never_helps_where_objects_stand_alone(seed):
    """COCO's rule may hand a duplicate on to the next best object, so this needs objects that do not overlap."""
    detections, targets = random_case(seed)
    alone = [Target(t.boxes_xyxy_orig[:1], t.labels[:1], t.difficult[:1]) for t in targets]
    lowest = replaced(detections, scores=detections.scores / 10)
    both = replaced(
        detections,
        **{
            name: np.concatenate([getattr(detections, name), getattr(lowest, name)])
            for name in ("image_index", "labels", "scores", "boxes_xyxy_orig")
        },
    )
    assert np.all((ap_table(both, alone, "coco") <= ap_table(detections, alone, "coco") + 1e-12) | no_truth(alone))


@given(SEEDS, ALL)
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


@given(SEEDS, ALL)
def test_precision_is_a_fraction(seed, metric):
    table = ap_table(*random_case(seed), metric)
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


@pytest.mark.parametrize("metric", METRICS)
def test_json_is_the_contract(metric):
    # 10 × 10 px are small.
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
        "definitions": {
            name: {"mAP": 1.0, "AP50": 1.0, "per_iou": {f"0.{percent}": 1.0 for percent in PERCENTS}}
            for name in ("voc", "voc07", "coco")
        },
        "by_size": {
            "small": {"mAP": 1.0, "AP50": 1.0, "objects": 2},
            "medium": {"mAP": None, "AP50": None, "objects": 0},
            "large": {"mAP": None, "AP50": None, "objects": 0},
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

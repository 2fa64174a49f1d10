import numpy as np
import pytest

from data.errors import DetectionsError
from evaluation.detections import Detections, ImageDetections


def arrays(**changes):
    values = {
        "image_ids": ("VOC2007/000001", "VOC2007/000002"),
        "image_index": np.array([0, 1]),
        "labels": np.array([1, 20]),
        "scores": np.array([0.5, 0.25], dtype=np.float32),
        "boxes_xyxy_orig": np.array([[0, 0, 5, 5], [1, 2, 3, 4]], dtype=np.float32),
    }
    return values | changes


def boxes(*rows):
    return np.array(rows, dtype=np.float32)


UNSCORABLE = {
    "NaN score": ({"scores": np.array([0.5, np.nan], np.float32)}, r"000002\): expected a finite score, found nan"),
    "negative score": ({"scores": np.array([-0.5, 1], np.float32)}, r"000001\): expected a score of 0 or more"),
    "infinite box": ({"boxes_xyxy_orig": boxes((0, 0, np.inf, 5), (1, 2, 3, 4))}, r"000001\): expected a finite box"),
    "inverted box": ({"boxes_xyxy_orig": boxes((0, 0, 5, 5), (3, 2, 1, 4))}, r"000002\): expected a box with x1 ≤ x2"),
    "background": ({"labels": np.array([0, 20])}, r"000001\): expected a label in 1..20, found 0"),
    "label 21": ({"labels": np.array([1, 21])}, r"000002\): expected a label in 1..20, found 21"),
}
MISTAKES = {
    "half scores": ({"scores": np.array([0.5, 0.2], np.float16)}, r"scores: expected float32 .* found float16 \(2,\)"),
    "one label": ({"labels": np.array([1])}, r"labels: expected int64 \(2,\), found int64 \(1,\)"),
    "flat boxes": ({"boxes_xyxy_orig": np.zeros(8, np.float32)}, r"boxes_xyxy_orig: expected float32 \(2, 4\)"),
    "image index too high": ({"image_index": np.array([0, 2])}, r"image_index: expected 0..1"),
    "repeated id": ({"image_ids": ("a", "a")}, "expected each image once"),
}


@pytest.mark.parametrize(("changes", "message"), UNSCORABLE.values(), ids=UNSCORABLE)
def test_values_that_cannot_be_scored_are_refused_with_the_image(changes, message):
    with pytest.raises(DetectionsError, match=message):
        Detections(**arrays(**changes))


@pytest.mark.parametrize(("changes", "message"), MISTAKES.values(), ids=MISTAKES)
def test_arrays_of_the_wrong_kind_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        Detections(**arrays(**changes))


def test_scores_may_be_as_exact_as_files_give_them():
    scores = np.array([0.99999999990, 0.99999999999])
    assert Detections(**arrays(scores=scores)).scores.dtype == np.float64


def test_images_without_detections_are_kept():
    none = ImageDetections(np.zeros((0, 4), np.float32), np.zeros(0, np.int64), np.zeros(0, np.float32))
    one = ImageDetections(boxes((1, 2, 3, 4)), np.array([7]), np.array([0.5], np.float32))
    joined = Detections.from_images(["a", "b", "c"], [none, one, none])
    assert joined.image_ids == ("a", "b", "c")
    assert joined.image_index.tolist() == [1]
    assert len(joined) == 1
    assert len(joined.of_image("a").labels) == 0
    assert joined.of_image("b").boxes_xyxy_orig.tolist() == [[1, 2, 3, 4]]
    with pytest.raises(KeyError):
        joined.of_image("d")


def test_a_result_too_few_is_refused():
    with pytest.raises(ValueError, match="expected detections of 1 images, found those of 0"):
        Detections.from_images(["a"], [])

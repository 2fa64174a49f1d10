"""What both formats refuse and what they tell, and which of them a path means."""

import json

import pytest

from data.errors import DetectionsError
from data.records import LABEL_OF_CLASS
from evaluation.coco_files import write_coco
from evaluation.detection_files import read_detections, write_detections
from tests.evaluation.file_cases import class_files, records_of

IDS = ("VOC2007/000005", "VOC2007/000007", "VOC2007/000009")
CAT = LABEL_OF_CLASS["cat"]
SOUND = ("000005", "0.5", 10, 20, 40, 60)
# 500 columns, 300 rows.
SIZE = (300, 500)


def devkit(tmp_path, rows):
    """Rows of image, score, x1, y1, x2, y2, half-open; a blank line before the last one."""
    lines = [f"{image} {score} {x1 + 1} {y1 + 1} {x2} {y2}" for image, score, x1, y1, x2, y2 in rows]
    return class_files(tmp_path, cat="\n".join([*lines[:-1], "", *lines[-1:]]))


def coco(tmp_path, rows):
    entries = [
        f'{{"image_id": "{image}", "category_id": {CAT}, "bbox": {json.dumps([x1, y1, x2 - x1, y2 - y1])},'
        f' "score": {score.replace("nan", "NaN").replace("inf", "Infinity")}}}'
        for image, score, x1, y1, x2, y2 in rows
    ]
    path = tmp_path / "found.json"
    path.write_text(f"[{', '.join(entries)}]")
    return path


FORMATS = pytest.mark.parametrize(
    ("write", "place"), [(devkit, "x_cat.txt:{line}: "), (coco, "found.json: entry {entry}: ")], ids=["devkit", "coco"]
)
REFUSED = {
    "NaN score": (("000005", "nan", 10, 20, 40, 60), "expected a finite score, found nan"),
    "infinite score": (("000005", "inf", 10, 20, 40, 60), "expected a finite score, found inf"),
    "negative score": (("000005", "-0.25", 10, 20, 40, 60), "expected a score of 0 or more, found -0.25"),
    "box without end": (("000005", "0.5", 10, 20, 1e39, 60), "expected a finite box"),
    "inverted box": (("000005", "0.5", 40, 20, 10, 60), "found the inverted box"),
    "upside-down box": (("000005", "0.5", 10, 60, 40, 20), "found the inverted box"),
    "right of the image": (("000005", "0.5", 501, 20, 540, 60), "a box that overlaps its image, 500×300 px"),
    "beginning where the image ends": (("000005", "0.5", 500, 20, 540, 60), "wholly outside"),
    "left of the image": (("000005", "0.5", -30, 20, -10, 60), "wholly outside"),
    "below the image": (("000005", "0.5", 10, 310, 40, 400), "wholly outside"),
    "above the image": (("000005", "0.5", 10, -40, 40, 0), "wholly outside"),
}


@FORMATS
@pytest.mark.parametrize(("row", "message"), REFUSED.values(), ids=REFUSED)
def test_a_row_that_cannot_be_scored_is_refused_with_its_place(tmp_path, write, place, row, message):
    path = write(tmp_path, [SOUND, SOUND, row])
    with pytest.raises(DetectionsError) as refused:
        read_detections(path, records_of(IDS, SIZE))
    assert place.format(line=4, entry=3) + "expected" in refused.value.message
    assert message in refused.value.message


@FORMATS
def test_the_first_wrong_row_is_named_whatever_is_wrong_with_it(tmp_path, write, place):
    path = write(tmp_path, [SOUND, REFUSED["left of the image"][0], REFUSED["NaN score"][0], SOUND])
    with pytest.raises(
        DetectionsError, match=place.format(line=2, entry=2).replace(".", r"\.") + ".*overlaps its image"
    ):
        read_detections(path, records_of(IDS, SIZE))


@FORMATS
def test_negative_scores_come_with_a_way_on(tmp_path, write, place):
    with pytest.raises(DetectionsError) as refused:
        read_detections(write(tmp_path, [("000005", "-1", 10, 20, 40, 60)]), records_of(IDS, SIZE))
    assert "through a sigmoid" in refused.value.hint


@FORMATS
def test_boxes_that_stick_out_are_scored_as_they_are_and_told(tmp_path, write, place):
    rows = [SOUND, ("000007", "0.5", -20, 20, 40, 60), ("000009", "0.5", 400, 250, 500, 312.5), SOUND]
    path = write(tmp_path, rows)
    found, notes = read_detections(path, records_of(IDS, SIZE))
    assert found.boxes_xyxy_orig.tolist() == [list(row[2:]) for row in rows]
    first = path / "x_cat.txt:2" if path.is_dir() else f"{path}: entry 2"
    assert notes == [
        f"note: 2 of 4 boxes stick out of their image, by up to 20.0 px, first {first}; scored as they are"
        " (pixels of a resized image look like this)"
    ]


@FORMATS
def test_one_pixel_too_far_looks_like_another_origin(tmp_path, write, place):
    _, notes = read_detections(write(tmp_path, [("000005", "0.5", -1, 20, 40, 60), SOUND]), records_of(IDS[:1], SIZE))
    assert len(notes) == 1
    assert "1 of 2 boxes stick out of their image, by up to 1.0 px" in notes[0]
    assert "(1-based and 0-based numbers mixed up look like this)" in notes[0]


@FORMATS
def test_empty_boxes_on_the_border_and_rounding_errors_are_nothing_odd(tmp_path, write, place):
    rows = [("000005", "0.5", 500, 20, 500, 60), ("000005", "0.5", 0, 0, 500.0001, 300), ("000005", "0", 0, 0, 0, 0)]
    found, notes = read_detections(write(tmp_path, rows), records_of(IDS[:1], SIZE))
    assert len(found) == 3
    assert notes == []


@FORMATS
def test_images_without_a_detection_are_counted(tmp_path, write, place):
    _, notes = read_detections(write(tmp_path, [SOUND, SOUND]), records_of(IDS, SIZE))
    assert notes == ["note: 2 of 3 images have no detection"]


@FORMATS
def test_the_wrong_set_is_told_by_its_share(tmp_path, write, place):
    rows = [SOUND, *((f"{number:06d}", "0.5", 10, 20, 40, 60) for number in range(100, 1600))]
    with pytest.raises(DetectionsError) as refused:
        read_detections(write(tmp_path, rows), records_of(IDS, SIZE))
    assert place.format(line=2, entry=2) + "unknown image id '000100'" in refused.value.message
    assert "so it is for 1,500 of the 1,501 images named" in refused.value.message
    assert "--voc-set" in refused.value.hint


def test_the_ending_of_a_path_says_the_format(tmp_path):
    found, _ = read_detections(coco(tmp_path, [SOUND]), records_of(IDS, SIZE))
    for name in ("again.json", "AGAIN.JSON", "folder"):
        write_detections(found, tmp_path / name)
        assert read_detections(tmp_path / name, records_of(IDS, SIZE))[0].boxes_xyxy_orig.tolist() == [[10, 20, 40, 60]]
    write_coco(found, tmp_path / "expected.json")
    assert (tmp_path / "AGAIN.JSON").read_bytes() == (tmp_path / "expected.json").read_bytes()
    assert len(list((tmp_path / "folder").iterdir())) == 20


def test_a_path_that_is_neither_is_refused(tmp_path):
    (tmp_path / "found.txt").touch()
    for name, message in (
        ("none.json", "none.json: no such file of detections"),
        ("found.txt", "found.txt: expected a folder or a .json file of detections"),
        ("none", "none: no such folder of detections"),
    ):
        with pytest.raises(DetectionsError, match=message):
            read_detections(tmp_path / name, records_of(IDS))

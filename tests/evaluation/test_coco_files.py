import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.errors import DetectionsError
from data.records import LABEL_OF_CLASS
from evaluation.coco_files import read_coco, write_coco
from evaluation.detections import Detections
from tests.evaluation.file_cases import records_of

IDS = ("VOC2007/000005", "VOC2007/000007", "VOC2012/2008_000001")
CAT = LABEL_OF_CLASS["cat"]
SOUND = {"image_id": 5, "category_id": CAT, "bbox": [10, 20, 30, 40.5], "score": 0.75}


def write(tmp_path, entries):
    path = tmp_path / "found.json"
    path.write_text(entries if isinstance(entries, str) else json.dumps(entries))
    return path


def read(path, ids=IDS):
    return read_coco(path, records_of(ids))[0]


def test_an_entry_is_a_half_open_box(tmp_path):
    found = read(write(tmp_path, [SOUND, {**SOUND, "image_id": 7, "score": 1, "area": 3, "segmentation": []}]))
    assert found.boxes_xyxy_orig.tolist() == [[10, 20, 40, 60.5]] * 2
    assert found.labels.tolist() == [CAT, CAT]
    assert found.scores.tolist() == [0.75, 1.0]
    assert found.image_index.tolist() == [0, 1]
    assert found.image_ids == IDS


@pytest.mark.parametrize(
    ("written", "index"),
    [(5, 0), ("000005", 0), ("VOC2007/000005", 0), (2008000001, 2), ("2008_000001", 2), ("VOC2012/2008_000001", 2)],
    ids=str,
)
def test_an_image_is_named_by_number_or_text(tmp_path, written, index):
    assert read(write(tmp_path, [{**SOUND, "image_id": written}])).image_index.tolist() == [index]


def test_an_empty_list_says_that_nothing_was_found(tmp_path):
    found, notes = read_coco(write(tmp_path, []), records_of(IDS))
    assert len(found) == 0
    assert notes == ["note: no detections at all: nothing was found in any of 3 images"]


BAD_ENTRIES = {
    "no object": ([1, 2], "expected an object, found [1, 2]"),
    "a key missing": ({"image_id": 5, "bbox": [1, 1, 2, 2], "score": 1}, "found no category_id"),
    "unknown number": ({**SOUND, "image_id": 6}, "unknown image id 6: the image sets being scored do not hold it"),
    "unknown text": ({**SOUND, "image_id": "5"}, "unknown image id '5'"),
    "id a fraction": ({**SOUND, "image_id": 5.0}, "expected image_id to be a string or a whole number, found 5.0"),
    "id a truth value": ({**SOUND, "image_id": True}, "expected image_id to be a string or a whole number, found true"),
    "id an object": ({**SOUND, "image_id": {}}, "expected image_id to be a string or a whole number"),
    "category 0": ({**SOUND, "category_id": 0}, "from 1 (aeroplane) to 20 (tvmonitor), VOC's classes in the devkit's"),
    "category 21": ({**SOUND, "category_id": 21}, "found 21"),
    "category a name": ({**SOUND, "category_id": "cat"}, 'found "cat"'),
    "category a list": ({**SOUND, "category_id": [8]}, "found [8]"),
    "box of three": ({**SOUND, "bbox": [1, 2, 3]}, "four numbers [x, y, width, height], found [1, 2, 3]"),
    "box of text": ({**SOUND, "bbox": ["1", 1, 2, 2]}, "four numbers"),
    "box a text": ({**SOUND, "bbox": "1234"}, 'found "1234"'),
    "box beyond all numbers": ({**SOUND, "bbox": [10**400, 1, 2, 2]}, "four numbers"),
    "score null": ({**SOUND, "score": None}, "expected score to be a number, found null"),
    "score true": ({**SOUND, "score": True}, "expected score to be a number, found true"),
    "negative width": ({**SOUND, "bbox": [10, 20, -3, 4]}, "found the inverted box [10.0, 20.0, -3.0, 4.0]"),
}


@pytest.mark.parametrize(("entry", "message"), BAD_ENTRIES.values(), ids=BAD_ENTRIES)
def test_a_bad_entry_is_refused_with_file_and_number(tmp_path, entry, message):
    path = write(tmp_path, [SOUND, entry, SOUND])
    with pytest.raises(DetectionsError) as refused:
        read(path)
    assert refused.value.message.startswith(f"{path}: entry 2: ")
    assert message in refused.value.message


def test_a_number_that_fits_two_images_is_refused(tmp_path):
    path = write(tmp_path, [SOUND])
    with pytest.raises(DetectionsError, match="entry 1: the image id 5 fits images of several devkits"):
        read(path, ("VOC2007/000005", "VOC2012/000005"))


BAD_FILES = {
    "zero bytes": ("", ": expected a list of detections, found an empty file\n  next: where nothing was found, .* []"),
    "blank": (" \n", ": expected a list of detections, found an empty file"),
    "cut off": ('[{"image_id": 5,\n "category_id"', ":2: not JSON .*column 15"),
    "an object": ("{}", ": expected a list of detections, found an object"),
    "a number": ("12", ": expected a list of detections, found 12"),
    "ground truth": ('{"images": [], "annotations": []}', ": expected a list of detections, found COCO's ground truth"),
    "nested": ("[" * 100_000, ": not a list of detections"),
}


@pytest.mark.parametrize(("text", "message"), BAD_FILES.values(), ids=BAD_FILES)
def test_a_file_that_is_no_result_is_refused(tmp_path, text, message):
    with pytest.raises(DetectionsError, match="found.json" + message.replace("[]", r"\[\]")):
        read(write(tmp_path, text))


def test_a_file_that_is_no_text_is_refused(tmp_path):
    (tmp_path / "found.json").write_bytes(b'["\xff\xfe"]')
    with pytest.raises(DetectionsError, match=r"found\.json: not JSON"):
        read(tmp_path / "found.json")


def detections(image_ids, rows):
    """Each row: image index, label, score, four corners in any order."""
    corners = np.array([row[3] for row in rows], dtype=np.float32).reshape(-1, 2, 2)
    return Detections(
        image_ids=tuple(image_ids),
        image_index=np.array([row[0] for row in rows], dtype=np.int64),
        labels=np.array([row[1] for row in rows], dtype=np.int64),
        scores=np.array([row[2] for row in rows], dtype=np.float32),
        boxes_xyxy_orig=np.concatenate([corners.min(axis=1), corners.max(axis=1)], axis=1),
    )


PIXELS = st.floats(0, 500, width=32)
SCORES = st.floats(0, allow_infinity=False, allow_subnormal=False, width=32)
ROWS = st.tuples(st.integers(0, 2), st.integers(1, 20), SCORES, st.lists(PIXELS, min_size=4, max_size=4))


@settings(max_examples=120)
@given(st.lists(ROWS, max_size=12))
def test_every_float_survives_the_round_trip(tmp_path_factory, rows):
    written = detections(IDS, rows)
    path = tmp_path_factory.mktemp("coco") / "out.json"
    write_coco(written, path)
    found = read(path)
    for name in ("image_index", "labels", "boxes_xyxy_orig"):
        np.testing.assert_array_equal(getattr(found, name), getattr(written, name), strict=True)
    np.testing.assert_array_equal(found.scores.astype(np.float32), written.scores, strict=True)
    again = path.with_name("again.json")
    write_coco(found, again)
    assert again.read_bytes() == path.read_bytes()


def test_what_is_written_is_short_and_a_line_an_entry(tmp_path):
    write_coco(detections(IDS, [(0, CAT, 0.1, (10.1, 20, 40.3, 60.5))] * 2), tmp_path / "out.json")
    entry = f'{{"image_id": 5, "category_id": {CAT}, "bbox": [10.1, 20.0, 30.2, 40.5], "score": 0.1}}'
    assert (tmp_path / "out.json").read_text() == f"[{entry},\n{entry}]\n"


@pytest.mark.parametrize(
    ("ids", "written"),
    [
        (("VOC2007/000005", "VOC2012/2008_000001"), 5),
        (("VOC2007/000005", "VOC2012/000005"), "VOC2007/000005"),
        (("VOC2007/000005", "VOC2007/cat"), "VOC2007/000005"),
    ],
)
def test_images_are_numbers_where_each_has_one_of_its_own(tmp_path, ids, written):
    write_coco(detections(ids, [(0, CAT, 0.1, (10, 20, 40, 60))]), tmp_path / "out.json")
    assert json.loads((tmp_path / "out.json").read_text())[0]["image_id"] == written
    assert read(tmp_path / "out.json", ids).image_index.tolist() == [0]


def test_pycocotools_reads_what_is_written(tmp_path, capsys):
    from pycocotools.coco import COCO

    write_coco(detections(IDS, [(2, CAT, 0.5, (10, 20, 40, 60))]), tmp_path / "out.json")
    truth = COCO()
    truth.dataset = {"images": [{"id": 2008000001}], "categories": [{"id": CAT}], "annotations": []}
    truth.createIndex()
    (found,) = truth.loadRes(str(tmp_path / "out.json")).loadAnns(1)
    assert (found["image_id"], found["bbox"], found["score"]) == (2008000001, [10.0, 20.0, 30.0, 40.0], 0.5)


def test_a_failed_write_leaves_the_former_file(tmp_path, monkeypatch):
    path = tmp_path / "out.json"
    write_coco(detections(IDS, [(0, CAT, 0.1, (10, 20, 40, 60))]), path)

    def full_disk(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_text", full_disk)
    with pytest.raises(DetectionsError, match=r"out\.json: cannot be written \(No space left on device\)"):
        write_coco(detections(IDS, []), path)
    assert len(read(path)) == 1
    assert [entry.name for entry in tmp_path.iterdir()] == ["out.json"]


def test_a_folder_in_the_way_is_refused(tmp_path):
    (tmp_path / "out.json").mkdir()
    with pytest.raises(DetectionsError, match="expected a file to write detections to, found a folder"):
        write_coco(detections(IDS, []), tmp_path / "out.json")

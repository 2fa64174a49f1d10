import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.errors import DetectionsError
from data.records import VOC_CLASSES
from evaluation.detections import Detections, ImageDetections
from evaluation.devkit_files import find_class_files, read_devkit, write_devkit
from evaluation.ranking import ranking
from tests.evaluation.file_cases import class_files, records_of

IDS = ("VOC2007/000005", "VOC2007/000007", "VOC2007/000009")
CAT = 1 + VOC_CLASSES.index("cat")


def one(box, score=0.5, label=CAT):
    return ImageDetections(np.array([box], np.float32), np.array([label]), np.array([score], np.float32))


def nothing():
    return ImageDetections(np.zeros((0, 4), np.float32), np.zeros(0, np.int64), np.zeros(0, np.float32))


def test_the_line_is_the_devkits_one_based_and_inclusive(tmp_path):
    # 10 columns from 0 on are the devkit's 1 to 10.
    write_devkit(Detections.from_images(IDS, [nothing(), one((0, 4, 10, 20.5)), nothing()]), tmp_path / "out")
    assert (tmp_path / "out" / "comp4_det_test_cat.txt").read_text() == "000007 0.5 1.0 5.0 10.0 20.5\n"
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(
        f"comp4_det_test_{name}.txt" for name in VOC_CLASSES
    )
    assert (tmp_path / "out" / "comp4_det_test_dog.txt").read_bytes() == b""


def read(folder, ids=IDS):
    return read_devkit(folder, records_of(ids))[0]


def test_lines_of_another_detector_are_read_as_half_open_boxes(tmp_path):
    class_files(tmp_path, "mine", cat="000009 .75 11 21 30 40\r\n\n  VOC2007/000005\t1e-3  1 1 1 1  \n")
    found = read(tmp_path)
    assert found.image_index.tolist() == [2, 0]
    assert found.boxes_xyxy_orig.tolist() == [[10, 20, 30, 40], [0, 0, 1, 1]]
    assert found.scores.tolist() == [0.75, 0.001]
    assert found.labels.tolist() == [CAT, CAT]
    assert found.image_ids == IDS


def test_ids_are_written_in_full_where_devkits_are_mixed(tmp_path):
    ids = ("VOC2007/000005", "VOC2012/000005")
    write_devkit(Detections.from_images(ids, [nothing(), one((0, 0, 1, 1))]), tmp_path / "out", prefix="mine")
    assert (tmp_path / "out" / "mine_cat.txt").read_text().startswith("VOC2012/000005 ")
    assert read(tmp_path / "out", ids).image_index.tolist() == [1]


def test_a_box_narrower_than_a_pixel_survives(tmp_path):
    # Its xmax is below its xmin in the devkit's inclusive numbers.
    write_devkit(Detections.from_images(IDS[:1], [one((10.25, 3, 10.5, 4))]), tmp_path / "out")
    assert read(tmp_path / "out", IDS[:1]).boxes_xyxy_orig.tolist() == [[10.25, 3, 10.5, 4]]


def test_scores_that_differ_only_as_doubles_keep_their_rank(tmp_path):
    class_files(tmp_path, cat="000005 0.99999999990 1 1 9 9\n000007 0.99999999999 1 1 9 9\n")
    found = read(tmp_path)
    assert found.scores.tolist() == [0.99999999990, 0.99999999999]
    assert ranking(found).tolist() == [1, 0]


PIXELS = st.floats(0, 500, width=32).filter(lambda value: value == 0 or value >= 2**-29)
SCORES = st.floats(0, allow_infinity=False, allow_subnormal=False, width=32)
ROWS = st.tuples(st.integers(0, 2), st.integers(1, 20), SCORES, st.lists(PIXELS, min_size=4, max_size=4))


@settings(max_examples=120)
@given(st.lists(ROWS, max_size=12))
def test_every_float_survives_the_round_trip(tmp_path_factory, rows):
    corners = np.array([row[3] for row in rows], dtype=np.float32).reshape(-1, 2, 2)
    written = Detections(
        image_ids=IDS,
        image_index=np.array([row[0] for row in rows], dtype=np.int64),
        labels=np.array([row[1] for row in rows], dtype=np.int64),
        scores=np.array([row[2] for row in rows], dtype=np.float32),
        boxes_xyxy_orig=np.concatenate([corners.min(axis=1), corners.max(axis=1)], axis=1),
    )
    folder = tmp_path_factory.mktemp("devkit") / "out"
    write_devkit(written, folder)
    found = read(folder)
    order = np.argsort(written.labels, kind="stable")
    for name in ("image_index", "labels", "boxes_xyxy_orig"):
        np.testing.assert_array_equal(getattr(found, name), getattr(written, name)[order], strict=True)
    np.testing.assert_array_equal(found.scores.astype(np.float32), written.scores[order], strict=True)


def test_what_was_read_is_written_as_it_was(tmp_path):
    rng = np.random.default_rng(0)
    corners = rng.uniform(0, 500, (50, 2, 2)).astype(np.float32)
    found = ImageDetections(
        np.concatenate([corners.min(axis=1), corners.max(axis=1)], axis=1),
        rng.integers(1, 21, 50),
        rng.random(50).astype(np.float32),
    )
    write_devkit(Detections.from_images(IDS[:1], [found]), tmp_path / "once")
    write_devkit(read(tmp_path / "once"), tmp_path / "twice")
    for path in (tmp_path / "once").iterdir():
        assert path.read_bytes() == (tmp_path / "twice" / path.name).read_bytes()


def test_an_empty_box_off_the_pixel_grid_is_read_as_it_was_written(tmp_path):
    x = np.float32(1e-05)
    write_devkit(Detections.from_images(IDS[:1], [one((x, 0, x, 0), np.float32(0.5))]), tmp_path / "out")
    np.testing.assert_array_equal(read(tmp_path / "out").boxes_xyxy_orig, [[x, 0, x, 0]])


def test_numbers_are_written_with_no_more_digits_than_they_need(tmp_path):
    score, x1 = np.float32(0.1), np.float32(123.4)
    write_devkit(Detections.from_images(IDS[:1], [one((x1, 0, 200, 1), score)]), tmp_path / "out")
    assert (tmp_path / "out" / "comp4_det_test_cat.txt").read_text() == "000005 0.1 124.4 1.0 200.0 1.0\n"


BAD_LINES = {
    "unknown id": ("000006 0.5 1 1 9 9", "unknown image id '000006'"),
    "a long unknown id": (f"{'9' * 90} 0.5 1 1 9 9", f"unknown image id '{'9' * 90}'"),
    "id of another year": ("VOC2012/000005 0.5 1 1 9 9", "unknown image id 'VOC2012/000005'"),
    "score beyond float64": ("000005 1e999 1 1 9 9", "expected a finite score, found inf"),
    "too few columns": ("000005 0.5 1 1 9", "expected the 6 columns image_id score xmin ymin xmax ymax, found 5"),
    "too many columns": ("000005 0.5 1 1 9 9 cat", "expected the 6 columns .* found 7"),
    "not a number": ("000005 high 1 1 9 9", "expected numbers in score xmin ymin xmax ymax, found 'high 1 1 9 9'"),
    "a decimal comma": ("000005 0,5 1 1 9 9", "expected numbers in score"),
    "digits of another script": ("000005 ٣ 1 1 9 9", "expected numbers in score"),
    "digits in groups": ("000005 0.5 1_0 1 19 9", "expected numbers in score"),
    "a comment": ("# all cats", "expected the 6 columns .* found 3"),
    "binary": ("\udcff\udcfe\x00", "expected the 6 columns"),
}


@pytest.mark.parametrize(("line", "message"), BAD_LINES.values(), ids=BAD_LINES)
def test_a_bad_line_is_refused_with_file_and_line(tmp_path, line, message):
    text = f"000005 0.5 1 1 9 9\n\n{line}\n000005 0.5 1 1 9 9\n"
    class_files(tmp_path)
    (tmp_path / "x_cat.txt").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(DetectionsError, match=rf"x_cat\.txt:3: {message}"):
        read(tmp_path)


def test_columns_that_only_add_up_over_two_lines_are_refused(tmp_path):
    class_files(tmp_path, cat="000005 0.5 1 1 9\n9 000005 0.5 1 1 9 9\n")
    with pytest.raises(DetectionsError, match=r"x_cat\.txt:1: expected the 6 columns .* found 5"):
        read(tmp_path)


def test_a_bare_id_that_fits_two_devkits_is_refused(tmp_path):
    class_files(tmp_path, cat="000005 0.5 1 1 9 9\n")
    with pytest.raises(DetectionsError, match=r":1: the image id '000005' fits images of several devkits") as refused:
        read(tmp_path, ("VOC2007/000005", "VOC2012/000005"))
    assert "write ids in full, as in VOC2007/000005" in refused.value.hint


BAD_FOLDERS = {
    "empty": ([], "expected files such as comp4_det_test_aeroplane.txt, found none"),
    "no class": (["notes.txt", "x_unicorn.txt", "cat.txt"], "found none for any VOC class"),
    "two prefixes": (["a_cat.txt", "b_dog.txt"], "found the prefixes a, b"),
    "misspelt class": (["a_cat.txt", "a_aeroplan.txt"], "a_aeroplan.txt: 'aeroplan' is no VOC class"),
}


@pytest.mark.parametrize(("names", "message"), BAD_FOLDERS.values(), ids=BAD_FOLDERS)
def test_a_folder_that_is_no_result_is_refused(tmp_path, names, message):
    for name in names:
        (tmp_path / name).touch()
    with pytest.raises(DetectionsError, match=message):
        read(tmp_path)


def test_a_missing_folder_is_refused(tmp_path):
    with pytest.raises(DetectionsError, match="no such folder of detections"):
        read(tmp_path / "absent")


def test_a_class_without_a_file_is_refused_by_name(tmp_path):
    for name in ("x_train.txt", "x_aeroplane.txt", "README.md"):
        (tmp_path / name).touch()
    with pytest.raises(DetectionsError, match=r"x_bicycle\.txt: no such file and 17 more") as refused:
        read(tmp_path)
    assert refused.value.hint == (
        f"where nothing was found of a class, say so by an empty file: touch {tmp_path / 'x_bicycle.txt'}"
    )


def test_empty_files_say_that_nothing_was_found(tmp_path):
    class_files(tmp_path, cat="\n \n")
    assert list(find_class_files(tmp_path)) == list(VOC_CLASSES)
    found, notes = read_devkit(tmp_path, records_of(IDS))
    assert len(found) == 0
    assert notes == ["note: no detections at all: nothing was found in any of 3 images"]


def test_writing_again_replaces_the_whole_result_and_leaves_nothing_beside_it(tmp_path):
    folder = tmp_path / "out"
    write_devkit(Detections.from_images(IDS[:1], [one((0, 0, 1, 1))]), folder)
    write_devkit(Detections.from_images(IDS[:1], [nothing()]), folder)
    assert len(read(folder)) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_writing_never_mixes_with_other_files(tmp_path):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(DetectionsError, match=r"expected an empty or new folder .* found 'thesis\.tex'"):
        write_devkit(Detections.from_images(IDS[:1], [nothing()]), tmp_path)
    with pytest.raises(DetectionsError, match="expected a folder to write detections to, found a file"):
        write_devkit(Detections.from_images(IDS[:1], [nothing()]), tmp_path / "thesis.tex")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_failed_write_leaves_the_former_result(tmp_path, monkeypatch):
    folder = tmp_path / "out"
    write_devkit(Detections.from_images(IDS[:1], [one((0, 0, 1, 1))]), folder)

    def full_disk(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_text", full_disk)
    with pytest.raises(DetectionsError, match=r"out: cannot be written \(No space left on device\)"):
        write_devkit(Detections.from_images(IDS[:1], [nothing()]), folder)
    assert len(read(folder)) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["out"]

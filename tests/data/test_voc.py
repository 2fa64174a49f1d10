import re
from pathlib import Path

import pytest

from data.errors import DatasetError, TeachOnceError, UsageError
from data.voc import list_ids, read_record, read_voc
from tests.data.tiny_devkit import TinyDevkit


def test_a_record_names_the_files_of_its_image(tiny: TinyDevkit) -> None:
    (record,) = read_voc(tiny.root, ["2007:train"])
    assert record.id == "VOC2007/000001"
    assert record.image_path == tiny.root / "VOC2007" / "JPEGImages" / "000001.jpg"
    assert record.annotation_path == tiny.root / "VOC2007" / "Annotations" / "000001.xml"
    assert record.image_size == (80, 100)


def test_the_image_is_named_by_the_id_and_never_by_the_annotation(tiny: TinyDevkit) -> None:
    tiny.annotate(
        "000001",
        "<annotation><filename>other.jpg</filename><size><width>100</width><height>80</height></size></annotation>",
    )
    assert read_record(tiny.root, "VOC2007/000001").image_path.name == "000001.jpg"


def test_sets_are_joined_in_order_and_a_repeated_id_is_kept_once(tiny: TinyDevkit) -> None:
    tiny.list("a", ["000003", "000001", "000003"])
    tiny.list("b", ["000002", "000001"])
    older = TinyDevkit(tiny.root, year=2012)
    older.list("a", ["000001"])
    assert list_ids(tiny.root, ["2007:b", "2007:a", "2012:a"]) == [
        "VOC2007/000002",
        "VOC2007/000001",
        "VOC2007/000003",
        "VOC2012/000001",
    ]


def test_a_limit_keeps_the_first_ones_and_reads_no_other(tiny: TinyDevkit) -> None:
    tiny.list("train", ["000001", "000002_has_no_annotation"])
    assert [record.id for record in read_voc(tiny.root, ["2007:train"], limit=1)] == ["VOC2007/000001"]


def test_blank_lines_and_trailing_blanks_are_no_ids(tiny: TinyDevkit) -> None:
    tiny.list("train", ["", "  000001  ", "", "2008_000002", ""])
    assert list_ids(tiny.root, ["2007:train"]) == ["VOC2007/000001", "VOC2007/2008_000002"]


BAD_LINES = {
    "climbing out": "../../x",
    "absolute": "/etc/passwd",
    "hidden": ".ssh",
    "with a folder": "a/b",
    "Windows path": "..\\x",
    "a line of a per-class list": "000002 -1",
}


@pytest.mark.parametrize("stem", BAD_LINES.values(), ids=BAD_LINES)
def test_a_line_that_is_no_id_is_refused(tiny: TinyDevkit, stem: str) -> None:
    path = tiny.list("train", ["000001", "", stem])
    with pytest.raises(DatasetError) as caught:
        read_voc(tiny.root, ["2007:train"])
    assert caught.value.message == f"{path}: expected an image id such as 000005 in line 3, found {stem!r}"


@pytest.mark.parametrize(
    "spec", ["train", "2007", "2007:", "07:train", "2007:../train", "2007:a b", "2007:train\n", ""]
)
def test_a_malformed_set_name_is_a_usage_error(tiny: TinyDevkit, spec: str) -> None:
    with pytest.raises(UsageError) as caught:
        read_voc(tiny.root, [spec])
    assert caught.value.message == f"expected an image set as YEAR:SPLIT, found {spec!r}"


def test_no_set_at_all_is_a_usage_error(tiny: TinyDevkit) -> None:
    with pytest.raises(UsageError, match="no image set was named"):
        read_voc(tiny.root, [])


@pytest.mark.parametrize("limit", [0, -1])
def test_a_limit_below_one_is_a_usage_error(tiny: TinyDevkit, limit: int) -> None:
    with pytest.raises(UsageError, match=f"expected a limit of at least one image, found {limit}"):
        read_voc(tiny.root, ["2007:train"], limit=limit)


def test_an_empty_set_is_refused(tiny: TinyDevkit) -> None:
    path = tiny.list("val", ["", " "])
    with pytest.raises(DatasetError) as caught:
        read_voc(tiny.root, ["2007:val"])
    assert caught.value.message == f"{path}: expected image ids, one a line, found an empty image set"


def test_a_missing_set_lists_those_there_are_without_the_per_class_lists(tiny: TinyDevkit) -> None:
    tiny.list("val", ["000001"])
    for name in ("cat_train", "train_train", "train_val"):
        tiny.list(name, ["000001  1"])
    tiny.list("train_small", ["000001"])
    with pytest.raises(DatasetError) as caught:
        read_voc(tiny.root, ["2007:test"])
    path = tiny.root / "VOC2007" / "ImageSets" / "Main" / "test.txt"
    assert caught.value.message == f"{path}: no such image set; this devkit has 2007:train, 2007:train_small, 2007:val"


def test_a_missing_devkit_lists_those_there_are(tiny: TinyDevkit) -> None:
    with pytest.raises(DatasetError) as caught:
        read_voc(tiny.root, ["2012:train"])
    assert caught.value.message == f"{tiny.root / 'VOC2012'}: no such devkit (found VOC2007)"


@pytest.mark.parametrize("root", ["VOCdevkit/VOC2007", "nowhere"])
def test_a_wrong_root_says_what_to_point_at(tiny: TinyDevkit, tmp_path: Path, root: str) -> None:
    with pytest.raises(DatasetError) as caught:
        read_voc(tmp_path / root, ["2007:train"])
    assert caught.value.message == f"{tmp_path / root / 'VOC2007'}: no such devkit (found no VOC folder there)"
    assert "point --voc-root at the folder that holds VOC2007" in str(caught.value)


def test_a_set_that_is_no_text_is_refused(tiny: TinyDevkit) -> None:
    path = tiny.list("train", [])
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DatasetError, match=f"^{re.escape(str(path))}: cannot be read as text"):
        read_voc(tiny.root, ["2007:train"])


def test_a_folder_in_the_place_of_a_set_is_refused(tiny: TinyDevkit) -> None:
    (tiny.folder / "ImageSets" / "Main" / "odd.txt").mkdir()
    with pytest.raises(TeachOnceError, match=r"odd\.txt: cannot be read as text"):
        read_voc(tiny.root, ["2007:odd"])

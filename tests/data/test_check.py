from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.check import CheckReport, Problem, check_voc
from data.errors import DatasetError, UsageError
from data.voc import read_voc
from tests.data.tiny_devkit import CAT, TinyDevkit


def check(tiny: TinyDevkit, decode: bool = True) -> CheckReport:
    return check_voc(tiny.root, ["2007:train"], decode=decode, workers=2)


def told(report: CheckReport) -> list[tuple[str, str, str]]:
    return [(level, file.name, what) for level, file, what in report.problems]


def size(width: int = 100, height: int = 80) -> str:
    return f"<size><width>{width}</width><height>{height}</height></size>"


def cat(xmin: float, ymin: float, xmax: float, ymax: float) -> str:
    corners = f"<xmin>{xmin}</xmin><ymin>{ymin}</ymin><xmax>{xmax}</xmax><ymax>{ymax}</ymax>"
    return f"<object><name>cat</name><bndbox>{corners}</bndbox></object>"


def test_a_sound_set_has_no_problem(tiny: TinyDevkit) -> None:
    report = check(tiny)
    assert (report.ok, report.problems) == (True, ())
    assert (report.images, report.objects, report.difficult, report.images_without_objects) == (1, 1, 0, 0)
    assert report.per_class["cat"] == 1
    assert sum(report.per_class.values()) == 1
    assert len(report.per_class) == 20


PLANTED = {
    "unknown class": (
        f"<annotation>{size()}<object><name>yeti</name></object></annotation>",
        "object 1: unknown class 'yeti'",
    ),
    "inverted box": (f"<annotation>{size()}{cat(9, 1, 8, 5)}</annotation>", "object 1 (cat): expected xmin ≤ xmax"),
    "box outside": (f"<annotation>{size()}{cat(9, 1, 120, 5)}</annotation>", "object 1 (cat): expected a box inside"),
    "malformed": ("<annotation>", "malformed XML"),
    "hostile": ("<!DOCTYPE annotation><annotation/>", "refused: it declares a document type"),
    "no size": (f"<annotation>{CAT}</annotation>", "expected a <size>"),
    "path in filename": (
        f"<annotation><filename>/etc/passwd</filename>{size()}{CAT}</annotation>",
        "expected <filename> to be a bare file name",
    ),
}


@pytest.mark.parametrize(("xml", "what"), PLANTED.values(), ids=PLANTED)
def test_a_planted_fault_of_an_annotation_is_an_error(tiny: TinyDevkit, xml: str, what: str) -> None:
    tiny.annotate("000001", xml)
    report = check(tiny)
    assert not report.ok
    (problem,) = report.problems
    assert (problem.level, problem.file.name) == ("error", "000001.xml")
    assert problem.what.startswith(what)


def test_every_faulty_object_of_a_file_is_listed_and_the_others_counted(tiny: TinyDevkit) -> None:
    tiny.annotate("000001", f"<annotation>{size()}{cat(9, 1, 8, 5)}{CAT}{cat(1, 1, 999, 5)}</annotation>")
    report = check(tiny)
    assert [problem.what.split(":")[0] for problem in report.problems] == ["object 1 (cat)", "object 3 (cat)"]
    assert report.objects == 1


def test_a_path_in_filename_does_not_hide_what_else_is_wrong(tiny: TinyDevkit) -> None:
    tiny.annotate("000001", f"<annotation><filename>a/b</filename>{size()}{cat(9, 1, 8, 5)}</annotation>")
    assert len(check(tiny).problems) == 2


def test_a_missing_annotation_and_a_missing_image_are_both_listed(tiny: TinyDevkit) -> None:
    tiny.list("train", ["000001", "000009"])
    assert told(check(tiny)) == [
        ("error", "000009.xml", "the annotation is missing"),
        ("error", "000009.jpg", "the image is missing"),
    ]


def test_truncated_undecodable_and_wrongly_sized_images_are_listed(tiny: TinyDevkit) -> None:
    tiny.list("train", ["000001", "000002", "000003"])
    tiny.add("000002")
    tiny.add("000003", size=(99, 80))
    noise = np.random.default_rng(0).integers(0, 256, (80, 100, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tiny.image("000001"))
    tiny.image("000001").write_bytes(tiny.image("000001").read_bytes()[:-2000])
    tiny.image("000002").write_bytes(b"not an image")
    problems = told(check(tiny))
    assert [(level, file) for level, file, _ in problems] == [
        ("error", "000001.jpg"),
        ("error", "000002.jpg"),
        ("error", "000003.jpg"),
    ]
    assert problems[0][2].startswith("damaged image (")
    assert problems[1][2] == "neither a JPEG nor a PNG image"
    assert problems[2][2] == "expected 99×80 as its annotation says, found 100×80"


def test_an_image_without_objects_is_a_note_and_legal(tiny: TinyDevkit) -> None:
    tiny.add("000001", objects="")
    report = check(tiny)
    assert told(report) == [("note", "000001.xml", "no object in this image")]
    assert (report.ok, report.images_without_objects) == (True, 1)


def test_what_is_read_otherwise_than_it_stands_is_a_warning(tiny: TinyDevkit) -> None:
    tiny.list("train", ["000001", "000001", "000001"])
    tiny.annotate("000001", f"<annotation><filename>7.jpg</filename>{size()}{cat(0, 1, 100, 81)}</annotation>")
    report = check(tiny)
    assert told(report) == [
        ("warning", "train.txt", "000001 is listed 3 times; it is used once"),
        ("warning", "000001.xml", "<filename> says '7.jpg', expected '000001.jpg', which is the file that is read"),
        (
            "warning",
            "000001.xml",
            "object 1 (cat): its box stands up to a pixel outside the image and is clipped",
        ),
    ]
    assert (report.ok, report.images) == (True, 1)


def test_without_decoding_annotations_are_enough(tiny: TinyDevkit) -> None:
    tiny.image("000001").unlink()
    assert check(tiny, decode=False).problems == ()
    assert check(tiny).problems == (Problem("error", tiny.image("000001"), "the image is missing"),)


def test_a_set_listed_in_two_sets_is_checked_once_and_progress_told(devkit: Path) -> None:
    steps: list[tuple[int, int]] = []
    report = check_voc(devkit, ["2007:trainval", "2007:val"], progress=lambda done, total: steps.append((done, total)))
    assert steps == [(done, 18) for done in range(1, 19)]
    targets = [record.target for record in read_voc(devkit, ["2007:trainval"])]
    assert (report.images, report.objects) == (18, sum(len(target) for target in targets))
    assert report.difficult == sum(int(target.difficult.sum()) for target in targets)
    assert report.problems == ()


def test_a_list_that_cannot_be_read_stops_the_check(tiny: TinyDevkit) -> None:
    with pytest.raises(DatasetError, match="no such image set"):
        check_voc(tiny.root, ["2007:val"])
    with pytest.raises(UsageError, match="expected an image set as YEAR:SPLIT"):
        check_voc(tiny.root, ["train"])

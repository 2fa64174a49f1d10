import numpy as np
import pytest

from data.errors import AnnotationError
from data.voc import read_record
from tests.data.tiny_devkit import TinyDevkit

SIZE = "<size><width>100</width><height>80</height></size>"
CLASSES = (
    "aeroplane, bicycle, bird, boat, bottle, bus, car, cat, chair, cow, diningtable, dog, horse, motorbike, person,"
    " pottedplant, sheep, sofa, train, tvmonitor"
)


def box(xmin: object, ymin: object, xmax: object, ymax: object) -> str:
    return f"<bndbox><xmin>{xmin}</xmin><ymin>{ymin}</ymin><xmax>{xmax}</xmax><ymax>{ymax}</ymax></bndbox>"


def cat(bndbox: str, more: str = "") -> str:
    return f"<object><name>cat</name>{more}{bndbox}</object>"


def annotation(objects: str, size: str = SIZE) -> str:
    return f"<annotation><filename>000001.jpg</filename>{size}{objects}</annotation>"


def message_for(tiny: TinyDevkit, xml: str | bytes) -> str:
    """What reading says of the file, without the file's path."""
    path = tiny.annotate("000001", xml)
    with pytest.raises(AnnotationError) as caught:
        read_record(tiny.root, "VOC2007/000001")
    prefix = f"{path}: "
    assert caught.value.message.startswith(prefix)
    return caught.value.message.removeprefix(prefix)


BAD_BOXES = {
    "xmin beyond xmax": (
        box(30, 1, 10, 9),
        "object 1 (cat): expected xmin ≤ xmax and ymin ≤ ymax, found the inverted box xmin=30 ymin=1 xmax=10 ymax=9",
    ),
    "ymin beyond ymax": (
        box(1, 9, 10, 8),
        "object 1 (cat): expected xmin ≤ xmax and ymin ≤ ymax, found the inverted box xmin=1 ymin=9 xmax=10 ymax=8",
    ),
    "two pixels outside on the right": (
        box(1, 1, 102, 80),
        "object 1 (cat): expected a box inside the 100×80 image (1-based, inclusive),"
        " found xmin=1 ymin=1 xmax=102 ymax=80",
    ),
    "two pixels outside at the top": (
        box(1, -1, 100, 80),
        "object 1 (cat): expected a box inside the 100×80 image (1-based, inclusive),"
        " found xmin=1 ymin=-1 xmax=100 ymax=80",
    ),
    "wholly in the tolerated pixel on the left": (
        box(0, 1, 0, 80),
        "object 1 (cat): expected a box inside the 100×80 image (1-based, inclusive),"
        " found xmin=0 ymin=1 xmax=0 ymax=80",
    ),
    "wholly in the tolerated pixel below": (
        box(1, 81, 10, 81),
        "object 1 (cat): expected a box inside the 100×80 image (1-based, inclusive),"
        " found xmin=1 ymin=81 xmax=10 ymax=81",
    ),
    "no box": ("", "object 1 (cat): expected a <bndbox>, found none"),
    "only a part's box": (
        f"<part><name>head</name>{box(1, 1, 9, 9)}</part>",
        "object 1 (cat): expected a <bndbox>, found none",
    ),
    "a word for a number": (box("left", 1, 9, 9), "expected a number in <bndbox><xmin>, found 'left'"),
    "not a number": (box(1, 1, "nan", 9), "expected a number in <bndbox><xmax>, found 'nan'"),
    "infinite": (box(1, 1, 9, "1e999"), "expected a number in <bndbox><ymax>, found '1e999'"),
    "missing corner": (
        "<bndbox><xmin>1</xmin><xmax>9</xmax><ymax>9</ymax></bndbox>",
        "expected a number in <bndbox><ymin>, found none",
    ),
    "difficult neither 0 nor 1": (
        "<difficult>maybe</difficult>" + box(1, 1, 9, 9),
        "object 1 (cat): expected <difficult> to be 0 or 1, found 'maybe'",
    ),
}


@pytest.mark.parametrize(("inner", "message"), BAD_BOXES.values(), ids=BAD_BOXES)
def test_an_impossible_object_is_refused(tiny: TinyDevkit, inner: str, message: str) -> None:
    assert message_for(tiny, annotation(cat(inner))) == message


def test_the_second_object_is_named_as_the_second(tiny: TinyDevkit) -> None:
    objects = cat(box(1, 1, 9, 9)) + "<object><name>unicorn</name></object>"
    assert message_for(tiny, annotation(objects)) == (f"object 2: unknown class 'unicorn'; expected one of {CLASSES}")


BAD_FILES = {
    "empty file": ("", "malformed XML (no element found: line 1, column 0)"),
    "cut short": ("<annotation><size>", "malformed XML (no element found: line 1, column 18)"),
    "binary": (b"\x00\x01\x02", "malformed XML (not well-formed (invalid token): line 1, column 0)"),
    "encoding that does not exist": (
        '<?xml version="1.0" encoding="klingon"?><annotation/>',
        "cannot be read (unknown encoding: klingon)",
    ),
    "multi-byte encoding": (
        '<?xml version="1.0" encoding="shift_jis"?><annotation/>',
        "cannot be read (multi-byte encodings are not supported)",
    ),
    "no size": (annotation("", size=""), "expected a <size> with the image's width and height, found none"),
    "no height": (
        annotation("", size="<size><width>100</width></size>"),
        "expected a number in <size><height>, found none",
    ),
    "no pixel": (
        annotation("", size="<size><width>0</width><height>80</height></size>"),
        "expected <size><width> to be a whole number of pixels, found 0",
    ),
    "half a pixel": (
        annotation("", size="<size><width>100</width><height>80.5</height></size>"),
        "expected <size><height> to be a whole number of pixels, found 80.5",
    ),
    "path in filename": (
        f"<annotation><filename>../../etc/passwd</filename>{SIZE}</annotation>",
        "expected <filename> to be a bare file name, found the path '../../etc/passwd'",
    ),
    "Windows path in filename": (
        f"<annotation><filename>C:\\secret.jpg</filename>{SIZE}</annotation>",
        "expected <filename> to be a bare file name, found the path 'C:\\\\secret.jpg'",
    ),
}


@pytest.mark.parametrize(("xml", "message"), BAD_FILES.values(), ids=BAD_FILES)
def test_a_malformed_annotation_is_refused(tiny: TinyDevkit, xml: str | bytes, message: str) -> None:
    assert message_for(tiny, xml) == message


BILLION_LAUGHS = (
    '<!DOCTYPE a [<!ENTITY l0 "lol">'
    + "".join(f'<!ENTITY l{n} "{f"&l{n - 1};" * 10}">' for n in range(1, 10))
    + "]><annotation>&l9;</annotation>"
)
HOSTILE = {
    "entity expansion": BILLION_LAUGHS,
    "external entity": '<!DOCTYPE a [<!ENTITY x SYSTEM "file:///etc/passwd">]><annotation>&x;</annotation>',
    "external document type": '<!DOCTYPE a SYSTEM "file:///etc/passwd"><annotation/>',
    "document type alone": "<!DOCTYPE annotation><annotation/>",
}


@pytest.mark.parametrize("xml", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_annotation_is_refused_before_anything_is_expanded(tiny: TinyDevkit, xml: str) -> None:
    assert message_for(tiny, xml) == (
        "refused: it declares a document type or entities, as no devkit file does (DTDForbidden)"
    )


def test_a_missing_annotation_is_named(tiny: TinyDevkit) -> None:
    (tiny.folder / "Annotations" / "000001.xml").unlink()
    with pytest.raises(AnnotationError, match=r"000001\.xml: the annotation is missing"):
        read_record(tiny.root, "VOC2007/000001")


GOOD_BOXES = {
    "the whole image": (box(1, 1, 100, 80), (0, 0, 100, 80)),
    "one pixel": (box(100, 80, 100, 80), (99, 79, 100, 80)),
    "float coordinates": (box("10.5", "20.25", "30.5", "40"), (9.5, 19.25, 30.5, 40)),
    "a pixel outside on every side is clipped": (box(0, 0, 101, 81), (0, 0, 100, 80)),
    "half a pixel outside is clipped": (box("0.5", 1, "100.5", 80), (0, 0, 100, 80)),
    "surrounded by blanks": (box(" 1 ", "\n2", 9, 9), (0, 1, 9, 9)),
}


@pytest.mark.parametrize(("bndbox", "expected"), GOOD_BOXES.values(), ids=GOOD_BOXES)
def test_boxes_become_zero_based_and_half_open(
    tiny: TinyDevkit, bndbox: str, expected: tuple[float, float, float, float]
) -> None:
    tiny.annotate("000001", annotation(cat(bndbox)))
    assert read_record(tiny.root, "VOC2007/000001").target.boxes_xyxy_orig.tolist() == [list(expected)]


def test_parts_with_boxes_of_their_own_are_no_objects(tiny: TinyDevkit) -> None:
    part = f"<part><name>head</name>{box(2, 2, 5, 5)}</part>"
    person = f"<object>{part}<name>person</name>{box(1, 1, 50, 60)}{part}</object>"
    tiny.annotate("000001", annotation(person))
    target = read_record(tiny.root, "VOC2007/000001").target
    assert target.boxes_xyxy_orig.tolist() == [[0, 0, 50, 60]]
    assert target.labels.tolist() == [15]


def test_labels_and_difficult_keep_the_files_order(tiny: TinyDevkit) -> None:
    objects = "".join(
        f"<object><name>{name}</name>{difficult}{box(1, 1, 9, 9)}</object>"
        for name, difficult in (
            ("tvmonitor", "<difficult>1</difficult>"),
            ("aeroplane", "<difficult>0</difficult>"),
            ("cat", ""),
            (" dog ", "<difficult/>"),
        )
    )
    tiny.annotate("000001", annotation(objects))
    target = read_record(tiny.root, "VOC2007/000001").target
    assert target.labels.tolist() == [20, 1, 8, 12]
    assert target.difficult.tolist() == [True, False, False, False]


def test_an_image_without_objects_has_empty_arrays_of_the_right_shape(tiny: TinyDevkit) -> None:
    tiny.annotate("000001", annotation(""))
    target = read_record(tiny.root, "VOC2007/000001").target
    assert len(target) == 0
    assert (target.boxes_xyxy_orig.shape, target.boxes_xyxy_orig.dtype) == ((0, 4), np.float32)
    assert (target.labels.shape, target.labels.dtype) == ((0,), np.int64)
    assert (target.difficult.shape, target.difficult.dtype) == ((0,), np.bool_)


def test_a_deeply_nested_annotation_does_not_exhaust_the_stack(tiny: TinyDevkit) -> None:
    tiny.annotate("000001", annotation("<x>" * 100_000 + "</x>" * 100_000))
    assert len(read_record(tiny.root, "VOC2007/000001").target) == 0

"""Reads one VOC annotation file: its image's size and its objects.

Annotations are untrusted input: XML is parsed without document types or entities, and every number is checked.

Source: the VOC2007 development kit documentation, section 4.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple
from xml.etree.ElementTree import Element, ParseError

import defusedxml.ElementTree
from defusedxml import DefusedXmlException

from .errors import AnnotationError
from .records import LABEL_OF_CLASS, VOC_CLASSES

# Annotation tools round: a box may stand this far (px) outside its image and is then clipped; further is an error.
_OUTSIDE_TOLERANCE_PX = 1.0
_RESTORE = "restore this file from the devkit"


class AnnotatedObject(NamedTuple):
    """One object of an annotation.

    box_xyxy: 0-based half-open px of the original image, inside it.  clipped: whether the file's box stood up to a
    pixel outside.
    """

    name: str
    label: int
    difficult: bool
    box_xyxy: tuple[float, float, float, float]
    clipped: bool


def parse_annotation(path: Path) -> Element:
    """Return the root of an annotation file.

    Raises AnnotationError where it is missing, malformed, or declares a document type or entities.
    """
    try:
        root = defusedxml.ElementTree.parse(path, forbid_dtd=True).getroot()
    except FileNotFoundError:
        raise AnnotationError(
            f"{path}: the annotation is missing",
            hint="`python cli.py check-voc` lists everything a set lacks",
        ) from None
    except ParseError as error:
        raise AnnotationError(f"{path}: malformed XML ({error})", hint=_RESTORE) from error
    except DefusedXmlException as error:
        raise AnnotationError(
            f"{path}: refused: it declares a document type or entities, as no devkit file does"
            f" ({type(error).__name__})",
            hint="treat the file as hostile and restore it from the devkit",
        ) from error
    except (OSError, LookupError, ValueError) as error:  # LookupError: the declared encoding does not exist
        raise AnnotationError(f"{path}: cannot be read ({error})", hint=_RESTORE) from error
    assert root is not None  # a parsed document has a root
    return root


def read_filename(root: Element, path: Path) -> str:
    """Return what the annotation calls its image file, or an empty string.

    Raises AnnotationError where that is a path.
    """
    filename = root.findtext("filename", default="").strip()
    if "/" in filename or "\\" in filename:
        raise AnnotationError(
            f"{path}: expected <filename> to be a bare file name, found the path {filename!r}",
            hint="correct the file; TeachOnce itself only ever opens JPEGImages/<id>.jpg",
        )
    return filename


def read_size(root: Element, path: Path) -> tuple[int, int]:
    """Return the image's size (H, W) as its annotation says.

    Raises AnnotationError where it is missing or no whole number of pixels.
    """
    size = root.find("size")
    if size is None:
        raise AnnotationError(f"{path}: expected a <size> with the image's width and height, found none", hint=_RESTORE)
    height, width = (_number(size, name, path) for name in ("height", "width"))
    for name, value in (("height", height), ("width", width)):
        if value < 1 or value != int(value):
            raise AnnotationError(f"{path}: expected <size><{name}> to be a whole number of pixels, found {value:g}")
    return int(height), int(width)


def object_elements(root: Element) -> list[Element]:
    """Return the annotation's objects: direct children only, since a person's parts look alike."""
    return root.findall("object")


def read_object(element: Element, number: int, image_size: tuple[int, int], path: Path) -> AnnotatedObject:
    """Return one object of an annotation, its box clipped to the image of size (H, W).

    number: its place in the file, from 1, for the message.

    Raises AnnotationError for an unknown class or an impossible box.
    """
    name = element.findtext("name", default="").strip()
    if name not in LABEL_OF_CLASS:
        raise AnnotationError(
            f"{path}: object {number}: unknown class {name!r}; expected one of {', '.join(VOC_CLASSES)}"
        )
    where = f"{path}: object {number} ({name})"
    difficult = element.findtext("difficult", default="").strip() or "0"
    if difficult not in ("0", "1"):
        raise AnnotationError(f"{where}: expected <difficult> to be 0 or 1, found {difficult!r}")
    box, clipped = _box(element, image_size, where, path)
    return AnnotatedObject(name, LABEL_OF_CLASS[name], difficult == "1", box, clipped)


def _box(
    element: Element, image_size: tuple[int, int], where: str, path: Path
) -> tuple[tuple[float, float, float, float], bool]:
    # The object's own box, not one of its parts': `find` sees direct children only.
    bndbox = element.find("bndbox")
    if bndbox is None:
        raise AnnotationError(f"{where}: expected a <bndbox>, found none")
    xmin, ymin, xmax, ymax = (_number(bndbox, name, path) for name in ("xmin", "ymin", "xmax", "ymax"))
    found = f"xmin={xmin:g} ymin={ymin:g} xmax={xmax:g} ymax={ymax:g}"
    if xmax < xmin or ymax < ymin:
        raise AnnotationError(f"{where}: expected xmin ≤ xmax and ymin ≤ ymax, found the inverted box {found}")
    height, width = image_size
    outside = max(1 - xmin, 1 - ymin, xmax - width, ymax - height)
    # A box that only touches the tolerated pixel outside would be clipped to nothing.
    beyond = xmax < 1 or ymax < 1 or xmin > width or ymin > height
    if outside > _OUTSIDE_TOLERANCE_PX or beyond:
        raise AnnotationError(
            f"{where}: expected a box inside the {width}×{height} image (1-based, inclusive), found {found}",
            hint="`python cli.py check-voc` lists every such box",
        )
    box = max(xmin - 1, 0.0), max(ymin - 1, 0.0), min(xmax, float(width)), min(ymax, float(height))
    return box, outside > 0


def _number(element: Element, name: str, path: Path) -> float:
    text = element.findtext(name)
    try:
        value = math.nan if text is None else float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        found = "none" if text is None else repr(text)
        raise AnnotationError(f"{path}: expected a number in <{element.tag}><{name}>, found {found}")
    return value

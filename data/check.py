"""Reads a whole image set and lists everything wrong with it, where training would stop at the first fault."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple
from xml.etree.ElementTree import Element

from .annotation import AnnotatedObject, object_elements, parse_annotation, read_filename, read_object, read_size
from .errors import DatasetError
from .images import decode_file
from .records import VOC_CLASSES
from .voc import annotation_path, ids_of_set, image_path, list_ids, set_path

Level = Literal["error", "warning", "note"]


class Problem(NamedTuple):
    """One finding. error: reading or training stops here.  warning: read, but not as it stands.  note: legal."""

    level: Level
    file: Path
    what: str


@dataclass(frozen=True)
class CheckReport:
    """What image sets hold and what is wrong with them.

    Counts are over unique images and objects that can be read; `per_class` has every class, difficult objects too.
    """

    images: int
    objects: int
    difficult: int
    images_without_objects: int
    per_class: dict[str, int]
    problems: tuple[Problem, ...]

    @property
    def ok(self) -> bool:
        """Whether the sets can be trained on: no problem is an error."""
        return not any(problem.level == "error" for problem in self.problems)


class _Finding(NamedTuple):
    """What one image gave; objects: those that can be read.  is_empty: a sound annotation lists none."""

    objects: list[AnnotatedObject]
    is_empty: bool
    problems: list[Problem]


def check_voc(
    voc_root: Path,
    sets: Sequence[str],
    *,
    decode: bool = True,
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> CheckReport:
    """Return what the image sets hold, and every problem with their lists, annotations and images.

    decode: decode every image; without it images are not looked at, so a devkit of annotations alone passes.
    workers: threads, by default one a core.  progress: called with (images checked, of how many).

    Raises UsageError for a malformed set name, DatasetError for a list that cannot be read at all.
    """
    ids = list_ids(voc_root, sets)
    problems = [problem for spec in sets for problem in _repeated_ids(voc_root, spec)]
    findings: list[_Finding] = []
    executor = ThreadPoolExecutor(workers or os.cpu_count())
    try:
        for finding in executor.map(partial(_check_image, voc_root, decode=decode), ids):
            findings.append(finding)
            problems += finding.problems
            if progress is not None:
                progress(len(findings), len(ids))
    finally:
        executor.shutdown(cancel_futures=True)
    objects = [found for finding in findings for found in finding.objects]
    count = Counter(found.name for found in objects)
    return CheckReport(
        images=len(ids),
        objects=len(objects),
        difficult=sum(found.difficult for found in objects),
        images_without_objects=sum(finding.is_empty for finding in findings),
        per_class={name: count[name] for name in VOC_CLASSES},
        problems=tuple(problems),
    )


def _repeated_ids(voc_root: Path, spec: str) -> list[Problem]:
    path = set_path(voc_root, spec)
    counts = Counter(ids_of_set(voc_root, spec))
    return [
        Problem("warning", path, f"{image_id.split('/')[1]} is listed {count} times; it is used once")
        for image_id, count in counts.items()
        if count > 1
    ]


def _check_image(voc_root: Path, image_id: str, *, decode: bool) -> _Finding:
    path, picture = annotation_path(voc_root, image_id), image_path(voc_root, image_id)
    finding = _Finding([], False, [])
    size = None
    try:
        root = parse_annotation(path)
        _check_filename(root, path, picture, finding.problems)
        size = read_size(root, path)
        finding = _check_objects(root, size, path, finding.problems)
    except DatasetError as error:
        finding.problems.append(_problem(path, error))
    if decode:
        try:
            decode_file(picture, annotated_size=size)
        except DatasetError as error:
            finding.problems.append(_problem(picture, error))
    return finding


def _check_filename(root: Element, path: Path, picture: Path, problems: list[Problem]) -> None:
    try:
        filename = read_filename(root, path)
    except DatasetError as error:
        problems.append(_problem(path, error))
        return
    if filename not in ("", picture.name):
        what = f"<filename> says {filename!r}, expected {picture.name!r}, which is the file that is read"
        problems.append(Problem("warning", path, what))


def _check_objects(root: Element, size: tuple[int, int], path: Path, problems: list[Problem]) -> _Finding:
    elements = object_elements(root)
    if not elements:
        problems.append(Problem("note", path, "no object in this image"))
    objects = []
    for number, element in enumerate(elements, start=1):
        try:
            found = read_object(element, number, size, path)
        except DatasetError as error:
            problems.append(_problem(path, error))
            continue
        objects.append(found)
        if found.clipped:
            what = f"object {number} ({found.name}): its box stands up to a pixel outside the image and is clipped"
            problems.append(Problem("warning", path, what))
    return _Finding(objects, not elements, problems)


def _problem(path: Path, error: DatasetError) -> Problem:
    return Problem("error", path, error.message.removeprefix(f"{path}: "))

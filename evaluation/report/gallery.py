"""The section of pictures: chosen images with what every run found in them, drawn as SVG over one thumbnail each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from data.records import VOC_CLASSES, ImageRecord

from .choice import choose_images, how_chosen
from .comparison import Comparison
from .marks import DIFFICULT, MARK_KINDS, MISSED, Mark, Marks
from .page import Section, render
from .thumbnails import thumbnail

# The outline of each kind, as dashes; its colour is in the style sheet, by its place in MARK_KINDS.
DASHES: Mapping[str, str] = {
    "true positive": "", "classification": "9 4", "localisation": "4 3", "both": "9 3 2 3", "duplicate": "14 4",
    "background": "6 2", MISSED: "2 3", "ignored": "1 3", DIFFICULT: "1 5",
}  # fmt: skip
_EXPLAINED: Mapping[str, str] = {
    "true positive": "found, IoU of 0.50 or more",
    "classification": "an object of another class, IoU of 0.50 or more",
    "localisation": "the right class, IoU below 0.50",
    "both": "another class, IoU below 0.50",
    "duplicate": "an object that is found already",
    "background": "nothing near",
    MISSED: "an object without a true positive at this score",
    "ignored": "a detection on a difficult object, counts nowhere",
    DIFFICULT: "an object that need not be found",
}
_USUAL_THRESHOLD, _LOWEST_THRESHOLD, _STEP = 0.3, 0.05, 0.05


@dataclass(frozen=True)
class _Figure:
    """One run's boxes over an image, lowest score first, and in words what of it is shown at first."""

    boxes: list[_Box]
    told: str


@dataclass(frozen=True)
class _Card:
    """An image. reason: why it was chosen.  letter: height of the text on its boxes, px.  figures: one a run."""

    id: str
    reason: str
    width: int
    height: int
    letter: float
    picture: str
    figures: list[_Figure]


@dataclass(frozen=True)
class _Box:
    """A mark as the template draws it. label_x, label_y: where its text starts."""

    mark: Mark
    kind: int
    shown: bool
    label: str
    label_x: float
    label_y: float
    anchor: str


def gallery_section(shown: Comparison, open_image: Callable[[ImageRecord], Image.Image], count: int) -> Section:
    """Return the pictures of at most `count` images.

    open_image: returns a record's image at its original size, or raises ImageError.
    """
    marks = [
        Marks(run.detections, analysis.breakdown, shown.records)
        for run, analysis in zip(shown.runs, shown.analyses, strict=True)
    ]
    threshold = usual_threshold(shown)
    ids = [record.id for record in shown.records]
    chosen = choose_images(np.stack([each.errors(ids, threshold) for each in marks]), count)
    cards = [_card(shown.records[place], reason, marks, threshold, open_image) for place, reason in chosen.items()]
    present = {box.mark.class_name for card in cards for figure in card.figures for box in figure.boxes}
    body = render(
        "gallery.html",
        runs=shown.names,
        cards=cards,
        classes=[name for name in VOC_CLASSES if name in present],
        kinds=[(kind, DASHES[kind], _EXPLAINED[kind]) for kind in MARK_KINDS],
        threshold=threshold,
        lowest=_LOWEST_THRESHOLD,
        step=_STEP,
    )
    return Section("pictures", "Pictures", body, how_chosen(list(chosen.values()), len(ids), threshold))


def missing_gallery_section(reason: str) -> Section:
    """Return what stands for the pictures where there are none."""
    return Section("pictures", "Pictures", render("no_gallery.html", reason=reason))


def usual_threshold(shown: Comparison) -> float:
    """Return the score threshold that pictures start with.

    0.3, or, for weak detectors, the highest step below at which some run has a detection an image on average.
    """
    steps = np.arange(_USUAL_THRESHOLD, _LOWEST_THRESHOLD - 1e-9, -_STEP).round(2)
    for threshold in steps.tolist():
        if any(int(np.sum(run.detections.scores >= threshold)) >= len(shown.records) for run in shown.runs):
            return float(threshold)
    return _LOWEST_THRESHOLD


def _card(
    record: ImageRecord,
    reason: str,
    marks: Sequence[Marks],
    threshold: float,
    open_image: Callable[[ImageRecord], Image.Image],
) -> _Card:
    height, width = record.image_size
    letter = max(width, height * 4 / 3) / 31  # as large on every picture, which all stand in frames of 4:3
    figures = []
    for each in marks:
        found = each.of_image(record.id, _LOWEST_THRESHOLD)
        boxes = [_box(mark, threshold, record.image_size, letter) for mark in reversed(found)]  # the best on top
        figures.append(_Figure(boxes, told([box.mark for box in boxes if box.shown])))
    return _Card(
        id=record.id,
        reason=reason,
        width=width,
        height=height,
        letter=round(letter, 1),
        picture=thumbnail(open_image(record)),
        figures=figures,
    )


def told(marks: Sequence[Mark]) -> str:
    """Return the number of marks of each kind in words; `report.js` says the same after a filter."""
    counts = Counter(mark.kind for mark in marks)
    return ", ".join(f"{counts[kind]} {kind}" for kind in MARK_KINDS if counts[kind]) or "no boxes"


def _box(mark: Mark, threshold: float, image_size: tuple[int, int], letter: float) -> _Box:
    height, width = image_size
    x1, y1, _, y2 = mark.box
    label = f"{mark.class_name} {mark.kind}" if mark.is_object else f"{mark.class_name} {mark.score:.2f}"
    # What was detected is named above its box, what is there below: they often share a box.
    above, below = y1 - letter * 0.35, y2 + letter * 0.95
    if mark.is_object:
        label_y = below if below < height else y2 - letter * 0.35
    else:
        label_y = above if above > letter else min(y1 + letter, y2)
    runs_out = x1 + 0.6 * letter * len(label) > width
    return _Box(
        mark=mark,
        kind=MARK_KINDS.index(mark.kind),
        shown=mark.is_shown(threshold),
        label=label,
        label_x=width - 2 if runs_out else x1,
        label_y=round(label_y, 1),
        anchor="end" if runs_out else "start",
    )

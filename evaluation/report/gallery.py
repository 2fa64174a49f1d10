"""The section of pictures: chosen images with what every run found in them, drawn as SVG over one thumbnail each."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from data.records import VOC_CLASSES, ImageRecord

from .choice import choose_images, how_chosen
from .comparison import THRESHOLDS, Comparison
from .marks import DIFFICULT, MARK_KINDS, MISSED, Mark, Marks
from .page import Section, render
from .thumbnails import thumbnail

# The outline of each kind, as dashes; its colour is in the style sheet, by its place in MARK_KINDS.
DASHES: Mapping[str, str] = {
    "true positive": "", "classification": "9 4", "localisation": "4 3", "both": "9 3 2 3", "duplicate": "14 4",
    "background": "6 2", MISSED: "2 3", "ignored": "", DIFFICULT: "2 4",
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


_MOST_SIDE_BY_SIDE = 3


@dataclass(frozen=True)
class _Scores:
    """The scale of score thresholds. usual: the one to start with.  decimals: with which scores are written."""

    usual: float
    lowest: float
    highest: float
    step: float
    decimals: int

    @classmethod
    def around(cls, threshold: float, best_score: float) -> _Scores:
        """Return the usual scale; one of finer steps where detectors are so weak that it would hold nothing."""
        if threshold >= THRESHOLDS[-1]:
            return cls(threshold, THRESHOLDS[-1], 0.95, 0.05, 2)
        lowest = max(0.001, math.floor(500 * threshold) / 1000)
        return cls(threshold, lowest, max(threshold, math.floor(1000 * best_score) / 1000), 0.001, 3)


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
    threshold = shown.threshold
    scores = _Scores.around(threshold, max(float(run.detections.scores.max(initial=0)) for run in shown.runs))
    ids = [record.id for record in shown.records]
    chosen = choose_images(np.stack([each.errors(ids, threshold) for each in marks]), count)
    cards = [_card(shown.records[place], reason, marks, scores, open_image) for place, reason in chosen.items()]
    present = {box.mark.class_name for card in cards for figure in card.figures for box in figure.boxes}
    body = render(
        "gallery.html",
        runs=shown.names,
        cards=cards,
        classes=[name for name in VOC_CLASSES if name in present],
        kinds=[(kind, DASHES[kind], _EXPLAINED[kind]) for kind in MARK_KINDS],
        scores=scores,
        side_by_side=1 < len(shown.runs) <= _MOST_SIDE_BY_SIDE,
    )
    return Section("pictures", "Pictures", body, how_chosen(list(chosen.values()), len(ids), threshold))


def missing_gallery_section(reason: str) -> Section:
    """Return what stands for the pictures where there are none."""
    return Section("pictures", "Pictures", render("no_gallery.html", reason=reason))


def _card(
    record: ImageRecord,
    reason: str,
    marks: Sequence[Marks],
    scores: _Scores,
    open_image: Callable[[ImageRecord], Image.Image],
) -> _Card:
    height, width = record.image_size
    letter = max(width, height * 4 / 3) / 31  # as large on every picture, which all stand in frames of 4:3
    figures = []
    for each in marks:
        found = each.of_image(record.id, scores.lowest)
        boxes = [_box(mark, scores, record.image_size, letter) for mark in reversed(found)]  # the best on top
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


def _box(mark: Mark, scores: _Scores, image_size: tuple[int, int], letter: float) -> _Box:
    height, width = image_size
    x1, y1, _, y2 = mark.box
    label = (
        f"{mark.class_name} {mark.kind}" if mark.is_object else f"{mark.class_name} {mark.score:.{scores.decimals}f}"
    )
    # What was detected is named above its box, what is there below: they often share a box.
    above, below = y1 - letter * 0.35, y2 + letter * 0.95
    if mark.is_object:
        label_y = below if below < height else y2 - letter * 0.35
    else:
        label_y = above if above > letter else min(y1 + letter, y2)
    runs_out = x1 + 0.66 * letter * len(label) > width
    return _Box(
        mark=mark,
        kind=MARK_KINDS.index(mark.kind),
        shown=mark.is_shown(scores.usual),
        label=label,
        label_x=width - 2 if runs_out else x1,
        label_y=round(label_y, 1),
        anchor="end" if runs_out else "start",
    )

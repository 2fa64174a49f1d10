"""Draws what a detector found in one image against what was there.

Each outcome has a colour of its own and a line of its own, so that it is told apart in grey too; what counts neither
way has thin lines, and where labels get crowded, it goes without. The colours are from
the palette of Okabe and Ito, which stays distinct with the common kinds of colour blindness.

Source: Okabe and Ito, Color Universal Design, 2008 (jfly.uni-koeln.de/color).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from data.records import VOC_CLASSES, Target

from .detections import Detections, ImageDetections
from .matching import match_detections

Box = tuple[int, int, int, int]


@dataclass(frozen=True)
class Outcome:
    """One kind of box: its name in the legend, its RGB colour, and its dashes as (drawn, left out) in line widths.

    counts: as one that is right or wrong; thin lines where not.
    """

    name: str
    colour: tuple[int, int, int]
    dashes: tuple[int, int] | None = None
    counts: bool = True


TRUE_POSITIVE = Outcome("true positive", (0, 158, 115))
FALSE_POSITIVE = Outcome("false positive", (213, 94, 0), dashes=(5, 3))
MISSED = Outcome("missed", (86, 180, 233), dashes=(2, 2))
DIFFICULT = Outcome("difficult", (204, 121, 167), dashes=(2, 4), counts=False)
ON_DIFFICULT = Outcome("on difficult, ignored", (204, 121, 167), counts=False)
# In the order they are drawn: what matters most comes last and lies on top.
OUTCOMES = (DIFFICULT, ON_DIFFICULT, MISSED, FALSE_POSITIVE, TRUE_POSITIVE)

_SHOWN_WITHOUT_SCORE = 5
_LONGER_SIDE_PX = 900
_NARROWEST_PX = 480
_BLACK, _PAPER = (0, 0, 0), (255, 255, 255)


def draw_detections(
    image: Image.Image,
    detections: ImageDetections,
    target: Target,
    *,
    title: str = "",
    score_threshold: float = 0.3,
    iou_threshold: float = 0.5,
) -> Image.Image:
    """Return the image with its detections and objects outlined, over a strip that is the legend.

    image: RGB at its original size, enlarged by a whole factor where small.  title: shown in the strip.
    score_threshold: detections below it are left out; where none reaches it, the five highest are drawn and the strip
    says so.  iou_threshold: from which overlap on a detection counts as having found an object, by the devkit's rule.
    """
    shown, note = _select(detections, score_threshold)
    marks = _judge(shown, target, iou_threshold)
    factor = max(1, round(_LONGER_SIDE_PX / max(image.size)))
    picture = image.convert("RGB").resize((image.width * factor, image.height * factor), Image.Resampling.BICUBIC)
    size = max(12, max(picture.size) // 60)
    font = ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", size)
    line = max(3, round(size / 4))
    draw = ImageDraw.Draw(picture)
    tags: list[tuple[Outcome, str, Box]] = []
    for outcome, text, box in sorted(marks, key=lambda mark: OUTCOMES.index(mark[0])):
        x1, y1, x2, y2 = (np.clip(np.round(box * factor), 0, [*picture.size] * 2)).astype(int).tolist()
        pixels = (x1, y1, max(x2, x1 + 1), max(y2, y1 + 1))
        _outline(draw, pixels, outcome, line)
        tags.append((outcome, text, pixels))
    unlabelled = _label(draw, tags, font, picture.size)
    counts = Counter(outcome for outcome, _, _ in marks)
    notes = [title, note, f"IoU ≥ {iou_threshold:.2f}"]
    if unlabelled:
        notes.append(f"no room for {unlabelled} label{'s' if unlabelled > 1 else ''}")
    return _with_strip(picture, _strip(max(picture.width, _NARROWEST_PX), counts, notes, font, line))


def _select(detections: ImageDetections, threshold: float) -> tuple[ImageDetections, str]:
    """Return the detections to draw, by falling score, and the words that say which they are."""
    order = np.argsort(-detections.scores, kind="stable")
    kept = order[detections.scores[order] >= threshold]
    note = f"score ≥ {threshold:.2f}"
    if not len(order):
        note = "no detections"
    elif not len(kept):
        kept = order[:_SHOWN_WITHOUT_SCORE]
        note = f"no score reaches {threshold:.2f}: the highest {len(kept)} shown"
    boxes, labels, scores = detections
    return ImageDetections(boxes[kept], labels[kept], scores[kept]), note


def _judge(
    shown: ImageDetections, target: Target, iou_threshold: float
) -> list[tuple[Outcome, str, NDArray[np.float32]]]:
    """Return outcome, label text and box of every detection, and of every object that none of them found."""
    flat = Detections.from_images(["image"], [shown])
    missed = ~target.difficult
    outcomes = [FALSE_POSITIVE] * len(flat)
    for match in match_detections(flat, [target], thresholds=[iou_threshold]).values():
        for row, found, ignored in zip(match.detections, match.true_positive[0], match.ignored[0], strict=True):
            outcomes[row] = TRUE_POSITIVE if found else ON_DIFFICULT if ignored else FALSE_POSITIVE
        missed[match.objects[match.true_positive[0]]] = False
    names = [VOC_CLASSES[label - 1] for label in flat.labels]
    marks = [
        (outcome, f"{name} {score:.2f}", box)
        for outcome, name, score, box in zip(outcomes, names, flat.scores, flat.boxes_xyxy_orig, strict=True)
    ]
    for label, box, hard, lost in zip(target.labels, target.boxes_xyxy_orig, target.difficult, missed, strict=True):
        if hard or lost:
            outcome = DIFFICULT if hard else MISSED
            marks.append((outcome, VOC_CLASSES[label - 1] + (" missed" if lost and not hard else ""), box))
    return marks


def _outline(draw: ImageDraw.ImageDraw, box: Box, outcome: Outcome, line: int) -> None:
    """Draw the box's edge inside it, on a dark rim that holds against light and busy pictures.

    line: width in px of what counts.
    """
    line = line if outcome.counts else line // 2
    for margin, colour in ((1, _BLACK), (0, outcome.colour)):
        for x1, y1, x2, y2 in _dashes(box, outcome, line):
            draw.rectangle((x1 - margin, y1 - margin, x2 - 1 + margin, y2 - 1 + margin), fill=colour)


def _dashes(box: Box, outcome: Outcome, line: int) -> Iterator[Box]:
    x1, y1, x2, y2 = box
    across, down = min(line, x2 - x1), min(line, y2 - y1)
    for start, end in _along(x1, x2, outcome, line):
        yield from ((start, y1, end, y1 + down), (start, y2 - down, end, y2))
    for start, end in _along(y1, y2, outcome, line):
        yield from ((x1, start, x1 + across, end), (x2 - across, start, x2, end))


def _along(first: int, last: int, outcome: Outcome, line: int) -> Iterator[tuple[int, int]]:
    """Yield the dashes of a side: one at either end, so that every corner is closed; shorter ones on a short side."""
    length = last - first
    drawn, left_out = (line * part for part in outcome.dashes or (length, 0))
    drawn = min(drawn, (length - left_out) // 2) if outcome.dashes else drawn
    if drawn < max(left_out // 2, 1) or drawn >= length:
        yield first, last
        return
    gaps = max(1, round((length - drawn) / (drawn + left_out)))
    for start in np.linspace(first, last - drawn, gaps + 1).round().astype(int).tolist():
        yield start, start + drawn


def _label(
    draw: ImageDraw.ImageDraw,
    tags: list[tuple[Outcome, str, Box]],
    font: ImageFont.FreeTypeFont,
    picture_size: tuple[int, int],
) -> int:
    """Write the texts on their outcomes' colours, inside the picture, each where it covers the others least.

    Return how many were left out: where every place is taken to a half, and of what does not count, where none is free.
    """
    placed: list[tuple[Outcome, str, Box]] = []
    ascent, descent = font.getmetrics()
    for outcome, text, box in reversed(tags):
        width, height = int(font.getlength(text)) + 6, ascent + descent
        places = _places(box, (width, height), picture_size)
        covered = [sum(_overlap(place, other) for _, _, other in placed) for place in places]
        if min(covered) <= (width * height // 2 if outcome.counts else 0):
            placed.append((outcome, text, places[covered.index(min(covered))]))
    for outcome, text, (x1, y1, x2, y2) in reversed(placed):
        draw.rectangle((x1, y1, x2 - 1, y2 - 1), fill=outcome.colour, outline=_BLACK)
        draw.text((x1 + 3, y1), text, font=font, fill=_BLACK)
    return len(tags) - len(placed)


def _places(box: Box, tag_size: tuple[int, int], picture_size: tuple[int, int]) -> list[Box]:
    """Return where a label may stand, best first: above its box, below, down its sides inside, outside."""
    (x1, y1, x2, y2), (width, height) = box, tag_size
    inner = range(y1, max(y2 - height, y1) + 1, height)
    corners = [(x, y) for y in (y1 - height, y2, *inner) for x in (x1, x2 - width)]
    corners += [(x, y) for y in inner for x in (x2, x1 - width)]
    places = []
    for x, y in corners:
        left = min(max(x, 0), max(picture_size[0] - width, 0))
        top = min(max(y, 0), max(picture_size[1] - height, 0))
        places.append((left, top, left + width, top + height))
    return places


def _overlap(a: Box, b: Box) -> int:
    return max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))


def _strip(
    width: int, counts: Counter[Outcome], notes: list[str], font: ImageFont.FreeTypeFont, line: int
) -> Image.Image:
    """Return the legend: each outcome with its line and its number, then the notes, wrapped to the width."""
    gap, row_height = int(font.size), int(font.size * 1.7)
    swatch = 3 * row_height // 2
    # What does not count would only puzzle where it does not occur.
    legend = [outcome for outcome in reversed(OUTCOMES) if outcome.counts or counts[outcome]]
    entries: list[tuple[Outcome | None, str]] = [(outcome, f"{outcome.name} {counts[outcome]}") for outcome in legend]
    entries += [(None, note) for note in notes if note]
    placed: list[tuple[Outcome | None, str, int, int]] = []
    x, y = gap, gap // 2
    for outcome, text in entries:
        extent = int(font.getlength(text)) + (swatch + gap // 2 if outcome else 0)
        starts_notes = outcome is None and bool(placed) and placed[-1][0] is not None
        if x > gap and (x + extent + gap > width or starts_notes):
            x, y = gap, y + row_height
        placed.append((outcome, text, x, y))
        x += extent + 2 * gap
    strip = Image.new("RGB", (width, y + row_height + gap // 2), _PAPER)
    draw = ImageDraw.Draw(strip)
    for outcome, text, left, top in placed:
        if outcome is not None:
            _outline(draw, (left, top + 3, left + swatch, top + row_height - 3), outcome, line)
            left += swatch + gap // 2
        draw.text((left, top + row_height // 2), text, font=font, fill=_BLACK, anchor="lm")
    return strip


def _with_strip(picture: Image.Image, strip: Image.Image) -> Image.Image:
    joined = Image.new("RGB", (strip.width, picture.height + strip.height), _PAPER)
    joined.paste(picture, (0, 0))
    joined.paste(strip, (0, picture.height))
    return joined

import numpy as np
import pytest
from PIL import Image

from data.images import decode_image
from data.records import LABEL_OF_CLASS, Target
from data.voc import read_voc
from evaluation import pictures
from evaluation.detections import ImageDetections
from evaluation.pictures import (
    DIFFICULT,
    FALSE_POSITIVE,
    MISSED,
    ON_DIFFICULT,
    OUTCOMES,
    TRUE_POSITIVE,
    draw_detections,
)

CAT = LABEL_OF_CLASS["cat"]
# A grey picture of 450 × 300: enlarged twice, with four objects apart from one another.
SIZE, FACTOR = (450, 300), 2
HIT, LOST, HARD, HARD_HIT = (20, 40, 100, 120), (130, 40, 210, 120), (240, 40, 320, 120), (350, 40, 430, 120)
STRAY = (20, 190, 100, 270)


def blank(size=SIZE):
    return Image.new("RGB", size, (128, 128, 128))


def target(*objects):
    return Target(
        np.array([box for box, _ in objects], np.float32).reshape(-1, 4),
        np.full(len(objects), CAT),
        np.array([hard for _, hard in objects], np.bool_),
    )


def found(*boxes, scores=None):
    scores = np.linspace(0.9, 0.5, len(boxes)) if scores is None else scores
    return ImageDetections(
        np.array(boxes, np.float32).reshape(-1, 4), np.full(len(boxes), CAT), np.array(scores, np.float32)
    )


def edge_colours(picture, box):
    """The share of the box's lower edge, which no label covers here, that has each outcome's colour."""
    x1, _, x2, y2 = (side * FACTOR for side in box)
    row = np.asarray(picture)[y2 - 2, x1:x2]
    return {o: float((row == o.colour).all(axis=1).mean()) for o in OUTCOMES}


@pytest.fixture(scope="module")
def five_kinds():
    objects = target((HIT, False), (LOST, False), (HARD, True), (HARD_HIT, True))
    return draw_detections(blank(), found(HIT, HARD_HIT, STRAY), objects, title="VOC2007/000001")


@pytest.mark.parametrize(
    ("box", "outcome"),
    [(HIT, TRUE_POSITIVE), (STRAY, FALSE_POSITIVE), (LOST, MISSED), (HARD, DIFFICULT), (HARD_HIT, ON_DIFFICULT)],
    ids=lambda value: value.name if hasattr(value, "name") else "",
)
def test_box_has_its_outcomes_colour_and_line(five_kinds, box, outcome):
    share = edge_colours(five_kinds, box)
    same_colour = [o for o in OUTCOMES if o.colour == outcome.colour]
    assert all(value == 0 for o, value in share.items() if o not in same_colour)
    if outcome.dashes is None:
        assert share[outcome] == 1
    else:
        drawn, left_out = outcome.dashes
        assert share[outcome] == pytest.approx(drawn / (drawn + left_out), abs=0.1)


def test_no_two_outcomes_look_alike():
    assert len({(outcome.colour, outcome.dashes) for outcome in OUTCOMES}) == len(OUTCOMES)
    # In grey they differ by their line; the two solid ones by its width.
    assert len({(outcome.dashes, outcome.counts) for outcome in OUTCOMES}) == len(OUTCOMES)


def test_what_does_not_count_has_thinner_lines(five_kinds):
    """Rows of the lower edge in the outcome's colour, in a column where the line is drawn."""

    def thickness(box, outcome):
        x1, _, x2, y2 = (side * FACTOR for side in box)
        column = np.asarray(five_kinds)[y2 - 20 : y2 + 3, (x1 + x2) // 2]
        return int((column == outcome.colour).all(axis=1).sum())

    assert thickness(HIT, TRUE_POSITIVE) == 2 * thickness(HARD_HIT, ON_DIFFICULT) > 0


@pytest.mark.parametrize("box", [HIT, (20, 40, 101, 121), (20, 40, 27, 44), (20, 40, 21, 41)], ids=str)
def test_every_corner_is_closed(box):
    picture = np.asarray(draw_detections(blank(), found(), target((box, False))))
    x1, _, x2, y2 = (side * FACTOR for side in box)
    # The label stands above the upper ones.
    for x in (x1, x2 - 1):
        assert tuple(picture[y2 - 1, x]) == MISSED.colour


def test_picture_is_enlarged_by_a_whole_factor_above_a_strip(five_kinds):
    assert five_kinds.width == FACTOR * SIZE[0]
    assert FACTOR * SIZE[1] < five_kinds.height < 1.25 * FACTOR * SIZE[1]
    strip = np.asarray(five_kinds)[FACTOR * SIZE[1] :].reshape(-1, 3)
    for outcome in OUTCOMES:
        assert (strip == outcome.colour).all(axis=1).any()


@pytest.mark.parametrize("size", [(1, 1), (8, 500), (500, 8), (1600, 1200)])
def test_any_size_of_image_is_drawn(size):
    picture = draw_detections(blank(size), found((0, 0, *size)), target(((0, 0, *size), False)))
    assert picture.width >= max(size[0], 480)
    assert picture.height > size[1]


def strip_notes(monkeypatch, detections, **options):
    """The words of the strip, read off where they are handed to it."""
    words = []
    original = pictures._strip

    def spy(width, counts, notes, font, line):
        words.extend(notes)
        return original(width, counts, notes, font, line)

    monkeypatch.setattr(pictures, "_strip", spy)
    draw_detections(blank(), detections, target((HIT, False)), **options)
    return words


@pytest.mark.parametrize(
    ("scores", "options", "note"),
    [
        ([0.9, 0.2], {}, "score ≥ 0.30"),
        ([0.2, 0.1], {}, "no score reaches 0.30: the highest 2 shown"),
        ([0.9, 0.2], {"score_threshold": 0.95}, "no score reaches 0.95: the highest 2 shown"),
        ([0.01] * 9, {}, "no score reaches 0.30: the highest 5 shown"),
        ([], {}, "no detections"),
    ],
)
def test_strip_says_which_detections_are_shown(monkeypatch, scores, options, note):
    words = strip_notes(monkeypatch, found(*[HIT] * len(scores), scores=scores), title="VOC2007/000001", **options)
    assert words == ["VOC2007/000001", note, "IoU ≥ 0.50"]


def test_detections_below_the_threshold_are_not_drawn():
    picture = draw_detections(blank(), found(HIT, STRAY, scores=[0.9, 0.29]), target((HIT, False)))
    assert set(edge_colours(picture, STRAY).values()) == {0}


def test_labels_stay_inside_and_apart(monkeypatch):
    """Five boxes in the corners and on one another: their labels find places that do not overlap."""
    tags = []
    original = pictures._overlap
    monkeypatch.setattr(pictures, "_overlap", lambda a, b: tags.append((a, b)) or original(a, b))
    boxes = [(0, 0, 60, 40), (0, 0, 60, 44), (400, 0, 450, 60), (0, 260, 50, 300), (410, 270, 450, 300)]
    picture = np.asarray(draw_detections(blank(), found(*boxes), target()))
    placed = {b for _, b in tags}
    assert len(placed) == 4  # the last label is compared with the four before it
    for x1, y1, x2, y2 in placed:
        assert 0 <= x1 < x2 <= FACTOR * SIZE[0]
        assert 0 <= y1 < y2 <= FACTOR * SIZE[1]
        # Its text stands on the outcome's colour.
        inside = picture[y1 + 1 : y2 - 1, x1 + 1 : x2 - 1].reshape(-1, 3)
        assert (inside == FALSE_POSITIVE.colour).all(axis=1).mean() > 0.5
    assert all(original(a, b) == 0 for a in placed for b in placed if a != b)


def test_labels_without_room_are_left_out_and_counted(monkeypatch):
    """Forty objects on one spot: those of difficult ones go first, and no label lies on another by more than a half."""
    crowd = [((200 + i % 3, 140, 206 + i % 3, 146), False) for i in range(8)]
    words = []
    original = pictures._strip
    monkeypatch.setattr(pictures, "_strip", lambda *args: words.extend(args[2]) or original(*args))
    draw_detections(blank(), found(), target(*crowd))
    (counted,) = (word for word in words if word.startswith("no room for"))
    few = int(counted.split()[3])
    assert 0 < few < 8
    words.clear()
    draw_detections(blank(), found(), target(*crowd, *[(box, True) for box, _ in crowd]))
    (counted,) = (word for word in words if word.startswith("no room for"))
    assert few < int(counted.split()[3]) <= few + 8
    words.clear()
    draw_detections(blank(), found(), target((HIT, False), (HARD, True)))
    assert not [word for word in words if word.startswith("no room for")]


@pytest.mark.voc
def test_ground_truth_drawn_as_detections_is_all_true_positive(voc_root):
    record = read_voc(voc_root, ["2007:minival"], limit=1)[0]
    objects = record.target
    perfect = ImageDetections(objects.boxes_xyxy_orig, objects.labels, np.ones(len(objects), np.float32))
    picture = np.asarray(draw_detections(decode_image(record), perfect, objects)).reshape(-1, 3)
    assert (picture == TRUE_POSITIVE.colour).all(axis=1).sum() > 1000

import io

import matplotlib.figure
import numpy as np
import pytest
from PIL import Image

from data.records import VOC_CLASSES
from evaluation import curve_figure as module
from evaluation.curve_figure import MAX_LINES, curve_figure
from evaluation.curves import Curve


def curve(*points, positives=4, ap=0.25):
    """A curve through (recall, precision) points."""
    recall, precision = np.array(points, np.float64).reshape(-1, 2).T
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    return Curve(recall, precision, envelope, np.linspace(1, 0, len(recall)).astype(np.float32), positives, ap)


HALF = curve((0.25, 1.0), (0.5, 1.0))
DIPPING = curve((0.25, 1.0), (0.25, 0.5), (0.5, 0.6))


@pytest.fixture
def figures(monkeypatch):
    """The figures that would be saved, in place of saving them."""
    kept = []
    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", lambda self, *_, **__: kept.append(self))
    return kept


def shown(figures, lines):
    curve_figure(lines, "t")
    return [axis for axis in figures[-1].axes if axis.get_visible()]


def test_there_is_a_panel_for_every_class_with_ground_truth(figures):
    panels = shown(figures, {"a": {"dog": HALF, "cat": HALF}, "b": {"dog": HALF}})
    assert [axis.get_title() for axis in panels] == ["cat (4)\n25.0 · –", "dog (4)\n25.0 · 25.0"]
    assert len(shown(figures, {"a": dict.fromkeys(VOC_CLASSES, HALF)})) == 20


def test_lines_go_through_the_envelope_and_end_where_the_recall_does(figures):
    (panel,) = shown(figures, {"a": {"cat": DIPPING}, "b": {"cat": HALF}})
    envelope, _ = panel.lines
    np.testing.assert_allclose(envelope.get_xydata(), [(0, 1), (0.25, 1), (0.25, 0.6), (0.5, 0.6), (0.5, 0)])


def test_a_single_line_also_shows_the_precision_as_it_is(figures):
    (panel,) = shown(figures, {"a": {"cat": DIPPING}})
    raw, _ = panel.lines
    assert raw.get_ydata()[2] == 0.5


def test_lines_differ_in_colour_and_in_dashes():
    assert len({colour for colour, _ in module._STYLES}) == MAX_LINES
    assert len({dashes for _, dashes in module._STYLES}) == MAX_LINES


def test_every_line_is_named_in_the_legend_unless_there_is_one(figures):
    shown(figures, {"$a_b$": {"cat": HALF}, "kd": {"cat": HALF}})
    (legend,) = figures[-1].legends
    assert [text.get_text() for text in legend.get_texts()] == ["$a_b$", "kd"]
    shown(figures, {"a": {"cat": HALF}})
    assert not figures[-1].legends


@pytest.mark.parametrize("classes", [(), ("cat",), ("diningtable", "pottedplant")], ids=str)
def test_few_classes_are_drawn_and_titles_lie_apart(figures, classes):
    shown(figures, {"a": dict.fromkeys(classes, HALF), "b": dict.fromkeys(classes, curve())})
    figure = figures[-1]
    figure.draw_without_rendering()
    texts = [axis.title.get_window_extent() for axis in figure.axes if axis.get_visible()]
    texts += [figure._suptitle.get_window_extent(), figure.legends[0].get_window_extent()]
    assert not any(one.overlaps(other) for place, one in enumerate(texts) for other in texts[:place])
    assert all(figure.bbox.contains(*corner) for box in texts for corner in (box.min, box.max) if box.width)


def test_no_line_and_too_many_are_refused():
    for lines in ({}, {str(number): {"cat": HALF} for number in range(MAX_LINES + 1)}):
        with pytest.raises(ValueError, match="lines, found"):
            curve_figure(lines, "t")


def test_the_picture_is_the_same_bytes_each_time_and_has_the_lines_colours():
    one, other = (curve_figure({"a": {"cat": HALF}, "b": {"cat": DIPPING}}, "t") for _ in range(2))
    assert one == other
    pixels = np.asarray(Image.open(io.BytesIO(one)).convert("RGB"))
    for colour in ((0, 0x72, 0xB2), (0xD5, 0x5E, 0)):
        assert (pixels == colour).all(axis=2).sum() > 100

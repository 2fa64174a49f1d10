import io
from itertools import pairwise

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

from data.errors import TeachOnceError
from evaluation import heatmaps
from evaluation.colour_basis import ColourBasis
from evaluation.heatmaps import HeatmapRow, PairedMaps, cosine_to_cell, heatmap_figure, paired_figure


@pytest.fixture
def features():
    return np.random.default_rng(0).normal(size=(30, 30, 16)).astype(np.float16)


def opened(png):
    with Image.open(io.BytesIO(png)) as image:
        assert image.format == "PNG"
        return np.array(image.convert("RGB"))


def one(features, title="a", **more):
    return heatmap_figure([HeatmapRow(title, features, **more)], "teacher")


@pytest.fixture
def figures(monkeypatch):
    """The figures that would be saved, in place of saving them."""
    kept = []
    monkeypatch.setattr(heatmaps.Figure, "savefig", lambda self, *_, **__: kept.append(self))
    return kept


def drawn_in(figure, axes):
    """What is drawn inside each of the axes, [H, W, 3] int."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    drawn = np.asarray(canvas.buffer_rgba())[..., :3].astype(int)
    height = len(drawn)
    boxes = [axis.get_window_extent() for axis in axes]
    return [drawn[round(height - b.y1) : round(height - b.y0), round(b.x0) : round(b.x1)] for b in boxes]


def pixels_of(figure, axis):
    """What is drawn inside the axis, [H, W, 3] int."""
    return drawn_in(figure, [axis])[0]


def bounds(mask):
    """The first and last row and column of a mask, as fractions of its size."""
    rows, columns = np.nonzero(mask.any(axis=1))[0], np.nonzero(mask.any(axis=0))[0]
    return np.array([rows[0], rows[-1] + 1, columns[0], columns[-1] + 1]) / np.repeat(mask.shape, 2)


def test_frame_adds_a_panel_with_its_own_pixels(features):
    frame = np.full((480, 480, 3), (10, 200, 30), dtype=np.uint8)
    without, within = opened(one(features)), opened(one(features, image=frame))
    assert within.shape[1] > 1.2 * without.shape[1]
    assert (within == (10, 200, 30)).all(axis=2).sum() > 50_000
    assert not (without == (10, 200, 30)).all(axis=2).any()


def test_panels_lie_on_the_frame_and_mark_the_cell(features, figures):
    frame = np.zeros((480, 480, 3), np.uint8)
    heatmap_figure([HeatmapRow("VOC2007/000001", features, frame, cell=(3, 20))], "tiny_dino · hflip · untrained")
    panels = [axis for axis in figures[0].axes if axis.get_xlim() == (0, 480)]
    assert len(panels) == 4
    for axis in panels:
        assert {tuple(image.get_extent()) for image in axis.images} == {(0, 480, 480, 0)}
        # Row 3, column 20 of 16 px cells.
        assert {patch.get_bbox().bounds for patch in axis.patches} == {(320, 48, 16, 16)}
    assert figures[0].get_suptitle() == "tiny_dino · hflip · untrained"
    assert [text.get_text() for text in panels[0].texts] == ["VOC2007/000001"]


@pytest.mark.parametrize(
    ("shape", "hot", "marked"),
    [((30, 30), (3, 20), (25, 4)), ((24, 32), (5, 30), (20, 2)), ((15, 15), (1, 9), (13, 2))],
)
def test_a_hot_cell_is_drawn_over_the_pixels_that_it_covers(shape, hot, marked, figures):
    """A white rectangle in the image covers just the cell: in the picture both lie at the same place."""
    (height, width), (row, column) = shape, hot
    features = np.zeros((*shape, 2))
    features[..., 0] = 1
    features[hot] = features[marked] = (0, 1)
    top, bottom, left, right = (
        row * 480 // height, (row + 1) * 480 // height, column * 480 // width, (column + 1) * 480 // width,
    )  # fmt: skip
    image = np.zeros((480, 480, 3), np.uint8)
    image[top:bottom, left:right] = 255
    one(features, image=image, cell=marked)
    panels = [axis for axis in figures[0].axes if axis.get_xlim() == (0, 480)]
    frame, overlay = pixels_of(figures[0], panels[0]), pixels_of(figures[0], panels[-1])
    # The palette is yellow where the cosine is 1; the marked cell below is left out.
    half = len(overlay) // 2
    yellow = overlay[..., 0] - overlay[..., 2] > 60
    yellow[half:] = False
    expected = np.array([top, bottom, left, right]) / 480
    for mask in ((frame > 200).all(axis=2) & (np.arange(len(frame)) < half)[:, None], yellow):
        np.testing.assert_allclose(bounds(mask), expected, atol=1.5 / len(frame))


def test_the_image_shows_through_the_heat_map(features, figures):
    image = np.zeros((480, 480, 3), np.uint8)
    image[:, 240:] = 255
    one(np.ones((30, 30, 4)), image=image, cell=(0, 0))
    overlay = pixels_of(figures[0], [axis for axis in figures[0].axes if axis.get_xlim() == (0, 480)][-1])
    middle = overlay[len(overlay) // 2]
    assert (middle[-20] - middle[20]).min() > 60


def test_every_sample_has_a_row_of_its_own(features, figures):
    rows = [HeatmapRow(f"VOC2007/{n:06d}", features + n, cell=(n, 0)) for n in range(6)]
    heatmap_figure(rows, "teacher")
    panels = [axis for axis in figures[0].axes if axis.get_xlim() == (0, 480)]
    assert len(panels) == 18
    assert [text.get_text() for axis in panels[::3] for text in axis.texts] == [row.title for row in rows]
    assert [axis.get_title() for axis in panels[2::3]] == [f"cosine to cell ({n}, 0)" for n in range(6)]


@pytest.mark.parametrize("with_image", [False, True])
def test_long_titles_fold_and_none_lies_on_another(features, figures, with_image):
    image = np.zeros((480, 480, 3), np.uint8) if with_image else None
    titles = ["VOC2007/" + "x" * 300, "VOC2007/000001 · a $title$ of " + "many words " * 30]
    heatmap_figure([HeatmapRow(title, features, image) for title in titles], "a_long_teacher_key " * 20)
    figure = figures[0]
    FigureCanvasAgg(figure).draw()
    panels = [axis for axis in figure.axes if axis.get_xlim() == (0, 480)]
    texts = [figure._suptitle, *(text for axis in panels for text in (axis.title, *axis.texts) if text.get_text())]
    boxes = [text.get_window_extent() for text in texts]
    assert len(boxes) == 1 + 2 + len(panels)
    for index, box in enumerate(boxes):
        assert figure.bbox.containsx(box.x0)
        assert figure.bbox.containsx(box.x1)
        assert figure.bbox.containsy(box.y1)
        assert not any(box.overlaps(other) for other in boxes[index + 1 :])
        assert not any(box.overlaps(axis.get_window_extent()) for axis in panels)
    # The titles' width pushes no panel aside.
    gaps = [right.get_window_extent().x0 - left.get_window_extent().x1 for left, right in pairwise(panels[:-2])]
    assert max(gaps) < 0.5 * panels[0].get_window_extent().width


def test_the_same_features_give_the_same_bytes(features):
    assert one(features) == one(features.copy())


@pytest.mark.parametrize("shape", [(30, 30, 384), (15, 15, 2), (1, 1, 4), (2, 1, 1), (24, 32, 8)])
def test_any_grid_is_shown(shape):
    opened(one(np.random.default_rng(0).normal(size=shape)))


def test_principal_colours_are_the_leading_directions():
    """Three orthogonal ramps of falling strength: each colour is one ramp, from dark to light."""
    row, column = np.mgrid[0:9, 0:9] / 8.0
    wave = np.cos(np.pi * row * 2)
    features = np.stack([9 * column, 4 * row, wave, np.zeros((9, 9))], axis=2)
    basis = ColourBasis.of(features)
    colours, explained = basis.colours(features), basis.explained
    for channel, ramp in enumerate((column, row, wave)):
        assert abs(np.corrcoef(colours[..., channel].ravel(), ramp.ravel())[0, 1]) > 0.99
    assert explained == pytest.approx(1)
    assert colours.min() == 0
    assert colours.max() == 1


def test_components_that_are_not_there_are_grey():
    flat = np.ones((4, 4, 8))
    colours, explained = ColourBasis.of(flat).colours(flat), ColourBasis.of(flat).explained
    assert np.all(colours == 0.5)
    assert explained == 1
    line = np.linspace(0, 1, 16).reshape(4, 4, 1) * np.ones(8)
    assert np.all(ColourBasis.of(line).colours(line)[..., 1:] == 0.5)


def test_cosine_by_hand():
    features = np.array([[[1.0, 0.0], [0.0, 5.0]], [[-2.0, 0.0], [3.0, 3.0]], [[0.0, 0.0], [2.0, 0.0]]])
    expected = [[1, 0], [-1, np.sqrt(0.5)], [0, 1]]
    np.testing.assert_allclose(cosine_to_cell(features, (0, 0)), expected, atol=1e-15)


@pytest.mark.parametrize(
    ("shape", "image_shape", "message"),
    [
        ((30, 30), None, r"expected features \[Gh, Gw, C\], found \(30, 30\)"),
        ((30, 30, 0), None, r"found \(30, 30, 0\)"),
        ((30, 30, 8), (375, 500, 3), r"expected an image \(480, 480, 3\), found \(375, 500, 3\)"),
    ],
)
def test_arrays_of_another_shape_are_refused(shape, image_shape, message):
    image = None if image_shape is None else np.zeros(image_shape, np.uint8)
    with pytest.raises(ValueError, match=message):
        one(np.zeros(shape), image=image)


def test_features_that_are_not_finite_are_refused(features):
    features[0, 0, :2] = np.nan
    with pytest.raises(TeachOnceError, match="id: 2 of 14,400 features are NaN or infinite"):
        one(features, "id")


TEACHER = np.random.default_rng(2).normal(size=(6, 6, 8))
FRAME = np.full((480, 480, 3), 90, np.uint8)


def paired(student):
    return paired_figure(PairedMaps(TEACHER, student, FRAME, (1, 1)), "VOC2007/000012: a and b")


def panels(figures, student):
    """What is drawn in the six panels of the pair, row by row."""
    paired(student)
    return drawn_in(figures[-1], figures[-1].axes[:6])


def prevailing(panel):
    values, counts = np.unique(panel.reshape(-1, 3), axis=0, return_counts=True)
    assert counts.max() > 0.7 * counts.sum()
    return values[counts.argmax()]


def test_a_student_that_is_its_teacher_is_drawn_in_the_same_colours(figures):
    _, colours, likeness, between, own_colours, own_likeness = panels(figures, TEACHER)
    np.testing.assert_array_equal(own_colours, colours)
    np.testing.assert_allclose(own_likeness, likeness, atol=1)  # blended at other fractions of a pixel
    red, _, blue = prevailing(between)
    assert red > blue  # a cosine of 1 everywhere: the yellow end of cividis


def test_a_student_has_the_teachers_colours_not_its_own(figures):
    """A map of the opposite sign would look the same in principal components of its own."""
    _, colours, _, between, own_colours, _ = panels(figures, -TEACHER)
    assert np.abs(own_colours - colours).mean() > 40
    red, _, blue = prevailing(between)
    assert red < blue  # below zero: the blue end


def test_the_picture_of_both_is_the_same_bytes_each_time():
    assert paired(2 * TEACHER + 1) == paired(2 * TEACHER + 1)


def test_a_map_that_is_not_finite_is_refused_by_name():
    with pytest.raises(TeachOnceError, match="the student: 1 of 288 features are NaN"):
        paired(np.where(np.arange(288).reshape(6, 6, 8) == 5, np.nan, TEACHER))


def test_maps_of_other_shapes_are_refused():
    with pytest.raises(ValueError, match=r"two maps \[Gh, Gw, C\]"):
        paired(TEACHER[..., :4])

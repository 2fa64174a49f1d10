import io

import numpy as np
import pytest
from PIL import Image

from data.errors import TeachOnceError
from evaluation import heatmaps
from evaluation.heatmaps import cosine_to_cell, heatmap_figure, principal_colours


@pytest.fixture
def features():
    return np.random.default_rng(0).normal(size=(30, 30, 16)).astype(np.float16)


def opened(png):
    with Image.open(io.BytesIO(png)) as image:
        assert image.format == "PNG"
        return np.array(image.convert("RGB"))


def test_frame_adds_a_panel_with_its_own_pixels(features):
    frame = np.full((480, 480, 3), (10, 200, 30), dtype=np.uint8)
    without, within = opened(heatmap_figure(features, "a")), opened(heatmap_figure(features, "a", image=frame))
    assert within.shape[1] > 1.2 * without.shape[1]
    assert (within == (10, 200, 30)).all(axis=2).sum() > 50_000
    assert not (without == (10, 200, 30)).all(axis=2).any()


def test_panels_lie_on_the_frame_and_mark_the_cell(features, monkeypatch):
    figures = []
    monkeypatch.setattr(heatmaps.Figure, "savefig", lambda self, *_, **__: figures.append(self))
    heatmap_figure(features, "VOC2007/000001 · tiny_dino · hflip", cell=(3, 20), untrained=True)
    panels = [axis for axis in figures[0].axes if axis.images]
    assert len(panels) == 3
    for axis in panels:
        assert tuple(axis.images[0].get_extent()) == (0, 480, 480, 0)
        # Row 3, column 20 of 16 px cells.
        assert {patch.get_bbox().bounds for patch in axis.patches} == {(320, 48, 16, 16)}
    assert figures[0].get_suptitle() == "VOC2007/000001 · tiny_dino · hflip · untrained"


def test_the_same_features_give_the_same_bytes(features):
    assert heatmap_figure(features, "a") == heatmap_figure(features.copy(), "a")


@pytest.mark.parametrize("shape", [(30, 30, 384), (15, 15, 2), (1, 1, 4), (2, 1, 1), (24, 32, 8)])
def test_any_grid_is_shown(shape):
    opened(heatmap_figure(np.random.default_rng(0).normal(size=shape), "a"))


def test_principal_colours_are_the_leading_directions():
    """Three orthogonal ramps of falling strength: each colour is one ramp, from dark to light."""
    row, column = np.mgrid[0:9, 0:9] / 8.0
    wave = np.cos(np.pi * row * 2)
    features = np.stack([9 * column, 4 * row, wave, np.zeros((9, 9))], axis=2)
    colours, explained = principal_colours(features)
    for channel, ramp in enumerate((column, row, wave)):
        assert abs(np.corrcoef(colours[..., channel].ravel(), ramp.ravel())[0, 1]) > 0.99
    assert explained == pytest.approx(1)
    assert colours.min() == 0
    assert colours.max() == 1


def test_components_that_are_not_there_are_grey():
    colours, explained = principal_colours(np.ones((4, 4, 8)))
    assert np.all(colours == 0.5)
    assert explained == 1
    line = np.linspace(0, 1, 16).reshape(4, 4, 1) * np.ones(8)
    assert np.all(principal_colours(line)[0][..., 1:] == 0.5)


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
        heatmap_figure(np.zeros(shape), "a", image=image)


def test_features_that_are_not_finite_are_refused(features):
    features[0, 0, :2] = np.nan
    with pytest.raises(TeachOnceError, match="id: 2 of 14,400 features are NaN or infinite"):
        heatmap_figure(features, "id")

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from data.records import LABEL_OF_CLASS, ImageRecord, Target
from evaluation.agreement import REGIONS, CkaMoments, CosineCounts, cell_cosines, cell_regions

CAT, DOG = LABEL_OF_CLASS["cat"], LABEL_OF_CLASS["dog"]
# The halves of the frame.
LEFT_RIGHT = (1, 2)


def record(*objects, size=(480, 480)):
    """An image of objects (label, box, difficult)."""
    target = Target(
        np.array([box for _, box, _ in objects], np.float32).reshape(-1, 4),
        np.array([label for label, _, _ in objects], np.int64),
        np.array([hard for _, _, hard in objects], np.bool_),
    )
    return ImageRecord("VOC2007/000001", Path("x.jpg"), Path("x.xml"), size, target)


def regions_of(*objects, grid=LEFT_RIGHT, size=(480, 480)):
    """The regions that have a cell, as lists of 0 and 1."""
    found = cell_regions(record(*objects, size=size), grid)
    return {name: cells.astype(int).ravel().tolist() for name, cells in zip(REGIONS, found, strict=True) if cells.any()}


class TestCosine:
    def test_two_cells_by_hand(self):
        student = np.array([[[3.0, 4.0], [1.0, 0.0]]])
        teacher = np.array([[[4.0, 3.0], [0.0, 2.0]]])
        # (3·4 + 4·3) / (5 · 5) and 0 / 2
        np.testing.assert_allclose(cell_cosines(student, teacher), [[0.96, 0.0]])

    def test_it_is_torchs(self):
        student, teacher = (np.random.default_rng(seed).normal(size=(5, 7, 11)).astype(np.float32) for seed in (1, 2))
        expected = F.cosine_similarity(*(torch.from_numpy(m).double() for m in (student, teacher)), dim=2).numpy()
        np.testing.assert_allclose(cell_cosines(student, teacher), expected, atol=1e-12)

    def test_zero_vectors_have_none(self):
        np.testing.assert_array_equal(cell_cosines(np.zeros((1, 2, 3)), np.ones((1, 2, 3))), [[0, 0]])

    def test_other_shapes_are_refused(self):
        with pytest.raises(ValueError, match="two maps"):
            cell_cosines(np.zeros((1, 2, 3)), np.zeros((1, 2, 4)))


class TestRegions:
    def test_the_left_half_is_a_cat(self):
        found = regions_of((CAT, (0, 0, 240, 480), False))
        assert found == {"all": [1, 1], "objects": [1, 0], "background": [0, 1], "cat": [1, 0]}

    def test_a_cell_may_lie_in_two_classes(self):
        found = regions_of((CAT, (0, 0, 480, 480), False), (DOG, (240, 0, 480, 480), False))
        assert found == {"all": [1, 1], "objects": [1, 1], "cat": [1, 1], "dog": [0, 1]}

    def test_a_box_lies_where_the_squashed_image_has_it(self):
        """120 of 240 columns are half of the frame, whatever the height."""
        assert regions_of((CAT, (0, 0, 120, 100), False), size=(100, 240))["cat"] == [1, 0]

    def test_a_box_between_centres_has_the_cell_of_its_own(self):
        assert regions_of((CAT, (300, 10, 304, 14), False))["cat"] == [0, 1]
        assert regions_of((CAT, (479, 479, 480, 480), False))["cat"] == [0, 1]

    def test_difficult_objects_count_neither_way(self):
        assert regions_of((CAT, (0, 0, 240, 480), True)) == {"all": [1, 1], "background": [0, 1]}

    def test_an_image_without_objects_is_background(self):
        assert regions_of() == {"all": [1, 1], "background": [1, 1]}

    def test_cells_are_counted_one_by_one(self):
        """An independent count on the 30×30 grid: a cell of 16 px is inside where its centre is."""
        box = (100.0, 37.0, 333.0, 250.0)
        expected = [
            [box[1] <= 16 * i + 8 < box[3] and box[0] <= 16 * j + 8 < box[2] for j in range(30)] for i in range(30)
        ]
        found = cell_regions(record((CAT, box, False)), (30, 30))
        np.testing.assert_array_equal(found[REGIONS.index("cat")], expected)


class TestCounts:
    def test_figures_are_numpys(self):
        rng = np.random.default_rng(0)
        cells = np.tanh(rng.normal(0.5, 0.7, size=(40, 6, 5)))
        shuffled = np.tanh(rng.normal(0.0, 0.7, size=(40, 6, 5)))
        counts = CosineCounts()
        regions = cell_regions(record((CAT, (0, 0, 240, 480), False)), (6, 5))
        for one, other in zip(cells, shuffled, strict=True):
            counts.add(one, regions, other)
        for name in ("all", "cat", "background"):
            inside = regions[REGIONS.index(name)]
            values, found = cells[:, inside].ravel(), counts.regions()[name]
            assert found.cells == values.size
            assert found.mean == pytest.approx(values.mean(), abs=1e-12)
            assert found.shuffled == pytest.approx(shuffled[:, inside].mean(), abs=1e-12)
            for value, percent in ((found.p1, 1), (found.p50, 50)):
                assert value == pytest.approx(np.percentile(values, percent, method="inverted_cdf"), abs=6e-5)
        assert counts.regions()["dog"] is None

    def test_the_ends_of_the_scale_are_counted(self):
        counts = CosineCounts()
        counts.add(np.array([[-1.0, 1.0]]), cell_regions(record(), LEFT_RIGHT), None)
        found = counts.regions()["all"]
        assert (found.cells, found.mean, found.shuffled) == (2, 0.0, None)
        assert found.p1 == pytest.approx(-1, abs=6e-5)


def cka(student, teacher, *, standardise=False, images=4):
    moments = CkaMoments(standardise=standardise)
    for one, other in zip(np.split(student, images), np.split(teacher, images), strict=True):
        moments.add(one[None], other[None], None)
    return moments.value()


def cka_by_gram_matrices(x, y):
    """Equation 2 and 4 of Kornblith et al.: HSIC of centred Gram matrices over the cells, an independent way."""
    n = len(x)
    centring = np.eye(n) - 1 / n
    k, el = (centring @ (m @ m.T) @ centring for m in (x, y))
    return (k * el).sum() / np.sqrt((k * k).sum() * (el * el).sum())


class TestCka:
    @pytest.fixture
    def maps(self):
        rng = np.random.default_rng(3)
        student = rng.normal(5.0, 2.0, size=(200, 6))
        teacher = student @ rng.normal(size=(6, 9)) + 2 * rng.normal(size=(200, 9)) - 40
        return student, teacher

    def test_it_is_that_of_the_gram_matrices(self, maps):
        assert cka(*maps) == pytest.approx(cka_by_gram_matrices(*maps), abs=1e-6)

    def test_standardised_it_is_that_of_standardised_channels(self, maps):
        student, teacher = maps[0], maps[1] * np.logspace(-2, 2, 9)
        expected = cka_by_gram_matrices(student, teacher / teacher.std(axis=0))
        assert cka(student, teacher, standardise=True) == pytest.approx(expected, abs=1e-6)
        assert cka(student, teacher) != pytest.approx(expected, abs=1e-2)

    def test_a_rotated_and_scaled_map_is_the_same(self, maps):
        rotation = np.linalg.qr(np.random.default_rng(0).normal(size=(6, 6)))[0]
        assert cka(maps[0], 7 * maps[0] @ rotation + 3) == pytest.approx(1, abs=1e-6)
        assert cka(0.1 * maps[0] @ rotation, maps[1]) == pytest.approx(cka(*maps), abs=1e-6)

    def test_how_cells_come_in_images_does_not_matter(self, maps):
        assert cka(*maps, images=1) == pytest.approx(cka(*maps, images=10), abs=1e-6)

    def test_independent_maps_are_near_zero(self):
        one, other = (np.random.default_rng(seed).normal(size=(4000, 5)) for seed in (1, 2))
        assert cka(one, other) < 0.01

    def test_shuffled_maps_are_compared_as_they_lie(self, maps):
        student, teacher = (np.split(m, 4) for m in maps)
        moments = CkaMoments(standardise=False)
        for place in range(4):
            moments.add(student[place][None], teacher[place][None], teacher[place - 1][None])
        rolled = np.roll(maps[1], 50, axis=0)
        assert moments.value("shuffled") == pytest.approx(cka_by_gram_matrices(maps[0], rolled), abs=1e-6)
        assert moments.value() == pytest.approx(cka_by_gram_matrices(*maps), abs=1e-6)

    def test_maps_that_do_not_vary_have_none(self, maps):
        assert cka(maps[0], np.ones((200, 3))) is None
        assert CkaMoments(standardise=True).value() is None
        assert CkaMoments(standardise=True).value("shuffled") is None

    def test_a_dead_channel_changes_nothing(self, maps):
        dead = np.concatenate([maps[1], np.full((200, 1), 3.0)], axis=1)
        assert cka(maps[0], dead, standardise=True) == pytest.approx(cka(*maps, standardise=True), abs=1e-6)

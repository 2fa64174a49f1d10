from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from data.sample import load_sample
from data.transforms import jitter
from data.voc import read_voc


@pytest.fixture(scope="module")
def image(devkit: Path) -> NDArray[np.uint8]:
    return load_sample(read_voc(devkit, ["2007:train"])[0]).image


def test_jitter_is_torchvisions_brightness_then_contrast_then_saturation(image: NDArray[np.uint8]) -> None:
    from torchvision.transforms.v2 import functional

    brightness, contrast, saturation = np.random.default_rng(3).uniform(0.6, 1.4, 3)
    expected = torch.from_numpy(image).permute(2, 0, 1)
    expected = functional.adjust_brightness(expected, brightness)
    expected = functional.adjust_contrast(expected, contrast)
    expected = functional.adjust_saturation(expected, saturation)
    ours = jitter(image, np.random.default_rng(3), 0.4)
    assert (ours.shape, ours.dtype) == (image.shape, np.uint8)
    assert np.abs(ours.astype(int) - expected.permute(1, 2, 0).numpy()).max() <= 2


def test_strength_zero_returns_the_image_itself(image: NDArray[np.uint8]) -> None:
    assert jitter(image, np.random.default_rng(0), 0.0) is image


@pytest.mark.parametrize("strength", [0.0, 0.3])
def test_the_same_number_of_values_is_drawn_at_every_strength(image: NDArray[np.uint8], strength: float) -> None:
    rng, expected = np.random.default_rng(5), np.random.default_rng(5)
    jitter(image, rng, strength)
    expected.uniform(0, 1, 3)
    assert rng.random() == expected.random()


def test_jitter_leaves_its_input_alone_and_repeats(image: NDArray[np.uint8]) -> None:
    before = image.copy()
    first, second = (jitter(image, np.random.default_rng(1), 0.5) for _ in range(2))
    np.testing.assert_array_equal(image, before)
    np.testing.assert_array_equal(first, second)
    assert (first != image).any()


@pytest.mark.parametrize("strength", [-0.1, 1.0, float("nan")])
def test_a_strength_out_of_range_is_refused(image: NDArray[np.uint8], strength: float) -> None:
    with pytest.raises(ValueError, match=r"expected a jitter strength in \[0, 1\)"):
        jitter(image, np.random.default_rng(0), strength)

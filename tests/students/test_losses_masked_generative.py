import numpy as np
import pytest
import torch
from scipy.signal import correlate
from torch import nn

from students.losses.masked_generative import MASKED_SHARE, MaskedGenerator, kept_places, masked_generative
from tests.students.loss_inputs import randn, streams


def generator_of(channels: int, seed: int = 0) -> MaskedGenerator:
    return MaskedGenerator(channels, torch.Generator().manual_seed(seed))


def convolutions(generator: MaskedGenerator) -> list[nn.Conv2d]:
    return [generator.first, generator.second]


def test_loss_by_hand() -> None:
    generated, teacher = torch.tensor([[[[1.0, 2.0]]]]), torch.tensor([[[[4.0, 0.0]]]])
    assert masked_generative(generated, teacher).item() == pytest.approx((9 + 4) / 2)


def test_generator_by_hand() -> None:
    # Kernels that only look at the centre: 2x − 3 behind the first, then ReLU, then 5x + 1.
    generator = generator_of(1)
    with torch.no_grad():
        for convolution, weight, bias in zip(convolutions(generator), (2.0, 5.0), (-3.0, 1.0), strict=True):
            convolution.weight.zero_()[0, 0, 1, 1] = weight
            convolution.bias.fill_(bias)
    generator.masked_share = 0.0
    # 1 → −1 → 0 → 1;  4 → 5 → 5 → 26.
    assert generator(torch.tensor([[[[1.0, 4.0]]]]), streams(0)).tolist() == [[[[1.0, 26.0]]]]
    generator.masked_share = 1.0
    # 0 → −3 → 0 → 1, whatever the student says.
    assert generator(torch.tensor([[[[1.0, 4.0]]]]), streams(0)).tolist() == [[[[1.0, 1.0]]]]


def test_generator_matches_scipy() -> None:
    generator, student = generator_of(3), randn(2, 3, 6, 5)
    with torch.no_grad():
        for convolution in convolutions(generator):
            convolution.bias.copy_(randn(3, seed=4))
    kept = kept_places(streams(5, 6), (6, 5), MASKED_SHARE).numpy()
    maps = student.numpy() * kept
    for convolution, last in zip(convolutions(generator), (False, True), strict=True):
        weight, bias = convolution.weight.detach().numpy(), convolution.bias.detach().numpy()
        padded = np.pad(maps, ((0, 0), (0, 0), (1, 1), (1, 1)))
        maps = np.stack([[correlate(m, w, "valid")[0] + b for w, b in zip(weight, bias, strict=True)] for m in padded])
        maps = maps if last else np.maximum(maps, 0)
    np.testing.assert_allclose(generator(student, streams(5, 6)).detach().numpy(), maps, atol=1e-5)


def test_gradients_of_the_weights() -> None:
    generator, student, teacher = (
        generator_of(2).double(),
        randn(1, 2, 3, 4).double(),
        randn(1, 2, 3, 4, seed=1).double(),
    )
    weights = dict(generator.named_parameters())

    def loss(*values: torch.Tensor) -> torch.Tensor:
        given = dict(zip(weights, values, strict=True))
        return masked_generative(torch.func.functional_call(generator, given, (student, streams(0))), teacher)

    assert torch.autograd.gradcheck(loss, tuple(weights.values()))


def test_masks_the_stated_share_of_places_in_all_channels() -> None:
    kept = kept_places(streams(*range(20)), (30, 30), 0.45)
    assert kept.shape == (20, 1, 30, 30)
    # 18,000 draws: four standard deviations are 4 · √(0.45 · 0.55 / 18,000).
    assert 1 - kept.float().mean().item() == pytest.approx(0.45, abs=0.015)


def test_an_images_mask_depends_on_its_own_stream_only() -> None:
    generator, student = generator_of(2), randn(3, 2, 5, 6)
    whole = generator(student, streams(7, 8, 9))
    torch.testing.assert_close(generator(student[1:2], streams(8)), whole[1:2])
    torch.testing.assert_close(generator(student[[2, 0]], streams(9, 7)), whole[[2, 0]])
    assert not torch.allclose(generator(student[1:2], streams(7)), whole[1:2])


def test_weights_are_drawn_from_the_given_stream() -> None:
    first, again, other = (generator_of(4, seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["first.weight"], other["first.weight"])


def test_as_much_variance_comes_out_as_goes_in() -> None:
    generator, student = generator_of(96), randn(2, 96, 30, 30)
    generator.masked_share = 0.0
    # Away from the border, where the padding's zeros take a share.
    inside = generator(student, streams(0, 1))[:, :, 2:-2, 2:-2]
    assert inside.std().item() == pytest.approx(1, abs=0.1)

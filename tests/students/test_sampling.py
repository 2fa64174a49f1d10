import pytest
import torch
from torch import Tensor
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler

from students.sampling import SeededSampler


def draw(matched: list[Tensor], seeds: list[int], count: int = 16) -> list[tuple[Tensor, Tensor]]:
    sampler = SeededSampler(count, positive_fraction=0.25)
    sampler.generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    positives, negatives = sampler(matched)
    return list(zip(positives, negatives, strict=True))


def labels_of(num_positive: int, num_negative: int, num_ignored: int, seed: int) -> Tensor:
    values = torch.tensor([1] * num_positive + [0] * num_negative + [-1] * num_ignored)
    return values[torch.randperm(len(values), generator=torch.Generator().manual_seed(seed))]


@pytest.mark.parametrize(
    ("counts", "drawn"),
    [
        pytest.param((40, 100, 20), (4, 12), id="plenty of both"),
        pytest.param((2, 100, 0), (2, 14), id="few positives"),
        pytest.param((40, 3, 9), (4, 3), id="few negatives"),
        pytest.param((0, 50, 5), (0, 16), id="empty image"),
        pytest.param((0, 0, 8), (0, 0), id="nothing to draw"),
    ],
)
def test_counts_are_torchvisions(counts: tuple[int, int, int], drawn: tuple[int, int]) -> None:
    matched = labels_of(*counts, seed=0)
    ((positive, negative),) = draw([matched], [5])
    theirs = BalancedPositiveNegativeSampler(16, 0.25)([matched])
    assert (int(positive.sum()), int(negative.sum())) == drawn
    assert (int(theirs[0][0].sum()), int(theirs[1][0].sum())) == drawn
    assert positive.dtype == theirs[0][0].dtype
    assert (matched[positive.bool()] == 1).all()
    assert (matched[negative.bool()] == 0).all()


def test_an_image_draws_the_same_in_any_batch() -> None:
    one, other = labels_of(30, 60, 10, seed=1), labels_of(5, 200, 0, seed=2)
    alone = draw([one], [7])[0]
    for together in (draw([one, other], [7, 8])[0], draw([other, one], [8, 7])[1]):
        assert torch.equal(alone[0], together[0])
        assert torch.equal(alone[1], together[1])


def test_other_seeds_draw_others() -> None:
    matched = labels_of(30, 60, 10, seed=1)
    assert not torch.equal(draw([matched], [7])[0][1], draw([matched], [8])[0][1])


def test_every_candidate_is_drawn_equally_often() -> None:
    matched = torch.zeros(20, dtype=torch.int64)
    frequency = torch.stack([draw([matched], [seed], count=5)[0][1].float() for seed in range(2000)]).mean(dim=0)
    # 5 of 20, 2,000 times: a standard error of 0.0097.
    torch.testing.assert_close(frequency, torch.full((20,), 0.25), atol=0.04, rtol=0)

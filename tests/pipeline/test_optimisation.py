import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW

from pipeline.config import Recipe, TrainConfig
from pipeline.optimisation import build_optimizer, clip_gradients, learning_rate, set_learning_rate
from students.config import StudentConfig
from tests.pipeline.small_runs import small_run


def resolved(backbone: str, **recipe: Any) -> Recipe:
    config = small_run(Path("voc"), Path("out"), student=StudentConfig(backbone=backbone), recipe=recipe)
    return config.resolved().recipe


class TestDefaults:
    @pytest.mark.parametrize("backbone", ["resnet18", "mobilenet_v3_small", "timm:regnety_002"])
    @pytest.mark.parametrize(("batch_size", "rate"), [(8, 0.01), (4, 0.005), (32, 0.04)])
    def test_sgd_scales_linearly_with_the_batch(self, backbone: str, batch_size: int, rate: float) -> None:
        recipe = resolved(backbone, batch_size=batch_size)
        assert (recipe.optimizer, recipe.weight_decay) == ("sgd", 1e-4)
        assert recipe.learning_rate == pytest.approx(rate)

    @pytest.mark.parametrize("backbone", ["vit_tiny", "timm:deit_tiny_patch16_224", "timm:swin_tiny_patch4"])
    def test_transformers_take_adamw_at_any_batch(self, backbone: str) -> None:
        for batch_size in (4, 32):
            recipe = resolved(backbone, batch_size=batch_size)
            assert (recipe.optimizer, recipe.learning_rate, recipe.weight_decay) == ("adamw", 1e-4, 0.05)

    def test_what_is_given_stays(self) -> None:
        recipe = resolved("resnet18", optimizer="adamw", learning_rate=3e-3, weight_decay=0.0)
        assert (recipe.optimizer, recipe.learning_rate, recipe.weight_decay) == ("adamw", 3e-3, 0.0)

    def test_resolving_twice_changes_nothing(self) -> None:
        once: TrainConfig = small_run(Path("voc"), Path("out")).resolved()
        assert once.resolved() == once


class TestOptimizer:
    def module(self) -> nn.Module:
        module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2))
        module[2].bias.requires_grad_(False)
        return module

    def test_sgd_decays_everything_that_is_trained(self) -> None:
        module = self.module()
        optimizer = build_optimizer(resolved("resnet18"), [module])
        assert isinstance(optimizer, SGD)
        (group,) = optimizer.param_groups
        assert group["momentum"] == 0.9
        assert group["weight_decay"] == 1e-4
        assert [id(p) for p in group["params"]] == [id(p) for p in module.parameters() if p.requires_grad]

    def test_adamw_spares_biases_and_norms(self) -> None:
        module = self.module()
        optimizer = build_optimizer(resolved("vit_tiny"), [module])
        assert isinstance(optimizer, AdamW)
        decayed, spared = optimizer.param_groups
        assert [tuple(p.shape) for p in decayed["params"]] == [(4, 3, 3, 3), (2, 4)]
        assert [tuple(p.shape) for p in spared["params"]] == [(4,), (4,), (4,)]
        assert (decayed["weight_decay"], spared["weight_decay"]) == (0.05, 0.0)

    def test_the_rate_is_set_in_every_group(self) -> None:
        optimizer = build_optimizer(resolved("vit_tiny"), [self.module()])
        set_learning_rate(optimizer, 0.125)
        assert [group["lr"] for group in optimizer.param_groups] == [0.125, 0.125]

    def test_gradients_are_clipped_over_all_modules_together(self) -> None:
        modules = [nn.Linear(2, 1, bias=False), nn.Linear(2, 1, bias=False)]
        for module, gradient in zip(modules, ([[3.0, 0.0]], [[0.0, 4.0]]), strict=True):
            module.weight.grad = torch.tensor(gradient)
        assert clip_gradients(modules, 10.0).item() == pytest.approx(5.0)
        assert modules[1].weight.grad.tolist() == [[0.0, 4.0]]
        assert clip_gradients(modules, 1.0).item() == pytest.approx(5.0)
        assert modules[0].weight.grad[0, 0].item() == pytest.approx(0.6, rel=1e-5)
        assert modules[1].weight.grad[0, 1].item() == pytest.approx(0.8, rel=1e-5)


class TestSchedule:
    RECIPE = Recipe(learning_rate=0.1)

    def test_it_rises_linearly_over_a_twentieth_then_falls_along_a_cosine(self) -> None:
        rates = [learning_rate(self.RECIPE, step, 200) for step in range(200)]
        assert rates[:10] == pytest.approx([0.01 * (step + 1) for step in range(10)])
        assert rates[10] == pytest.approx(0.1)
        assert rates[105] == pytest.approx(0.05)  # half way down
        assert rates[10 + 190 // 3] == pytest.approx(0.05 * (1 + math.cos(math.pi * 63 / 190)))
        assert 0 < rates[-1] < 1e-4
        assert rates[10:] == sorted(rates[10:], reverse=True)

    def test_the_warm_up_is_never_longer_than_500_steps(self) -> None:
        assert learning_rate(self.RECIPE, 498, 100_000) < 0.1
        assert learning_rate(self.RECIPE, 499, 100_000) == pytest.approx(0.1)
        assert learning_rate(self.RECIPE, 500, 100_000) == pytest.approx(0.1)

    @pytest.mark.parametrize("total", [1, 2, 5])
    def test_the_shortest_runs_learn_too(self, total: int) -> None:
        assert all(0 < learning_rate(self.RECIPE, step, total) <= 0.1 for step in range(total))

    def test_a_run_without_warm_up_starts_at_the_peak(self) -> None:
        recipe = Recipe(learning_rate=0.1, warmup_fraction=0)
        assert learning_rate(recipe, 0, 10) == pytest.approx(0.1)

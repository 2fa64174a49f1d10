from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from data.errors import TeacherError
from features.registry import build_teacher
from features.teacher import draw_probe_image, grid_of, probe, weights_digest


class TestWeightsDigest:
    def test_equals_a_hash_made_by_hand(self) -> None:
        state = {"b": torch.tensor([1, 2]), "a.c": torch.tensor([[0.5]])}
        content = b"a.c torch.float32 [1, 1]\n" + np.float32(0.5).tobytes()
        content += b"b torch.int64 [2]\n" + np.array([1, 2], dtype="<i8").tobytes()
        assert weights_digest(state) == hashlib.sha256(content).hexdigest()

    def test_does_not_depend_on_order_or_memory_layout(self) -> None:
        matrix = torch.arange(6.0).reshape(2, 3)
        one = {"a": matrix, "b": torch.ones(2)}
        other = {"b": torch.ones(4)[::2], "a": matrix.T.contiguous().T}
        assert weights_digest(one) == weights_digest(other)

    @pytest.mark.parametrize(
        "changed",
        [
            {"a": torch.tensor([1.0, 2.0000002])},
            {"a": torch.tensor([[1.0, 2.0]])},
            {"a": torch.tensor([1.0, 2.0], dtype=torch.float64)},
            {"b": torch.tensor([1.0, 2.0])},
        ],
        ids=["a value", "shape", "dtype", "name"],
    )
    def test_changes_with(self, changed: dict[str, Tensor]) -> None:
        assert weights_digest(changed) != weights_digest({"a": torch.tensor([1.0, 2.0])})

    def test_of_a_module_leaves_out_what_is_not_saved(self) -> None:
        module = nn.Linear(2, 2)
        before = weights_digest(module)
        module.register_buffer("scratch", torch.ones(3), persistent=False)
        assert weights_digest(module) == before == weights_digest(module.state_dict())


class TestGrid:
    def test_of_whole_patches(self) -> None:
        assert grid_of((420, 280), 14) == (30, 20)

    @pytest.mark.parametrize("size", [(480, 420), (420, 480)])
    def test_refuses_a_size_whose_last_pixels_would_be_dropped(self, size: tuple[int, int]) -> None:
        with pytest.raises(TeacherError, match=r"a multiple of the patch size 14, found \d+×\d+"):
            grid_of(size, 14)


class TestProbe:
    def test_image_has_an_odd_original_size_and_fixed_pixels(self) -> None:
        image = draw_probe_image()
        assert image.size == (500, 375)
        pixels = np.asarray(image)
        # By hand: (0, 0) starts the ramps; (130, 340) is the middle of the disc; the last pixel ends the ramps.
        assert pixels[0, 0].tolist() == [0, 0, 0]
        assert pixels[130, 340].tolist() == [230, 130 * 255 // 374, 40]
        assert pixels[374, 499].tolist()[:2] == [255, 255]

    def test_notices_other_weights(self) -> None:
        for name in ("tiny_dino", "tiny_clip"):
            one, other = build_teacher(name), build_teacher(name)
            weight = next(tensor for key, tensor in other.module.named_parameters() if key.endswith("embed.weight"))
            weight.mul_(1 + 0.2 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)))
            first, second = probe(one), probe(other)
            assert first @ second / (np.linalg.norm(first) * np.linalg.norm(second)) < 0.9999


def test_precision_switches_are_put_back() -> None:
    teacher = build_teacher("tiny_clip")
    before = torch.backends.cudnn.conv.fp32_precision, torch.backends.cuda.matmul.fp32_precision  # type: ignore[attr-defined]
    seen = []
    teacher.module.register_forward_pre_hook(
        lambda *_: seen.append((torch.backends.cudnn.conv.fp32_precision, torch.backends.cuda.matmul.fp32_precision))  # type: ignore[attr-defined]
    )
    teacher(torch.zeros((1, *teacher.input.size, 3), dtype=torch.uint8))
    assert seen == [("ieee", "ieee")]
    after = torch.backends.cudnn.conv.fp32_precision, torch.backends.cuda.matmul.fp32_precision  # type: ignore[attr-defined]
    assert after == before

import re
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.errors import UsageError, WeightsError
from students.backbone import Backbone, build_backbone
from students.config import StudentConfig

# Shortest models that show each case; all are built with random weights.
RESNET, VIT = "resnet10t", "vit_tiny_patch16_224"


def build(name: str, weights: str | Path = "none", **fields: Any) -> Backbone:
    return build_backbone(StudentConfig(backbone=f"timm:{name}", backbone_weights=str(weights), **fields))


def seeded_state(name: str) -> dict[str, Tensor]:
    """The state dict timm publishes for a model, classifier included, with weights drawn from a seed."""
    torch.manual_seed(42)
    state: dict[str, Tensor] = timm.create_model(name).state_dict()
    return {
        key: torch.rand_like(value) if value.is_floating_point() else value + 5 for key, value in state.items()
    }  # fmt: skip


@pytest.fixture(scope="module")
def resnet_state() -> dict[str, Tensor]:
    return seeded_state(RESNET)


@pytest.fixture(scope="module")
def vit_state() -> dict[str, Tensor]:
    return seeded_state(VIT)


def loaded_state(backbone: Backbone) -> dict[str, Tensor]:
    return backbone.model.state_dict()


@pytest.mark.parametrize("layout", ["pth", "safetensors", "training checkpoint"])
def test_weights_of_a_file_are_really_loaded(layout: str, resnet_state: dict[str, Tensor], tmp_path: Path) -> None:
    path = tmp_path / ("weights.safetensors" if layout == "safetensors" else "weights.pth")
    if layout == "safetensors":
        safetensors.torch.save_file(resnet_state, path)
    else:
        torch.save(resnet_state if layout == "pth" else {"state_dict": resnet_state, "epoch": 3}, path)
    loaded = loaded_state(build(RESNET, path, norms="trained"))
    assert set(resnet_state) - set(loaded) == {"fc.weight", "fc.bias"}
    for key, value in loaded.items():
        assert torch.equal(value, resnet_state[key]), key


def test_position_embeddings_of_a_file_are_resampled_to_the_frame(vit_state: dict[str, Tensor], tmp_path: Path) -> None:
    safetensors.torch.save_file(vit_state, tmp_path / "vit.safetensors")
    loaded = loaded_state(build(VIT, tmp_path / "vit.safetensors"))
    prefix, grid = vit_state["pos_embed"][:, :1], vit_state["pos_embed"][:, 1:]
    square = grid.reshape(1, 14, 14, 192).permute(0, 3, 1, 2)
    resampled = F.interpolate(square, (30, 30), mode="bicubic", antialias=True, align_corners=False)
    expected = torch.cat([prefix, resampled.permute(0, 2, 3, 1).reshape(1, 900, 192)], dim=1)
    torch.testing.assert_close(loaded["pos_embed"], expected)
    for key in set(loaded) - {"pos_embed"}:
        assert torch.equal(loaded[key], vit_state[key]), key


def test_a_saved_backbone_is_not_kept_twice(resnet_state: dict[str, Tensor], tmp_path: Path) -> None:
    torch.save(resnet_state, tmp_path / "weights.pth")
    assert "state_dict" not in build(RESNET, tmp_path / "weights.pth").model.pretrained_cfg


def test_pretrained_batch_norms_are_frozen(resnet_state: dict[str, Tensor], tmp_path: Path) -> None:
    torch.save(resnet_state, tmp_path / "weights.pth")
    backbone = build(RESNET, tmp_path / "weights.pth").train()
    norms = [module for module in backbone.modules() if "BatchNorm" in type(module).__name__]
    assert norms
    assert not any(isinstance(module, nn.BatchNorm2d) for module in norms)
    with torch.no_grad():
        backbone(torch.rand(1, 3, 480, 480))
    after = loaded_state(backbone)
    for key in ("bn1.running_mean", "bn1.running_var", "bn1.weight", "bn1.bias"):
        assert torch.equal(after[key], resnet_state[key])
    assert not any("bn" in name for name, _ in backbone.named_parameters())


def test_random_batch_norms_are_trained_and_layer_norms_always_are() -> None:
    norms = [module for module in build(RESNET).modules() if isinstance(module, nn.BatchNorm2d)]
    assert norms
    assert all(module.weight.requires_grad for module in norms)
    transformer = build(VIT, norms="frozen")
    assert any(isinstance(module, nn.LayerNorm) for module in transformer.modules())
    assert all(parameter.requires_grad for parameter in transformer.parameters())


def test_a_checkpoint_of_frozen_norms_fits_the_config_without_weights(
    resnet_state: dict[str, Tensor], tmp_path: Path
) -> None:
    torch.save(resnet_state, tmp_path / "weights.pth")
    config = StudentConfig(backbone=f"timm:{RESNET}", backbone_weights=str(tmp_path / "weights.pth"))
    saved = build_backbone(config).state_dict()
    build_backbone(config.without_weights()).load_state_dict(saved)


def test_maps_of_a_windowed_nhwc_transformer_come_as_nchw() -> None:
    backbone = build("swin_tiny_patch4_window7_224")
    assert backbone.strides == (8, 16, 32)
    with torch.no_grad():
        shapes = [tuple(map_.shape) for map_ in backbone(torch.rand(1, 3, 480, 480))]
    assert shapes == [(1, 192, 60, 60), (1, 384, 30, 30), (1, 768, 15, 15)]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        pytest.param("resnet81", r"no model 'resnet81'; close names: resnet18", id="unknown name"),
        pytest.param("resnet18.a9_in1k", r"Invalid pretrained tag \(a9_in1k\)", id="unknown tag"),
        pytest.param("vit_small_patch14_dinov2", r"16 alone, on the 480×480 frame, found strides 14\.", id="patch 14"),
        pytest.param("vit_tiny_r_s16_p8_224", r"found strides 32$", id="stride 32 only"),
        pytest.param("levit_128s", r"found strides 16, 32, 60$", id="no stride 8"),
    ],
)
def test_models_that_do_not_fit_are_refused(name: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        build(name)
    assert caught.value.exit_code == 2
    assert re.search(message, caught.value.message), caught.value.message


def test_a_file_of_another_model_names_the_keys(vit_state: dict[str, Tensor], tmp_path: Path) -> None:
    torch.save(vit_state, tmp_path / "vit.pth")
    with pytest.raises(UsageError, match=r"(?s)state dict of timm's resnet10t.*Missing key.*conv1.*blocks\.0"):
        build(RESNET, tmp_path / "vit.pth")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(lambda state: state.pop("layer1.0.conv1.weight"), r"Missing.*layer1\.0\.conv1", id="missing"),
        pytest.param(lambda state: state.update(extra=torch.zeros(1)), r"Unexpected.*extra", id="unexpected"),
        pytest.param(
            lambda state: state.update({"layer1.0.conv1.weight": torch.zeros(1)}), r"size mismatch", id="shape"
        ),
    ],
)
def test_a_file_that_differs_in_one_entry_is_refused(
    change: Any, message: str, resnet_state: dict[str, Tensor], tmp_path: Path
) -> None:
    state = dict(resnet_state)
    change(state)
    torch.save(state, tmp_path / "weights.pth")
    with pytest.raises(UsageError, match=f"(?s){message}"):
        build(RESNET, tmp_path / "weights.pth")


@pytest.mark.parametrize("content", [b"not weights", b""], ids=["text", "empty"])
@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_a_damaged_file_is_refused(content: bytes, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"weights.{suffix}"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=r"cannot be read as a \.pth or \.safetensors state dict"):
        build(RESNET, path)


def test_a_file_without_tensors_is_refused(tmp_path: Path) -> None:
    torch.save({"epoch": 3}, tmp_path / "weights.pth")
    with pytest.raises(UsageError, match="expected a state dict of tensors"):
        build(RESNET, tmp_path / "weights.pth")


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such weights file") as caught:
        build(RESNET, tmp_path / "weights.pth")
    assert "imagenet, none or a file" in str(caught.value)


class TestHub:
    """timm's own weights, with an empty cache and a hub that is not there."""

    @pytest.mark.usefixtures("unreachable_hub")
    def test_weights_that_cannot_be_had_are_an_error_naming_the_ways_out(self) -> None:
        with pytest.raises(WeightsError, match=r"not in the local hub cache, and .* does not answer") as caught:
            build(RESNET, "imagenet")
        assert "--backbone-weights none" in str(caught.value)
        assert "--backbone-weights FILE" in str(caught.value)

    def test_a_model_without_weights_says_so(self) -> None:
        with pytest.raises(UsageError, match="no pretrained weights of this model on the hub"):
            build("mixer_s16_224", "imagenet")

    def test_cached_weights_are_loaded_without_asking(
        self, resnet_state: dict[str, Tensor], unreachable_hub: Path
    ) -> None:
        repo = unreachable_hub / ("models--" + timm.models.get_pretrained_cfg(RESNET).hf_hub_id.replace("/", "--"))
        (repo / "refs").mkdir(parents=True)
        (repo / "refs" / "main").write_text("abc123")
        (repo / "snapshots" / "abc123").mkdir(parents=True)
        safetensors.torch.save_file(resnet_state, repo / "snapshots" / "abc123" / "model.safetensors")
        loaded = loaded_state(build(RESNET, "imagenet"))
        assert torch.equal(loaded["layer1.0.conv1.weight"], resnet_state["layer1.0.conv1.weight"])

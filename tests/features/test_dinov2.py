from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from data.errors import TeacherError
from features.registry import build_teacher
from features.teacher import Teacher, weights_digest

Build = Callable[[str], Teacher]
Draw = Callable[[Teacher, int], Tensor]
NAMES = ("dinov2_vits14", "dinov2_vits14_reg")


@pytest.fixture(scope="module")
def folders(untrained: Build, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders as transformers itself writes them: config.json and model.safetensors, with the hub's names."""
    folders = {name: tmp_path_factory.mktemp(name) for name in NAMES}
    for name, folder in folders.items():
        untrained(name).module.save_pretrained(folder)  # type: ignore[operator]
    return folders


@pytest.mark.parametrize(("name", "num_prefix_tokens"), [("dinov2_vits14", 1), ("dinov2_vits14_reg", 5)])
def test_features_are_the_patch_tokens_transformers_gives(
    untrained: Build, folders: dict[str, Path], random_images: Draw, name: str, num_prefix_tokens: int
) -> None:
    from transformers import AutoModel

    teacher = untrained(name)
    images = random_images(teacher, 2)
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    pixels = torch.from_numpy(((images.numpy() / 255 - mean) / std).transpose(0, 3, 1, 2)).float()
    with torch.no_grad():
        tokens = AutoModel.from_pretrained(folders[name]).eval()(pixel_values=pixels).last_hidden_state
    assert tokens.shape == (2, num_prefix_tokens + 900, 384)

    features = teacher(images).features
    assert features is not None
    for row, column in [(0, 0), (0, 29), (3, 17), (29, 29)]:
        token = tokens[:, num_prefix_tokens + 30 * row + column]
        torch.testing.assert_close(features[:, row, column], token, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def reference(untrained: Build, random_images: Draw) -> Tensor:
    """Features of one image, by the teacher whose weights were saved."""
    teacher = untrained("dinov2_vits14")
    return teacher(random_images(teacher, 1)).arrays()["features"]


@pytest.mark.parametrize("layout", ["folder", "hub.safetensors", "hub.pth", "hub.bin", "library_names.safetensors"])
def test_every_file_layout_of_the_same_weights_is_the_same_teacher(
    untrained: Build, folders: dict[str, Path], random_images: Draw, reference: Tensor, tmp_path: Path, layout: str
) -> None:
    teacher = untrained("dinov2_vits14")
    hub_state = load_file(folders["dinov2_vits14"] / "model.safetensors")
    path = folders["dinov2_vits14"] if layout == "folder" else tmp_path / layout
    if layout == "hub.safetensors":
        save_file(hub_state, path)
    elif layout == "library_names.safetensors":
        save_file(teacher.module.state_dict(), path)
    elif layout != "folder":
        torch.save(hub_state, path)

    loaded = build_teacher("dinov2_vits14", weights=path)
    assert not loaded.untrained
    assert loaded.weights_source.startswith(str(path))
    assert loaded.weights_digest == weights_digest(hub_state)
    assert loaded.identity() == teacher.identity()
    assert torch.equal(loaded(random_images(teacher, 1)).arrays()["features"], reference)


def test_registers_are_loaded_too(untrained: Build, folders: dict[str, Path]) -> None:
    name = "dinov2_vits14_reg"
    assert build_teacher(name, weights=folders[name]).identity() == untrained(name).identity()


def test_half_precision_weights_are_computed_in_float32(folders: dict[str, Path], tmp_path: Path) -> None:
    state = load_file(folders["dinov2_vits14"] / "model.safetensors")
    torch.save({name: tensor.half() for name, tensor in state.items()}, tmp_path / "half.pth")
    teacher = build_teacher("dinov2_vits14", weights=tmp_path / "half.pth")
    assert teacher.weights_digest == weights_digest({name: tensor.half().float() for name, tensor in state.items()})


class TestWrongWeights:
    def test_folder_of_another_architecture(self, folders: dict[str, Path]) -> None:
        with pytest.raises(
            TeacherError, match=r"another architecture than dinov2_vitb14: hidden_size: expected 768, found 384"
        ):
            build_teacher("dinov2_vitb14", weights=folders["dinov2_vits14"])

    def test_folder_with_registers_for_a_teacher_without(self, folders: dict[str, Path]) -> None:
        with pytest.raises(TeacherError, match=r"model_type: expected dinov2, found dinov2_with_registers"):
            build_teacher("dinov2_vits14", weights=folders["dinov2_vits14_reg"])

    def test_folder_whose_config_leaves_defaults_out_is_read_with_them(
        self, folders: dict[str, Path], tmp_path: Path
    ) -> None:
        config = json.loads((folders["dinov2_vits14"] / "config.json").read_text())
        del config["mlp_ratio"], config["image_size"]  # the library's defaults: 4, which fits, and 224, which does not
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(TeacherError, match=r"than dinov2_vits14: image_size: expected 518, found 224\n"):
            build_teacher("dinov2_vits14", weights=tmp_path)

    def test_folder_without_config(self, tmp_path: Path) -> None:
        with pytest.raises(TeacherError, match=r"config\.json: cannot be read as JSON"):
            build_teacher("dinov2_vits14", weights=tmp_path)

    def test_file_of_another_size(self, folders: dict[str, Path]) -> None:
        with pytest.raises(TeacherError, match=r"these are not the weights of dinov2_vitb14: the shape of .* differs"):
            build_teacher("dinov2_vitb14", weights=folders["dinov2_vits14"] / "model.safetensors")

    def test_file_without_registers_for_a_teacher_with(self, folders: dict[str, Path]) -> None:
        with pytest.raises(TeacherError, match=r"embeddings\.register_tokens expected, but missing"):
            build_teacher("dinov2_vits14_reg", weights=folders["dinov2_vits14"] / "model.safetensors")

    def test_original_layout_is_named_as_such(self, tmp_path: Path) -> None:
        path = tmp_path / "dinov2_vits14_pretrain.pth"
        torch.save({"cls_token": torch.zeros(1, 1, 384), "patch_embed.proj.weight": torch.zeros(384, 3, 14, 14)}, path)
        with pytest.raises(
            TeacherError, match=r"found facebookresearch's own.*\n.*model\.safetensors of facebook/dinov2-small"
        ):
            build_teacher("dinov2_vits14", weights=path)

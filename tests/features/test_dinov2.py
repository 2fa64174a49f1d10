from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from data.errors import TeacherError, UsageError
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

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            (
                "dinov2_vits14",
                r"pretrain\.pth, in facebookresearch's layout: these are not the weights of dinov2_vits14: the shape of"
                r" embeddings\.cls_token \(and 2 more\) differs \(expected \[1, 1, 384\], found \[1, 1, 768\]\);"
                r" embeddings\.mask_token \(and 219 more\) expected, but missing",
            ),
            ("dinov2_vitb14", r"encoder\.layer\.0\.attn\.qkv\.bias \(and 1 more\) found, but unknown"),
        ],
    )
    def test_original_layout_of_another_size(self, tmp_path: Path, name: str, message: str) -> None:
        shapes = {
            "cls_token": (1, 1, 768), "patch_embed.proj.weight": (768, 3, 14, 14), "blocks.0.norm1.bias": (768,),
            "blocks.0.attn.qkv.weight": (2303, 768), "blocks.0.attn.qkv.bias": (),
        }  # fmt: skip
        path = tmp_path / "dinov2_vitb14_pretrain.pth"
        torch.save({key: torch.zeros(shape) for key, shape in shapes.items()}, path)
        with pytest.raises(TeacherError, match=message):
            build_teacher(name, weights=path)


class TestOptions:
    def test_default_is_what_stores_were_made_from(self, untrained: Build) -> None:
        # A store is resumed only by a teacher of the same identity: none of this may change unnoticed.
        identity = untrained("dinov2_vits14").identity()
        assert identity.pop("weights_digest") == "2fb3154e5db47b1a0ebd698e7bf46e62937da23c7ae959225733fd971ac447ce"
        assert identity == {
            "spec": "dinov2_vits14",
            "library": "transformers",
            "architecture": {
                "model_type": "dinov2", "hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6,
                "patch_size": 14, "image_size": 518, "mlp_ratio": 4, "hidden_act": "gelu", "layer_norm_eps": 1e-6,
                "qkv_bias": True, "use_swiglu_ffn": False, "layerscale_value": 1.0,
            },
            "input_size": [420, 420],
            "decoder": "pillow-rgb",
            "resample": "bicubic",
            "antialias": True,
            "mean": [0.485, 0.456, 0.406],
            "std": [0.229, 0.224, 0.225],
            "layer": "last block, patch tokens",
            "norm": "final LayerNorm",
            "patch_grid": [30, 30],
            "compute_dtype": "float32",
            "autocast": None,
            "tf32": False,
        }  # fmt: skip

    def test_options_are_in_the_identity_and_the_weights_are_the_whole_networks(self, untrained: Build) -> None:
        default = untrained("dinov2_vits14").identity()
        teacher = build_teacher("dinov2_vits14@layer=9,norm=none,grid=20x40", untrained=True)
        identity = teacher.identity()
        assert teacher.output_shapes == {"features": (20, 40, 384)}
        assert {key: value for key, value in identity.items() if value != default[key]} == {
            "spec": "dinov2_vits14@layer=9,norm=none,grid=20x40",
            "input_size": [280, 560],
            "patch_grid": [20, 40],
            "layer": "block 9 of 12, patch tokens",
            "norm": "none",
        }

    def test_blocks_behind_the_layer_are_not_computed(self) -> None:
        teacher = build_teacher("dinov2_vits14@layer=2,grid=2", untrained=True)
        blocks = {name.split(".")[2] for name in teacher.module.state_dict() if name.startswith("encoder.layer.")}
        assert blocks == {"0", "1"}

    @pytest.mark.parametrize("name", NAMES)
    def test_attention_does_not_depend_on_the_librarys_default(self, untrained: Build, name: str) -> None:
        assert untrained(name).module.config._attn_implementation == "sdpa"  # type: ignore[union-attr]

    @pytest.mark.parametrize(
        ("spec", "message"),
        [
            ("dinov2_vits14@layer=13", r"dinov2_vits14@layer=13: expected a layer from 1 to 12, found 13"),
            ("dinov2_vitl14_reg@layer=25", r"expected a layer from 1 to 24, found 25: it has 24 blocks"),
            ("dinov2_vits14@grid=65", r"expected 1 to 64 cells a side, found 65x65"),
            ("dinov2_vits14@dense", r"does not take the option dense"),
        ],
    )
    def test_what_it_cannot_give_is_said_before_weights_are_fetched(
        self, unreachable_hub: Path, spec: str, message: str
    ) -> None:
        with pytest.raises(UsageError, match=message):
            build_teacher(spec)

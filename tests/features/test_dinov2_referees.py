"""DINOv2 against three referees that share no code with it: transformers by hand, timm, and a plain one of 40 lines.

All load the same file in facebookresearch's layout, in which every tensor is random: an untrained network's biases
and layer scales are 0 and 1, and would not tell one from another.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from features.registry import build_teacher

NAMES = ("dinov2_vits14", "dinov2_vits14_reg")
TIMM_NAMES = {
    "dinov2_vits14": "vit_small_patch14_dinov2.lvd142m",
    "dinov2_vits14_reg": "vit_small_patch14_reg4_dinov2.lvd142m",
}
WIDTH, DEPTH, HEADS, PATCH_SIZE = 384, 12, 6, 14
State = dict[str, Tensor]


def original_state(num_registers: int) -> State:
    """Random weights under the names and with the shapes of `dinov2_vits14_pretrain.pth` and its `_reg4_` sister."""
    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, WIDTH),
        "pos_embed": (1, 1 + 37 * 37, WIDTH),
        "mask_token": (1, WIDTH),
        "patch_embed.proj.weight": (WIDTH, 3, PATCH_SIZE, PATCH_SIZE),
        "patch_embed.proj.bias": (WIDTH,),
        "norm.weight": (WIDTH,),
        "norm.bias": (WIDTH,),
    }
    if num_registers:
        shapes["register_tokens"] = (1, num_registers, WIDTH)
    matrices = {"attn.qkv": (3 * WIDTH, WIDTH), "attn.proj": (WIDTH, WIDTH)}
    matrices |= {"mlp.fc1": (4 * WIDTH, WIDTH), "mlp.fc2": (WIDTH, 4 * WIDTH)}
    for block in range(DEPTH):
        for name, shape in matrices.items():
            shapes |= {f"blocks.{block}.{name}.weight": shape, f"blocks.{block}.{name}.bias": shape[:1]}
        for name in ("norm1.weight", "norm1.bias", "ls1.gamma", "norm2.weight", "norm2.bias", "ls2.gamma"):
            shapes[f"blocks.{block}.{name}"] = (WIDTH,)
    generator = torch.Generator().manual_seed(11)
    return {name: random_tensor(name, shape, generator) for name, shape in shapes.items()}


def random_tensor(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    values = torch.randn(shape, generator=generator)
    if len(shape) == 1:
        return 0.2 * values if name.endswith("bias") else 0.5 + 0.2 * values
    # Large enough for every tensor to show in the output, far above the tolerance.
    return values * {"cls_token": 3.0, "register_tokens": 3.0, "pos_embed": 0.3}.get(name, 0.06)


@pytest.fixture(scope="module")
def states() -> dict[str, State]:
    """Weights in facebookresearch's layout, by the teacher's name."""
    return {name: original_state(num_registers=4 if name.endswith("_reg") else 0) for name in NAMES}


@pytest.fixture(scope="module")
def files(states: dict[str, State], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same weights in files."""
    folder = tmp_path_factory.mktemp("original")
    paths = {
        "dinov2_vits14": folder / "dinov2_vits14_pretrain.pth",
        "dinov2_vits14_reg": folder / "dinov2_vits14_reg4_pretrain.pth",
    }
    for name, path in paths.items():
        torch.save(states[name], path)
    return paths


@pytest.fixture(scope="module")
def hub_folders(files: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same weights in folders that transformers has written: config.json, model.safetensors, the hub's names."""
    folders = {name: tmp_path_factory.mktemp(name) for name in NAMES}
    for name, folder in folders.items():
        build_teacher(name, weights=files[name]).module.save_pretrained(folder)  # type: ignore[operator]
    return folders


@pytest.fixture(scope="module")
def features_at_518_px(files: dict[str, Path]) -> dict[str, Tensor]:
    """Our features [1, 1369, 384] of one image at 518×518 px, where no position embedding is interpolated."""
    teachers = {name: build_teacher(f"{name}@grid=37", weights=files[name]) for name in NAMES}
    return {
        name: teacher(draw_images(518, 518)).arrays()["features"].flatten(1, 2) for name, teacher in teachers.items()
    }


def draw_images(height: int, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randint(0, 256, (1, height, width, 3), dtype=torch.uint8, generator=generator)


def normalised(images: Tensor) -> Tensor:
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    return torch.from_numpy(((images.numpy() / 255 - mean) / std).transpose(0, 3, 1, 2)).float()


def plain_forward(state: State, pixels: Tensor) -> Tensor:
    """Patch tokens [B, N, 384] after the last norm, from the paper's description alone; 518×518 px only."""

    def norm(tokens: Tensor, name: str) -> Tensor:
        return F.layer_norm(tokens, (WIDTH,), state[f"{name}.weight"], state[f"{name}.bias"], eps=1e-6)

    def linear(tokens: Tensor, name: str) -> Tensor:
        return tokens @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def attend(tokens: Tensor, name: str) -> Tensor:
        joined = linear(tokens, f"{name}.qkv")
        heads = []
        for head in range(HEADS):
            query, key, value = (
                joined[..., start + head * 64 : start + head * 64 + 64] for start in (0, WIDTH, 2 * WIDTH)
            )
            heads.append(torch.softmax(query @ key.transpose(1, 2) / 8.0, dim=-1) @ value)
        return linear(torch.cat(heads, dim=-1), f"{name}.proj")

    patches = F.unfold(pixels, PATCH_SIZE, stride=PATCH_SIZE).transpose(1, 2)
    tokens = patches @ state["patch_embed.proj.weight"].flatten(1).T + state["patch_embed.proj.bias"]
    tokens = torch.cat((state["cls_token"].expand(len(pixels), -1, -1), tokens), dim=1) + state["pos_embed"]
    registers = state.get("register_tokens", torch.zeros(1, 0, WIDTH)).expand(len(pixels), -1, -1)
    tokens = torch.cat((tokens[:, :1], registers, tokens[:, 1:]), dim=1)
    for block in range(DEPTH):
        name = f"blocks.{block}"
        tokens = tokens + state[f"{name}.ls1.gamma"] * attend(norm(tokens, f"{name}.norm1"), f"{name}.attn")
        hidden = F.gelu(linear(norm(tokens, f"{name}.norm2"), f"{name}.mlp.fc1"))
        tokens = tokens + state[f"{name}.ls2.gamma"] * linear(hidden, f"{name}.mlp.fc2")
    return norm(tokens, "norm")[:, 1 + registers.shape[1] :]


def timm_patch_tokens(name: str, state: State, pixels: Tensor) -> Tensor:
    import timm

    with torch.device("meta"):
        model: Any = timm.create_model(TIMM_NAMES[name], pretrained=False, num_classes=0, dynamic_img_size=True)
    keyed = {key: tensor for key, tensor in state.items() if key != "mask_token"}
    if "register_tokens" in keyed:
        # timm adds the position embedding to the patches alone: that of CLS is part of CLS there.
        keyed["reg_token"] = keyed.pop("register_tokens")
        keyed["cls_token"] = keyed["cls_token"] + keyed["pos_embed"][:, :1]
        keyed["pos_embed"] = keyed["pos_embed"][:, 1:]
    model.load_state_dict(keyed, assign=True)
    with torch.no_grad():
        tokens: Tensor = model.eval().forward_features(pixels)
    return tokens[:, model.num_prefix_tokens :]


def assert_equal(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=5e-5, atol=5e-5)


@pytest.mark.parametrize("name", NAMES)
def test_features_equal_the_plain_reference(
    name: str, states: dict[str, State], features_at_518_px: dict[str, Tensor]
) -> None:
    with torch.no_grad():
        tokens = plain_forward(states[name], normalised(draw_images(518, 518)))
    assert_equal(features_at_518_px[name], tokens)


@pytest.mark.parametrize("name", NAMES)
def test_features_equal_timms_at_518_px(
    name: str, states: dict[str, State], features_at_518_px: dict[str, Tensor]
) -> None:
    tokens = timm_patch_tokens(name, states[name], normalised(draw_images(518, 518)))
    assert_equal(features_at_518_px[name], tokens)


def test_at_another_size_the_library_matters(states: dict[str, State], files: dict[str, Path]) -> None:
    # Each resizes position embeddings in its own way, which is why the library is part of a teacher's identity.
    def difference_from_timm(name: str) -> float:
        images = draw_images(420, 420)
        features = build_teacher(name, weights=files[name])(images).arrays()["features"].flatten(1, 2)
        tokens = timm_patch_tokens(name, states[name], normalised(images))
        return ((features - tokens).norm() / tokens.norm()).item()

    assert difference_from_timm("dinov2_vits14") > 0.01
    # With registers transformers antialiases as timm does, and the default grid has a referee.
    assert difference_from_timm("dinov2_vits14_reg") < 5e-5


@pytest.fixture(scope="module")
def hidden_states(hub_folders: dict[str, Path]) -> dict[str, tuple[Tensor, ...]]:
    """Patch tokens [1, 80, 384] behind every block at 112×140 px, by transformers with its plain attention."""
    from transformers import AutoModel

    pixels = normalised(draw_images(112, 140))
    hidden_states = {}
    for name, folder in hub_folders.items():
        model = AutoModel.from_pretrained(folder, attn_implementation="eager").eval()
        with torch.no_grad():
            states = model(pixel_values=pixels, output_hidden_states=True).hidden_states
        assert len(states) == 1 + DEPTH  # what enters the first block stands before them
        hidden_states[name] = tuple(tokens[:, -80:] for tokens in states)
    return hidden_states


@pytest.mark.parametrize(
    ("spec", "block", "normed"),
    [
        ("dinov2_vits14@grid=8x10", 12, True),
        ("dinov2_vits14@norm=none,grid=8x10", 12, False),
        ("dinov2_vits14@layer=12,grid=8x10", 12, True),
        ("dinov2_vits14@layer=9,grid=8x10", 9, True),
        ("dinov2_vits14@layer=9,norm=none,grid=8x10", 9, False),
        ("dinov2_vits14_reg@layer=1,norm=final,grid=8x10", 1, True),
        ("dinov2_vits14_reg@layer=11,norm=none,grid=8x10", 11, False),
    ],
)
def test_layers_and_norms_are_those_of_transformers(
    spec: str,
    block: int,
    normed: bool,
    states: dict[str, State],
    hub_folders: dict[str, Path],
    hidden_states: dict[str, tuple[Tensor, ...]],
) -> None:
    name = spec.partition("@")[0]
    expected = hidden_states[name][block]
    if normed:
        expected = F.layer_norm(expected, (WIDTH,), states[name]["norm.weight"], states[name]["norm.bias"], eps=1e-6)
    features = build_teacher(spec, weights=hub_folders[name])(draw_images(112, 140)).arrays()["features"]
    assert features.shape == (1, 8, 10, WIDTH)
    assert_equal(features.flatten(1, 2), expected)


@pytest.mark.parametrize("name", NAMES)
def test_both_layouts_of_the_same_weights_are_the_same_teacher(
    name: str, files: dict[str, Path], hub_folders: dict[str, Path]
) -> None:
    original, hub = build_teacher(name, weights=files[name]), build_teacher(name, weights=hub_folders[name])
    assert original.identity() == hub.identity()
    assert original.weights_source == f"{files[name]}, in facebookresearch's layout"

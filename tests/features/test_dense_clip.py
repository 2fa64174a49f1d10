"""Dense CLIP features against a plain reference from the weights, the library's own attention, and a moving blob."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from open_clip.model import resize_pos_embed
from torch import Tensor

from data.errors import UsageError
from features.dense_clip import DenseClipTeacher, resize_positions, value_path
from features.registry import build_teacher
from features.teacher import Teacher, TeacherOutput

NUM_LAYERS = 3
WIDTH = 128
TEXT = {"width": 64, "heads": 2, "layers": 1}


def configuration(patch_size: int, native: int, **vision: Any) -> dict[str, Any]:
    size = {"image_size": native * patch_size, "patch_size": patch_size, "layers": NUM_LAYERS, "width": WIDTH}
    return {"embed_dim": 40, "quick_gelu": True, "vision_cfg": {**size, **vision}, "text_cfg": TEXT}


CONFIGS = {
    "dense-14": configuration(14, 5),
    "dense-16": configuration(16, 4),
    "dense-32": configuration(32, 3, ls_init_value=0.5),
    "pooled-16": configuration(16, 4, pool_type="avg"),
    "single-16": configuration(16, 4, layers=1),
    "scaled-16": configuration(16, 4, scale_heads=True),
    "resnet": configuration(16, 4, layers=[1, 1, 1, 1], width=32),
    "trunk": {
        "embed_dim": 64,
        "custom_text": True,
        "vision_cfg": {"image_size": 160, "timm_model_name": "test_vit", "timm_pool": "map", "timm_proj": "none"},
        "text_cfg": TEXT,
    },
}


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Weights that open_clip initialised, by architecture."""
    folder = tmp_path_factory.mktemp("dense")
    for name, config in CONFIGS.items():
        (folder / f"{name}.json").write_text(json.dumps(config))
        open_clip.add_model_config(folder / f"{name}.json")
    files = {}
    for name in ("dense-14", "dense-16", "dense-32"):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(23)
            model = open_clip.create_model(name)
        torch.save(model.state_dict(), folder / f"{name}.pt")
        files[name] = folder / f"{name}.pt"
    return files


def build(weights: dict[str, Path], name: str, options: str = "@dense") -> Teacher:
    return build_teacher(f"open_clip:{name}{options}", weights=weights[name])


def draw(teacher: Teacher, count: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randint(0, 256, (count, *teacher.input.size, 3), dtype=torch.uint8, generator=generator)


def by_hand(state: dict[str, Tensor], images: Tensor, patch_size: int, positions: Tensor) -> Tensor:
    """The features [B, Gh, Gw, D] from the weights alone: tokens of all blocks but the last, then its value path."""

    def norm(tokens: Tensor, name: str) -> Tensor:
        centred = tokens - tokens.mean(dim=-1, keepdim=True)
        unit = centred / (centred.square().mean(dim=-1, keepdim=True) + 1e-5).sqrt()
        return unit * state[f"visual.{name}.weight"] + state[f"visual.{name}.bias"]

    def linear(tokens: Tensor, name: str) -> Tensor:
        return tokens @ state[f"visual.{name}.weight"].T + state[f"visual.{name}.bias"]

    mean, std = torch.tensor(open_clip.OPENAI_DATASET_MEAN), torch.tensor(open_clip.OPENAI_DATASET_STD)
    pixels = (images / 255 - mean) / std
    rows, columns = pixels.shape[1] // patch_size, pixels.shape[2] // patch_size
    patches = pixels.reshape(-1, rows, patch_size, columns, patch_size, 3).permute(0, 1, 3, 5, 2, 4)
    tokens = patches.reshape(len(images), rows * columns, -1) @ state["visual.conv1.weight"].flatten(1).T
    of_class = state["visual.class_embedding"].expand(len(images), 1, -1)
    tokens = norm(torch.cat([of_class, tokens], dim=1) + positions, "ln_pre")
    for block in (f"transformer.resblocks.{number}" for number in range(NUM_LAYERS - 1)):
        weight, bias = state[f"visual.{block}.attn.in_proj_weight"], state[f"visual.{block}.attn.in_proj_bias"]
        heads = (norm(tokens, f"{block}.ln_1") @ weight.T + bias).unflatten(-1, (3, 2, 64)).permute(2, 0, 3, 1, 4)
        query, key, value = heads
        mixed = (query @ key.transpose(-1, -2) / math.sqrt(64)).softmax(dim=-1) @ value
        tokens = tokens + linear(mixed.transpose(1, 2).flatten(2), f"{block}.attn.out_proj")
        hidden = linear(norm(tokens, f"{block}.ln_2"), f"{block}.mlp.c_fc")
        tokens = tokens + linear(hidden * torch.sigmoid(1.702 * hidden), f"{block}.mlp.c_proj")
    last = f"transformer.resblocks.{NUM_LAYERS - 1}"
    weight, bias = state[f"visual.{last}.attn.in_proj_weight"], state[f"visual.{last}.attn.in_proj_bias"]
    values = norm(tokens[:, 1:], f"{last}.ln_1") @ weight[-WIDTH:].T + bias[-WIDTH:]
    projected = norm(linear(values, f"{last}.attn.out_proj"), "ln_post") @ state["visual.proj"]
    return projected.reshape(len(images), rows, columns, -1)


def features_of(output: TeacherOutput) -> Tensor:
    assert list(output.arrays()) == ["features"]
    return output.arrays()["features"]


@pytest.mark.parametrize(
    ("name", "patch_size", "grid"),
    [("dense-16", 16, (4, 4)), ("dense-14", 14, (5, 5)), ("dense-16", 16, (3, 7)), ("dense-14", 14, (6, 8))],
    ids=["patch 16, native", "patch 14, native", "patch 16, another grid", "patch 14, another grid"],
)
def test_features_are_the_value_path_of_the_last_block(
    weights: dict[str, Path], name: str, patch_size: int, grid: tuple[int, int]
) -> None:
    teacher = build(weights, name, f"@dense,grid={grid[0]}x{grid[1]}")
    state = torch.load(weights[name], weights_only=True)
    # The library's own resize stands in for ours.
    resized = {"visual.positional_embedding": state["visual.positional_embedding"]}
    resize_pos_embed(resized, SimpleNamespace(visual=SimpleNamespace(grid_size=grid)))
    images = draw(teacher)
    expected = by_hand(state, images, patch_size, resized["visual.positional_embedding"])
    torch.testing.assert_close(features_of(teacher(images)), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["dense-16", "dense-32"], ids=["plain", "with layer scale"])
def test_value_path_is_the_librarys_attention_where_every_token_sees_itself_alone(
    weights: dict[str, Path], name: str
) -> None:
    model = open_clip.create_model(name, pretrained=str(weights[name])).eval()
    block = model.visual.transformer.resblocks[-1]
    tokens = torch.randn(2, 10, WIDTH, generator=torch.Generator().manual_seed(1))
    alone = torch.full((10, 10), -math.inf).fill_diagonal_(0.0)
    with torch.no_grad():
        expected = block.ls_1(block.attention(block.ln_1(tokens), attn_mask=alone))
        torch.testing.assert_close(value_path(block, tokens), expected, rtol=0, atol=1e-6)
        assert not torch.allclose(value_path(block, tokens), block.ls_1(block.attention(block.ln_1(tokens))), atol=1e-3)


def test_positions_are_resized_even_where_the_number_of_cells_is_the_same() -> None:
    # open_clip's own resize would hand these back as they are: rows of 4 cells, read as rows of 8.
    ramp = torch.arange(4.0).view(1, 4).expand(4, 4).reshape(16, 1)
    positions = resize_positions(torch.cat([torch.tensor([[9.0]]), ramp]), (4, 4), (2, 8))
    assert positions[0] == 9.0
    columns = positions[1:].view(2, 8)
    assert (columns.diff(dim=1) > 0).all()
    torch.testing.assert_close(columns[0], columns[1])


@pytest.mark.parametrize(("name", "grid"), [("dense-16", (5, 7)), ("dense-14", (6, 4)), ("dense-32", (3, 5))])
def test_a_moving_blob_moves_the_cell_that_changes_most(
    weights: dict[str, Path], name: str, grid: tuple[int, int]
) -> None:
    teacher = build(weights, name, f"@dense,grid={grid[0]}x{grid[1]}")
    (height, width), (rows, columns) = teacher.input.size, grid
    step = height // rows
    images = torch.full((1 + rows * columns, height, width, 3), 110, dtype=torch.uint8)
    for cell in range(rows * columns):
        top, left = cell // columns * step, cell % columns * step
        images[1 + cell, top + 2 : top + step - 2, left + 2 : left + step - 2] = 255
    features = features_of(teacher(images))
    change = (features[1:] - features[0]).norm(dim=-1).flatten(1)
    assert change.argmax(dim=1).tolist() == list(range(rows * columns))


@pytest.mark.parametrize(
    ("name", "size", "grid"), [("dense-14", 420, 30), ("dense-16", 480, 30), ("dense-32", 480, 15)]
)
def test_default_grid_lies_on_the_frames_cells(weights: dict[str, Path], name: str, size: int, grid: int) -> None:
    teacher = build(weights, name)
    assert teacher.input.size == (size, size)
    assert teacher.patch_grid == (grid, grid)
    assert teacher.output_shapes == {"features": (grid, grid, 40)}
    output = features_of(teacher(draw(teacher, 1)))
    assert output.shape == (1, grid, grid, 40)
    assert output.dtype == torch.float32
    assert not torch.allclose(output.norm(dim=-1), torch.ones(1))


def test_identity_says_what_is_read_and_how_positions_were_resized(weights: dict[str, Path]) -> None:
    of_image = build(weights, "dense-16", "")
    teacher = build(weights, "dense-16")
    assert isinstance(teacher, DenseClipTeacher)
    identity = teacher.identity()
    assert identity["spec"] == "open_clip:dense-16@dense"
    assert identity["layer"] == "last block, value path, projected (dense)"
    assert identity["norm"] == "final LayerNorm, projected, not L2"
    assert identity["patch_grid"] == [30, 30]
    assert identity["architecture"]["position_embeddings"] == "4x4 to 30x30, bicubic, antialiased"
    native = build(weights, "dense-16", "@dense,grid=4x4").identity()
    assert native["architecture"]["position_embeddings"] == "as trained"
    shared = ("weights_digest", "prompts", "class_order", "text_tower", "tokenizer", "logit_scale", "logit_bias")
    assert {key: identity[key] for key in shared} == {key: of_image.identity()[key] for key in shared}
    assert json.loads(json.dumps(identity, allow_nan=False)) == identity
    np.testing.assert_array_equal(teacher.text_embeddings, of_image.text_embeddings)


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_features_in_low_precision_stay_close(weights: dict[str, Path], precision: Any) -> None:
    exact = build(weights, "dense-16", "@dense,grid=6x6")
    teacher = build_teacher("open_clip:dense-16@dense,grid=6x6", weights=weights["dense-16"], precision=precision)
    images = draw(exact)
    found, expected = features_of(teacher(images)), features_of(exact(images))
    assert found.dtype == torch.float32
    assert F.cosine_similarity(found, expected, dim=-1).min() > 0.999


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("open_clip:trunk@dense", "found a trunk of timm"),
        ("open_clip:resnet@dense", "found a residual network"),
        ("open_clip:pooled-16@dense", "found one that pools its patches"),
        ("open_clip:single-16@dense", "found one with a single block"),
        ("open_clip:scaled-16@dense", "found one with an attention of its own kind"),
        ("open_clip:dense-32@dense,grid=40x40", "needs an input of 1280×1280 px"),
        ("open_clip:dense-16@grid=30x30", "an image embedding has no grid"),
    ],
)
def test_what_has_no_dense_features_is_refused(weights: dict[str, Path], spec: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        build_teacher(spec, untrained=True)
    assert message in caught.value.message

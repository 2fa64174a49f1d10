"""DINOv2 through transformers: patch tokens of the last block after the final LayerNorm.

Source: Oquab et al., DINOv2: Learning Robust Visual Features without Supervision (2023); Darcet et al., Vision
Transformers Need Registers (2023).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.errors import TeacherError
from data.geometry import PATCH_GRID

from .registry import TeacherRequest
from .teacher import Teacher, TeacherInput, TeacherOutput, grid_of, weights_digest
from .weights import load_weights, locate_weights, read_json, read_state_dict, seeded_state

_PATCH_SIZE = 14
# The frame's 30×30 cells at 14 px each: cell (i, j) is then cell (i, j) of the frame.
_INPUT = TeacherInput(
    size=(PATCH_GRID[0] * _PATCH_SIZE, PATCH_GRID[1] * _PATCH_SIZE),
    resample="bicubic",
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
)
_SIZES = {
    "vits14": {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6},
    "vitb14": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12},
    "vitl14": {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16},
}
# Common to all of them; position embeddings are those of the 37×37 grid they were trained on.
_SHARED = {
    "patch_size": _PATCH_SIZE, "image_size": 518, "mlp_ratio": 4, "hidden_act": "gelu", "layer_norm_eps": 1e-6,
    "qkv_bias": True, "use_swiglu_ffn": False, "layerscale_value": 1.0,
}  # fmt: skip
# transformers has renamed the attention's layers, and the hub's files keep the old names: those are used for loading
# and for the digest, so that neither depends on the version.
_HUB_NAMES = (
    (".attention.q_proj.", ".attention.attention.query."),
    (".attention.k_proj.", ".attention.attention.key."),
    (".attention.v_proj.", ".attention.attention.value."),
    (".attention.o_proj.", ".attention.output.dense."),
)


@dataclass(kw_only=True, eq=False)
class DinoV2Teacher(Teacher):
    """A teacher of patch tokens; `num_prefix_tokens` counts CLS and the registers, which stand before the patches."""

    patch_grid: tuple[int, int]
    num_prefix_tokens: int

    def forward(self, pixels: Tensor) -> TeacherOutput:
        """Return features [B, 30, 30, C]."""
        tokens: Tensor = self.module(pixel_values=pixels).last_hidden_state
        patches = tokens[:, self.num_prefix_tokens :]
        return TeacherOutput(features=patches.reshape(len(patches), *self.patch_grid, -1))


def build(request: TeacherRequest) -> Teacher:
    """Return a DINOv2 teacher on the CPU.

    Raises TeacherError where the weights cannot be obtained or belong to another architecture.
    """
    from transformers import Dinov2Config, Dinov2Model, Dinov2WithRegistersConfig, Dinov2WithRegistersModel

    spec, entry, weights, untrained = request.name, request.entry, request.weights, request.untrained
    size, _, registers = entry.architecture.partition("_")
    options: dict[str, Any] = {**_SIZES[size], **_SHARED}
    if registers:
        options["num_register_tokens"] = 4
    config = Dinov2WithRegistersConfig(**options) if registers else Dinov2Config(**options)
    architecture = {"model_type": config.model_type, **options}
    with torch.device("meta"):
        model = Dinov2WithRegistersModel(config) if registers else Dinov2Model(config)

    if untrained:
        state, source = seeded_state(model), "seed"
    else:
        assert entry.hub_id is not None
        if weights is not None and weights.is_dir():
            _check_config(spec, weights / "config.json", architecture, type(config)().to_dict())
        path, source = locate_weights(spec, entry.hub_id, entry.weights_files, weights)
        state = _from_hub_names(model.state_dict(), _refuse_original_layout(read_state_dict(path), path, entry.hub_id))
    load_weights(model, state, spec, source)
    grid = grid_of(_INPUT.size, _PATCH_SIZE)
    return DinoV2Teacher(
        name=spec,
        library="transformers",
        architecture=architecture,
        layer="last block, patch tokens",
        norm="final LayerNorm",
        input=_INPUT,
        patch_grid=grid,
        output_shapes={"features": (*grid, options["hidden_size"])},
        weights_digest=weights_digest({_hub_name(name): tensor for name, tensor in model.state_dict().items()}),
        weights_source=source,
        untrained=untrained,
        precision=request.precision,
        module=model,
        num_prefix_tokens=1 + options.get("num_register_tokens", 0),
    )


def _hub_name(name: str) -> str:
    for library_name, hub_name in _HUB_NAMES:
        name = name.replace(library_name, hub_name)
    return name


def _from_hub_names(expected: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    names = {_hub_name(name): name for name in expected}
    return {names.get(_hub_name(name), name): tensor for name, tensor in state.items()}


def _check_config(spec: str, path: Path, architecture: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    # A config.json may leave out what equals the library's default.
    found = {**defaults, **read_json(path)}
    wrong = [
        f"{key}: expected {value}, found {found.get(key)}"
        for key, value in architecture.items()
        if found.get(key) != value
    ]
    if wrong:
        raise TeacherError(
            f"{path}: another architecture than {spec}: {'; '.join(wrong)}",
            hint="name the teacher that this folder belongs to, or give the folder of the one you named",
        )


def _refuse_original_layout(state: dict[str, Tensor], path: Path, hub_id: str) -> dict[str, Tensor]:
    if "patch_embed.proj.weight" in state:
        raise TeacherError(
            f"{path}: expected the hub's layout of DINOv2 (embeddings.…, encoder.layer.…), found facebookresearch's own"
            " (patch_embed.…, blocks.…)",
            hint=f"use model.safetensors of {hub_id}, which holds the same weights",
        )
    return state

"""DINOv2 through transformers: patch tokens, by default of the last block after the final LayerNorm.

An earlier block's tokens pass the final LayerNorm too, unless `norm=none` says otherwise: so do those that
facebookresearch's `get_intermediate_layers` returns.

Source: Oquab et al., DINOv2: Learning Robust Visual Features without Supervision (2023); Darcet et al., Vision
Transformers Need Registers (2023).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from data.errors import TeacherError

from .patch_tokens import PatchTokenTeacher, input_for, layer_name, norm_name
from .registry import TeacherRequest
from .spec import TeacherOptions
from .teacher import Teacher, weights_digest
from .weights import load_weights, locate_weights, read_json, read_state_dict, seeded_state

_PATCH_SIZE = 14
_MEAN = (0.485, 0.456, 0.406)
_STD = (0.229, 0.224, 0.225)
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
# From facebookresearch's own names to the hub's; its joined query, key and value are split besides.
_ORIGINAL_NAMES = (
    (r"^(cls_token|mask_token|register_tokens)$", r"embeddings.\1"),
    (r"^pos_embed$", "embeddings.position_embeddings"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embeddings.projection."),
    (r"^norm\.", "layernorm."),
    (r"^blocks\.", "encoder.layer."),
    (r"\.attn\.proj\.", ".attention.output.dense."),
    (r"\.ls([12])\.gamma$", r".layer_scale\1.lambda1"),
)


def build(request: TeacherRequest) -> Teacher:
    """Return a DINOv2 teacher on the CPU.

    Raises UsageError for a layer or a grid that it cannot give, TeacherError where the weights cannot be obtained or
    belong to another architecture.
    """
    name, options = request.name, request.spec.options
    model, architecture = _empty_model(request.entry.architecture)
    layer = layer_name(options.layer, architecture["num_hidden_layers"], name)
    teacher_input, grid = input_for(options, _PATCH_SIZE, resample="bicubic", mean=_MEAN, std=_STD, name=name)
    state, source = _read_state(request, model, architecture)
    load_weights(model, state, name, source)
    digest = weights_digest({_hub_name(name): tensor for name, tensor in model.state_dict().items()})
    _cut(model, options)
    return PatchTokenTeacher(
        name=name,
        library="transformers",
        architecture=architecture,
        layer=layer,
        norm=norm_name(options.norm),
        input=teacher_input,
        patch_grid=grid,
        output_shapes={"features": (*grid, architecture["hidden_size"])},
        weights_digest=digest,
        weights_source=source,
        untrained=request.untrained,
        precision=request.precision,
        module=model,
        num_prefix_tokens=1 + architecture.get("num_register_tokens", 0),
        read_tokens=_read_tokens,
    )


def _empty_model(architecture: str) -> tuple[Any, dict[str, Any]]:
    """Return the model on the meta device, and what fixes it."""
    from transformers import Dinov2Config, Dinov2Model, Dinov2WithRegistersConfig, Dinov2WithRegistersModel

    size, _, registers = architecture.partition("_")
    options: dict[str, Any] = {**_SIZES[size], **_SHARED}
    if registers:
        options["num_register_tokens"] = 4
    # Said, not left to the library's default, which has changed before.
    config = (Dinov2WithRegistersConfig if registers else Dinov2Config)(**options, attn_implementation="sdpa")
    with torch.device("meta"):
        model = Dinov2WithRegistersModel(config) if registers else Dinov2Model(config)
    return model, {"model_type": config.model_type, **options}


def _read_state(request: TeacherRequest, model: Any, architecture: Mapping[str, Any]) -> tuple[dict[str, Tensor], str]:
    """Return the weights under the library's names, and where they came from."""
    if request.untrained:
        return seeded_state(model), "seed"
    entry, weights = request.entry, request.weights
    assert entry.hub_id is not None
    if weights is not None and weights.is_dir():
        _check_config(request.name, weights / "config.json", architecture, type(model.config)().to_dict())
    path, source = locate_weights(request.name, entry.hub_id, entry.weights_files, weights)
    state = read_state_dict(path)
    if "patch_embed.proj.weight" in state:
        state, source = _from_original_layout(state), f"{source}, in facebookresearch's layout"
    return _from_hub_names(model.state_dict(), state), source


def _cut(model: Any, options: TeacherOptions) -> None:
    """Leave only what the wanted tokens pass: later blocks would be computed for nothing."""
    model.encoder.layer = model.encoder.layer[: options.layer]
    if options.norm == "none":
        model.layernorm = nn.Identity()


def _read_tokens(model: nn.Module, pixels: Tensor) -> Tensor:
    tokens: Tensor = model(pixel_values=pixels).last_hidden_state
    return tokens


def _from_original_layout(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return weights in facebookresearch's layout in the hub's."""
    converted: dict[str, Tensor] = {}
    for name, tensor in state.items():
        for original, hub_name in _ORIGINAL_NAMES:
            name = re.sub(original, hub_name, name)
        block, joined, kind = name.partition(".attn.qkv.")
        if joined and tensor.ndim > 0 and len(tensor) % 3 == 0:
            for part, rows in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                converted[f"{block}.attention.attention.{part}.{kind}"] = rows.clone()
        else:
            converted[name] = tensor
    return converted


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

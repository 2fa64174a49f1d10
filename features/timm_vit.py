"""Any plain vision transformer of timm, DINOv3 among them: patch tokens of one of its blocks.

Source: Wightman, PyTorch Image Models (github.com/huggingface/pytorch-image-models); Siméoni et al., DINOv3 (2025).
"""

from __future__ import annotations

import difflib
from typing import Any, get_args

import torch
from torch import Tensor, nn

from data.errors import TeacherError, UsageError
from data.images import Resample

from .patch_tokens import PatchTokenTeacher, input_for, layer_name
from .registry import TeacherRequest
from .spec import Grid, TeacherOptions
from .teacher import Teacher, TeacherInput, weights_digest
from .weights import load_weights, locate_weights, read_state_dict, seeded_state

_FILES = ("model.safetensors", "pytorch_model.bin")
# What turns tokens into one vector an image: found in the files, never run here.
_HEADS = ("head.", "head_dist.", "fc_norm.", "attn_pool.")


def build(request: TeacherRequest) -> Teacher:
    """Return a vision transformer of timm as a teacher, on the CPU.

    The weights are loaded at the size they were trained at; then timm's own `set_input_size` fits position embeddings,
    relative position tables and rotary caches to the teacher's input, once.

    Raises UsageError for a name that timm does not know or an option the model cannot take, TeacherError for a model
    that is no plain vision transformer, or whose weights cannot be obtained or do not fit.
    """
    spec, options = request.name, request.spec.options
    model = _build_on_meta(request.spec.argument, spec)
    cfg: dict[str, Any] = model.pretrained_cfg
    patch_size = _patch_size(model, spec)
    layer = layer_name(options.layer, len(model.blocks), spec)
    norm = _norm(model, options.norm, spec)
    teacher_input, grid = _input(cfg, options, patch_size, spec)
    architecture = _describe(model, request.spec.argument)
    source = _load(model, request, cfg)
    digest = weights_digest(model)
    with torch.no_grad():
        model.set_input_size(img_size=teacher_input.size)
    index, normed = (options.layer or len(model.blocks)) - 1, norm != "none"

    def read_tokens(module: nn.Module, pixels: Tensor) -> Tensor:
        read: Any = module.forward_intermediates
        tokens: list[Tensor] = read(
            pixels, indices=[index], norm=normed, stop_early=True, output_fmt="NLC", intermediates_only=True
        )
        return tokens[0]

    return PatchTokenTeacher(
        name=spec,
        library="timm",
        architecture=architecture,
        layer=layer,
        norm=norm,
        input=teacher_input,
        patch_grid=grid,
        output_shapes={"features": (*grid, model.embed_dim)},
        weights_digest=digest,
        weights_source=source,
        untrained=request.untrained,
        precision=request.precision,
        module=model,
        # CLS, the distillation token and registers: timm knows how many there are, and has taken them off.
        num_prefix_tokens=0,
        read_tokens=read_tokens,
    )


def _build_on_meta(argument: str, spec: str) -> Any:
    import timm
    from timm.models import get_pretrained_cfg

    name, _, tag = argument.partition(".")
    if not timm.is_model(name):
        close = difflib.get_close_matches(name, timm.list_models(), n=3, cutoff=0.5)
        raise UsageError(
            f"{spec}: timm {timm.__version__} has no model {name!r}",
            hint=f"did you mean {' or '.join(f'timm:{other}' for other in close)}?" if close else None,
        )
    try:
        get_pretrained_cfg(argument)
    except RuntimeError:
        tags = [known.partition(".")[2] for known in timm.list_models(f"{name}.*", pretrained=True)]
        raise UsageError(
            f"{spec}: timm {timm.__version__} has no weights {tag!r} of {name}; expected one of {', '.join(tags)}"
        ) from None
    with torch.device("meta"):
        return timm.create_model(argument, pretrained=False, num_classes=0)


def _patch_size(model: Any, spec: str) -> int:
    patch_embed: Any = getattr(model, "patch_embed", None)
    projection = getattr(patch_embed, "proj", None)
    needed = ("blocks", "norm", "embed_dim", "num_prefix_tokens", "forward_intermediates", "set_input_size")
    if not (isinstance(projection, nn.Conv2d) and all(hasattr(model, name) for name in needed)):
        raise TeacherError(
            f"{spec}: expected a plain vision transformer, found timm's {type(model).__name__}, whose output is no row"
            " of patch tokens",
            hint="name a ViT, as timm:vit_small_patch16_dinov3",
        )
    sizes = {tuple(projection.kernel_size), tuple(projection.stride), tuple(patch_embed.feat_ratio(as_scalar=False))}
    height, width = projection.kernel_size
    # Overlapping patches or a convolutional stem would see more than their own cell.
    if len(sizes) > 1 or height != width or projection.in_channels != 3:
        raise TeacherError(f"{spec}: expected square RGB patches side by side, found {type(patch_embed).__name__}")
    return int(height)


def _norm(model: Any, wanted: str | None, spec: str) -> str:
    # Models that pool the patches norm what they have pooled: their tokens pass no norm at all.
    if isinstance(model.norm, nn.Identity):
        if wanted == "final":
            raise UsageError(f"--teacher {spec}: this model norms after pooling, its tokens have no final norm")
        return "none"
    return "none" if wanted == "none" else f"final {type(model.norm).__name__}"


def _input(cfg: dict[str, Any], options: TeacherOptions, patch_size: int, spec: str) -> tuple[TeacherInput, Grid]:
    resample: Resample = cfg["interpolation"]
    if resample not in get_args(Resample):
        raise TeacherError(f"{spec}: expected images resized {' or '.join(get_args(Resample))}, found {resample}")
    mean: tuple[float, float, float] = cfg["mean"]
    std: tuple[float, float, float] = cfg["std"]
    return input_for(options, patch_size, resample=resample, mean=mean, std=std, name=spec)


def _describe(model: Any, argument: str) -> dict[str, Any]:
    heads = {module.num_heads for module in model.blocks.modules() if hasattr(module, "num_heads")}
    return {
        "model": argument.partition(".")[0],
        "embed_dim": model.embed_dim,
        "depth": len(model.blocks),
        "num_heads": sorted(heads),
        "patch_size": list(model.patch_embed.patch_size),
        "num_prefix_tokens": model.num_prefix_tokens,
        "native_grid": list(model.patch_embed.grid_size),
        "positions": "fitted to the grid by set_input_size",
    }


def _load(model: Any, request: TeacherRequest, cfg: dict[str, Any]) -> str:
    spec = request.name
    if request.untrained:
        state, source = seeded_state(model), "seed"
    else:
        hub_id = cfg.get("hf_hub_id")
        if request.weights is None and not hub_id:
            raise TeacherError(
                f"{spec}: timm names no trained weights of this model on the hub",
                hint=f"give a local copy with --weights {spec}=PATH, or try things out with --untrained",
            )
        path, source = locate_weights(spec, hub_id or "", _FILES, request.weights)
        state = read_state_dict(path)
        if request.weights is None and cfg.get("license"):
            source = f"{source}, licence {cfg['license']}"
    load_weights(model, state, spec, source, ignore=lambda key: key.startswith(_HEADS))
    _fill_caches(model, spec)
    return source


def _fill_caches(model: nn.Module, spec: str) -> None:
    # Rotary periods, index tables and the like are no weights: they were left on the meta device.
    for module in model.modules():
        caches = {name: tensor for name, tensor in module.named_buffers(recurse=False) if tensor.is_meta}
        if not caches:
            continue
        compute: Any = getattr(module, "init_non_persistent_buffers", None)
        if compute is None:
            raise TeacherError(f"{spec}: this release of timm cannot compute {', '.join(caches)} anew")
        for name, tensor in caches.items():
            setattr(module, name, torch.empty_like(tensor, device="cpu"))
        compute()

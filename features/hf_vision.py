"""Any vision transformer of transformers, from a folder or the hub: patch tokens of one of its blocks.

Of a model of images and text (CLIP, SigLIP) its image tower is taken. Code that comes with a folder is never run.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from data.errors import TeacherError, UsageError
from data.hub import fetch
from data.images import Resample

from .patch_tokens import PatchTokenTeacher, input_for, layer_name
from .registry import TeacherRequest
from .spec import Grid
from .teacher import Teacher, weights_digest
from .weights import locate_weights, read_json, read_state_dict, seeded_state

_CONFIG = "config.json"
# Newer releases save the image processor's settings inside the second file.
_PROCESSORS = ("preprocessor_config.json", "processor_config.json")
_WEIGHTS = (
    "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json",
)  # fmt: skip
# Pillow's numbers, as the files have them.
_RESAMPLE: dict[int, Resample] = {2: "bilinear", 3: "bicubic"}
# Parts of a weights file that no patch token depends on: pooling, heads, a text tower, masks, tables of positions.
_UNUSED = frozenset(
    {
        "pooler", "head", "lm_head", "classifier", "cls_classifier", "distillation_classifier", "decoder",
        "text_model", "text_projection", "visual_projection", "logit_scale", "logit_bias", "mask_token", "position_ids",
    }
)  # fmt: skip
# Fields of a config that say nothing about what the network computes.
_IRRELEVANT = frozenset(
    {
        "architectures", "transformers_version", "dtype", "torch_dtype", "id2label", "label2id", "num_labels",
        "problem_type", "initializer_range", "initializer_factor", "stage_names", "out_features", "out_indices",
        "model_type",
    }
)  # fmt: skip
_NORMS = ("layernorm", "norm", "post_layernorm")


class PatchTower(nn.Module):
    """A transformer cut off behind one block, and the norm its tokens pass then; pixels [B, 3, H, W] → [B, T, C]."""

    def __init__(self, transformer: nn.Module, norm: nn.Module) -> None:
        super().__init__()
        self.transformer = transformer
        self.norm = norm
        takes = inspect.signature(transformer.forward).parameters
        # Most families stretch their position embeddings only when told to.
        self._options = {"interpolate_pos_encoding": True} if "interpolate_pos_encoding" in takes else {}

    def forward(self, pixels: Tensor) -> Tensor:
        """Return the tokens, prefix first."""
        tokens: Tensor = self.norm(self.transformer(pixel_values=pixels, **self._options).last_hidden_state)
        return tokens


def build(request: TeacherRequest) -> Teacher:
    """Return a vision transformer of transformers as a teacher, on the CPU.

    A folder's path is no part of the teacher's identity: moved, it is the same teacher.

    Raises UsageError for an argument that is neither a folder nor a hub id or for an option the model cannot take,
    TeacherError for a model that is no plain vision transformer, or whose files cannot be obtained or do not fit.
    """
    folder, hub_id = _locate(request)
    spec, options = (request.name if hub_id else request.spec.named("hf:DIR")), request.spec.options
    config = _read_config(_find(request, folder, hub_id, (_CONFIG,)), request.name)
    patch_size = _patch_size(config, request.name)
    resample, mean, std = _read_processor(_find(request, folder, hub_id, _PROCESSORS))
    teacher_input, grid = input_for(options, patch_size, resample=resample, mean=mean, std=std, name=request.name)
    model, source = _load(config, request, folder, hub_id)
    digest = weights_digest(model)
    blocks = _blocks(model, config.num_hidden_layers, request.name)
    layer = layer_name(options.layer, len(blocks), request.name)
    tower, norm = _take_norm(model, options.norm, request.name)
    num_prefix_tokens = _count_prefix_tokens(tower, blocks, grid, patch_size, request.name)
    del blocks[options.layer or len(blocks) :]
    return PatchTokenTeacher(
        name=spec,
        library="transformers",
        architecture=_describe(config),
        layer=layer,
        norm=norm,
        input=teacher_input,
        patch_grid=grid,
        output_shapes={"features": (*grid, config.hidden_size)},
        weights_digest=digest,
        weights_source=source,
        untrained=request.untrained,
        precision=request.precision,
        module=tower,
        num_prefix_tokens=num_prefix_tokens,
        read_tokens=_run,
    )


def _run(module: nn.Module, pixels: Tensor) -> Tensor:
    tokens: Tensor = module(pixels)
    return tokens


def _locate(request: TeacherRequest) -> tuple[Path | None, str | None]:
    # The folder that holds the configs, and the hub id where the argument is one: a local copy may stand in for it.
    argument = Path(request.spec.argument)
    if argument.is_dir():
        return argument, None
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", request.spec.argument):
        raise UsageError(
            f"{request.name}: no such folder",
            hint="expected hf:FOLDER with a config.json, or a hub id as in hf:facebook/dinov2-small",
        )
    weights = request.weights
    return (weights.parent if weights is not None and weights.is_file() else weights), request.spec.argument


def _find(request: TeacherRequest, folder: Path | None, hub_id: str | None, names: tuple[str, ...]) -> Path:
    if folder is None:
        assert hub_id is not None
        return fetch(request.name, hub_id, names, ways_on=f"give a local copy with --weights {request.name}=FOLDER")
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise TeacherError(
        f"{folder}: expected a model folder of transformers, with {' or '.join(names)}, found none",
        hint=f"copy {names[0]} from the model's page on the hub, or save it with save_pretrained",
    )


def _read_config(path: Path, spec: str) -> Any:
    import transformers

    content = read_json(path)
    if "auto_map" in content:
        raise TeacherError(f"{path}: {spec} needs code from its folder (auto_map), which is never run")
    model_type = content.get("model_type")
    if model_type not in transformers.CONFIG_MAPPING:
        raise TeacherError(f"{path}: transformers {transformers.__version__} knows no model_type {model_type!r}")
    try:
        with _quiet():
            config = transformers.CONFIG_MAPPING[model_type].from_dict(content)
    except Exception as error:  # each config class has its own checks
        raise TeacherError(f"{path}: cannot be read as the config of a {model_type} ({error})") from error
    return getattr(config, "vision_config", config)


def _patch_size(config: Any, spec: str) -> int:
    import transformers

    fields = {name: getattr(config, name, None) for name in ("patch_size", "num_hidden_layers", "hidden_size")}
    known = type(config) in transformers.MODEL_MAPPING
    if not known or not all(isinstance(value, int) for value in fields.values()):
        found = ", ".join(f"{name} {value}" for name, value in fields.items())
        raise TeacherError(
            f"{spec}: expected a vision transformer, found model_type {config.model_type!r} with {found}",
            hint="name a ViT, as hf:facebook/dinov2-small, or a folder of one",
        )
    if getattr(config, "num_channels", 3) != 3:
        raise TeacherError(f"{spec}: expected a model of RGB images, found {config.num_channels} channels")
    return int(config.patch_size)


def _read_processor(path: Path) -> tuple[Resample, tuple[float, float, float], tuple[float, float, float]]:
    content = read_json(path)
    content = content.get("image_processor", content)
    if content.get("resample") not in _RESAMPLE:
        raise TeacherError(f"{path}: expected resample 2 (bilinear) or 3 (bicubic), found {content.get('resample')!r}")
    if not math.isclose(content.get("rescale_factor") or 1 / 255, 1 / 255, rel_tol=1e-3):
        raise TeacherError(f"{path}: expected rescale_factor 1/255, found {content['rescale_factor']}")
    if content.get("do_normalize") is False:
        return _RESAMPLE[content["resample"]], (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    return _RESAMPLE[content["resample"]], _of_rgb(content, "image_mean", path), _of_rgb(content, "image_std", path)


def _of_rgb(content: Mapping[str, Any], key: str, path: Path) -> tuple[float, float, float]:
    values = content.get(key)
    if not (isinstance(values, list) and len(values) == 3 and all(isinstance(value, int | float) for value in values)):
        raise TeacherError(f"{path}: expected {key} with three numbers, found {values!r}")
    red, green, blue = map(float, values)
    return red, green, blue


def _describe(config: Any) -> dict[str, Any]:
    # What differs from the library's defaults, and the sizes in any case: a field that a later release adds then
    # changes nothing.
    sizes = ("hidden_size", "num_hidden_layers", "num_attention_heads", "patch_size", "image_size")
    fields, defaults = config.to_dict(), type(config)().to_dict()
    kept = {name for name in fields if name in sizes or fields[name] != defaults.get(name)} - _IRRELEVANT
    chosen = {name: fields[name] for name in sorted(kept) if not name.startswith("_")}
    return {"model_type": config.model_type, **chosen}


def _load(config: Any, request: TeacherRequest, folder: Path | None, hub_id: str | None) -> tuple[Any, str]:
    import transformers

    model_class = transformers.MODEL_MAPPING[type(config)]
    # Pooled outputs are never read.
    without_pooler = (
        {"add_pooling_layer": False} if "add_pooling_layer" in inspect.signature(model_class).parameters else {}
    )
    if request.untrained:
        with _quiet(), torch.device("meta"):
            blank = model_class(config, **without_pooler)
        state, source = seeded_state(blank), "seed"
    else:
        path, source = locate_weights(request.name, hub_id or "", _WEIGHTS, request.weights or folder)
        if request.weights is None and folder is None and path.name.endswith(".index.json"):
            _fetch_shards(path, request.name, hub_id or "")
        state = read_state_dict(path)
    # transformers renames parameters between releases and drops the prefixes of larger models: only it knows how.
    try:
        with _quiet(), torch.random.fork_rng(devices=[]):
            model, report = model_class.from_pretrained(
                None, config=config, state_dict=state, dtype=torch.float32, attn_implementation="sdpa",
                ignore_mismatched_sizes=True, output_loading_info=True, **without_pooler,
            )  # fmt: skip
    except (ValueError, RuntimeError, ImportError) as error:
        raise TeacherError(f"{source}: transformers cannot load {request.name} ({error})") from error
    _check_report(report, request.name, source)
    return model, source


def _fetch_shards(index: Path, spec: str, hub_id: str) -> None:
    weight_map = read_json(index).get("weight_map")
    for filename in sorted(set(weight_map.values())) if isinstance(weight_map, dict) else []:
        fetch(spec, hub_id, (str(filename),), ways_on=f"give a local copy with --weights {spec}=FOLDER")


def _check_report(report: Mapping[str, Any], spec: str, source: str) -> None:
    problems = []
    if report["mismatched_keys"]:
        key, found, expected = min(report["mismatched_keys"])
        names = _some(name for name, *_ in report["mismatched_keys"])
        shapes = f"{key}: expected {list(expected)}, found {list(found)}"
        problems.append(f"the shape of {names} differs ({shapes})")
    if report["missing_keys"]:
        problems.append(f"{_some(report['missing_keys'])} expected, but missing")
    surplus = [key for key in report["unexpected_keys"] if _UNUSED.isdisjoint(key.split("."))]
    if surplus:
        problems.append(f"{_some(surplus)} found, but unknown to the architecture")
    if problems:
        raise TeacherError(
            f"{source}: these are not the weights of {spec}: {'; '.join(problems)}",
            hint="config.json and the weights belong to different models: restore both from one of them",
        )


def _some(names: Iterable[str]) -> str:
    first, *others = sorted(names)
    return f"{first} (and {len(others)} more)" if others else first


def _blocks(model: nn.Module, num_blocks: int, spec: str) -> nn.ModuleList:
    found = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) == num_blocks]
    if len(found) != 1:
        raise TeacherError(
            f"{spec}: expected one row of {num_blocks} blocks, found {len(found)} in {type(model).__name__}"
        )
    return found[0]


def _take_norm(model: nn.Module, wanted: str | None, spec: str) -> tuple[PatchTower, str]:
    # Some models norm their last tokens (ViT, DINOv2), some only what they pool (CLIP): taken out of all of them and
    # applied by us, `final` means the same for each.
    name = next((name for name in _NORMS if isinstance(getattr(model, name, None), nn.Module)), None)
    norm = nn.Identity() if name is None else getattr(model, name)
    if name is not None:
        setattr(model, name, nn.Identity())
    if isinstance(norm, nn.Identity):
        if wanted == "final":
            raise UsageError(f"--teacher {spec}: this model norms after pooling, its tokens have no final norm")
        return PatchTower(model, norm), "none"
    if wanted == "none":
        return PatchTower(model, nn.Identity()), "none"
    return PatchTower(model, norm), f"final {type(norm).__name__}"


def _count_prefix_tokens(tower: PatchTower, blocks: nn.ModuleList, grid: Grid, patch_size: int, spec: str) -> int:
    """Return how many tokens stand before the patches, found by lighting the patch of one cell.

    Before the first block a patch reaches its own token only. That token's place tells the prefix, and that the patches
    stand row by row with nothing between or behind them.
    """
    row, column = grid[0] - 1, 0
    pixels = torch.zeros(2, 3, grid[0] * patch_size, grid[1] * patch_size)
    pixels[1, :, row * patch_size : (row + 1) * patch_size, column * patch_size : (column + 1) * patch_size] = 1.0
    taken = list(blocks)
    del blocks[:]
    try:
        with torch.inference_mode():
            dark, lit = tower.eval()(pixels)
    except Exception as error:  # each model has its own way to refuse an input
        raise TeacherError(
            f"{spec}: {type(tower.transformer).__name__} cannot be run on a {grid[0]}×{grid[1]} grid ({error})",
            hint="it may be bound to the grid it was trained at: name that one with @grid=ROWSxCOLUMNS",
        ) from error
    finally:
        blocks.extend(taken)
    changed = (dark != lit).any(dim=-1).nonzero().flatten().tolist() if dark.ndim == 2 else []
    prefix = len(dark) - grid[0] * grid[1]
    if prefix < 0 or changed != [prefix + row * grid[1] + column]:
        raise TeacherError(
            f"{spec}: expected one token for each of {grid[0]}×{grid[1]} patches, row by row behind a prefix;"
            f" {type(tower.transformer).__name__} gives {list(dark.shape)}",
            hint="name a plain ViT, as hf:facebook/dinov2-small",
        )
    return prefix


@contextmanager
def _quiet() -> Iterator[None]:
    # transformers reports on every unused tensor and draws a bar of its own: what matters is checked and raised here.
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()

"""Which of open_clip's models a teacher is: its configuration, how its images are prepared, where its weights are."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, get_args

from data.errors import TeacherError, UsageError
from data.images import Resample

from .registry import TeacherRequest
from .weights import read_json

_WEIGHTS_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
_CONFIG_FILE = "open_clip_config.json"
# What of open_clip's preprocessing is followed; its resize mode is not: a teacher sees the whole image, squashed.
_PREPROCESSING = ("mean", "std", "interpolation")
_LIST = '`python -c "import open_clip; print(open_clip.list_models())"` lists them all'


@dataclass(frozen=True)
class OpenClipModel:
    """One of open_clip's models.

    architecture: its name in open_clip, and config: open_clip's configuration of it.  resample, mean, std: how its
    images are prepared.  hub_id: None where open_clip names no hub repository; url: what it names instead.
    """

    architecture: str
    config: Mapping[str, Any]
    resample: Resample
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    hub_id: str | None
    weights_files: tuple[str, ...]
    url: str


def find_model(request: TeacherRequest) -> OpenClipModel:
    """Return the model that a request names; reads nothing but the configuration of a folder of weights.

    Raises UsageError for a name that open_clip does not know, or one whose weights or preprocessing are left open;
    TeacherError for a folder that belongs to another model.
    """
    import open_clip

    if request.entry.architecture:
        architecture, tag = request.entry.architecture, "openai"
    else:
        architecture, _, tag = request.spec.argument.partition("/")
        _check_names(request, architecture, tag)
    config: dict[str, Any] = open_clip.get_model_config(architecture)
    pretrained: dict[str, Any] = open_clip.get_pretrained_cfg(architecture, tag)
    _check_activation(request.name, architecture, tag, config, pretrained)
    folder = _read_folder_config(request.weights)
    prepared = _preprocessing(request, architecture, pretrained, folder.get("preprocess_cfg", {}))
    _check_folder(request, config, prepared, folder)
    if prepared["interpolation"] not in get_args(Resample):
        raise UsageError(
            f"{request.name}: expected a model whose images are resized by {' or '.join(get_args(Resample))},"
            f" found {prepared['interpolation']}"
        )
    repository, files = _hub_files(pretrained.get("hf_hub", ""))
    return OpenClipModel(
        architecture=architecture,
        config=config,
        resample=prepared["interpolation"],
        mean=tuple(prepared["mean"]),
        std=tuple(prepared["std"]),
        hub_id=request.entry.hub_id or repository,
        weights_files=request.entry.weights_files or files,
        url=pretrained.get("url", ""),
    )


def _check_names(request: TeacherRequest, architecture: str, tag: str) -> None:
    import open_clip

    names = open_clip.list_models()
    if architecture not in names:
        # Without regard to case: the closest to ViT-b-32 is not whatever else has a small b.
        by_lower = {name.lower(): name for name in names}
        close = difflib.get_close_matches(request.spec.argument.lower().replace("/", "-"), by_lower, n=3, cutoff=0.5)
        raise UsageError(
            f"--teacher {request.name}: open_clip has no architecture {architecture!r}",
            hint=f"did you mean {', '.join(by_lower[name] for name in close)}?"
            if close
            else "see open_clip.list_models()",
        )
    tags = open_clip.list_pretrained_tags_by_model(architecture)
    offered = ", ".join(tags) or "none"
    if tag and tag not in tags:
        close = difflib.get_close_matches(tag, tags, n=1, cutoff=0.5)
        raise UsageError(
            f"--teacher {request.name}: open_clip has no weights {tag!r} of {architecture}; expected one of: {offered}",
            hint=f"did you mean open_clip:{architecture}/{close[0]}?" if close else None,
        )
    if not tag and request.weights is None and not request.untrained:
        raise UsageError(
            f"--teacher {request.name}: expected open_clip:{architecture}/PRETRAINED with PRETRAINED one of: {offered}",
            hint=f"or give weights of your own with --weights {request.name}=PATH, or try things out with --untrained",
        )


def _check_activation(
    name: str, architecture: str, tag: str, config: Mapping[str, Any], pretrained: Mapping[str, Any]
) -> None:
    # open_clip only warns: weights trained with one activation give plausible nonsense with the other.
    if pretrained.get("quick_gelu") and not config.get("quick_gelu"):
        raise UsageError(
            f"--teacher {name}: the weights {tag} were trained with QuickGELU, and {architecture} computes GELU",
            hint=f"name open_clip:{architecture}-quickgelu/{tag}",
        )


def _preprocessing(
    request: TeacherRequest, architecture: str, pretrained: Mapping[str, Any], of_folder: Mapping[str, Any]
) -> dict[str, Any]:
    """Return mean, std and interpolation: of the weights that are named, else of the folder, else of the architecture.

    Raises UsageError where the architecture's weights are prepared in several ways and none is named.
    """
    import open_clip
    from open_clip.transform import PreprocessCfg, merge_preprocess_dict

    tags = open_clip.list_pretrained_tags_by_model(architecture)
    known = [open_clip.get_pretrained_cfg(architecture, tag) for tag in tags]
    chosen = pretrained or of_folder or (known[0] if known else {})
    if not (pretrained or of_folder) and request.weights is not None and len({_key(one) for one in known}) > 1:
        raise UsageError(
            f"--teacher {request.name}: the weights of {architecture} differ in mean, std or interpolation of their"
            " images, and a file of weights does not say its own",
            hint=f"name the weights that yours come from: open_clip:{architecture}/PRETRAINED with one of"
            f" {', '.join(tags)}; or give a folder with {_CONFIG_FILE}",
        )
    merged: dict[str, Any] = merge_preprocess_dict(PreprocessCfg(), chosen)
    return merged


def _key(preprocessing: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(preprocessing["mean"]), tuple(preprocessing["std"]), preprocessing["interpolation"]


def _read_folder_config(weights: Path | None) -> dict[str, Any]:
    if weights is None or not (weights / _CONFIG_FILE).is_file():
        return {}
    return read_json(weights / _CONFIG_FILE)


def _check_folder(
    request: TeacherRequest, config: Mapping[str, Any], prepared: Mapping[str, Any], folder: Mapping[str, Any]
) -> None:
    # Shapes cannot tell QuickGELU from GELU, nor one mean from another: both give plausible nonsense.
    if not folder:
        return
    wanted = _flatten({"quick_gelu": False, **config})
    wanted |= {f"preprocess_cfg.{key}": prepared[key] for key in _PREPROCESSING}
    found = _flatten({"quick_gelu": False, **folder.get("model_cfg", {})})
    found |= _flatten({"preprocess_cfg": folder.get("preprocess_cfg", {})})
    wrong = [
        f"{key}: expected {value}, found {found[key]}"
        for key, value in wanted.items()
        if key in found and _plain(found[key]) != _plain(value)
    ]
    if wrong:
        raise TeacherError(
            f"{request.weights}/{_CONFIG_FILE}: another architecture than {request.name}: {'; '.join(wrong)}",
            hint="name the teacher that this folder belongs to, or give the folder of the one you named",
        )


def _flatten(config: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in config.items():
        flat |= {f"{key}.{inner}": item for inner, item in value.items()} if isinstance(value, dict) else {key: value}
    return flat


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _hub_files(place: str) -> tuple[str | None, tuple[str, ...]]:
    """Return the repository and the files of an `OWNER/NAME/` or `OWNER/NAME/FILE`, as open_clip writes them."""
    if not place:
        return None, _WEIGHTS_FILES
    repository, _, filename = place.rpartition("/")
    return repository, (
        str(PurePosixPath(filename).with_suffix(".safetensors")),
        filename,
    ) if filename else _WEIGHTS_FILES

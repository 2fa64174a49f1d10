"""Builds a timm model with pretrained weights, or says why it cannot; never a random model in their place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import timm
from torch import Tensor

from data.errors import UsageError
from data.hub import fetch

_HUB_FILES = ("model.safetensors", "pytorch_model.bin")
_OTHER_WEIGHTS = (
    "train from random weights with --backbone-weights none,"
    " or give a timm state dict (.pth, .safetensors) with --backbone-weights FILE"
)


def imagenet_file(name: str) -> str:
    """Return the path of timm's own weights of the model `name` in the hub's cache, downloaded if need be.

    Raises UsageError where there are none at all, WeightsError where they cannot be had.
    """
    repo = timm.models.get_pretrained_cfg(name).hf_hub_id
    if not repo:
        raise UsageError(f"{name}: timm has no pretrained weights of this model on the hub", hint=_OTHER_WEIGHTS)
    return str(fetch(name, repo, _HUB_FILES, ways_on=_OTHER_WEIGHTS))


def create_with_weights(name: str, path: str, **kwargs: Any) -> Any:
    """Return the timm model `name` with the weights of a timm state dict (`.pth`, `.bin`, `.safetensors`).

    The classifier's entries are dropped; of everything else none may be missing, left over or of another shape.
    timm resamples position embeddings to the model's size on the way.  kwargs: for `timm.create_model`.

    Raises UsageError for a file that is missing, unreadable or of another model; it names the keys.
    """
    source = timm.models.get_pretrained_cfg(name)
    classifiers = (source.classifier,) if isinstance(source.classifier, str) else tuple(source.classifier or ())
    state = {key: value for key, value in _read(path).items() if key.rpartition(".")[0] not in classifiers}
    # timm turns lenient as soon as the file's number of classes is not the model's: say that both have none.
    overlay = {"state_dict": state, "num_classes": 0, "label_offset": 0, "custom_load": False}
    try:
        model = timm.create_model(name, pretrained=True, num_classes=0, pretrained_cfg_overlay=overlay, **kwargs)
    except (RuntimeError, KeyError, ValueError, AssertionError, AttributeError) as error:
        raise UsageError(
            f"{path}: expected a state dict of timm's {name}, found another: {_shortened(str(error))}",
            hint="give this model's own file, or train from random weights with --backbone-weights none",
        ) from error
    # timm keeps what it loaded from beside the model; that would be a second copy of every weight.
    del model.pretrained_cfg["state_dict"]
    return model


def _read(path: str) -> dict[str, Tensor]:
    if not Path(path).is_file():
        raise UsageError(f"{path}: no such weights file", hint="give imagenet, none or a file to --backbone-weights")
    try:
        state = timm.models.load_state_dict(path)
    except Exception as error:  # torch, pickle, zipfile and safetensors each raise their own for a damaged file
        raise UsageError(f"{path}: cannot be read as a .pth or .safetensors state dict ({error})") from error
    if not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise UsageError(f"{path}: expected a state dict of tensors, found something else")
    return state  # type: ignore[no-any-return]


def _shortened(message: str, lines: int = 5, characters: int = 300) -> str:
    kept = message.splitlines()[:lines]
    return "\n".join(line if len(line) <= characters else f"{line[:characters]} …" for line in kept)

"""CLIP through open_clip: image embeddings, and logits over the VOC classes.

Source: Radford et al., Learning Transferable Visual Models From Natural Language Supervision (2021).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.errors import TeacherError

from .prompts import DEFAULT_PROMPTS
from .registry import TeacherRequest
from .teacher import Teacher, TeacherInput, weights_digest
from .weights import load_weights, locate_weights, read_json, read_state_dict, seeded_state
from .zero_shot import CosineClassifier, ZeroShotTeacher, embed_classes

_MEAN = (0.48145466, 0.4578275, 0.40821073)
_STD = (0.26862954, 0.26130258, 0.27577711)
# Trained CLIPs end at a factor of 100, where training clips it; an untrained one is given the same.
_UNTRAINED_LOGIT_SCALE = math.log(100.0)


def build(request: TeacherRequest) -> Teacher:
    """Return a CLIP teacher on the CPU.

    Raises TeacherError where the weights cannot be obtained or belong to another architecture.
    """
    import open_clip

    spec, entry, weights, untrained = request.name, request.entry, request.weights, request.untrained
    config: dict[str, Any] = open_clip.get_model_config(entry.architecture)
    with torch.device("meta"):
        model: Any = open_clip.CLIP(**config)
    if untrained:
        state, source = seeded_state(model), "seed"
        state["logit_scale"] = torch.tensor(_UNTRAINED_LOGIT_SCALE)
    else:
        assert entry.hub_id is not None
        if weights is not None and weights.is_dir():
            _check_config(spec, weights / "open_clip_config.json", config)
        path, source = locate_weights(spec, entry.hub_id, entry.weights_files, weights)
        state = read_state_dict(path)
    load_weights(model, state, spec, source)
    model.requires_grad_(False).eval()
    # The causal mask is no weight: it was left on the meta device.
    length = config["text_cfg"]["context_length"]
    model.attn_mask = torch.full((length, length), -math.inf).triu_(1)

    prompts = request.prompts or DEFAULT_PROMPTS
    prompts = request.prompts or DEFAULT_PROMPTS
    text_embeddings = embed_classes(prompts, lambda sentences: _embed_text(model, open_clip.tokenize(sentences)))
    image_size = config["vision_cfg"]["image_size"]
    return ZeroShotTeacher(
        name=spec,
        library="open_clip_torch",
        architecture={"model": entry.architecture, **config},
        layer="image embedding",
        norm="L2",
        input=TeacherInput(size=(image_size, image_size), resample="bicubic", mean=_MEAN, std=_STD),
        patch_grid=None,
        output_shapes={"logits": (len(text_embeddings),), "embeddings": (config["embed_dim"],)},
        weights_digest=weights_digest(model),
        weights_source=source,
        untrained=untrained,
        # The text tower has done its work: only the image tower travels to a device.
        module=CosineClassifier(model.visual, text_embeddings),
        text_embeddings=text_embeddings,
        precision=request.precision,
        prompts=prompts,
        text_tower=f"{entry.architecture} text transformer",
        tokenizer=f"open_clip SimpleTokenizer, context {length}",
        logit_scale=float(model.logit_scale.exp()),
        logit_bias=None if model.logit_bias is None else float(model.logit_bias),
    )


def _embed_text(model: Any, tokens: Tensor) -> Tensor:
    # The tower is causal and reads the end token, so that nothing behind the longest sentence matters: cutting it off
    # saves three quarters of the work.
    length = int(tokens.argmax(dim=-1).max()) + 1
    shortened = {
        "positional_embedding": model.positional_embedding[:length],
        "attn_mask": model.attn_mask[:length, :length],
    }
    embeddings: Tensor = torch.func.functional_call(model, shortened, kwargs={"text": tokens[:, :length]})[1]
    return embeddings


def _check_config(spec: str, path: Path, expected: Mapping[str, Any]) -> None:
    # Shapes cannot tell QuickGELU from GELU, and weights trained with one give plausible nonsense with the other.
    if not path.is_file():
        return
    wanted = _flatten({"quick_gelu": False, **expected})
    found = _flatten({"quick_gelu": False, **read_json(path).get("model_cfg", {})})
    wrong = [
        f"{key}: expected {value}, found {found[key]}"
        for key, value in wanted.items()
        if key in found and found[key] != value
    ]
    if wrong:
        raise TeacherError(
            f"{path}: another architecture than {spec}: {'; '.join(wrong)}",
            hint="name the teacher that this folder belongs to, or give the folder of the one you named",
        )


def _flatten(config: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in config.items():
        flat |= {f"{key}.{inner}": item for inner, item in value.items()} if isinstance(value, dict) else {key: value}
    return flat

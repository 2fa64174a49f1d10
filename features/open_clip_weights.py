"""The networks of open_clip's models, and their weights: from the hub, a file, a folder or a seed.

open_clip's own loader is not used: it falls back to random weights, resizes position embeddings that do not fit, and
asks the hub without a limit on time.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from data.errors import TeacherError
from data.hub import fetch

from .open_clip_models import OpenClipModel
from .registry import TeacherRequest
from .weights import load_weights, locate_weights, read_state_dict, seeded_state

# Trained CLIPs end at a factor of 100, where training clips it; an untrained one is given the same.
_UNTRAINED_LOGIT_SCALE = math.log(100.0)


def build_network(config: Mapping[str, Any], name: str) -> Any:
    """Return the untrained network of a configuration: on the meta device where it is open_clip's own transformers.

    name: the teacher's spec, for messages.

    Raises WeightsError where a text tower of transformers is described on the hub only, and the hub cannot give it.
    """
    import open_clip

    options = copy.deepcopy(dict(config))
    vision, text = options["vision_cfg"], options["text_cfg"]
    custom_text = options.pop("custom_text", False)
    if "hf_model_name" in text:
        custom_text = True
        # The folder, not the name: transformers would ask the hub again, without a limit on time.
        ways_on = "a text tower of transformers is built from its config.json: make the hub reachable once"
        text["hf_model_name"] = str(fetch(name, text["hf_model_name"], ("config.json",), ways_on=ways_on).parent)
        text["hf_model_pretrained"] = False
    if not custom_text and "timm_model_name" not in vision and not isinstance(vision.get("layers"), list):
        with torch.device("meta"):
            model = open_clip.CLIP(**options)
        if model.attn_mask is not None:
            # The causal mask is no weight: it was left on the meta device.
            length = model.context_length
            model.attn_mask = torch.full((length, length), -math.inf).triu_(1)
        return model
    # Buffers that are no weights (masks, tables of positions) are right only where they are computed: on the CPU.
    vision["timm_model_pretrained"] = False
    with torch.random.fork_rng(devices=[]):
        if "multimodal_cfg" in options:
            return open_clip.CoCa(**options)
        return open_clip.CustomTextCLIP(**options) if custom_text else open_clip.CLIP(**options)


def fill_network(network: Any, request: TeacherRequest, model: OpenClipModel) -> str:
    """Load the weights that a request asks for into the model's network and return, in words, where they came from.

    Raises TeacherError where they cannot be read or do not fit, WeightsError where the hub cannot give them.
    """
    if request.untrained:
        state, source = _untrained_state(network, model.config), "seed"
    else:
        if request.weights is None and model.hub_id is None:
            raise TeacherError(
                f"{request.name}: open_clip has no hub repository of these weights, only {model.url}",
                hint=f"download them, then give the file with --weights {request.name}=PATH",
            )
        path, source = locate_weights(request.name, model.hub_id or "", model.weights_files, request.weights)
        state = _library_layout(network, read_state_dict(path))
    load_weights(network, state, request.name, source)
    network.requires_grad_(False).eval()
    return source


def _untrained_state(network: Any, config: Mapping[str, Any]) -> dict[str, Tensor]:
    state = seeded_state(copy.deepcopy(network).to("meta"))
    state["logit_scale"] = torch.full(network.logit_scale.shape, _UNTRAINED_LOGIT_SCALE)
    if network.logit_bias is not None:
        state["logit_bias"] = torch.full(network.logit_bias.shape, config["init_logit_bias"])
    return state


def _library_layout(network: Any, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors under the names, and the two scalars in the shapes, that open_clip's network has."""
    from open_clip.convert import convert_state_dict
    from open_clip.model import convert_to_custom_text_state_dict

    if all(name.startswith("module.") for name in state):  # saved by a training job of several processes
        state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    state = convert_state_dict(network, state)
    if not hasattr(network, "positional_embedding"):
        state = convert_to_custom_text_state_dict(state)
    expected = network.state_dict()
    for name in ("logit_scale", "logit_bias"):
        if name in state and name in expected and state[name].numel() == 1:
            state[name] = state[name].reshape(expected[name].shape)
    # transformers once saved this table of positions among its weights.
    table = "text.transformer.embeddings.position_ids"
    return {name: tensor for name, tensor in state.items() if name != table or name in expected}

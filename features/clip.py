"""CLIP and its relatives through open_clip: image embeddings and logits over the VOC classes, or dense features.

The image is squashed to the network's native size, never cropped: the stock transform would lose a quarter of it.

Source: Radford et al., Learning Transferable Visual Models From Natural Language Supervision (2021); Zhai et al.,
Sigmoid Loss for Language Image Pre-Training (2023).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.errors import TeacherError, UsageError, WeightsError
from data.hub import find_cached, hub_answers
from data.records import VOC_CLASSES

from .dense_clip import build_dense, dense_input
from .open_clip_models import OpenClipModel, find_model
from .open_clip_weights import build_network, fill_network
from .prompts import DEFAULT_PROMPTS
from .registry import TeacherRequest
from .teacher import Teacher, TeacherInput, weights_digest
from .zero_shot import CosineClassifier, ZeroShotTeacher, embed_classes

# From n sentences to token ids [n, L] int64.
Tokenize = Callable[[list[str]], Tensor]

# One of these is in every folder that a tokenizer of transformers can be read from; the others belong to it.
_VOCABULARIES = ("tokenizer.json", "spiece.model", "sentencepiece.bpe.model", "vocab.txt", "vocab.json")
_TOKENIZER_FILES = [
    *_VOCABULARIES,
    *("merges.txt", "added_tokens.json", "special_tokens_map.json", "tokenizer_config.json", "config.json"),
]
# Sentences at a time: a tower whose attention is not causal computes every place, the padding too.
_TEXT_BATCH = 256


def build(request: TeacherRequest) -> Teacher:
    """Return a CLIP teacher on the CPU.

    Raises UsageError for a name or an option that means nothing here, TeacherError where weights or tokenizer do not
    fit, WeightsError where they cannot be obtained.
    """
    options = request.spec.options
    if options.grid is not None and not options.dense:
        raise UsageError(
            f"--teacher {request.name}: an image embedding has no grid",
            hint=f"dense features have one: {request.spec.name}@dense,grid={options.grid[0]}x{options.grid[1]}",
        )
    model = find_model(request)
    network = build_network(model.config, request.name)
    dense = dense_input(network.visual, model, options, request.name) if options.dense else None
    tokenize, tokenizer = load_tokenizer(request, model.config)
    source = fill_network(network, request, model)
    # CoCa's towers return their tokens too; its text tower unpacks them, the image tower would hand them on.
    network.visual.output_tokens = False

    prompts = request.prompts or DEFAULT_PROMPTS
    text_embeddings = embed_classes(prompts, lambda sentences: _embed_text(network, _tokens(tokenize, sentences)))
    shared: dict[str, Any] = {
        "name": request.name,
        "library": "open_clip_torch",
        "weights_digest": weights_digest(network),
        "weights_source": source,
        "untrained": request.untrained,
        "precision": request.precision,
        "text_embeddings": text_embeddings,
        "prompts": prompts,
        "text_tower": f"{model.architecture} text transformer",
        "tokenizer": tokenizer,
        "logit_scale": float(network.logit_scale.exp()),
        "logit_bias": None if network.logit_bias is None else float(network.logit_bias),
    }
    if dense is not None:
        return build_dense(network.visual, model, *dense, shared)
    return _build_image_level(network.visual, model, shared)


def _build_image_level(visual: Any, model: OpenClipModel, shared: Mapping[str, Any]) -> ZeroShotTeacher:
    size = visual.image_size
    return ZeroShotTeacher(
        **shared,
        architecture={"model": model.architecture, **model.config},
        layer="image embedding",
        norm="L2",
        input=TeacherInput(
            size=(size, size) if isinstance(size, int) else tuple(size),
            resample=model.resample,
            mean=model.mean,
            std=model.std,
        ),
        patch_grid=None,
        output_shapes={"logits": (len(VOC_CLASSES),), "embeddings": (model.config["embed_dim"],)},
        # The text tower has done its work: only the image tower travels to a device.
        module=CosineClassifier(visual, shared["text_embeddings"]),
    )


def _tokens(tokenize: Tokenize, sentences: list[str]) -> Tensor:
    """Return the sentences' token ids [n, L].

    Raises UsageError for a sentence that fills the tower's context: tokenizers cut what is too long without a word.
    """
    tokens = tokenize(sentences)
    longer = tokenize([f"{sentence} too" for sentence in sentences])
    full = (tokens == longer).all(dim=1).nonzero()
    if len(full):
        raise UsageError(
            f"a prompt fills all {tokens.shape[1]} tokens of the text tower's context, so that its end would be cut"
            f" off: {sentences[int(full[0])]!r}",
            hint="shorten the template (--prompts FILE)",
        )
    return tokens


def _embed_text(network: Any, tokens: Tensor) -> Tensor:
    """Return the text tower's embeddings [n, D] of token ids [n, L], not normalised.

    Raises TeacherError for tokens that the tower does not know.
    """
    import open_clip

    size = getattr(network, "text", network).vocab_size
    if int(tokens.max()) >= size:
        raise TeacherError(
            f"expected tokens below {size}, the size of the text tower's vocabulary, found {int(tokens.max())}",
            hint="the tokenizer belongs to another model: give both as one folder, as the hub has them",
        )
    if not isinstance(network, open_clip.CLIP) or network.attn_mask is None or network.text_pool_type != "argmax":
        vectors = [network.encode_text(part, normalize=False) for part in torch.split(tokens, _TEXT_BATCH)]
        return torch.cat(vectors)
    # The tower is causal and reads the end token, so that nothing behind the longest sentence matters: cutting it off
    # saves three quarters of the work.
    length = int(tokens.argmax(dim=-1).max()) + 1
    shortened = {
        "positional_embedding": network.positional_embedding[:length],
        "attn_mask": network.attn_mask[:length, :length],
    }
    embeddings: Tensor = torch.func.functional_call(network, shortened, kwargs={"text": tokens[:, :length]})[1]
    return embeddings


def load_tokenizer(request: TeacherRequest, config: Mapping[str, Any]) -> tuple[Tokenize, str]:
    """Return a model's tokenizer and its name for the identity.

    CLIP's own comes with open_clip; that of another text tower is taken from the folder of weights where it is there,
    else from the hub's local cache, else from the hub.

    Raises WeightsError where it cannot be obtained, TeacherError for one that cannot be read.
    """
    import open_clip

    text = config["text_cfg"]
    length = text.get("context_length", open_clip.tokenizer.DEFAULT_CONTEXT_LENGTH)
    options = dict(text.get("tokenizer_kwargs") or {})
    name = text.get("hf_tokenizer_name")
    if not name:
        tokenize = open_clip.SimpleTokenizer(context_length=length, **options)
        return tokenize, f"open_clip SimpleTokenizer, context {length}"
    options |= {"context_length": length, "tokenizer_mode": text.get("tokenizer_mode")}
    folder = request.weights
    if folder is None or not any((folder / filename).is_file() for filename in _VOCABULARIES):
        folder = _fetch_tokenizer(request.name, name)
    tokenize = _open_tokenizer(folder, options)
    # Another version of the library may write the same vocabulary in another way: what it holds is what counts.
    vocabulary = json.dumps(sorted(tokenize.tokenizer.get_vocab().items()))
    digest = hashlib.sha256(vocabulary.encode()).hexdigest()
    return tokenize, f"{name}, context {length}, vocabulary {digest}"


def _fetch_tokenizer(spec: str, name: str) -> Path:
    """Return the folder that holds a hub repository's tokenizer: in the local cache, or put there now."""
    from huggingface_hub import constants, snapshot_download

    cached = find_cached(name, _VOCABULARIES)
    if cached is not None:
        return cached.parent
    why = "the hub does not answer"
    if hub_answers():
        try:
            return Path(snapshot_download(name, allow_patterns=_TOKENIZER_FILES, cache_dir=constants.HF_HUB_CACHE))
        except Exception as error:  # refused, interrupted, disk full: the ways on are the same
            why = f"the download failed ({type(error).__name__}: {error})"
    raise WeightsError(
        f"{spec}: its tokenizer {name} is not in the local hub cache, and {why}",
        hint=f"give a folder with weights and tokenizer (a clone of the model's hub repository) with --weights"
        f" {spec}=FOLDER, or make the hub reachable once",
    )


def _open_tokenizer(folder: Path, options: Mapping[str, Any]) -> Any:
    from open_clip.tokenizer import HFTokenizer

    try:
        tokenize = HFTokenizer(str(folder), local_files_only=True, trust_remote_code=False, **options)
        names = tokenize(list(VOC_CLASSES))
    except Exception as error:  # the library's readers have no common error
        why = f"{type(error).__name__}: {error}"
    else:
        # transformers makes an empty tokenizer of a folder without a vocabulary: every word is the same unknown one.
        if len(names.unique(dim=0)) == len(VOC_CLASSES):
            return tokenize
        why = "it does not tell the VOC classes apart"
    raise TeacherError(
        f"{folder}: the tokenizer in it cannot be used: {why}",
        hint="copy the files of the tokenizer again, as the hub has them",
    )

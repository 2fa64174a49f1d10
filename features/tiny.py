"""Embedded teachers, built from a seed in milliseconds, for tests and the offline demo. They are untrained.

Their features mean something all the same: a patch is described by its colour and coarse edges (the lowest frequencies
of a cosine transform), projected by fixed weights and passed through two transformer blocks.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.geometry import PATCH_GRID

from .prompts import DEFAULT_PROMPTS
from .registry import TeacherRequest
from .teacher import Teacher, TeacherInput, TeacherOutput, grid_of, weights_digest
from .weights import load_weights, seeded_state
from .zero_shot import CosineClassifier, ZeroShotTeacher, embed_classes

_PATCH_SIZE = 14
_NUM_FREQUENCIES = 3
_WIDTH = 64
_NUM_BLOCKS = 2
_NUM_HEADS = 2
_EMBEDDING_DIM = 32
_LOGIT_SCALE = 100.0
_MEAN = (0.5, 0.5, 0.5)
_STD = (0.25, 0.25, 0.25)


@dataclass(kw_only=True, eq=False)
class TinyDinoTeacher(Teacher):
    """A teacher of patch tokens; its module is a `TinyViT`."""

    patch_grid: tuple[int, int]

    def forward(self, pixels: Tensor) -> TeacherOutput:
        """Return features [B, 30, 30, 64]."""
        tokens: Tensor = self.module(pixels)
        return TeacherOutput(features=tokens.reshape(len(tokens), *self.patch_grid, -1))


class TinyViT(nn.Module):
    """Maps pixels [B, 3, H, W] to patch tokens [B, N, 64], row by row."""

    def __init__(self) -> None:
        super().__init__()
        self.frequencies: Tensor
        self.register_buffer("frequencies", _cosine_filters())
        self.embed = nn.Linear(len(self.frequencies), _WIDTH)
        self.blocks = nn.Sequential(*(_Block() for _ in range(_NUM_BLOCKS)))
        self.norm = nn.LayerNorm(_WIDTH)

    def forward(self, pixels: Tensor) -> Tensor:
        """Return the patch tokens [B, N, 64] after the final LayerNorm."""
        patches = F.conv2d(pixels, self.frequencies, stride=_PATCH_SIZE).flatten(2).transpose(1, 2)
        tokens: Tensor = self.norm(self.blocks(self.embed(patches)))
        return tokens


class TinyImageTower(nn.Module):
    """Maps pixels [B, 3, H, W] to one vector [B, 32] an image: its mean patch token, projected."""

    def __init__(self) -> None:
        super().__init__()
        self.vit = TinyViT()
        self.project = nn.Linear(_WIDTH, _EMBEDDING_DIM)

    def forward(self, pixels: Tensor) -> Tensor:
        """Return the vectors [B, 32], not normalised."""
        vectors: Tensor = self.project(self.vit(pixels).mean(dim=1))
        return vectors


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm_attention = nn.LayerNorm(_WIDTH)
        self.qkv = nn.Linear(_WIDTH, 3 * _WIDTH)
        self.mix = nn.Linear(_WIDTH, _WIDTH)
        self.norm_mlp = nn.LayerNorm(_WIDTH)
        self.mlp = nn.Sequential(nn.Linear(_WIDTH, 2 * _WIDTH), nn.GELU(), nn.Linear(2 * _WIDTH, _WIDTH))

    def forward(self, tokens: Tensor) -> Tensor:
        query, key, value = (
            part.unflatten(2, (_NUM_HEADS, -1)).transpose(1, 2)
            for part in self.qkv(self.norm_attention(tokens)).chunk(3, dim=2)
        )
        attended = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        tokens = tokens + self.mix(attended)
        mixed: Tensor = tokens + self.mlp(self.norm_mlp(tokens))
        return mixed


def build(request: TeacherRequest) -> Teacher:
    """Return tiny_dino or tiny_clip on the CPU; both are untrained whatever was asked for."""
    assert request.weights is None
    return _build_dino(request) if request.entry.architecture == "dino" else _build_clip(request)


def _build_dino(request: TeacherRequest) -> Teacher:
    with torch.device("meta"):
        vit = TinyViT()
    load_weights(vit, seeded_state(vit), request.name, "seed")
    size = (PATCH_GRID[0] * _PATCH_SIZE, PATCH_GRID[1] * _PATCH_SIZE)
    grid = grid_of(size, _PATCH_SIZE)
    return TinyDinoTeacher(
        name=request.name,
        precision=request.precision,
        library="torch",
        architecture=_architecture(),
        layer="last block, patch tokens",
        norm="final LayerNorm",
        input=TeacherInput(size=size, resample="bicubic", mean=_MEAN, std=_STD),
        patch_grid=grid,
        output_shapes={"features": (*grid, _WIDTH)},
        weights_digest=weights_digest(vit),
        weights_source="seed",
        untrained=True,
        module=vit,
    )


def _build_clip(request: TeacherRequest) -> Teacher:
    with torch.device("meta"):
        tower = TinyImageTower()
    load_weights(tower, seeded_state(tower), request.name, "seed")
    prompts = request.prompts or DEFAULT_PROMPTS
    text_embeddings = embed_classes(prompts, _embed_text)
    size = (8 * _PATCH_SIZE, 8 * _PATCH_SIZE)
    return ZeroShotTeacher(
        name=request.name,
        precision=request.precision,
        library="torch",
        architecture=_architecture() | {"embedding_dim": _EMBEDDING_DIM},
        layer="mean patch token, projected",
        norm="L2",
        input=TeacherInput(size=size, resample="bicubic", mean=_MEAN, std=_STD),
        patch_grid=None,
        output_shapes={"logits": (len(text_embeddings),), "embeddings": (_EMBEDDING_DIM,)},
        weights_digest=weights_digest(tower),
        weights_source="seed",
        untrained=True,
        module=CosineClassifier(tower, text_embeddings),
        text_embeddings=text_embeddings,
        prompts=prompts,
        text_tower="one random vector per sentence, seeded by its SHA-256",
        tokenizer="none",
        logit_scale=_LOGIT_SCALE,
        logit_bias=None,
    )


def _architecture() -> dict[str, int]:
    return {"patch_size": _PATCH_SIZE, "width": _WIDTH, "blocks": _NUM_BLOCKS, "heads": _NUM_HEADS}


def _embed_text(sentences: list[str]) -> Tensor:
    def vector(sentence: str) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
        seed = int.from_bytes(hashlib.sha256(sentence.encode()).digest()[:8], "big")
        return np.random.Generator(np.random.PCG64(seed)).random(_EMBEDDING_DIM) - 0.5

    return torch.from_numpy(np.stack([vector(sentence) for sentence in sentences]))


def _cosine_filters() -> Tensor:
    """Return 27 filters [27, 3, 14, 14]: for each colour channel the 3×3 lowest frequencies, the mean among them."""
    # Rounded, so that the last bit of a cosine, which the C library is free in, cannot change the weights' digest.
    waves = [
        [round(math.cos(math.pi * (2 * x + 1) * frequency / (2 * _PATCH_SIZE)), 6) for x in range(_PATCH_SIZE)]
        for frequency in range(_NUM_FREQUENCIES)
    ]
    wave = torch.tensor(waves, device="cpu")
    planes = torch.einsum("iy,jx->ijyx", wave, wave).flatten(0, 1) / _PATCH_SIZE**2
    filters = torch.zeros(3, len(planes), 3, _PATCH_SIZE, _PATCH_SIZE, device="cpu")
    for channel in range(3):
        filters[channel, :, channel] = planes
    return filters.flatten(0, 1)

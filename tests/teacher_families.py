"""One small teacher of every family, to hold all of them to the same promises. Weights are random, layouts real."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from features.registry import build_teacher
from features.teacher import Teacher
from tests.pipeline.small_runs import SMALL_STUDENT, save_student

_CLIP_16 = {
    "embed_dim": 48,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 64, "layers": 2, "width": 128, "patch_size": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2},
}


@dataclass(frozen=True)
class SmallTeacher:
    """How a family's small teacher is asked for.

    spec: of a folder in which `prepare` has written what the family needs.  arrays: what it puts out.
    own_cell: whether a blob answers in its own cell; random convolutions may answer in the one beside it.
    full_size: it takes seconds to build and to run.
    """

    spec: str
    arrays: frozenset[str]
    prepare: Callable[[Path], None] = lambda _: None
    untrained: bool = True
    own_cell: bool = True
    full_size: bool = False

    def build(self, folder: Path) -> Teacher:
        """Return the teacher; folder: where `prepare` has written."""
        return build_teacher(self.spec.format(folder=folder), untrained=self.untrained)


def _save_hf_folder(folder: Path) -> None:
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, patch_size=16, image_size=64
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        ViTModel(config, add_pooling_layer=False).save_pretrained(folder)
    processor = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "resample": 2, "rescale_factor": 1 / 255}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))


def _register_clip(folder: Path) -> None:
    import open_clip

    path = folder / "contract-16.json"
    path.write_text(json.dumps(_CLIP_16))
    open_clip.add_model_config(path)


def _save_checkpoint(folder: Path) -> None:
    save_student(folder, SMALL_STUDENT)


FEATURES, LOGITS = frozenset({"features"}), frozenset({"logits", "embeddings"})
FAMILIES: dict[str, SmallTeacher] = {
    "tiny_dino": SmallTeacher("tiny_dino", FEATURES),
    "tiny_clip": SmallTeacher("tiny_clip", LOGITS),
    "dinov2": SmallTeacher("dinov2_vits14", FEATURES, full_size=True),
    "dinov2 with registers": SmallTeacher("dinov2_vits14_reg@layer=2,norm=none,grid=20x30", FEATURES),
    "clip": SmallTeacher("clip_vitb32", LOGITS, full_size=True),
    "timm": SmallTeacher("timm:test_vit", FEATURES),
    "timm DINOv3": SmallTeacher("timm:vit_small_patch16_dinov3@layer=3,grid=12x10", FEATURES),
    "hf": SmallTeacher("hf:{folder}@grid=20x24", FEATURES, _save_hf_folder),
    "open_clip": SmallTeacher("open_clip:contract-16", LOGITS, _register_clip),
    "open_clip, dense": SmallTeacher("open_clip:contract-16@dense", FEATURES, _register_clip),
    "detector": SmallTeacher(
        "detector:{folder}/student_latest.pth",
        frozenset({"features", "logits"}),
        _save_checkpoint,
        untrained=False,
        own_cell=False,
    ),
}


def family_params(*, of_features: bool = False) -> list[object]:
    """Return the families' names as test parameters, what is full size marked slow."""
    names = [name for name, small in FAMILIES.items() if not of_features or "features" in small.arrays]
    return [pytest.param(name, marks=pytest.mark.slow if FAMILIES[name].full_size else ()) for name in names]

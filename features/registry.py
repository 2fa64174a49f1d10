"""The teachers' names and how each is built. Imports neither torch nor a teacher library until one is built.

A new teacher is one file with a `build` function and one line in `TEACHERS`. A key that ends in a colon stands for a
family: `x:` builds `x:anything`.
"""

from __future__ import annotations

import difflib
import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

from data.errors import UsageError
from data.hub import find_cached

if TYPE_CHECKING:
    from .teacher import Teacher


@dataclass(frozen=True)
class TeacherEntry:
    """One line of the registry.

    module: the file of this package that builds it.  kind: what it gives.  architecture: its name in that file.
    hub_id, weights_files: the hub repository and the files that may hold the weights, the preferred first.
    embedded: it has no trained weights at all.
    """

    module: str
    kind: Literal["features", "logits"]
    architecture: str
    description: str
    licence: str
    hub_id: str | None = None
    weights_files: tuple[str, ...] = ()
    embedded: bool = False


class _Builder(Protocol):
    def __call__(self, spec: str, entry: TeacherEntry, weights: Path | None, untrained: bool) -> Teacher: ...


def _dinov2(architecture: str, description: str, hub_id: str) -> TeacherEntry:
    files = ("model.safetensors", "pytorch_model.bin")
    return TeacherEntry("dinov2", "features", architecture, description, "Apache-2.0", f"facebook/{hub_id}", files)


def _clip(architecture: str, description: str, hub_id: str) -> TeacherEntry:
    files = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
    return TeacherEntry("clip", "logits", architecture, description, "MIT", f"timm/{hub_id}", files)


def _tiny(architecture: str, kind: Literal["features", "logits"], description: str) -> TeacherEntry:
    return TeacherEntry("tiny", kind, architecture, description, "Apache-2.0", embedded=True)


TEACHERS: dict[str, TeacherEntry] = {
    "dinov2_vits14": _dinov2("vits14", "DINOv2 ViT-S/14, 30×30×384 patch tokens", "dinov2-small"),
    "dinov2_vitb14": _dinov2("vitb14", "DINOv2 ViT-B/14, 30×30×768 patch tokens", "dinov2-base"),
    "dinov2_vitl14": _dinov2("vitl14", "DINOv2 ViT-L/14, 30×30×1024 patch tokens", "dinov2-large"),
    "dinov2_vits14_reg": _dinov2("vits14_reg", "as dinov2_vits14, with 4 registers", "dinov2-with-registers-small"),
    "dinov2_vitb14_reg": _dinov2("vitb14_reg", "as dinov2_vitb14, with 4 registers", "dinov2-with-registers-base"),
    "dinov2_vitl14_reg": _dinov2("vitl14_reg", "as dinov2_vitl14, with 4 registers", "dinov2-with-registers-large"),
    "clip_vitb32": _clip("ViT-B-32-quickgelu", "OpenAI CLIP ViT-B/32 at 224", "vit_base_patch32_clip_224.openai"),
    "clip_vitb16": _clip("ViT-B-16-quickgelu", "OpenAI CLIP ViT-B/16 at 224", "vit_base_patch16_clip_224.openai"),
    "clip_vitl14": _clip("ViT-L-14-quickgelu", "OpenAI CLIP ViT-L/14 at 224", "vit_large_patch14_clip_224.openai"),
    "tiny_dino": _tiny("dino", "features", "embedded, untrained: 30×30×64 patch tokens, for tests and the demo"),
    "tiny_clip": _tiny("clip", "logits", "embedded, untrained: logits and embeddings, for tests and the demo"),
}


def build_teacher(spec: str, *, weights: Path | None = None, untrained: bool = False) -> Teacher:
    """Return the teacher of that name, on the CPU.

    weights: a local file or folder in place of the hub.  untrained: the real architecture with seeded weights.

    Raises UsageError for an unknown name or options that exclude each other, TeacherError where the weights cannot be
    obtained or do not fit.
    """
    entry = _find(spec)
    if weights is not None and untrained:
        raise UsageError(f"{spec}: --weights and --untrained exclude each other")
    if weights is not None and entry.embedded:
        raise UsageError(f"{spec}: built from a seed, it has no other weights", hint="leave --weights out for it")
    builder: _Builder = importlib.import_module(f".{entry.module}", __package__).build
    return builder(spec, entry, weights, untrained)


def is_available_locally(name: str) -> bool:
    """Return whether the teacher can be built without network: embedded, or its weights in the local hub cache.

    Raises UsageError for an unknown name.
    """
    entry = _find(name)
    return entry.embedded or (entry.hub_id is not None and find_cached(entry.hub_id, entry.weights_files) is not None)


def _find(spec: str) -> TeacherEntry:
    entry = TEACHERS.get(spec) or TEACHERS.get(spec.partition(":")[0] + ":")
    if entry is not None:
        return entry
    close = difflib.get_close_matches(spec, TEACHERS, n=1, cutoff=0.5)
    raise UsageError(
        f"unknown teacher {spec!r}; expected one of {', '.join(TEACHERS)}",
        hint=f"did you mean {close[0]}?" if close else None,
    )

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

from .spec import TeacherSpec, parse_spec

if TYPE_CHECKING:
    from .prompts import PromptSet
    from .teacher import Teacher

# In what the network computes: its weights are float32 all the same, and so is what it hands out.
Precision = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class TeacherEntry:
    """One line of the registry.

    module: the file that builds it.  kind: what it gives.  architecture: its name in that file, empty for a family.
    takes: the options that its spec may carry.  size: of its weights, in words.  grid: cells at the 480×480 frame.
    hub_id, weights_files: the hub repository and the files that may hold the weights, the preferred first.
    embedded: it has no trained weights at all.  argument: what stands behind a family's colon, in words.
    """

    module: str
    kind: Literal["features", "logits", "features and logits"]
    architecture: str
    description: str
    licence: str
    takes: frozenset[str] = frozenset()
    size: str = ""
    grid: str = ""
    hub_id: str | None = None
    weights_files: tuple[str, ...] = ()
    embedded: bool = False
    argument: str = ""


@dataclass(frozen=True)
class TeacherRequest:
    """What a teacher is built from.

    weights: a local file or folder in place of the hub.  untrained: the real architecture with seeded weights.
    precision: that of the computation (autocast unless float32).  prompts: for a teacher with a text
    tower, None for `features.prompts.DEFAULT_PROMPTS`.
    """

    spec: TeacherSpec
    entry: TeacherEntry
    weights: Path | None = None
    untrained: bool = False
    precision: Precision = "float32"
    prompts: PromptSet | None = None

    @property
    def name(self) -> str:
        """The spec as text: how messages call the teacher."""
        return str(self.spec)


class _Builder(Protocol):
    def __call__(self, request: TeacherRequest) -> Teacher: ...


_OF_BLOCKS = frozenset({"layer", "norm", "grid"})


def _dinov2(architecture: str, description: str, size: str, hub_id: str) -> TeacherEntry:
    files = ("model.safetensors", "pytorch_model.bin")
    return TeacherEntry(
        "features.dinov2", "features", architecture, description, "Apache-2.0", takes=_OF_BLOCKS, size=size,
        grid="30×30", hub_id=f"facebook/{hub_id}", weights_files=files,
    )  # fmt: skip


def _clip(architecture: str, description: str, size: str, hub_id: str) -> TeacherEntry:
    files = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
    return TeacherEntry(
        "features.clip", "logits", architecture, description, "MIT", takes=frozenset({"dense", "grid"}), size=size,
        grid="image", hub_id=f"timm/{hub_id}", weights_files=files,
    )  # fmt: skip


def _tiny(
    architecture: str, kind: Literal["features", "logits"], description: str, size: str, grid: str
) -> TeacherEntry:
    return TeacherEntry(
        "features.tiny", kind, architecture, description, "Apache-2.0", size=size, grid=grid, embedded=True
    )


TEACHERS: dict[str, TeacherEntry] = {
    "dinov2_vits14": _dinov2("vits14", "DINOv2 ViT-S/14, 384 channels", "22 M", "dinov2-small"),
    "dinov2_vitb14": _dinov2("vitb14", "DINOv2 ViT-B/14, 768 channels", "87 M", "dinov2-base"),
    "dinov2_vitl14": _dinov2("vitl14", "DINOv2 ViT-L/14, 1024 channels", "304 M", "dinov2-large"),
    "dinov2_vits14_reg": _dinov2("vits14_reg", "likewise, 4 registers", "22 M", "dinov2-with-registers-small"),
    "dinov2_vitb14_reg": _dinov2("vitb14_reg", "likewise, 4 registers", "87 M", "dinov2-with-registers-base"),
    "dinov2_vitl14_reg": _dinov2("vitl14_reg", "likewise, 4 registers", "304 M", "dinov2-with-registers-large"),
    "clip_vitb32": _clip("ViT-B-32-quickgelu", "OpenAI CLIP ViT-B/32", "151 M", "vit_base_patch32_clip_224.openai"),
    "clip_vitb16": _clip("ViT-B-16-quickgelu", "OpenAI CLIP ViT-B/16", "150 M", "vit_base_patch16_clip_224.openai"),
    "clip_vitl14": _clip("ViT-L-14-quickgelu", "OpenAI CLIP ViT-L/14", "428 M", "vit_large_patch14_clip_224.openai"),
    "timm:": TeacherEntry(
        "features.timm_vit", "features", "", "any ViT of timm, DINOv3 among them (vit_small_patch16_dinov3)",
        "the model's own", takes=_OF_BLOCKS, grid="30×30", argument="NAME",
    ),
    "hf:": TeacherEntry(
        "features.hf_vision", "features", "", "any vision transformer of transformers, from the hub or a folder",
        "the model's own", takes=_OF_BLOCKS, grid="30×30", argument="ID_OR_DIR",
    ),
    "open_clip:": TeacherEntry(
        "features.clip", "logits", "", "any model of open_clip, SigLIP among them", "the model's own",
        takes=frozenset({"dense", "grid"}), grid="image", argument="ARCH/PRETRAINED",
    ),
    # Named, not imported: a trained student can only be built where all packages meet.
    "detector:": TeacherEntry(
        "pipeline.detector_teacher", "features and logits", "", "a trained student of this project", "yours",
        grid="30×30", argument="CHECKPOINT",
    ),
    "tiny_dino": _tiny("dino", "features", "embedded, untrained: 64 channels; tests and demo", "0.1 M", "30×30"),
    "tiny_clip": _tiny("clip", "logits", "embedded, untrained; tests and demo", "0.1 M", "image"),
}  # fmt: skip


def build_teacher(
    spec: str,
    *,
    weights: Path | None = None,
    untrained: bool = False,
    precision: Precision = "float32",
    prompts: PromptSet | None = None,
) -> Teacher:
    """Return the teacher that a spec names, on the CPU. The arguments are those of `TeacherRequest`.

    Raises UsageError for an unknown name or options that exclude each other, TeacherError where the weights cannot be
    obtained or do not fit.
    """
    parsed = parse_spec(spec)
    entry = find_entry(parsed)
    if weights is not None and untrained:
        raise UsageError(f"{spec}: --weights and --untrained exclude each other")
    if weights is not None and entry.embedded:
        raise UsageError(f"{spec}: built from a seed, it has no other weights", hint="leave --weights out for it")
    builder: _Builder = importlib.import_module(entry.module).build
    return builder(TeacherRequest(parsed, entry, weights, untrained, precision, prompts))


def is_available_locally(name: str) -> bool:
    """Return whether the teacher can be built without network: embedded, or its weights in the local hub cache.

    Raises UsageError for an unknown name.
    """
    entry = find_entry(parse_spec(name))
    return entry.embedded or (entry.hub_id is not None and find_cached(entry.hub_id, entry.weights_files) is not None)


def find_entry(spec: TeacherSpec) -> TeacherEntry:
    """Return the registry's entry for a spec.

    Raises UsageError for an unknown name, a family without its argument, or options that the teacher does not take.
    """
    family, colon, argument = spec.name.partition(":")
    entry = TEACHERS.get(spec.name) if not colon else TEACHERS.get(f"{family}:")
    if entry is None:
        close = difflib.get_close_matches(spec.name, TEACHERS, n=1, cutoff=0.5)
        raise UsageError(
            f"unknown teacher {spec.name!r}; expected one of {', '.join(TEACHERS)}",
            hint=f"did you mean {close[0]}?" if close else "`python cli.py teachers` lists them all",
        )
    if colon and not argument:
        raise UsageError(f"{spec.name}: expected {family}:{entry.argument}, found nothing behind the colon")
    foreign = sorted(set(spec.options.given()) - entry.takes)
    if foreign:
        allowed = ", ".join(sorted(entry.takes)) or "none"
        raise UsageError(f"--teacher {spec}: {spec.name} does not take the option {foreign[0]} (it takes: {allowed})")
    return entry

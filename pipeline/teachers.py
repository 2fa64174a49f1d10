"""Builds the teachers that a command line names, under their keys."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from cache.manifest import check_teacher_key
from data.errors import UsageError
from features.prompts import PromptSet
from features.registry import Precision, build_teacher, find_entry
from features.spec import parse_spec
from features.teacher import Teacher
from pipeline.progress import say

DEFAULT_TEACHERS = ("dinov2_vits14", "clip_vitb32")


@dataclass(frozen=True)
class TeacherChoices:
    """What holds for all teachers of a run.

    weights: local files or folders by key, spec or plain name.  untrained: seeded weights for those without.
    prompts: None for the usual ones.
    """

    weights: dict[str, Path] = field(default_factory=dict)
    untrained: bool = False
    precision: Precision = "float32"
    prompts: PromptSet | None = None


def build_teachers(specs: Sequence[str], choices: TeacherChoices, device: torch.device) -> dict[str, Teacher]:
    """Return the teachers by key, on the device. A spec is NAME, or KEY=SPEC to choose the key in the store.

    Raises UsageError for a bad key, a key given twice, or weights and prompts that no teacher takes.
    """
    named = named_specs(specs)
    called = {key: (key, spec, parse_spec(spec).name) for key, spec in named.items()}
    stray = sorted(set(choices.weights) - {name for names in called.values() for name in names})
    if stray:
        raise UsageError(f"--weights {stray[0]}=…: no such teacher was asked for (asked: {', '.join(named)})")
    teachers = {}
    for key, spec in named.items():
        say(f"building teacher {key}")
        path = next((choices.weights[name] for name in called[key] if name in choices.weights), None)
        teachers[key] = build_teacher(
            spec,
            weights=path,
            untrained=choices.untrained and path is None,
            precision=choices.precision,
            prompts=choices.prompts,
        ).to(device)
        if teachers[key].untrained:
            say(f"teacher {key} is UNTRAINED")
    if choices.prompts is not None and all(teacher.text_embeddings is None for teacher in teachers.values()):
        raise UsageError(
            f"--prompts: none of the teachers reads prompts (asked: {', '.join(named)})",
            hint="add a CLIP teacher, as --teacher clip_vitb32",
        )
    return teachers


def check_specs(texts: Sequence[str]) -> None:
    """Raise UsageError for a teacher that cannot be named so: before anything else is done."""
    for spec in named_specs(texts).values():
        find_entry(parse_spec(spec))


def named_specs(texts: Sequence[str]) -> dict[str, str]:
    """Return specs by their key in the store, of texts NAME or KEY=SPEC.

    Raises UsageError for a bad key or one given twice.
    """
    named: dict[str, str] = {}
    for text in texts:
        key, separator, spec = text.partition("=")
        if not separator or "@" in key:  # options hold an = too: `NAME@layer=9`
            key, spec = text, text
        try:
            check_teacher_key(key)
        except ValueError as error:
            raise UsageError(f"--teacher {text}: {error}", hint=f"name it yourself: --teacher mykey={spec}") from None
        if key in named:
            raise UsageError(f"--teacher {key} is given twice", hint="give each its own key: --teacher KEY=SPEC")
        named[key] = spec
    return named

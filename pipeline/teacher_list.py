"""`teachers`: which teachers there are, what each gives, and whether its weights are here already. Needs no torch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from data.hub import find_cached
from features.registry import TEACHERS, TeacherEntry
from pipeline.text_tables import Heading, plain_table, titled

Listed = dict[str, Any]


@dataclass(frozen=True)
class _Family:
    """What the registry does not say of a family. weights: where they come from.  example: a spec with a key."""

    weights: str
    example: str


_FAMILIES = {
    "timm:": _Family("timm's own from the hub, or --weights", "dinov3=timm:vit_small_patch16_dinov3"),
    "hf:": _Family("the hub's, or the folder's", "base=hf:facebook/dinov2-base"),
    "open_clip:": _Family("open_clip's own from the hub, or --weights", "siglip=open_clip:ViT-B-16-SigLIP/webli"),
    "detector:": _Family("a checkpoint of yours", "mine=detector:checkpoints/student_latest.pth"),
}


def list_teachers() -> list[Listed]:
    """Return every line of the registry, in its order, as `teachers --json` prints it.

    name: as `--teacher` takes it; of a family with what stands behind its colon, `timm:NAME`.  family: whether it is
    one.  gives: `features`, `logits` or both.  description, size, grid, licence: in words, empty where the model
    decides.  options: names it takes behind an `@`.  example: of `--teacher`.  weights: where they come from, in words.
    hub_id: of the hub repository, or null.  cached: whether the local hub cache holds the weights; null where they are
    not a known repository's.
    """
    return [_listed(name, entry) for name, entry in TEACHERS.items()]


def teachers_table(teachers: Sequence[Listed]) -> Group:
    """Return the list as a person reads it: two lines a teacher, at 80 columns."""
    named, families = ([t for t in teachers if t["family"] is family] for family in (False, True))
    return Group(
        _named_table(named),
        titled("Families", _family_table(families)),
        titled("Options, behind the name: NAME@layer=9,norm=none,grid=40x40 or NAME@dense", _options(teachers)),
    )


def closing_lines(teachers: Sequence[Listed]) -> list[str]:
    """Return examples and notes: lines that must not be wrapped, to be copied."""
    from huggingface_hub import constants

    lines = ["", "For example:", *(f"  --teacher {t['example']}" for t in teachers if t["family"])]
    lines += [
        "",
        "grid: cells at the 480×480 frame; image: one answer for the whole image.",
        "Weights of your own: --weights NAME=PATH. Seeded ones in their place: --untrained.",
    ]
    if constants.HF_HUB_OFFLINE:
        lines.append("HF_HUB_OFFLINE is set: nothing will be downloaded.")
    return lines


def _listed(name: str, entry: TeacherEntry) -> Listed:
    family = _FAMILIES.get(name)
    origin = "a seed" if entry.embedded else f"{entry.hub_id} from the hub, or --weights"
    return {
        "name": f"{name}{entry.argument}",
        "family": family is not None,
        "gives": entry.kind.split(" and "),
        "description": entry.description,
        "size": entry.size,
        "grid": entry.grid,
        "licence": entry.licence,
        "options": sorted(entry.takes),
        "example": name if family is None else family.example,
        "weights": origin if family is None else family.weights,
        "hub_id": entry.hub_id,
        "cached": None if entry.hub_id is None else find_cached(entry.hub_id, entry.weights_files) is not None,
    }


_WORDS = {True: ("in the cache", "green"), False: ("to download", ""), None: ("from a seed", "")}


def _named_table(teachers: Iterable[Listed]) -> Table:
    table = plain_table(
        Heading("name\n  weights"), Heading("what it is\nwhere its weights are"), Heading("gives\ngrid"),
        Heading("size\nlicence"),
    )  # fmt: skip
    for teacher in teachers:
        name = Text.assemble((teacher["name"], "bold"), "\n  ", _WORDS[teacher["cached"]])
        what = [teacher["description"], *([] if teacher["hub_id"] is None else [teacher["hub_id"]])]
        table.add_row(name, "\n".join(what), _gives(teacher), f"{teacher['size']}\n{teacher['licence']}")
    return table


def _family_table(teachers: Iterable[Listed]) -> Table:
    table = plain_table(Heading("form\n  licence"), Heading("what it is\nits weights"), Heading("gives\ngrid"))
    for teacher in teachers:
        name = Text.assemble((teacher["name"], "bold"), f"\n  {teacher['licence']}")
        table.add_row(name, f"{teacher['description']}\n{teacher['weights']}", _gives(teacher))
    return table


def _gives(teacher: Listed) -> str:
    return "\n".join([*teacher["gives"], teacher["grid"] or "the model's"])


def _options(teachers: Iterable[Listed]) -> Table:
    """Return which teachers take which options; those that take the same ones stand in one row."""
    takers: dict[str, list[str]] = {}
    for teacher in teachers:
        name, colon, _ = teacher["name"].partition(":")
        takers.setdefault(", ".join(teacher["options"]) or "none", []).append(f"{name}{colon}")
    table = plain_table(Heading("options"), Heading("teachers"), header=False)
    for options, names in takers.items():
        table.add_row(options, ", ".join(names))
    return table

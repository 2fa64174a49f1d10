"""What names a teacher: `NAME`, `FAMILY:ARGUMENT`, and options behind an `@`, as in `dinov2_vits14@layer=9,norm=none`.

Options are part of the spec because they change what is stored: one model may stand in a store at two layers, under
two keys.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from data.errors import UsageError

Norm = Literal["final", "none"]
Grid = tuple[int, int]

# Finer than this, no teacher's cell shows more than the photograph holds: 500×375 px is VOC's usual size.
MAX_GRID = 64
_OPTIONS_HINT = "options go behind the name: NAME@layer=9,norm=none,grid=40x40 or NAME@dense"


@dataclass(frozen=True)
class TeacherOptions:
    """What is read off a teacher, where that is not its default.

    layer: number of the block whose output is taken, the first is 1.  norm: whether that output passes the network's
    final norm (`final`) or is taken as it is (`none`).  grid: cells (Gh, Gw); the input is then grid × patch size.
    dense: a CLIP model's dense features instead of its image embedding.
    """

    layer: int | None = None
    norm: Norm | None = None
    grid: Grid | None = None
    dense: bool = False

    def given(self) -> dict[str, str]:
        """Return the options that were set, as they are written; a flag has an empty value."""
        written = {
            "layer": None if self.layer is None else str(self.layer),
            "norm": self.norm,
            "grid": None if self.grid is None else f"{self.grid[0]}x{self.grid[1]}",
            "dense": "" if self.dense else None,
        }
        return {name: value for name, value in written.items() if value is not None}


@dataclass(frozen=True)
class TeacherSpec:
    """A parsed spec. name: without options, `dinov2_vits14` or `timm:vit_small_patch16_dinov3`."""

    name: str
    options: TeacherOptions = TeacherOptions()

    @property
    def argument(self) -> str:
        """What follows the family's colon; empty for a plain name."""
        return self.name.partition(":")[2]

    def named(self, name: str) -> str:
        """Return the spec as text, in its one canonical form, with another name in this one's place."""
        given = [f"{key}={value}" if value else key for key, value in self.options.given().items()]
        return f"{name}@{','.join(given)}" if given else name

    def __str__(self) -> str:
        return self.named(self.name)


def parse_spec(text: str) -> TeacherSpec:
    """Return the spec that a text names.

    Raises UsageError for options that are unknown, given twice or out of range.
    """
    name, separator, written = text.rpartition("@")
    # A path may hold an @ of its own: only what looks like options is taken for options.
    if not separator or not name or not re.fullmatch(r"[^/@]*", written):
        return TeacherSpec(text)
    found: dict[str, Any] = {}
    for option in written.split(","):
        key, _, value = option.partition("=")
        if key not in _READERS:
            raise UsageError(
                f"--teacher {text}: unknown option {option!r}; expected {', '.join(_READERS)}", hint=_OPTIONS_HINT
            )
        if key in found:
            raise UsageError(f"--teacher {text}: {key} is given twice")
        try:
            found[key] = _READERS[key](value)
        except ValueError as error:
            raise UsageError(f"--teacher {text}: {key}: {error}", hint=_OPTIONS_HINT) from None
    return TeacherSpec(name, TeacherOptions(**found))


def _layer(value: str) -> int:
    if not re.fullmatch(r"[1-9][0-9]{0,2}", value):
        raise ValueError(f"expected the number of a block, counted from 1, found {value!r}")
    return int(value)


def _norm(value: str) -> Norm:
    if value == "final":
        return "final"
    if value == "none":
        return "none"
    raise ValueError(f"expected final or none, found {value!r}")


def _grid(value: str) -> Grid:
    match = re.fullmatch(r"([0-9]{1,4})(?:x([0-9]{1,4}))?", value)
    if match is None:
        raise ValueError(f"expected ROWSxCOLUMNS or one number for both, as 40x40, found {value!r}")
    rows = int(match[1])
    columns = rows if match[2] is None else int(match[2])
    if not (1 <= rows <= MAX_GRID and 1 <= columns <= MAX_GRID):
        raise ValueError(f"expected 1 to {MAX_GRID} cells a side, found {rows}x{columns}")
    return rows, columns


def _dense(value: str) -> bool:
    if value:
        raise ValueError(f"expected no value, found {value!r}")
    return True


_READERS: Mapping[str, Callable[[str], Any]] = {"layer": _layer, "norm": _norm, "grid": _grid, "dense": _dense}

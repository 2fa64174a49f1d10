"""Options that several verbs share. click and nothing else, so that the command line's help answers at once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

Function = TypeVar("Function", bound=Callable[..., Any])
PATH = click.Path(path_type=Path)


def options(*decorators: Callable[[Function], Function]) -> Callable[[Function], Function]:
    """Return one decorator that applies several options, listed top down."""

    def decorate(function: Function) -> Function:
        for decorator in reversed(decorators):
            function = decorator(function)
        return function

    return decorate


def weight_paths(_: click.Context, __: click.Parameter, values: tuple[str, ...]) -> dict[str, Path]:
    """Return NAME=PATH options as a dictionary."""
    pairs = [value.partition("=") for value in values]
    bad = [value for value, (name, _, path) in zip(values, pairs, strict=True) if not name or not path]
    if bad:
        raise click.BadParameter(f"expected NAME=PATH, found {bad[0]!r}")
    return {name: Path(path) for name, _, path in pairs}


VOC_ROOT = click.option(
    "--voc-root", type=PATH, default="data/VOCdevkit", show_default=True, help="Folder that holds VOC2007."
)
DEVICE = click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
WORKERS = click.option("--workers", type=click.IntRange(0), help="Decoding processes; chosen to fit when not given.")
JSON = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
WEIGHTS = click.option(
    "--weights", multiple=True, callback=weight_paths, metavar="NAME=PATH", help="Local weights of a teacher."
)
UNTRAINED = click.option("--untrained", is_flag=True, help="Real architectures, seeded weights.")

"""The options of `train` and `debug-batch`: those of a run's configuration are read off its models.

A field of `Recipe`, `Distillation`, `StudentConfig` or `TrainConfig` that is listed here becomes an option with its
default and the first words of its docstring; what a field cannot say stands beside it. No torch.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import click
import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from data.errors import UsageError
from pipeline.config import DEFAULT_IMAGE_STORE, DEFAULT_STORE, Distillation, Recipe, TrainConfig
from pipeline.options import DEVICE, PATH, UNTRAINED, VOC_ROOT, WEIGHTS, WORKERS
from students.config import StudentConfig

_STUDENT = ("backbone", "backbone_weights", "norms")
_DISTILLATION = (
    "feature_teacher", "logit_teacher", "region_teacher", "alpha", "beta", "gamma", "delta", "kd_weight", "kd_share",
    "temperature", "feature_loss", "feature_norm", "feature_tap", "logit_loss", "logit_targets", "target_shuffle",
)  # fmt: skip
_RUN = ("seed", "residency", "checkpoint_steps", "report_steps", "pictures")


def training_options() -> list[click.Parameter]:
    """Return the options that describe a run, in the order in which `--help` lists them."""
    return [
        *_built(
            click.option("--config", type=PATH, is_eager=True, expose_value=False, callback=_read_defaults,
                         metavar="FILE", help="Options from a YAML file, as epochs: 30; those given here win."),
            VOC_ROOT,
            click.option("--voc-set", "voc_sets", multiple=True, default=["2007:train"], show_default=True,
                         help="Training images."),
            click.option("--val-set", "val_sets", multiple=True, default=["2007:val"], show_default=True,
                         help="Images that select the best epoch."),
            click.option("--test-set", "test_sets", multiple=True, help="Images scored once, at the end."),
            click.option("--limit", type=click.IntRange(1), help="First N training images only."),
        ),
        *fields_as_options(StudentConfig, _STUDENT),
        *_built(
            click.option("--cached-teachers", type=PATH, multiple=True, is_flag=False, flag_value=str(DEFAULT_STORE),
                         metavar="[STORE]",
                         help=f"Distil from this store; repeat to join several. [{DEFAULT_STORE} without a path]"),
            click.option("--expect-fingerprint", "expect_fingerprints", multiple=True, metavar="HEX",
                         help="Insist on this store; one for each --cached-teachers, the first 12 digits at least."),
            click.option("--distill", is_flag=True, help="Distil from live teachers, for comparison."),
            click.option("--teacher", "teachers", multiple=True, metavar="NAME|KEY=SPEC",
                         help="Live teacher. [dinov2_vits14 and clip_vitb32]"),
            WEIGHTS,
            UNTRAINED,
        ),
        *fields_as_options(Distillation, _DISTILLATION),
        *fields_as_options(Recipe, tuple(Recipe.model_fields)),
        *_built(
            click.option("--cache-images", type=PATH, is_flag=False, flag_value=str(DEFAULT_IMAGE_STORE),
                         metavar="[STORE]", help=_help(TrainConfig.model_fields["cache_images"])),
        ),
        *fields_as_options(TrainConfig, _RUN),
        *_built(WORKERS, DEVICE),
    ]  # fmt: skip


def fields_as_options(model: type[BaseModel], names: Sequence[str]) -> list[click.Parameter]:
    """Return an option for each named field: its name with dashes, its type, default and description."""
    return [_option(name, model.model_fields[name]) for name in names]


def _option(name: str, field: FieldInfo) -> click.Option:
    flag, kind = f"--{name.replace('_', '-')}", _without_none(field.annotation)
    settings: dict[str, Any] = {
        "default": field.default,
        "help": _help(field),
        "show_default": field.default is not None,
    }
    if kind is bool:
        return click.Option([f"{flag}/--no-{flag.removeprefix('--')}"], **settings)
    settings["type"] = click.Choice(get_args(kind)) if get_origin(kind) is Literal else kind
    return click.Option([flag], **settings)


def _without_none(annotation: Any) -> Any:
    if get_origin(annotation) in (Union, types.UnionType):
        (kind,) = (part for part in get_args(annotation) if part is not type(None))
        return kind
    return annotation


def _help(field: FieldInfo) -> str:
    return " ".join((field.description or "").replace("`", "").split())


def _built(*decorators: Callable[[Callable[..., Any]], Callable[..., Any]]) -> list[click.Parameter]:
    def nothing() -> None:
        pass

    decorated: Any = nothing
    for decorator in reversed(decorators):
        decorated = decorator(decorated)
    return list(reversed(decorated.__click_params__))


def _read_defaults(ctx: click.Context, _: click.Parameter, path: Path | None) -> None:
    """Take a YAML file's entries as the options' defaults: what is given on the command line wins."""
    if path is None:
        return
    known = {str(param.name): param for param in ctx.command.get_params(ctx) if isinstance(param, click.Option)}
    try:
        where = f"--config {path}"
        ctx.default_map = {name: checked_entry(where, name, value, known) for name, value in _entries(path).items()}
    except UsageError as error:
        raise click.UsageError(str(error), ctx) from error


def _entries(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"--config {path}: cannot be read ({error.strerror})") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"--config {path}: no YAML ({' '.join(str(error).split())})") from error
    if not isinstance(content, dict):
        raise UsageError(f"--config {path}: expected option: value, a line each, found {type(content).__name__}")
    return {option_name(str(key)): value for key, value in content.items()}


def option_name(key: str) -> str:
    """Return the inner name of an option, `voc_sets`, as a file may write it: `voc-set`, `voc_set` or `voc_sets`."""
    name = key.replace("-", "_")
    return _PLURALS.get(name, name)


# Options that may be repeated go by another name inside; a file may use the flag's.
_PLURALS = {
    "voc_set": "voc_sets", "val_set": "val_sets", "test_set": "test_sets", "teacher": "teachers",
    "expect_fingerprint": "expect_fingerprints",
}  # fmt: skip


def checked_entry(where: str, name: str, value: Any, known: Mapping[str, click.Option]) -> Any:
    """Return a file's value for an option, in a list where the option may be repeated.

    where: the file, for messages.  known: the options by their inner names.

    Raises UsageError for an option that is not known, or one value too many.
    """
    option = known.get(name)
    if option is None or name in ("config", "debug"):
        import difflib

        close = difflib.get_close_matches(name, known, n=1)
        raise UsageError(
            f"{where}: no option {name.replace('_', '-')}", hint=f"did you mean {close[0]}?" if close else None
        )
    if option.multiple and not isinstance(value, list):
        value = [value]
    if isinstance(value, dict) or (isinstance(value, list) and not option.multiple):
        raise UsageError(f"{where}: {name}: expected one value, found {value!r}")
    return value

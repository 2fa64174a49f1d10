"""The options of `train` in a plan: checked as `train` checks them, made into a configuration or a command line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from data.errors import UsageError
from pipeline.config import TrainConfig
from pipeline.run_options import train_config
from pipeline.sweep.plan import BestOf, close_match
from pipeline.train_options import checked_entry, fields_as_options, option_name, training_options

STORES = "cached_teachers"
# What a plan says in its own words, and why.
_NOT_IN_PLANS = {
    "config": "write the options into the plan",
    "seed": "a plan has seeds, as seeds: [0, 1, 2]",
    "expect_fingerprints": "the sweep gives every run the fingerprints that it found",
    **dict.fromkeys(("run_name", "runs_dir", "checkpoints_dir", "resume"), "the sweep names runs and their folders"),
    **dict.fromkeys(
        ("distill", "teachers", "weights", "untrained"),
        "a sweep loads no teacher: distil from a store, cached-teachers: true",
    ),
}


@dataclass(frozen=True)
class Places:
    """Where a sweep's runs read and write. stores: those that `cached-teachers: true` stands for.

    fingerprints: by store path, given to the runs that read it.
    """

    out: Path
    stores: tuple[Path, ...] = ()
    fingerprints: Mapping[str, str] | None = None

    @property
    def runs(self) -> Path:
        """The folder of the runs' folders."""
        return self.out / "runs"

    @property
    def checkpoints(self) -> Path:
        """The folder of the runs' checkpoints."""
        return self.out / "checkpoints"


class TrainOptions:
    """The options of `train`, by their inner names (`voc_sets`), with their defaults."""

    def __init__(self) -> None:
        options = [*training_options(), *fields_as_options(TrainConfig, ("evaluate",))]
        self._options = {str(option.name): option for option in options if isinstance(option, click.Option)}
        self._context = click.Command("train", params=list(options)).make_context("train", [])
        self._defaults = dict(self._context.params)

    def flag(self, name: str) -> str:
        """Return the name of an option as a file or a message has it: `voc-set`."""
        return self._options[name].opts[0].removeprefix("--")

    def checked(self, where: str, options: Mapping[str, Any], extra: Sequence[str] = ()) -> dict[str, Any]:
        """Return options as plain values by their inner names; `null` is kept, and means the default.

        extra: other keys that may stand beside the options, for what was misspelt.

        Raises UsageError naming the option: unknown, not for a plan, or of a value that it cannot have.
        """
        found: dict[str, Any] = {}
        for key, value in options.items():
            name = option_name(str(key))
            if name in found:
                raise UsageError(f"{where}: {self.flag(name)} is given twice")
            plain = self.value(where, name, None if isinstance(value, BestOf) else value, extra)
            found[name] = value if isinstance(value, BestOf) else plain
        return found

    def value(self, where: str, name: str, value: Any, extra: Sequence[str] = ()) -> Any:
        """Return one option's value, plain; raises UsageError as `checked`. extra: other keys that may be meant."""
        if name in _NOT_IN_PLANS:
            raise UsageError(f"{where}: {name.replace('_', '-')}: {_NOT_IN_PLANS[name]}")
        if name not in self._options:
            asked, known = name.replace("_", "-"), [self.flag(n) for n in self._options if n not in _NOT_IN_PLANS]
            raise UsageError(f"{where}: no option {asked}", hint=close_match(asked, (*known, *extra)))
        if value is None or (name == STORES and isinstance(value, bool)):
            return value or None
        flag = f"{where}: {self.flag(name)}"
        return _plain(self._converted(flag, name, checked_entry(where, name, value, self._options)))

    def config(self, where: str, options: Mapping[str, Any], places: Places, run_name: str, seed: int) -> TrainConfig:
        """Return the configuration that `train` would make of the options.

        Raises UsageError naming the option, for values that do not go together too.
        """
        given = {n: self._converted(f"{where}: {self.flag(n)}", n, v) for n, v in self._given(options, places).items()}
        folders = {"run_name": run_name, "runs_dir": places.runs, "checkpoints_dir": places.checkpoints}
        try:
            return train_config({**self._defaults, **given, **folders, "seed": seed})
        except UsageError as error:
            raise UsageError(f"{where}: {error.message}", hint=error.hint) from None

    def arguments(self, options: Mapping[str, Any], places: Places, run_name: str, seed: int) -> list[str]:
        """Return the command line of `train` that means the options: what follows `cli.py`."""
        words = ["train"]
        for name, value in self._given(options, places).items():
            words += self._words(name, value)
        folders = ["--runs-dir", str(places.runs), "--checkpoints-dir", str(places.checkpoints)]
        return [*words, "--seed", str(seed), "--run-name", run_name, *folders]

    def _given(self, options: Mapping[str, Any], places: Places) -> dict[str, Any]:
        given = {name: value for name, value in options.items() if value is not None}
        stores = stores_of(options, places)
        given.pop(STORES, None)
        if stores:
            given[STORES] = [str(store) for store in stores]
            if places.fingerprints is not None:
                given["expect_fingerprints"] = [places.fingerprints[str(store)] for store in stores]
        return given

    def _converted(self, where: str, name: str, value: Any) -> Any:
        option = self._options[name]
        boolean = isinstance(option.type, click.types.BoolParamType)
        values = value if isinstance(value, list | tuple) else [value]
        for each in values:
            # YAML's yes and no are booleans, which click would take for the numbers 1 and 0.
            if isinstance(each, bool) and not boolean:
                raise UsageError(f"{where}: expected {option.type.name}, found {str(each).lower()}")
        written = [str(each) for each in values]
        try:
            return option.type_cast_value(self._context, written if option.multiple else written[0])
        except click.BadParameter as error:
            raise UsageError(f"{where}: {error.message.rstrip('.')}") from None

    def _words(self, name: str, value: Any) -> list[str]:
        if name == "evaluate":
            return ["--eval-final-only" if value == "final-only" else "--eval-every-epoch"]
        option = self._options[name]
        if isinstance(value, bool):
            return [option.opts[0] if value else option.secondary_opts[0]]
        values: Sequence[Any] = value if isinstance(value, list | tuple) else [value]
        return [word for each in values for word in (option.opts[0], str(each))]


def stores_of(options: Mapping[str, Any], places: Places) -> tuple[Path, ...]:
    """Return the stores that options distil from; none for a baseline."""
    asked = options.get(STORES)
    if asked is True:
        return places.stores
    return tuple(Path(path) for path in asked or ())


def _plain(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return str(value) if isinstance(value, Path) else value

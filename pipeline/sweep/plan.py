"""A sweep's plan: a YAML file of arms over one training set-up, each an option set of `train`. No torch."""

from __future__ import annotations

import difflib
from collections.abc import Hashable, Iterable, Mapping
from pathlib import Path
from typing import Any, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from data.errors import UsageError

NAME = r"^[A-Za-z0-9][A-Za-z0-9_.\-]{0,59}$"
DEFAULT_SEEDS = (0, 1, 2)
# What a folder's plan.yaml holds beside the plan; a plan that is read back from there is the same plan.
STORES = "stores"


class BestOf(BaseModel):
    """An option's value taken from another arm: that of its grid member with the highest mean validation mAP."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    best_of: str
    """The arm; its grid must vary the option."""


class Arm(BaseModel):
    """One arm of a plan. In the file its options stand beside the other keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    about: str = ""
    """What it is there for."""
    baseline: str | None = None
    """The arm that it is compared with, seed by seed."""
    grid: dict[str, tuple[Any, ...]] = Field(default_factory=dict)
    """Options with several values each: a member for every combination."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Options of `train`, by the names they go by in the file; a `BestOf` where another arm decides."""

    @model_validator(mode="before")
    @classmethod
    def _options_stand_beside(cls, data: Any) -> Any:
        if not isinstance(data, Mapping) or "options" in data:
            return data
        own = {key: value for key, value in data.items() if key in ("about", "baseline", "grid")}
        options = {str(key): _reference(value) for key, value in data.items() if key not in own}
        return {**own, "options": options}

    @field_validator("grid", mode="before")
    @classmethod
    def _several_values(cls, grid: Any) -> Any:
        for option, values in grid.items() if isinstance(grid, Mapping) else ():
            if not isinstance(values, list | tuple) or not values:
                raise ValueError(f"{option}: expected a list of values, as [1, 5, 10], found {values!r}")
        return grid


class Plan(BaseModel):
    """A whole plan, as it stands in its file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(pattern=NAME)
    """Names the folder of what comes out: `sweeps/NAME`."""
    about: str = ""
    """What the plan is there to find out."""
    train: dict[str, Any] = Field(default_factory=dict)
    """Options of `train` that hold for every run."""
    seeds: tuple[int, ...] = DEFAULT_SEEDS
    """Every arm is trained once with each."""
    arms: dict[str, Arm] = Field(min_length=1)

    @field_validator("seeds")
    @classmethod
    def _each_once(cls, seeds: tuple[int, ...]) -> tuple[int, ...]:
        if not seeds or len(set(seeds)) < len(seeds) or min(seeds) < 0:
            raise ValueError("expected seeds from 0, each once, as [0, 1, 2]")
        return seeds

    @field_validator("arms")
    @classmethod
    def _names_fit_folders(cls, arms: dict[str, Arm]) -> dict[str, Arm]:
        import re

        for name in arms:
            if not re.match(NAME, name):
                raise ValueError(f"arm {name!r}: expected letters, digits, _ . and -, at most 60, for it names folders")
        return arms

    def with_seeds(self, seeds: Iterable[int]) -> Self:
        """Return the plan with other seeds, ascending."""
        return self.model_copy(update={"seeds": tuple(sorted(set(seeds)))})

    def document(self) -> dict[str, Any]:
        """Return the plan as its file holds it."""
        return {
            "name": self.name,
            "about": self.about,
            "train": dict(self.train),
            "seeds": list(self.seeds),
            "arms": {name: _arm_document(arm) for name, arm in self.arms.items()},
        }


def read_plan(path: Path) -> Plan:
    """Return the plan in a YAML file; its options are not looked at yet.

    Raises UsageError where the file cannot be read, is no YAML, or is no plan, naming the key.
    """
    document = read_document(path)
    document.pop(STORES, None)
    return plan_of(str(path), document)


def read_document(path: Path) -> dict[str, Any]:
    """Return a YAML file's mapping.

    Raises UsageError where it cannot be read, is no YAML, holds a key twice, or is no mapping.
    """
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_EachKeyOnce)
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror})", hint="see plans/ for examples") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: no YAML ({' '.join(str(error).split())})") from error
    if not isinstance(content, dict):
        raise UsageError(f"{path}: expected a plan (name, train, seeds, arms), found {type(content).__name__}")
    return {str(key): value for key, value in content.items()}


def plan_of(where: str, document: Mapping[str, Any]) -> Plan:
    """Return a document's plan. Raises UsageError naming the key that is wrong. where: for messages."""
    try:
        return Plan.model_validate(document)
    except ValidationError as error:
        raise _told(where, error) from None


def close_match(name: str, known: Iterable[str]) -> str | None:
    """Return a hint with the known name closest to one that is not, None where none is close."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"did you mean {close[0]}?" if close else None


def _told(where: str, error: ValidationError) -> UsageError:
    first = error.errors()[0]
    *above, last = [str(part) for part in first["loc"]] or [""]
    place = f"{where}: {'.'.join([*above, last])}" if last else where
    if first["type"] == "extra_forbidden":
        keys = Plan.model_fields if not above else Arm.model_fields
        return UsageError(
            f"{place}: no such key; expected {', '.join(key for key in keys if key != 'options')}",
            hint=close_match(last, keys),
        )
    if first["type"] == "missing":
        return UsageError(f"{place}: missing", hint="see plans/ for examples")
    message = first["msg"].removeprefix("Value error, ")
    found = f", found {first['input']!r}" if not isinstance(first["input"], dict) and "found" not in message else ""
    return UsageError(f"{place}: {message}{found}")


def _reference(value: Any) -> Any:
    return BestOf.model_validate(value) if isinstance(value, Mapping) and "best_of" in value else value


def _arm_document(arm: Arm) -> dict[str, Any]:
    options = {k: v.model_dump() if isinstance(v, BestOf) else v for k, v in arm.options.items()}
    told: dict[str, Any] = {"about": arm.about} if arm.about else {}
    if arm.baseline is not None:
        told["baseline"] = arm.baseline
    grid = {option: list(values) for option, values in arm.grid.items()}
    return {**told, **options, **({"grid": grid} if grid else {})}


class _EachKeyOnce(yaml.SafeLoader):
    """YAML as it is, but for keys given twice, of which PyYAML keeps the last without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """Return a mapping; raises ConstructorError for a key that stands in it twice."""
        seen = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key} stands there twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep=deep)

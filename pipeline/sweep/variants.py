"""Expands a plan: arms into members, members into runs. Everything that can be refused is refused here.

A member is one set of options, which all its seeds share: an arm without a grid is one member, a grid has one for every
combination. A run is a member with a seed; its name says what it is and ends in a digest of its configuration.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from graphlib import CycleError, TopologicalSorter
from itertools import product
from pathlib import Path
from typing import Any

from cache.canonical import canonical_json, digest
from data.errors import UsageError
from pipeline.config import DEFAULT_STORE, Distillation, TrainConfig
from pipeline.sweep.plan import Arm, BestOf, Plan, close_match
from pipeline.sweep.settings import STORES, Places, TrainOptions

_KEYS = ("about", "baseline", "grid")
_DIGITS = 8
_MAX_NAME = 100
_ANYWHERE = Places(Path("sweeps"), (DEFAULT_STORE,))


@dataclass(frozen=True)
class Member:
    """One set of options of an arm. options: all of them, those of the plan's `train` too, by their inner names.

    varied: those of the arm's grid, with this member's values.
    """

    name: str
    arm: str
    options: dict[str, Any]
    varied: dict[str, Any] = field(default_factory=dict)

    @property
    def references(self) -> dict[str, str]:
        """The arms that decide over options of this one, by the option."""
        return {name: value.best_of for name, value in self.options.items() if isinstance(value, BestOf)}

    def resolved(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return the options with the values that other arms decided on."""
        return {**self.options, **{name: values[name] for name in self.references}}


@dataclass(frozen=True)
class Run:
    """A member with a seed, and nothing left open."""

    name: str
    member: Member
    seed: int
    options: dict[str, Any]
    config: TrainConfig


class Variants:
    """A checked plan, expanded. plan: in its one normal form, every value of the type it has in `train`."""

    def __init__(self, where: str, plan: Plan, overrides: Mapping[str, Any] | None = None) -> None:
        """Check the plan. where: its file, for messages.  overrides: options that hold for every run.

        Raises UsageError naming file, arm and key for anything that cannot be meant.
        """
        self._where = where
        self.options = TrainOptions()
        self._train = self._checked_train(plan, dict(overrides or {}))
        self._arms = {name: self._checked_arm(name, arm, overrides or {}) for name, arm in plan.arms.items()}
        self.plan = self._normal_form(plan)
        self._check_references()
        self.stages = self._stages()
        self._owners: dict[bytes, str] = {}
        self.members: dict[str, Member] = {}
        for member in (member for name, arm in self._arms.items() for member in self._expanded(name, arm)):
            if member.name in self.members:
                raise UsageError(f"{where}: two arms come to the same name, {member.name}", hint="rename one of them")
            self.members[member.name] = member
        self._check_members()

    def members_of(self, arm: str) -> list[Member]:
        """Return an arm's members, in the order of its grid."""
        return [member for member in self.members.values() if member.arm == arm]

    def distils(self, member: Member) -> bool:
        """Return whether a member has teacher targets."""
        return bool(member.options.get(STORES))

    def owner(self, member: Member) -> str:
        """Return the first member whose runs are this one's: itself, unless another arm comes to the same options."""
        return member.name if member.references else self._owners[_identity(member, self.trial(member))]

    def run(self, member: Member, seed: int, values: Mapping[str, Any], places: Places) -> Run:
        """Return a member's run with a seed. values: of the options that other arms decided on.

        Where another member's runs are the same, they are this one's too.
        """
        options = member.resolved(values)
        config = self.options.config(self._place(member.arm), options, places, "run", seed)
        # Without defaults: a run keeps its name when `train` gets another option.
        named = digest(config.resolved().computed(defaults=False))[:_DIGITS]
        owner = self._owners.get(_identity(member, config), member.name)
        name = f"{owner}-s{seed}-{named}"
        return Run(name, member, seed, options, config.model_copy(update={"run_name": name}))

    def trial(self, member: Member, places: Places = _ANYWHERE) -> TrainConfig:
        """Return the configuration of one of a member's runs, with any of the values that another arm decides on."""
        values = {option: self._arms[arm].grid[option][0] for option, arm in member.references.items()}
        return self.run(member, 0, values, places).config

    def _place(self, arm: str) -> str:
        return f"{self._where}: arm {arm}"

    def _checked_train(self, plan: Plan, overrides: dict[str, Any]) -> dict[str, Any]:
        return {**self.options.checked(f"{self._where}: train", plan.train), **overrides}

    def _checked_arm(self, name: str, arm: Arm, overrides: Mapping[str, Any]) -> Arm:
        where = self._place(name)
        options = self.options.checked(where, arm.options, extra=_KEYS)
        grid = {}
        for key, values in arm.grid.items():
            checked = [self.options.checked(f"{where}: grid", {key: value}) for value in values]
            (option,) = checked[0]
            grid[option] = tuple(each[option] for each in checked)
            flag = self.options.flag(option)
            if option in options:
                raise UsageError(f"{where}: {flag} has a value and a grid", hint="keep one of them")
            if len({canonical_json(value) for value in grid[option]}) < len(values):
                raise UsageError(f"{where}: grid: {flag} holds a value twice: {list(grid[option])}")
            if any(value is None or isinstance(value, BestOf | list) for value in grid[option]):
                raise UsageError(f"{where}: grid: {flag}: expected single values, found {list(values)}")
        for option in overrides:
            if option in grid or isinstance(options.get(option), BestOf):
                flag = self.options.flag(option)
                raise UsageError(f"{where}: {flag} is what this arm varies", hint=f"leave out --set {flag}=…")
        options = {option: value for option, value in options.items() if option not in overrides}
        return arm.model_copy(update={"options": options, "grid": grid})

    def _normal_form(self, plan: Plan) -> Plan:
        def flags(options: Mapping[str, Any]) -> dict[str, Any]:
            return {self.options.flag(name): value for name, value in options.items()}

        arms = {
            name: arm.model_copy(update={"options": flags(arm.options), "grid": flags(arm.grid)})
            for name, arm in self._arms.items()
        }
        return plan.model_copy(update={"train": flags(self._train), "arms": arms})

    def _check_references(self) -> None:
        for name, arm in self._arms.items():
            where = self._place(name)
            if arm.baseline is not None:
                if arm.baseline == name:
                    raise UsageError(f"{where}: baseline: an arm cannot be compared with itself")
                if self._named(f"{where}: baseline", arm.baseline).grid:
                    raise UsageError(
                        f"{where}: baseline: {arm.baseline} has a grid, so it is several",
                        hint="name an arm without a grid",
                    )
            for option, value in arm.options.items():
                if not isinstance(value, BestOf):
                    continue
                flag = self.options.flag(option)
                grid = self._named(f"{where}: {flag}: best_of", value.best_of).grid
                if option not in grid:
                    varies = ", ".join(map(self.options.flag, grid)) or "nothing"
                    raise UsageError(f"{where}: {flag}: best_of: {value.best_of} does not vary {flag} (but {varies})")

    def _named(self, where: str, name: str) -> Arm:
        if name not in self._arms:
            hint = close_match(name, self._arms) or f"the plan's arms: {', '.join(self._arms)}"
            raise UsageError(f"{where}: no arm {name!r} in this plan", hint=hint)
        return self._arms[name]

    def _stages(self) -> list[list[str]]:
        """Return the arms in the order in which they can be run: those that wait for others, after them."""
        waits = {
            name: {value.best_of for value in arm.options.values() if isinstance(value, BestOf)}
            for name, arm in self._arms.items()
        }
        sorter = TopologicalSorter(waits)
        try:
            sorter.prepare()
        except CycleError as error:
            circle = " → ".join(reversed(error.args[1]))
            raise UsageError(f"{self._where}: arms wait for each other: {circle}") from None
        stages, order = [], list(self._arms)
        while sorter.is_active():
            ready = sorted(sorter.get_ready(), key=order.index)
            stages.append(ready)
            sorter.done(*ready)
        return stages

    def _expanded(self, name: str, arm: Arm) -> list[Member]:
        fixed = {**self._train, **arm.options}
        if not arm.grid:
            return [Member(name, name, fixed)]
        found = []
        for values in product(*arm.grid.values()):
            varied = dict(zip(arm.grid, values, strict=True))
            said = "-".join(f"{self.options.flag(o).replace('-', '_')}{_short(v)}" for o, v in varied.items())
            found.append(Member(f"{name}-{said}", name, {**fixed, **varied}, varied))
        return found

    def _check_members(self) -> None:
        """Refuse members whose options do not go together; note whose runs each one's are."""
        for member in self.members.values():
            where = self._place(member.arm)
            if len(member.name) > _MAX_NAME:
                raise UsageError(
                    f"{where}: grid: {member.name} is too long a name for a folder", hint="shorten the arm's"
                )
            self._check_targets(where, member)
            config = self.trial(member)
            if not member.references:
                self._owners.setdefault(_identity(member, config), member.name)

    def _check_targets(self, where: str, member: Member) -> None:
        if member.options.get(STORES):
            return
        mine = {*self._arms[member.arm].options, *self._arms[member.arm].grid}
        for option in mine & set(Distillation.model_fields):
            if member.options[option] is not None:
                raise UsageError(
                    f"{where}: {self.options.flag(option)} is given, but no teacher's targets",
                    hint="add cached-teachers: true, or leave it out for a baseline",
                )


def _identity(member: Member, config: TrainConfig) -> bytes:
    """Return what two members have in common whose runs are the same: all that is computed, but for the seed."""
    computed = {name: value for name, value in config.resolved().computed().items() if name != "seed"}
    return canonical_json([computed, member.options.get(STORES)])


def _short(value: Any) -> str:
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return "".join(c if c.isalnum() or c in "._" else "_" for c in text)

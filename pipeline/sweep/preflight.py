"""Refuses, before anything runs, what every run of a kind would end with: image sets and targets that are not there."""

from __future__ import annotations

from pathlib import Path

from cache.reader import TeacherStore
from cache.selection import Selection
from data.errors import TeachOnceError, UsageError
from data.voc import list_ids
from pipeline.config import TrainConfig
from pipeline.sweep.settings import STORES, Places
from pipeline.sweep.variants import Member, Variants
from pipeline.teacher_choice import choose_teachers, select_arrays, stored_outputs, views_drawn


def distilled_stores(variants: Variants, given: tuple[Path, ...]) -> list[Path]:
    """Return every store that an arm distils from.

    Raises UsageError where an arm asks for the command line's and none was given.
    """
    stores: list[Path] = []
    for member in variants.members.values():
        asked = member.options.get(STORES)
        if asked is True and not given:
            raise UsageError(
                f"arm {member.arm} distils from a store, and none was given",
                hint="add --cached-teachers STORE; make one: python cli.py extract-teachers",
            )
        stores += given if asked is True else [Path(path) for path in asked or ()]
    return list(dict.fromkeys(stores))


def check_runs(variants: Variants, places: Places) -> None:
    """Raise what training a member would raise at its start: image sets, teachers, views, images and shards.

    UsageError, DatasetError and StoreError are told with the arm that they are about.
    """
    checker = _Checker()
    for member in variants.members.values():
        config = variants.trial(member, places)
        try:
            checker.check(config)
        except TeachOnceError as error:
            raise type(error)(f"arm {_named(member)}: {error.message}", hint=error.hint) from error


class _Checker:
    """Opens each store once, and looks at each thing once."""

    def __init__(self) -> None:
        self._stores: dict[Path, TeacherStore] = {}
        self._seen: set[object] = set()

    def check(self, config: TrainConfig) -> None:
        for sets in (config.voc_sets, config.val_sets, config.test_sets):
            if sets and self._is_new((config.voc_root, sets)):
                list_ids(config.voc_root, sets)
        distillation = config.distillation
        if distillation.source != "store":
            return
        views = views_drawn(config.recipe.flip)
        named = (distillation.feature_teacher, distillation.logit_teacher, distillation.region_teacher)
        weights = (distillation.beta > 0, distillation.gamma > 0, distillation.delta > 0)
        images = (config.voc_root, config.voc_sets, config.limit)
        kind = (distillation.stores, named, weights, distillation.logit_targets, distillation.feature_norm)
        if self._is_new((views, images, kind)):
            stores = [self._opened(path) for path in distillation.stores]
            selection = Selection(stores, list_ids(config.voc_root, config.voc_sets)[: config.limit])
            choice = choose_teachers(distillation, stored_outputs(selection), selection.where)
            select_arrays(selection, choice, distillation, views)

    def _is_new(self, what: object) -> bool:
        if what in self._seen:
            return False
        self._seen.add(what)
        return True

    def _opened(self, path: Path) -> TeacherStore:
        if path not in self._stores:
            self._stores[path] = TeacherStore(path)
        return self._stores[path]


def _named(member: Member) -> str:
    return member.arm if member.name == member.arm else f"{member.arm} ({member.name})"

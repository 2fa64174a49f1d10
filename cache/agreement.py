"""Refuses to join stores that contradict each other, naming every field, both stores and both values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cache.canonical import Json, canonical_json, differences
from cache.reader import TeacherStore
from data.errors import StoreStaleError
from data.geometry import View

_MAX_SHOWN = 8


@dataclass(frozen=True)
class Part:
    """One view of a teacher in one store: what has to be alike wherever it comes from."""

    store: TeacherStore
    teacher: str
    view: View
    names: tuple[str, ...]

    def description(self) -> dict[str, Json]:
        """Return identity, PCA basis, and shape and dtype of a sample of every named array."""
        manifest = self.store.catalog.teachers[self.teacher].manifest
        arrays = self.store.catalog.teachers[self.teacher].views[self.view].manifest.arrays
        return {
            "identity": manifest.identity,
            "untrained": manifest.untrained,
            "pca": None if manifest.pca is None else {"shape": manifest.pca.shape, "sha256": manifest.pca.sha256},
            **{name: arrays[name].model_dump(mode="json", include={"sample_shape", "dtype"}) for name in self.names},
        }


def refuse_other_frame(store: TeacherStore, frame: tuple[int, int]) -> None:
    """Raise StoreStaleError unless the store's images were squashed to the frame (H, W)."""
    found = store.catalog.root.frame
    if found != frame:
        raise StoreStaleError(
            f"{store.catalog.path}: expected frame {frame}, found {found}",
            hint="extract a store with this version: python cli.py extract-teachers … --out ANOTHER",
        )


def refuse_unlike_parts(parts: Sequence[Part]) -> None:
    """Raise StoreStaleError unless one key means one teacher, stored alike, in all parts."""
    first, *others = parts
    for other in others:
        changed = [
            (field.removeprefix("."), one, two)
            for field, one, two in differences(first.description(), other.description(), "")
        ]
        if changed:
            names = _names(first, other)
            raise StoreStaleError(
                _told(f"teacher {first.teacher} is not the same in {names[0]} and {names[1]}:", changed, names),
                hint="give only one of the stores, or extract or convert both with the same settings; teachers that"
                " differ need keys that differ: --teacher KEY=SPEC",
            )


def refuse_other_images(
    one: TeacherStore, digests: Mapping[str, str], other: TeacherStore, others: Mapping[str, str]
) -> None:
    """Raise StoreStaleError where two stores saw different images under one id. digests: SHA-256 by image id."""
    changed = [
        (f"{image_id}.sha256", digests[image_id], sha256)
        for image_id, sha256 in others.items()
        if digests.get(image_id, sha256) != sha256
    ]
    if changed:
        names = str(one.catalog.path), str(other.catalog.path)
        raise StoreStaleError(
            _told(f"{names[0]} and {names[1]} saw different images under one id ({len(changed)}):", changed, names),
            hint="give only the store of the images as they are now, or extract the other one anew",
        )


def _names(one: Part, other: Part) -> tuple[str, str]:
    paths = one.store.catalog.path, other.store.catalog.path
    if paths[0] == paths[1]:
        return f"{paths[0]} {one.view}", f"{paths[1]} {other.view}"
    return str(paths[0]), str(paths[1])


def _told(what: str, changed: Sequence[tuple[str, Json, Json]], names: tuple[str, str]) -> str:
    shown = [
        f"  {field}: {_show(one)} in {names[0]}, {_show(two)} in {names[1]}" for field, one, two in changed[:_MAX_SHOWN]
    ]
    return "\n".join([what, *shown, *([f"  … and {len(changed) - _MAX_SHOWN} more"] * (len(changed) > _MAX_SHOWN))])


def _show(value: Json) -> str:
    text = value if isinstance(value, str) else canonical_json(value).decode("ascii")
    return text if len(text) <= 100 else f"{text[:97]}…"

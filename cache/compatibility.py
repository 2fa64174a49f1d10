"""Refuses to resume or extend a store with what it was not made from, naming every field that differs."""

from __future__ import annotations

from pathlib import Path

from cache.canonical import Json, canonical_json, differences
from cache.catalog import Catalog, StoredTeacher
from cache.manifest import RootManifest, ViewManifest
from cache.plan import StorePlan, TeacherPlan
from data.errors import StoreStaleError

MIN_PROBE_COSINE = 0.9999
_MAX_SHOWN = 8
_HINT = "repeat the stored settings to resume, or extract into a new store with another --out"
_HINT_DERIVED = (
    "convert-cache made this store: repeat its settings to resume or to add to it, or make a new store (convert-cache:"
    " another DST; extract-teachers: another --out)"
)
_HINT_RELABELLED = (
    "relabel-logits made these logits: repeat its settings to resume, or give what you ask for another key"
    " (relabel-logits: --as KEY; extract-teachers: --teacher KEY=SPEC)"
)
_HINT_EXTRACTED = "the store holds these targets as they were extracted: give convert-cache another DST"


def refuse_other_dataset(catalog: Catalog, plan: StorePlan) -> None:
    """Raise StoreStaleError unless the store holds the plan's images, in order, unchanged, in its frame."""
    asked = plan.root_manifest()
    changed: list[tuple[str, Json, Json]] = []
    if catalog.root.frame != asked.frame:
        changed.append(("frame", list(catalog.root.frame), list(asked.frame)))
    stored_ids = [sample.id for sample in catalog.samples]
    asked_ids = [sample.id for sample in plan.samples]
    if stored_ids != asked_ids:
        changed.append(("dataset.samples", _selection(catalog.root, stored_ids), _selection(asked, asked_ids)))
        pairs = enumerate(zip(stored_ids, asked_ids, strict=False))
        changed.extend([(f"dataset.samples[{row}].id", *pair) for row, pair in pairs if pair[0] != pair[1]][:1])
    else:
        for old, new in zip(catalog.samples, plan.samples, strict=True):
            if old.sha256 != new.sha256:
                changed.append((f"dataset.samples[{old.id}].sha256", old.sha256, new.sha256))
            elif old != new:
                changed.append((f"dataset.samples[{old.id}].size", [old.height, old.width], [new.height, new.width]))
    _refuse(catalog.path, "other images", changed)


def _selection(root: RootManifest, ids: list[str]) -> str:
    limit = "" if root.dataset.limit is None else f" --limit {root.dataset.limit}"
    return f"{'+'.join(root.dataset.sets)}{limit}: {len(ids)} images, {ids[0]} … {ids[-1]}"


def refuse_other_teacher(path: Path, stored: StoredTeacher, asked: TeacherPlan) -> None:
    """Raise StoreStaleError unless the teacher has the stored identity and still says of the probe what it said."""
    changed = list(differences(stored.manifest.identity, asked.identity, asked.key))
    _refuse(path, "another teacher under the same name", changed, _HINT_RELABELLED if _is_relabelled(stored) else _HINT)
    pca = asked.manifest().pca
    refuse_other_basis(path, stored, None if pca is None else pca.model_dump(mode="json"))
    cosine = stored.manifest.probe.cosine(asked.probe)
    if not cosine >= MIN_PROBE_COSINE:  # nor one that is no number
        raise StoreStaleError(
            f"{path}: {asked.key} no longer says what it said when the store was made: its output on the fixed probe"
            f" image has cosine {cosine:.6f} to the stored one (expected ≥ {MIN_PROBE_COSINE})",
            hint="check library versions and device against provenance.jsonl, or extract into a new store (--out)",
        )


def refuse_other_basis(path: Path, stored: StoredTeacher, asked: dict[str, Json] | None) -> None:
    """Raise StoreStaleError unless the teacher's features were projected as asked.

    asked: the fields of its PCA's manifest that are known, None for no PCA.
    """
    known = None if stored.manifest.pca is None else stored.manifest.pca.model_dump(mode="json")
    if known is not None and asked is not None:
        known = {name: known[name] for name in asked}
    changed = list(differences(known, asked, f"{stored.manifest.key}.pca"))
    _refuse(path, "another PCA", changed, _hint(stored, asked_derived=asked is not None))


def refuse_other_view(path: Path, stored: StoredTeacher, asked: ViewManifest) -> None:
    """Raise StoreStaleError unless the view is stored as asked. A new view must have its siblings' arrays."""
    view = stored.views.get(asked.view)
    sibling = view or next(iter(stored.views.values()), None)
    if sibling is None:
        return
    name = f"{stored.manifest.key}.{sibling.manifest.view}"
    same_view = view is not None
    stored_arrays, asked_arrays = _arrays(sibling.manifest, same_view), _arrays(asked, same_view)
    changed = list(differences(stored_arrays, asked_arrays, f"{name}.arrays"))
    if view is not None:
        changed.extend(differences(view.manifest.layout.model_dump(), asked.layout.model_dump(), f"{name}.layout"))
    _refuse(path, "other arrays or another layout", changed, _hint(stored, asked_derived=_is_derived(asked)))


def _arrays(manifest: ViewManifest, same_view: bool) -> Json:
    # Without the fingerprints: teacher and images are compared before, and a field says more than a hash.
    hidden = {"arrays": {"__all__": {"fingerprint"}}}
    arrays = manifest.model_dump(mode="json", exclude_unset=True, exclude=hidden)["arrays"]
    # Two views of a derived teacher come from two arrays: all they share is that each comes from one.
    return arrays if same_view else {name: {**array, **_is_from(array)} for name, array in arrays.items()}


def _is_from(array: dict[str, Json]) -> dict[str, Json]:
    return {"source": "an array of another store"} if array.get("source") else {}


def _is_derived(manifest: ViewManifest) -> bool:
    return any(array.source is not None for array in manifest.arrays.values())


def _is_relabelled(stored: StoredTeacher) -> bool:
    # A conversion changes features alone: logits that were computed from something stored are relabelled ones.
    arrays = (view.manifest.arrays.get("logits") for view in stored.views.values())
    return any(array is not None and array.source is not None for array in arrays)


def _hint(stored: StoredTeacher, *, asked_derived: bool) -> str:
    if _is_relabelled(stored):
        return _HINT_RELABELLED
    if any(_is_derived(view.manifest) for view in stored.views.values()):
        return _HINT_DERIVED
    return _HINT_EXTRACTED if asked_derived else _HINT


def _refuse(path: Path, what: str, changed: list[tuple[str, Json, Json]], hint: str = _HINT) -> None:
    if not changed:
        return
    shown = [f"  {field}: stored {_show(old)}, found {_show(new)}" for field, old, new in changed[:_MAX_SHOWN]]
    if len(changed) > _MAX_SHOWN:
        shown.append(f"  … and {len(changed) - _MAX_SHOWN} more")
    raise StoreStaleError(
        "\n".join([f"{path}: the store was made from {what}:", *shown]),
        hint=hint,
    )


def _show(value: Json) -> str:
    text = str(value) if isinstance(value, str) else canonical_json(value).decode("ascii")
    return text if len(text) <= 100 else f"{text[:97]}…"

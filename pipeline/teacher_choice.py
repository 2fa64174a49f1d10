"""Which teachers of which stores a run distils, and the arrays that it reads of them. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from cache.selected_array import SelectedArray
from cache.selection import Selection
from data.errors import UsageError
from data.geometry import VIEWS, View
from pipeline.config import Distillation

# What a teacher has whose features lie in the space of its text embeddings.
DENSE = "dense CLIP features"
# Before the names of the arrays of the teacher of regions, which may be those of the teacher of features too.
REGIONS = "regions/"


@dataclass(frozen=True)
class TeacherChoice:
    """Which teachers are distilled, by key; None for a loss whose weight is zero."""

    features: str | None
    logits: str | None
    regions: str | None = None

    def record(self) -> dict[str, str | None]:
        """Return the choice as checkpoints and results keep it; regions only where they are distilled."""
        named = asdict(self)
        return named if self.regions is not None else {name: named[name] for name in ("features", "logits")}

    @property
    def used(self) -> list[str]:
        """The teachers that are distilled at all."""
        return list(dict.fromkeys(key for key in (self.features, self.logits, self.regions) if key is not None))


def choose_teachers(config: Distillation, outputs: Mapping[str, set[str]], where: str) -> TeacherChoice:
    """Return the teachers to distil: the named ones, or the only ones that have what a loss needs.

    outputs: names of the arrays of every teacher by key.  where: what holds them, for messages.

    Raises UsageError where several would do and none is named, or none will do.
    """

    def choose(array: str, named: str | None, weight: float, flag: str, off: str) -> str | None:
        if weight == 0:
            return None
        candidates = [key for key, names in outputs.items() if array in names]
        if named is not None:
            if named not in candidates:
                listed = ", ".join(candidates) or "none"
                raise UsageError(f"{flag} {named}: {where} has no {array} of it (teachers with {array}: {listed})")
            return named
        if len(candidates) > 1:
            raise UsageError(
                f"several teachers in {where} have {array}: {', '.join(candidates)}", hint=f"choose: {flag} NAME"
            )
        if not candidates:
            listed = ", ".join(outputs) or "no teacher"
            raise UsageError(
                f"no teacher in {where} has {array} (it holds {listed})", hint=f"add one, or turn the loss off: {off} 0"
            )
        return candidates[0]

    gamma = config.gamma if config.logit_targets == "teacher" else 0.0
    return TeacherChoice(
        features=choose("features", config.feature_teacher, config.beta, "--feature-teacher", "--beta"),
        logits=choose("logits", config.logit_teacher, gamma, "--logit-teacher", "--gamma"),
        regions=choose(DENSE, config.region_teacher, config.delta, "--region-teacher", "--delta"),
    )


def stored_outputs(selection: Selection) -> dict[str, set[str]]:
    """Return the names of the arrays of every stored teacher by key; `DENSE` for features in CLIP's space."""
    outputs = {}
    for key, names in selection.outputs.items():
        manifest = selection.manifest(key)
        dense = "features" in names and manifest.text_embeddings_shape is not None and manifest.pca is None
        outputs[key] = names | ({DENSE} if dense else set())
    return outputs


def select_arrays(
    selection: Selection, choice: TeacherChoice, config: Distillation, views: Sequence[View]
) -> dict[str, SelectedArray]:
    """Return the arrays that a run reads, by name; those of the teacher of regions behind `regions/`.

    Raises as `Selection.arrays` where the stores lack anything of them, the moments of the features too.
    """
    arrays: dict[str, SelectedArray] = {}
    if choice.features is not None:
        arrays |= selection.arrays(choice.features, "features", views)
        if config.feature_norm == "channel":  # now, so that what lacks is told before anything starts
            selection.arrays(choice.features, "moments", ("original",))
    if choice.logits is not None:
        arrays |= selection.arrays(choice.logits, "logits", views)
    if choice.regions is not None:
        found = selection.arrays(choice.regions, "features", views)
        arrays |= {f"{REGIONS}{name}": array for name, array in found.items()}
    return arrays


def views_drawn(flip: float) -> tuple[View, ...]:
    """Return the views that training with this flip probability draws; statistics always need `original`."""
    return VIEWS if flip > 0 else ("original",)

"""What the runs that wrote a store noted beside its arrays: what that cost, and how close stored features are.

Provenance is never compared and is untrusted: a note that no run of ours would write is left out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cache.catalog import Catalog, StoredTeacher, StoredView
from cache.fidelity import Fidelity
from cache.layout import ArrayLayout


class PassNote(BaseModel):
    """Where the time of a pass went. bottleneck: the stage that held the others up."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    bottleneck: Literal["decode", "teacher", "copy", "disk"]


class RunNote(BaseModel):
    """One line of an array's provenance, as far as it is shown.

    samples: of this view that the run wrote.  teacher_seconds_all_views: what the teacher took for all views of it.
    fidelity: that of what an extraction wrote, or of the whole view after a conversion.  command: the conversion's.
    multilabel_map: how well a teacher's logits tell the images' classes.
    """

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)

    time: datetime
    host: str | None = None
    device: str | None = None
    samples: int = Field(default=0, ge=0)
    teacher_seconds_all_views: float | None = Field(default=None, ge=0)
    fidelity: Fidelity | None = None
    command: str | None = None
    multilabel_map: float | None = Field(default=None, ge=0, le=1)
    whole_pass: PassNote | None = Field(default=None, alias="pass")

    @property
    def run(self) -> tuple[str | None, str | None, float | None]:
        """What all notes of one run on one teacher share, and hardly two runs do."""
        return self.host, self.device, self.teacher_seconds_all_views


@dataclass(frozen=True)
class Cost:
    """What extracting took, over all runs that noted it.

    seconds: of teachers at work.  outputs: one a teacher, view and image.  batch_sizes: images a teacher saw at once.
    first, last: when the earliest and the latest run ended, ISO 8601.  bottlenecks: what held the runs up.
    """

    runs: int
    seconds: float
    outputs: int
    devices: tuple[str, ...]
    hosts: tuple[str, ...]
    batch_sizes: tuple[int, ...]
    first: str
    last: str
    bottlenecks: tuple[str, ...] = ()


def array_notes(catalog: Catalog, layout: ArrayLayout) -> list[RunNote]:
    """Return the notes beside an array, in the order in which they were written."""
    notes = []
    for note in catalog.storage.array(layout).read_provenance():
        try:
            notes.append(RunNote.model_validate(note))
        except ValidationError:
            continue
    return notes


def teacher_cost(catalog: Catalog, teacher: StoredTeacher) -> Cost | None:
    """Return what extracting a teacher took; None where no run noted it, as for a derived store."""
    views = [_costly_notes(catalog, view) for view in teacher.views.values()]
    # A run notes the same seconds in every view that it wrote: they count once.
    runs: Counter[tuple[str | None, str | None, float | None]] = Counter()
    for notes in views:
        runs |= Counter(note.run for note in notes)
    every = [note for notes in views for note in notes]
    if not every:
        return None
    times = sorted(note.time.isoformat() for note in every)
    return Cost(
        runs=runs.total(),
        seconds=round(sum((seconds or 0.0) * count for (_, _, seconds), count in runs.items()), 3),
        outputs=sum(note.samples for note in every),
        devices=_unique(note.device for note in every),
        hosts=_unique(note.host for note in every),
        batch_sizes=tuple(sorted({view.manifest.layout.batch_size for view in teacher.views.values()})),
        first=times[0],
        last=times[-1],
        bottlenecks=_unique(None if note.whole_pass is None else note.whole_pass.bottleneck for note in every),
    )


def total_cost(costs: Sequence[Cost]) -> Cost | None:
    """Return the cost of several teachers together; None of none. runs: the most that any teacher took."""
    if not costs:
        return None
    return Cost(
        runs=max(cost.runs for cost in costs),
        seconds=round(sum(cost.seconds for cost in costs), 3),
        outputs=sum(cost.outputs for cost in costs),
        devices=_unique(device for cost in costs for device in cost.devices),
        hosts=_unique(host for cost in costs for host in cost.hosts),
        batch_sizes=tuple(sorted({size for cost in costs for size in cost.batch_sizes})),
        first=min(cost.first for cost in costs),
        last=max(cost.last for cost in costs),
        bottlenecks=_unique(stage for cost in costs for stage in cost.bottlenecks),
    )


def teacher_map(catalog: Catalog, teacher: StoredTeacher) -> float | None:
    """Return the image-level multi-label mAP that was last noted beside a teacher's logits; None where none was."""
    view = teacher.views.get("original")
    if view is None or "logits" not in view.layouts:
        return None
    found = [note.multilabel_map for note in array_notes(catalog, view.layouts["logits"])]
    return next((value for value in reversed(found) if value is not None), None)


def array_fidelity(catalog: Catalog, layout: ArrayLayout) -> Fidelity | None:
    """Return how close an array's values are to what they were made from; None where no run measured it."""
    measured = [(note.command, note.fidelity) for note in array_notes(catalog, layout) if note.fidelity is not None]
    if measured and measured[-1][0] is not None:
        return measured[-1][1]
    return combined_fidelity([found for _, found in measured])


def combined_fidelity(measured: Sequence[Fidelity]) -> Fidelity | None:
    """Return the fidelity over the samples of several measurements; None of none.

    The mean cosine is that over all samples. Of the others only the worst is known to hold for all samples together: a
    percentile of the whole is never below the lowest of its parts, nor is an error of the whole above the largest.
    """
    if not measured:
        return None
    samples = sum(found.samples for found in measured)
    errors = [found.relative_error for found in measured]
    explained = [found.explained_variance for found in measured]
    return Fidelity(
        samples=samples,
        cosine_mean=sum(found.cosine_mean * found.samples for found in measured) / samples,
        cosine_p01=min(found.cosine_p01 for found in measured),
        relative_error=None if None in errors else max(error for error in errors if error is not None),
        explained_variance=None if None in explained else min(share for share in explained if share is not None),
    )


def _costly_notes(catalog: Catalog, view: StoredView) -> list[RunNote]:
    """Return the notes of the runs that extracted a view: every array has them, unless a file was damaged."""
    every = ([n for n in array_notes(catalog, layout) if n.run[-1] is not None] for layout in view.layouts.values())
    return max(every, key=len)


def _unique(names: Iterable[str | None]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for name in names if name))

"""Makes new logits of a store from its image embeddings and other text embeddings: no image and no network is needed.

They become a teacher of their own in the same store, which says of each array which embeddings it was computed from.

Axes: n samples, K classes, D embedding dimensions.
"""

from __future__ import annotations

import platform
import socket
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cache.canonical import Json
from cache.catalog import Catalog, StoredTeacher
from cache.derive import ShowProgress, silently
from cache.plan import Derivation, StorePlan, TeacherPlan
from cache.relabel_source import embeddings_of
from cache.repair import Repair
from cache.writer import MissingShard, StoreWriter, open_writer
from data.geometry import View


@dataclass(frozen=True, eq=False)
class RelabelRequest:
    """The logits that are asked for: scale × embeddings · textᵀ + bias.

    source: key of the teacher whose embeddings are read.  key: of the new one.  identity: of the new one.
    text_embeddings: [K, D] float32.  facts: for the provenance, `command` among them, `versions` where
    a library made the text embeddings.
    """

    source: str
    key: str
    identity: dict[str, Any]
    text_embeddings: NDArray[np.float32]
    logit_scale: float
    logit_bias: float | None
    facts: Mapping[str, Json]
    repair: bool = False


@dataclass(frozen=True)
class Relabelling:
    """What a run did.

    written: samples over all views.  judgement: what `judge` said.  repairs: damaged shards that were written again.
    """

    written: int
    seconds: float
    judgement: Mapping[str, Json]
    repairs: list[Repair]


def relabel(
    catalog: Catalog,
    request: RelabelRequest,
    *,
    judge: Callable[[], Mapping[str, Json]] = dict,
    show: ShowProgress = silently,
) -> Relabelling:
    """Add the teacher of new logits to the store, or go on with it where an earlier run began.

    judge: called once all logits are committed; what it returns goes into the provenance of the `original` view.

    Raises as `open_writer`; whatever was committed stays.
    """
    start = time.monotonic()
    written = 0
    judgement: dict[str, Json] = {}
    repairs: list[Repair] = []
    for plan in _plans(catalog, request):
        with open_writer(catalog.path, plan, repair=request.repair) as writer:
            run = _Run(catalog, writer, request)
            written += run.fill(show)
            if "original" in plan.views:
                judgement |= judge()
            run.conclude(judgement, start)
            repairs += writer.repaired
    return Relabelling(written, time.monotonic() - start, judgement, repairs)


def _plans(catalog: Catalog, request: RelabelRequest) -> list[StorePlan]:
    """Return what a writer is to be asked for: one plan for all views that are cut alike."""
    source = catalog.teacher(request.source)
    cuts: dict[tuple[int, int], list[View]] = defaultdict(list)
    for view, stored in source.views.items():
        cuts[stored.manifest.layout.shard_samples, stored.manifest.layout.batch_size].append(view)
    return [
        StorePlan(
            sets=catalog.root.dataset.sets,
            limit=catalog.root.dataset.limit,
            samples=catalog.samples,
            teachers=[_teacher_plan(source, request, views)],
            views=views,
            feature_dtype="float32",  # of none
            shard_samples=shard_samples,
            batch_size=batch_size,
            frame=catalog.root.frame,
        )
        for (shard_samples, batch_size), views in cuts.items()
    ]


def _teacher_plan(source: StoredTeacher, request: RelabelRequest, views: list[View]) -> TeacherPlan:
    embeddings = {view: source.views[view].manifest.arrays["embeddings"].fingerprint for view in views}
    return TeacherPlan(
        key=request.key,
        identity=request.identity,
        untrained=source.manifest.untrained,
        probe=source.manifest.probe.values,
        outputs={"logits": (len(request.text_embeddings),)},
        text_embeddings=request.text_embeddings,
        derivation=Derivation(sources={view: {"logits": origin} for view, origin in embeddings.items()}),
    )


class _Run:
    """One pass over the views of one plan: fills what is missing and notes who did."""

    def __init__(self, catalog: Catalog, writer: StoreWriter, request: RelabelRequest) -> None:
        source = catalog.teacher(request.source)
        self._writer = writer
        self._request = request
        self._readers = {view: embeddings_of(catalog, source, view) for view in writer.plan.views}
        self._missing = writer.missing()

    def fill(self, show: ShowProgress) -> int:
        """Commit what is missing and return how many samples that was, over all views."""
        total = sum(shard.count for shard in self._missing)
        if not total:
            return 0
        for view in self._readers:
            if not self._notes(view):  # from the start, so that a killed run's store says how to finish it
                self._writer.note_provenance(self._request.key, view, self._origin(view))
        with show("relabelling", total, "targets") as tick:
            for shard in self._missing:
                self._writer.commit(shard, {"logits": self._logits(shard)})
                tick(shard.count)
        return total

    def _logits(self, shard: MissingShard) -> NDArray[np.float32]:
        """Return logits [n, K] of a range of samples."""
        rows = range(shard.first, shard.first + shard.count)
        # In double precision: a cosine's last bits times a scale of 100 would show, and it costs nothing.
        embeddings = self._readers[shard.view].gather(rows).astype(np.float64)
        logits = self._request.logit_scale * (embeddings @ self._request.text_embeddings.T.astype(np.float64))
        return (logits + (self._request.logit_bias or 0.0)).astype(np.float32)

    def conclude(self, judgement: Mapping[str, Json], start: float) -> None:
        """Note the cost, and what was judged, beside each view that was written, or not yet noted or judged.

        start: when the run began, by the monotonic clock.
        """
        for view in self._readers:
            facts = dict(judgement) if view == "original" else {}
            samples = sum(shard.count for shard in self._missing if shard.view == view)
            noted = [note for note in self._notes(view) if "seconds_all_views" in note]
            if samples or not noted or not any(facts.keys() <= note.keys() for note in noted):
                cost = {"samples": samples, "seconds_all_views": round(time.monotonic() - start, 3)}
                self._writer.note_provenance(self._request.key, view, {**self._origin(view), **cost, **facts})

    def _origin(self, view: View) -> dict[str, Json]:
        versions = {"numpy": np.__version__, "python": platform.python_version()}
        return {
            **self._request.facts,
            "source": {"array": self._readers[view].layout.path, "content": self._readers[view].content_digest},
            "host": socket.gethostname(),
            "versions": {**self._request.facts.get("versions", {}), **versions},
        }

    def _notes(self, view: View) -> list[Json]:
        layout = self._writer.catalog.teacher(self._request.key).view(view).layouts["logits"]
        return self._writer.catalog.storage.array(layout).read_provenance()

"""Runs teachers on decoded batches. On a GPU, copies in, computation and copies out overlap on three streams.

Nothing is waited for when a batch is launched; `Flight.land` waits, and only then are its outputs whole.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from data.errors import TeacherError
from data.geometry import View
from features.teacher import Teacher
from pipeline.decoding import DecodedBatch, Shown
from pipeline.progress import say
from pipeline.stage_times import Lane, Span, StageTimes

Target = tuple[str, View]  # a teacher's key and a view
# By array name: rows of a buffer, [B, …], page-locked where there is a GPU.
OutputRows = Mapping[str, Tensor]


@dataclass
class Flight:
    """A launched batch. rows: its place in the store.  finite: by target and array, [B] bool on the host."""

    rows: Sequence[int]
    finite: dict[tuple[Target, str], Tensor] = field(default_factory=dict)
    spans: dict[str, list[Span]] = field(default_factory=dict)
    done: Any = None

    def land(self) -> tuple[Target, str, int] | None:
        """Wait for the outputs; return target, array and row of the first that is not finite, None where all are."""
        if self.done is not None:
            self.done.synchronize()
        for (target, name), finite in self.finite.items():
            if not bool(finite.all()):
                return target, name, self.rows[int((~finite).nonzero()[0])]
        return None


class TeacherRunner:
    """Launches batches.

    teacher_seconds: time at work by teacher.  halvings: batches that did not fit into the device's memory, by teacher.
    """

    def __init__(self, teachers: Mapping[str, Teacher], device: torch.device, times: StageTimes) -> None:
        self._teachers = teachers
        self._device = device
        self._times = times
        self._copy_in, self._copy_out = Lane(device), Lane(device)
        self._compute = Lane(device, current=True)
        self._limits: dict[str, int] = {}
        self.teacher_seconds: dict[str, float] = dict.fromkeys(teachers, 0.0)
        self.halvings: dict[str, list[dict[str, int]]] = {key: [] for key in teachers}

    def launch(self, batch: DecodedBatch, outputs: Mapping[Target, OutputRows]) -> Flight:
        """Start every target's teacher on its images and the copies of what it says into `outputs`.

        Raises TeacherError where the device has too little memory for one image.
        """
        flight = Flight(batch.rows, spans={"copy": [], **{key: [] for key in self._teachers}})
        on_device: dict[Shown, Tensor] = {}
        with self._copy_in.work(flight.spans["copy"]):
            for shown in {(view, self._teachers[key].input) for key, view in outputs}:
                on_device[shown] = batch.images[shown].to(self._device, non_blocking=True)
        self._compute.wait_for(self._copy_in)
        for target, rows in outputs.items():
            key, view = target
            images = on_device[view, self._teachers[key].input]
            self._compute.keep(images)
            with self._compute.work(flight.spans[key]):
                said = self._run(key, images)
                finite = {name: torch.isfinite(values).flatten(1).all(dim=1) for name, values in said.items()}
                # Cast where it is fast; what float16 cannot hold becomes infinite and is refused by the writer.
                said = {name: values.to(rows[name].dtype) for name, values in said.items()}
            self._copy_out.wait_for(self._compute)
            with self._copy_out.work(flight.spans["copy"]):
                for name, values in said.items():
                    rows[name].copy_(values, non_blocking=True)
                    flight.finite[target, name] = self._on_host(finite[name])
                    self._copy_out.keep(values)
                    self._copy_out.keep(finite[name])
        if self._copy_out.stream is not None:
            flight.done = self._copy_out.stream.record_event()
        return flight

    def account(self, flight: Flight) -> None:
        """Add a landed batch's times."""
        for name, spans in flight.spans.items():
            seconds = sum(span.seconds() for span in spans)
            self._times.seconds["copy" if name == "copy" else "teacher"] += seconds
            if name != "copy":
                self.teacher_seconds[name] += seconds

    def _on_host(self, flags: Tensor) -> Tensor:
        """Start a copy of flags [B] to the host; into pageable memory it would be waited for."""
        host = torch.empty(flags.shape, dtype=torch.bool, pin_memory=self._device.type == "cuda")
        return host.copy_(flags, non_blocking=True)

    def _run(self, key: str, images: Tensor) -> dict[str, Tensor]:
        """Return what a teacher says, in as many parts as the memory asks for."""
        while True:
            limit = min(len(images), self._limits.get(key, len(images)))
            parts = self._try(key, images, limit)
            if parts is not None:
                names = parts[0]
                return names if len(parts) == 1 else {name: torch.cat([part[name] for part in parts]) for name in names}
            self._halve(key, limit)

    def _try(self, key: str, images: Tensor, limit: int) -> list[dict[str, Tensor]] | None:
        try:
            return [self._teachers[key](part).arrays() for part in torch.split(images, limit)]
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        return None  # outside the handler: the error holds the frames, and with them the memory

    def _halve(self, key: str, limit: int) -> None:
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        if limit == 1:
            raise TeacherError(
                f"{key}: {self._device} has too little memory for one image",
                hint="what was committed is intact; free memory, take a smaller teacher or grid, or --device cpu",
            )
        self._limits[key] = limit // 2
        self.halvings[key].append({"from": limit, "to": limit // 2})
        say(f"{key}: a batch of {limit} does not fit into the memory of {self._device}: going on with {limit // 2}")


def is_out_of_memory(error: RuntimeError) -> bool:
    """Return whether torch could not allocate: on a GPU by its own class, on the CPU by the allocator's name."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)

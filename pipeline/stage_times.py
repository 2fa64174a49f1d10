"""Where the time of an extraction goes: which of its stages holds the others up.

Stages overlap, so their shares need not add up to one. `decode` and `disk` are how long teachers waited for images and
for room to put their output; `teacher` and `copy` how long the device was busy with either.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch

Stage = Literal["decode", "teacher", "copy", "disk"]
STAGES: tuple[Stage, ...] = get_args(Stage)


@dataclass(frozen=True)
class Span:
    """Time on a lane: known at once on the CPU, on a GPU when its work is done."""

    start: Any
    end: Any

    def seconds(self) -> float:
        """Return the time between start and end, in seconds; on a GPU only once the end was reached."""
        if isinstance(self.start, float):
            return float(self.end - self.start)
        return float(self.start.elapsed_time(self.end)) / 1000


class Lane:
    """A CUDA stream; on the CPU nothing of that kind, work is done when it is asked for."""

    def __init__(self, device: torch.device, *, current: bool = False) -> None:
        self.stream: Any = None
        cuda: Any = torch.cuda
        if device.type == "cuda":
            self.stream = cuda.current_stream(device) if current else cuda.Stream(device)

    @contextmanager
    def work(self, spans: list[Span]) -> Iterator[None]:
        """Put the block's work on this lane and append the time that it takes."""
        if self.stream is None:
            began = time.perf_counter()
            yield
            spans.append(Span(began, time.perf_counter()))
            return
        cuda: Any = torch.cuda
        with cuda.stream(self.stream):
            start, end = cuda.Event(enable_timing=True), cuda.Event(enable_timing=True)
            start.record()
            yield
            end.record()
            spans.append(Span(start, end))

    def wait_for(self, other: Lane) -> None:
        """Let what is put on this lane from now on wait for what is on the other one now."""
        if self.stream is not None:
            self.stream.wait_stream(other.stream)

    def keep(self, tensor: torch.Tensor) -> None:
        """Tell the allocator that this lane uses a tensor of another lane's."""
        if self.stream is not None:
            tensor.record_stream(self.stream)


@dataclass
class StageTimes:
    """Seconds by stage. images: distinct ones that went through.  wall: seconds from start to end."""

    seconds: dict[Stage, float] = field(default_factory=lambda: dict.fromkeys(STAGES, 0.0))
    images: int = 0
    wall: float = 0.0

    @contextmanager
    def waiting(self, stage: Stage) -> Iterator[None]:
        """Count the block's time for a stage."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] += time.perf_counter() - start

    @property
    def shares(self) -> dict[Stage, float]:
        """The stages' shares of the wall time, in 0..1; all zero for a pass that did nothing."""
        return {stage: min(1.0, self.seconds[stage] / self.wall) if self.wall else 0.0 for stage in STAGES}

    @property
    def bottleneck(self) -> Stage:
        """The stage with the largest share."""
        return max(STAGES, key=lambda stage: self.seconds[stage])

    @property
    def images_per_second(self) -> float:
        """Images through all their teachers and views, a second."""
        return self.images / self.wall if self.wall else 0.0

    def facts(self) -> dict[str, Any]:
        """Return what provenance keeps of it."""
        return {
            "seconds": round(self.wall, 3),
            "images_per_second": round(self.images_per_second, 3),
            "bottleneck": self.bottleneck,
            "shares": {stage: round(share, 4) for stage, share in self.shares.items()},
        }

    def line(self) -> str:
        """Return one line that names the bottleneck."""
        first = self.bottleneck
        others = ", ".join(f"{stage} {share:.0%}" for stage, share in self.shares.items() if stage != first)
        rate = f"{self.images_per_second:.1f} images/s"
        return f"{rate}; bottleneck: {first}, {self.shares[first]:.0%} of the time ({others})"

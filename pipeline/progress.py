"""Progress on stderr: on a terminal a bar, gone when its work is done; off it a plain line now and then.

Results go to stdout, never here.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

_SECONDS_BETWEEN_LINES = 10.0
_silent = False


def silence() -> None:
    """Show no more progress from this process: of several that work together, the first one speaks."""
    global _silent
    _silent = True


class Tick(Protocol):
    """Called with how many units were done, and a short note that replaces the last one."""

    def __call__(self, done: int = 1, note: str = "") -> None:
        """Advance by `done` units."""


def say(text: str) -> None:
    """Print one line of progress."""
    if not _silent:
        print(text, file=sys.stderr, flush=True)


@contextmanager
def progress(what: str, total: int, unit: str = "images") -> Iterator[Tick]:
    """Show the progress of `total` units of work in the block."""
    if sys.stderr.isatty() and not _silent:
        with _bar(what, total, unit) as tick:
            yield tick
    else:
        yield _lines(what, total, unit)


class _Rate(ProgressColumn):
    """Units a second."""

    def render(self, task: Task) -> Text:
        """Return the rate over the last half minute."""
        return Text("" if task.speed is None else f"{task.speed:.1f}/s")


class _NotedProgress(Progress):
    """A bar with its note on a line of its own below it: beside the bar, 80 columns have no room for both."""

    def get_renderables(self) -> Iterable[RenderableType]:
        """Return the bar, and the note where there is one."""
        yield self.make_tasks_table(self.tasks)
        for task in self.tasks:
            if task.fields["note"]:
                yield Text(f"  {task.fields['note']}", no_wrap=True, overflow="ellipsis")


@contextmanager
def _bar(what: str, total: int, unit: str) -> Iterator[Tick]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TextColumn(unit),
        _Rate(),
        TextColumn("ETA"),
        TimeRemainingColumn(compact=True),
    )
    with _NotedProgress(*columns, console=Console(stderr=True), expand=True, transient=True) as bar:
        task = bar.add_task(what, total=total, note="")

        def tick(done: int = 1, note: str = "") -> None:
            bar.advance(task, done)
            if note:
                bar.update(task, note=note)

        yield tick


def _lines(what: str, total: int, unit: str) -> Tick:
    start = last = time.monotonic()
    count = 0

    def tick(done: int = 1, note: str = "") -> None:
        nonlocal count, last
        count += done
        now = time.monotonic()
        ended = count >= total > count - done  # more than was announced is told no second time
        if ended or now - last >= _SECONDS_BETWEEN_LINES:
            last = now
            rate = count / max(now - start, 1e-9)
            say(f"{what}: {count}/{total} {unit}, {rate:.1f} {unit}/s{', ' + note if note else ''}")

    return tick

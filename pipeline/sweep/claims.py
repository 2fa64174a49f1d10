"""Claims on runs: several processes and machines work through one folder, and no run is ever two's at a time.

A run's claims are numbered files, `claims/<run>.<number>.json`. The owner of a run is whoever made the highest one, as
long as it is alive; making the next one is how a run is taken, and the file system lets only one process make it
(O_CREAT | O_EXCL). No claim is ever moved or deleted, so nobody who looked a moment ago can take away what is another's
by now. Whoever holds a claim touches it now and then; a claim is dead when its process is, where that can be seen, else
when it was not touched for `STALE_SECONDS` by the clock of the file system, whatever the machines' clocks say.
"""

from __future__ import annotations

import json
import os
import re
import socket
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, Self
from uuid import uuid4

from pydantic import BaseModel, ConfigDict, ValidationError

from data.errors import TeachOnceError
from pipeline.sweep.processes import Process

State = Literal["running", "finished", "failed", "interrupted"]
HEARTBEAT_SECONDS = 15.0
STALE_SECONDS = 300.0


class ClaimNote(BaseModel):
    """What a claim says. seconds: that the run took while it was held; exit_code, message: how it failed."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    run: str
    state: State = "running"
    host: str
    owner: Process
    child: Process | None = None
    started: str
    seconds: float | None = None
    exit_code: int | None = None
    message: str | None = None


@dataclass
class Claim:
    """A run that this process holds."""

    path: Path
    number: int
    note: ClaimNote

    def update(self, **changes: object) -> None:
        """Write changes to the claim; nobody else ever writes to it."""
        self.note = ClaimNote.model_validate({**self.note.model_dump(), **changes})
        temporary = self.path.with_name(f".{self.path.name}.{uuid4().hex}")
        temporary.write_text(self.note.model_dump_json(indent=2) + "\n", encoding="utf-8")
        temporary.replace(self.path)


@dataclass(frozen=True)
class Found:
    """A run's newest claim as it lies there. note: None where it was just being written. modified: its file's time."""

    number: int
    path: Path
    note: ClaimNote | None
    modified: float


class Claims:
    """The claims of one sweep's folder."""

    def __init__(self, folder: Path, stale_seconds: float = STALE_SECONDS) -> None:
        self._folder = folder
        self._stale_seconds = stale_seconds
        folder.mkdir(parents=True, exist_ok=True)

    def take(self, run: str) -> Claim | None:
        """Return the claim on a run, None where it is another's."""
        newest = self.newest(run)
        if newest is not None and not self.is_dead(newest):
            return None
        number = 1 if newest is None else newest.number + 1
        path = self.path(run, number)
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        except FileExistsError:
            return None
        now = datetime.now(UTC).isoformat(timespec="seconds")
        note = ClaimNote(run=run, host=socket.gethostname(), owner=Process.this(), started=now)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(note.model_dump_json(indent=2) + "\n")
        return Claim(path, number, note)

    def path(self, run: str, number: int) -> Path:
        """Return the file of a claim."""
        return self._folder / f"{run}.{number}.json"

    def newest(self, run: str) -> Found | None:
        """Return a run's newest claim."""
        return max(self._all(run), key=lambda found: found.number, default=None)

    def notes(self, run: str) -> list[ClaimNote]:
        """Return what all claims on a run say, the oldest first."""
        found = sorted(self._all(run), key=lambda found: found.number)
        return [each.note for each in found if each.note is not None]

    def is_dead(self, found: Found) -> bool:
        """Return whether nobody works on the run any more: it ended, its process is gone, or it lies untouched.

        A run whose own process outlives the sweep that started it, for as long as that takes to notice, is not dead.
        """
        if found.note is not None:
            if found.note.state != "running":
                return True
            alive = [each.is_alive() for each in (found.note.owner, found.note.child) if each is not None]
            if any(alive) or None not in alive:
                return not any(alive)
        return self.now() - found.modified > self._stale_seconds

    def holds(self, claim: Claim) -> bool:
        """Return whether nobody took a run over from this process, as after a long sleep of the machine."""
        newest = self.newest(claim.note.run)
        return newest is not None and newest.number == claim.number

    def now(self) -> float:
        """Return the time by the file system's own clock."""
        probe = self._folder / f".clock-{uuid4().hex}"
        try:
            probe.touch()
            return probe.stat().st_mtime
        finally:
            probe.unlink(missing_ok=True)

    def _all(self, run: str) -> Iterator[Found]:
        pattern = re.compile(rf"{re.escape(run)}\.([0-9]+)\.json")
        for entry in os.scandir(self._folder):
            match = pattern.fullmatch(entry.name)
            if match is None:
                continue
            path = Path(entry.path)
            with suppress(FileNotFoundError):
                yield Found(int(match[1]), path, _read(path), path.stat().st_mtime)


class Heartbeat:
    """Touches held claims from a thread of its own, so that a long step of anything else does not let them go stale."""

    def __init__(self, seconds: float = HEARTBEAT_SECONDS) -> None:
        self._seconds = seconds
        self._held: set[Path] = set()
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="claims", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def hold(self, claim: Claim) -> None:
        """Touch this claim from now on."""
        with self._lock:
            self._held.add(claim.path)

    def drop(self, claim: Claim) -> None:
        """Touch it no more."""
        with self._lock:
            self._held.discard(claim.path)

    def _beat(self) -> None:
        while not self._ended.wait(self._seconds):
            with self._lock:
                held = list(self._held)
            for path in held:
                with suppress(OSError):
                    os.utime(path)  # no times given: on a network disk, its server's


def _read(path: Path) -> ClaimNote | None:
    try:
        return ClaimNote.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        raise
    except OSError as error:
        raise TeachOnceError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValidationError, json.JSONDecodeError):
        return None

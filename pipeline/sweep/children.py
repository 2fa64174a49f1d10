"""Starts runs as processes of their own: `cli.py train …`, each with its log, its share of the threads and a device."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from data.errors import TeachOnceError
from pipeline.sweep.folder import SweepFolder
from pipeline.sweep.processes import Process
from pipeline.sweep.settings import Places, TrainOptions
from pipeline.sweep.variants import Run

CLI = Path(__file__).resolve().parents[2] / "cli.py"
_LAUNCHER = Path(__file__).with_name("launch.py")
_TAIL_LINES = 12
_TAIL_BYTES = 16384


class Child(Protocol):
    """A run under way."""

    @property
    def process(self) -> Process | None:
        """Who it is."""

    def poll(self) -> int | None:
        """Return its exit code, negative for a signal; None while it runs."""

    def send(self, number: signal.Signals) -> None:
        """Send it a signal."""


class Runner(Protocol):
    """Starts runs."""

    def start(self, run: Run, *, resume: bool, slot: int) -> Child:
        """Start a run, or go on with it. slot: which of the runs beside each other it is, from 0."""


class TrainProcess:
    """A started `train`."""

    def __init__(self, command: Sequence[str], log: Path, environment: Mapping[str, str]) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("a", encoding="utf-8") as file:
            file.write(f"$ {shlex.join(command)}\n")
            file.flush()
            self._popen = subprocess.Popen(
                # Isolated and without site-packages: all it does is to become the command.
                [sys.executable, "-I", "-S", str(_LAUNCHER), str(os.getpid()), *command],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env={**os.environ, **environment},
                # Ctrl-C goes to the sweep alone, which passes it on: a run that got it twice would end without saving.
                start_new_session=True,
            )
        self.process = Process.of(self._popen.pid)

    def poll(self) -> int | None:
        """Return the exit code; None while it runs."""
        return self._popen.poll()

    def send(self, number: signal.Signals) -> None:
        """Send a signal."""
        self._popen.send_signal(number)


class TrainRunner:
    """Runs `cli.py train`. devices: shared out over the slots; none: what the options say."""

    def __init__(
        self, options: TrainOptions, places: Places, *, parallel: int = 1, devices: Sequence[str] = ()
    ) -> None:
        self._options = options
        self._places = places
        self._folder = SweepFolder(places.out)
        self._parallel = parallel
        self._devices = devices

    def start(self, run: Run, *, resume: bool, slot: int) -> TrainProcess:
        """Start a run."""
        arguments = self._options.arguments(run.options, self._places, run.name, run.seed)
        arguments += ["--resume"] if resume else []
        arguments += ["--device", self._devices[slot % len(self._devices)]] if self._devices else []
        return TrainProcess([sys.executable, str(CLI), *arguments], self._folder.log(run), self._environment())

    def _environment(self) -> dict[str, str]:
        if self._parallel == 1:
            return {}
        threads = str(max(1, len(os.sched_getaffinity(0)) // self._parallel))
        return {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", threads)}


def train_command(options: TrainOptions, places: Places, run: Run, *, resume: bool) -> str:
    """Return a run's command as one line for a shell."""
    arguments = options.arguments(run.options, places, run.name, run.seed)
    return shlex.join(["python", "cli.py", *arguments, *(["--resume"] if resume else [])])


def log_tail(log: Path) -> list[str]:
    """Return the last lines that a run said."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - _TAIL_BYTES))
            lines = file.read().decode("utf-8", errors="replace").splitlines()
    except OSError as error:
        raise TeachOnceError(f"{log}: cannot be read: {error.strerror}") from error
    return [line for line in lines if line.strip()][-_TAIL_LINES:]

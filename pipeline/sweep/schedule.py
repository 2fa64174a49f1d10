"""Works through a plan's runs: claims one, starts it, notes how it ended, until none is left that can be run."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType

from data.errors import StoreStaleError
from pipeline.progress import say
from pipeline.sweep.children import Child, Runner, log_tail
from pipeline.sweep.claims import Claim, Claims, Heartbeat
from pipeline.sweep.estimates import Estimates
from pipeline.sweep.folder import SweepFolder, result_of, status_of
from pipeline.sweep.standing import Standing
from pipeline.sweep.stores import Stores
from pipeline.sweep.telling import ending, finished_line, time_left, title
from pipeline.sweep.variants import Run

# Another try changes nothing about a wrong option, or a store or a checkpoint that is not what it should be.
_FINAL_CODES = (2, 3)


@dataclass(frozen=True)
class Rules:
    """How a plan is worked through. retries: further tries of a run that failed.

    poll_seconds: between two looks at the runs under way.  wait_seconds: between two looks for what others do.
    """

    parallel: int = 1
    retries: int = 2
    poll_seconds: float = 0.2
    wait_seconds: float = 2.0
    check_seconds: float = 15.0


@dataclass
class _Working:
    """A run under way here. tries: that ended.  lost: another process took it over."""

    run: Run
    claim: Claim
    child: Child
    slot: int
    began: float = field(default_factory=time.monotonic)
    tries: int = 0
    lost: bool = False


class Schedule:
    """Runs of a plan, worked through by this process, beside any others on the same folder.

    failed: why runs were given up, by name.
    """

    def __init__(
        self, standing: Standing, runner: Runner, claims: Claims, stores: Stores, rules: Rules = Rules()
    ) -> None:
        self._standing = standing
        self._folder = SweepFolder(standing.places.out)
        self._runner = runner
        self._claims = claims
        self._stores = stores
        self._rules = rules
        self._working: list[_Working] = []
        self._heartbeat = Heartbeat()
        self._began = claims.now()
        self._estimates = Estimates.of([r for r in standing.all_runs() if standing.is_finished(r)], claims)
        self._interruptions = 0
        self._checked = time.monotonic()
        self._wake = threading.Event()
        self.failed: dict[str, str] = {}

    def work(self) -> None:
        """Run what can be run.

        Raises KeyboardInterrupt once every run under way has saved and ended, where it was interrupted;
        StoreStaleError, likewise, where a store changed.
        """
        with self._heartbeat, self._noting_signals():
            try:
                while self._step():
                    pass
            finally:
                self._end_all()
        if self._interruptions:
            raise KeyboardInterrupt

    def _step(self) -> bool:
        """Do what is to be done now; return whether there may be more."""
        ended = [working for working in list(self._working) if self._reap(working)]
        if self._interruptions:
            return False
        if ended or not self._working:
            self._standing.refresh()
        started = self._start_some()
        # A run that is open and could not be started is another's, for now.
        if not self._working and not started and not any(map(self._is_open, self._standing.all_runs())):
            return False
        self._wake.wait(self._rules.poll_seconds if self._working else self._rules.wait_seconds)
        return True

    # Starting

    def _start_some(self) -> bool:
        before = len(self._working)
        for run in self._standing.all_runs():
            if len(self._working) >= self._rules.parallel or self._held_back():
                break
            if not self._is_open(run):
                continue
            claim = self._claims.take(run.name)
            if claim is not None:
                self._begin(run, claim)
        return len(self._working) > before

    def _is_open(self, run: Run) -> bool:
        mine = {working.run.name for working in self._working}
        return not self._standing.is_finished(run) and run.name not in self.failed and run.name not in mine

    def _held_back(self) -> bool:
        """Return whether a run is just writing the store of decoded images, which only one process can."""
        return any(
            working.run.config.cache_images is not None and not (working.run.config.run_dir / "config.json").exists()
            for working in self._working
        )

    def _begin(self, run: Run, claim: Claim) -> None:
        # Others may have finished it, or given it up, between the last look and the claim.
        if result_of(run) is not None:
            claim.update(state="finished", seconds=0.0)
            return
        earlier = self._given_up_since(run, claim)
        if earlier is not None:
            claim.update(state="failed", seconds=0.0, message=earlier)
            self.failed[run.name] = earlier
            return
        try:
            self._stores.refuse_changed()
            resume = status_of(run) == "started"
            slot = min(set(range(self._rules.parallel)) - {working.slot for working in self._working})
            child = self._runner.start(run, resume=resume, slot=slot)
        except BaseException:
            claim.update(state="interrupted", seconds=0.0)
            raise
        claim.update(child=child.process)
        self._heartbeat.hold(claim)
        self._working.append(_Working(run, claim, child, slot))
        say(f"{title(run)}: {'goes on' if resume else 'started'}")

    def _given_up_since(self, run: Run, claim: Claim) -> str | None:
        """Return why another process gave a run up since this one began; None where it may be tried."""
        notes = self._claims.notes(run.name)[:-1]
        if not notes or notes[-1].state != "failed":
            return None
        before = self._claims.path(run.name, claim.number - 1)
        return notes[-1].message if before.stat().st_mtime >= self._began else None

    # Ending

    def _reap(self, working: _Working) -> bool:
        """Note how a run ended; return whether it did."""
        code = working.child.poll()
        if code is None:
            self._check_held(working)
            return False
        if working.lost:
            self._working.remove(working)
            return True
        seconds = time.monotonic() - working.began
        result = result_of(working.run) if code == 0 else None
        if result is not None:
            self._close(working, state="finished", seconds=seconds)
            self._estimates.add(working.run.config, seconds)
            self._standing.refresh()
            left = time_left(self._standing, self._estimates, self._rules.parallel)
            say(finished_line(working.run, result, seconds, self._standing, left))
            return True
        if self._interruptions:
            self._close(working, state="interrupted", seconds=seconds)
            return True
        return self._failed(working, code, seconds)

    def _failed(self, working: _Working, code: int, seconds: float) -> bool:
        working.tries += 1
        run, log = working.run, self._folder.log(working.run)
        why = ending(code)
        if code == 3:
            try:
                self._stores.refuse_changed()
            except StoreStaleError:
                self._close(working, state="interrupted", seconds=seconds)
                raise
        if code not in _FINAL_CODES and working.tries <= self._rules.retries:
            say(f"{title(run)}: {why}; try {working.tries + 1} of {self._rules.retries + 1}")
            working.child = self._runner.start(run, resume=status_of(run) == "started", slot=working.slot)
            working.claim.update(child=working.child.process)
            return False
        why += f" after {working.tries} tries" if working.tries > 1 else ""
        tail = log_tail(log)
        errors = [line.removeprefix("error: ") for line in tail if line.startswith("error: ")]
        message = f"{why}: {(errors or tail or ['it said nothing'])[-1]}"
        self.failed[run.name] = message
        self._close(working, state="failed", seconds=seconds, exit_code=code, message=message)
        say("\n".join([f"{title(run)}: given up, {why}; the end of {log}:", *(f"  | {line}" for line in tail)]))
        return True

    def _close(self, working: _Working, **changes: object) -> None:
        self._heartbeat.drop(working.claim)
        working.claim.update(**changes, child=None)
        self._working.remove(working)

    def _check_held(self, working: _Working) -> None:
        """End a run that another process has taken over, which it may where this one slept for long."""
        now = time.monotonic()
        if now - self._checked < self._rules.check_seconds:
            return
        self._checked = now
        if not self._claims.holds(working.claim):
            working.child.send(signal.SIGKILL)
            working.lost = True
            self._heartbeat.drop(working.claim)
            say(f"{title(working.run)}: another process took it over, ended here")

    def _end_all(self) -> None:
        """Interrupt what is under way, and wait until it has saved; once more interrupted, it ends at once."""
        signals = (signal.SIGINT, signal.SIGINT, signal.SIGKILL)
        if self._working:
            self._interruptions = max(1, self._interruptions)
        sent = 0
        while self._working:
            while sent < min(self._interruptions, len(signals)):
                for working in self._working:
                    working.child.send(signals[sent])
                sent += 1
            for working in list(self._working):
                self._reap(working)
            self._wake.clear()
            self._wake.wait(self._rules.poll_seconds)

    @contextmanager
    def _noting_signals(self) -> Iterator[None]:
        """Only note Ctrl-C and a scheduler's SIGTERM in the block."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._interruptions += 1
        self._wake.set()
        if self._interruptions == 1:
            say("interrupted: the runs under way save and end; once more ends them at once")

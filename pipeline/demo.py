"""`demo`: the whole pipeline on a synthetic devkit, in one process, in a few minutes on two cores.

It draws images, extracts a store, works through a tiny plan from it and writes the sweep's report. It uses the real
default teachers where their weights are in the local hub cache or the hub answers within three seconds, else the
embedded ones, and says which.
"""

from __future__ import annotations

import shutil
import signal
from pathlib import Path
from typing import Any

from data.errors import UsageError
from data.hub import hub_answers
from data.synthetic import make_devkit
from data.voc import read_voc
from features.registry import is_available_locally
from pipeline.extract import ExtractConfig, extract
from pipeline.inspection import heatmap, inspect_store, summary_table
from pipeline.progress import say
from pipeline.sweep.closing import closing_parts, live_ratio
from pipeline.sweep.command import SweepRequest, run_sweep
from pipeline.sweep.variants import Run
from pipeline.teachers import DEFAULT_TEACHERS
from pipeline.train import train

EMBEDDED_TEACHERS = ("tiny_dino", "tiny_clip")
MARKER = "made-by-teachonce-demo"
PLAN = Path(__file__).resolve().parents[1] / "plans" / "demo.yaml"
CLASSES = ("bird", "car", "dog")
_NUM_TRAIN, _NUM_VAL = 32, 12


def run_demo(out: Path, device: str) -> list[Any]:
    """Make everything below `out` anew and return what to print at the end.

    Raises UsageError where `out` holds something that the demo did not make.
    """
    _clear(out)
    teachers, said = choose_teachers()
    say(said)
    voc_root = make_devkit(out / "VOCdevkit", num_train=_NUM_TRAIN, num_val=_NUM_VAL, classes=CLASSES)
    store = out / "teachers.zarr"
    extract(ExtractConfig(voc_root=voc_root, voc_sets=("2007:train",), out=store, teachers=teachers, device=device))
    picture = out / "teacher-heatmap.png"
    picture.write_bytes(heatmap(store, read_voc(voc_root, ("2007:train",), 1)[0].id, voc_root))
    done = run_sweep(
        SweepRequest(
            plan=PLAN,
            cached_teachers=(store,),
            voc_root=voc_root,
            out=out,
            overrides=(f"device={device}",),
            retries=0,
        ),
        InThisProcess(),
    )
    return [
        "",
        summary_table(inspect_store(store, verify=True)),
        "",
        f"teachers' features over their pixels: {picture}",
        f"more: tensorboard --logdir {out / 'runs'}   or the README's tour with real images",
        said,
        *closing_parts(done, live_ratio(done.collected, None, measure=True)),
    ]


class InThisProcess:
    """Starts runs of a sweep one after the other in this process: torch is loaded once, and progress is seen."""

    def start(self, run: Run, *, resume: bool, slot: int) -> Finished:
        """Run it to its end; what stops it stops the demo."""
        say(f"training {run.member.name}, seed {run.seed}")
        train(run.config, resume=resume)
        return Finished()


class Finished:
    """A run that is over."""

    process = None

    def poll(self) -> int:
        """Return the exit code of success."""
        return 0

    def send(self, number: signal.Signals) -> None:
        """Do nothing: it is over."""


def choose_teachers() -> tuple[tuple[str, ...], str]:
    """Return the teachers that can be had here, and that in plain words."""
    if all(is_available_locally(name) for name in DEFAULT_TEACHERS):
        return DEFAULT_TEACHERS, f"Teachers: {', '.join(DEFAULT_TEACHERS)}, trained, from the local hub cache."
    if hub_answers():
        return DEFAULT_TEACHERS, f"Teachers: {', '.join(DEFAULT_TEACHERS)}, trained, from the hub."
    return EMBEDDED_TEACHERS, (
        f"Teachers: {' and '.join(EMBEDDED_TEACHERS)}, embedded and UNTRAINED: the real ones are not in the local hub"
        " cache, and the hub does not answer."
    )


def _clear(out: Path) -> None:
    if out.exists():
        if any(out.iterdir()) and not (out / MARKER).is_file():
            raise UsageError(f"{out}: holds something that the demo did not make", hint="give another --out")
        shutil.rmtree(out)
    out.mkdir(parents=True)
    (out / MARKER).write_text("`python cli.py demo` deletes and remakes this folder.\n", encoding="utf-8")

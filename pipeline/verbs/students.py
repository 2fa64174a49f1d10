"""Verbs that train a student, look at one batch, and write the detector alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from data.errors import UsageError
from pipeline.options import JSON, PATH, options
from pipeline.verbs.verb import TrainingVerb, Verb, print_rich


@click.command(cls=TrainingVerb)
@options(
    click.option("--eval-every-epoch", "evaluate", flag_value="every-epoch", default="every-epoch",
                 help="Score the validation images after every epoch. [default]"),
    click.option("--eval-final-only", "evaluate", flag_value="final-only", help="Score them only at the end."),
    click.option("--run-name", help="Names the run's folders. [made from backbone, arm and seed]"),
    click.option("--resume", is_flag=True, help="Go on from the last saved step of --run-name."),
    click.option("--runs-dir", type=PATH, default="runs", show_default=True),
    click.option("--checkpoints-dir", type=PATH, default="checkpoints", show_default=True),
    JSON,
)  # fmt: skip
def train(resume: bool, as_json: bool, **flags: Any) -> None:
    """Train a student: baseline, cached or live teachers."""
    from pipeline.run_options import train_config

    if resume and not flags["run_name"]:
        raise UsageError("--resume needs to know which run", hint="name it with --run-name")
    config = train_config(flags)

    from pipeline.results import run_lines
    from pipeline.train import train as run_training

    result = run_training(config, resume=resume)
    if as_json:
        click.echo(json.dumps(result, indent=2))
        return
    for line in run_lines(result):
        click.echo(line)
    best = config.checkpoint_dir / "student_best.pth"
    click.echo(f"next: python cli.py eval --checkpoint {best} --visualize 8 --out {config.run_dir / 'pictures'}")


@click.command("debug-batch", cls=TrainingVerb)
def debug_batch(**flags: Any) -> None:
    """Print every loss of the first batch.

    With a store and --distill: of stored against live targets, and against the wrong view.
    """
    from pipeline.run_options import live_teachers, train_config

    nowhere = {"run_name": "debug-batch", "runs_dir": Path("runs"), "checkpoints_dir": Path("checkpoints")}
    config = train_config({**flags, **nowhere})
    live = None
    if flags["cached_teachers"] and flags["distill"]:
        live = live_teachers(flags["teachers"], flags["weights"], flags["untrained"])

    from pipeline.debug_batch import debug_batch as run
    from pipeline.debug_batch import losses_table

    print_rich(losses_table(run(config, live)))


@click.command(cls=Verb)
@options(
    click.option("--checkpoint", type=PATH, required=True, help="A student's checkpoint."),
    click.option("--out", type=PATH, required=True, help="The file to write; nothing is written over."),
    click.option("--format", type=click.Choice(["onnx", "torch"]),
                 help="ONNX, or a state dict for load_detector. [torch for .pth, else onnx]"),
    click.option("--opset", type=click.IntRange(16, 20), help="ONNX opset. [17]"),
    click.option("--check-images", type=click.IntRange(1), default=8, show_default=True, metavar="N",
                 help="Images to compare with PyTorch on."),
    click.option("--voc-root", type=PATH,
                 help="Folder that holds VOC2007. [the checkpoint's; drawn images where it is not there]"),
    click.option("--voc-set", "voc_sets", multiple=True,
                 help="Images to compare on. [the checkpoint's validation set]"),
)  # fmt: skip
def export(**flags: Any) -> None:
    """Write the detector alone, as ONNX or torch.

    Without the auxiliary head and training state. It is compared with PyTorch before it is there; exits 1, and writes
    nothing, where it finds something else.
    """
    from pipeline.export import ExportRequest, export_lines
    from pipeline.export import export as run

    for line in export_lines(run(ExportRequest(**flags))):
        click.echo(line)

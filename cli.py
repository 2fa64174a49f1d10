"""TeachOnce's command line: `python cli.py VERB`.

Progress goes to stderr, results to stdout. Exit codes: 0 ok; 1 operational failure; 2 usage; 3 store or checkpoint
missing, incomplete, stale or corrupt; 130 interrupted. Everything heavy is imported inside the verbs, so that `--help`
answers at once.
"""

from __future__ import annotations

import errno
import json
import os
import re
import sys
import traceback
from pathlib import Path
from typing import Any

import click

from data.errors import TeachOnceError, UsageError
from pipeline.options import DEVICE, JSON, PATH, UNTRAINED, VOC_ROOT, WEIGHTS, WORKERS, options


class Verb(click.Command):
    """A command that ends foreseeable mistakes with a message and an exit code; `--debug` adds the traceback."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.params.append(click.Option(["--debug"], is_flag=True, help="Show the traceback of an error."))

    def invoke(self, ctx: click.Context) -> None:
        """Run the verb."""
        debug = ctx.params.pop("debug")
        try:
            super().invoke(ctx)
            return
        except Exception as error:
            told = foreseen(error)
            if told is None:
                raise
            if debug:
                traceback.print_exc()
        message, code = told
        click.echo(f"error: {message}", err=True)
        ctx.exit(code)


class TrainingVerb(Verb):
    """A verb with the options of a run's configuration, which are read off its models when they are asked for."""

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        """Return the options, those of the configuration first."""
        if not self._complete:
            from pipeline.train_options import training_options

            self.params[:0] = training_options()
            self._complete = True
        return super().get_params(ctx)

    _complete = False


def foreseen(error: Exception) -> tuple[str, int] | None:
    """Return the message and the exit code of a failure that needs no traceback, None for any other."""
    if isinstance(error, TeachOnceError):
        return str(error), error.exit_code
    # Where the reader of a pipe has gone, click ends quietly.
    if isinstance(error, OSError) and error.errno != errno.EPIPE:
        return f"{error.filename or 'input or output'}: {error.strerror or error}", 1
    # torch's own class, which is not imported for this.
    if type(error).__name__ == "OutOfMemoryError":
        return "the device ran out of memory\n  next: lower --batch-size", 1
    return None


class Verbs(click.Group):
    """The group of verbs, listed in the order of use."""

    command_class = Verb

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the verbs in the order they are defined in."""
        return list(self.commands)


@click.group(cls=Verbs, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
def cli() -> None:
    """Run the teachers once, train students many times.

    Stage 1, extract-teachers, writes what frozen teachers say of Pascal VOC to a store; stage 2, train
    --cached-teachers, trains light detectors against it without loading a teacher again.
    """


def grid_cell(_: click.Context, __: click.Parameter, value: str | None) -> tuple[int, int] | None:
    """Return a ROW,COLUMN option as numbers."""
    match = re.fullmatch(r"([0-9]{1,4}),([0-9]{1,4})", value or "")
    if value is not None and match is None:
        raise click.BadParameter(f"expected ROW,COLUMN, as 12,7, found {value!r}")
    return None if match is None else (int(match[1]), int(match[2]))


def name_list(_: click.Context, __: click.Parameter, value: str | None) -> tuple[str, ...]:
    """Return a comma-separated option as its parts."""
    return tuple(part.strip() for part in (value or "").split(",") if part.strip())


def seed_list(context: click.Context, parameter: click.Parameter, value: str | None) -> tuple[int, ...]:
    """Return a comma-separated option as numbers, each once."""
    parts = name_list(context, parameter, value)
    if not all(part.isdecimal() for part in parts) or len(set(parts)) < len(parts) or (value and not parts):
        raise click.BadParameter(f"expected numbers from 0, each once, as 0,1,2, found {value!r}")
    return tuple(map(int, parts))


@cli.command()
@JSON
def teachers(as_json: bool) -> None:
    """List the teachers.

    What each gives, its size, grid and licence, and whether its weights are in the local hub cache.
    """
    from pipeline.teacher_list import closing_lines, list_teachers, teachers_table

    listed = list_teachers()
    if as_json:
        click.echo(json.dumps(listed, indent=2, ensure_ascii=False))
        return
    print_rich(teachers_table(listed), *closing_lines(listed))


@cli.command("extract-teachers")
@options(
    VOC_ROOT,
    click.option("--voc-set", "voc_sets", multiple=True, default=["2007:train"], show_default=True, help="Image set."),
    click.option("--out", type=PATH, default="data/teachers.zarr", show_default=True, help="The store."),
    click.option(
        "--teacher",
        "teachers",
        multiple=True,
        default=["dinov2_vits14", "clip_vitb32"],
        show_default=True,
        metavar="NAME|KEY=SPEC",
        help="Teacher; repeat for several.",
    ),
    click.option(
        "--view", "views", multiple=True, type=click.Choice(["original", "hflip"]), default=["original", "hflip"],
        show_default=True, help="View; repeat for several.",
    ),
    click.option("--dtype", type=click.Choice(["float16", "float32", "int8"]), default="float16", show_default=True,
                 help="Stored dtype of features."),
    click.option("--format", type=click.Choice(["zarr", "hdf5"]),
                 help="Container of a new store. [hdf5 for .h5 and .hdf5, else zarr]"),
    click.option("--shard-samples", type=click.IntRange(1, 65536), default=64, show_default=True,
                 help="Images a shard file holds."),
    click.option("--batch-size", type=click.IntRange(1), help="Images a teacher sees at once; recorded. [16]"),
    WORKERS,
    DEVICE,
    WEIGHTS,
    UNTRAINED,
    click.option("--precision", type=click.Choice(["float32", "bfloat16", "float16"]), default="float32",
                 show_default=True, help="What teachers compute in; part of their identity."),
    click.option("--prompts", type=PATH, metavar="FILE", help="Templates and class names for CLIP teachers (YAML)."),
    click.option("--limit", type=click.IntRange(1), help="First N images only."),
    click.option("--repair", is_flag=True, help="Verify every byte first; write what is damaged again."),
)  # fmt: skip
def extract_teachers(**flags: Any) -> None:
    """Run frozen teachers once and store what they say.

    Running it again resumes. Another teacher or view can be added to a store at any time.
    """
    from pipeline.extract import ExtractConfig, extract
    from pipeline.inspection import closing_lines, inspect_store, summary_table

    flags["views"] = tuple(dict.fromkeys(flags["views"]))
    config = ExtractConfig(**flags)
    done = extract(config)
    if done.rank > 0:
        return  # of several processes, the first one tells
    summary = inspect_store(config.out, verify=False)
    print_rich(summary_table(summary), *closing_lines(summary))
    for repair in done.repaired:
        how = "the same bytes" if repair.same_bytes else "OTHER BYTES than before; noted in its provenance"
        click.echo(f"repaired {repair.array}, shard {repair.shard}: {how}")
    cost = ", ".join(f"{key} {seconds:.1f} s" for key, seconds in done.seconds_by_teacher.items())
    click.echo(f"{done.computed} targets computed in {done.seconds:.1f} s ({cost})")
    if done.computed:
        click.echo(done.times.line())
    sets = " ".join(f"--voc-set {name}" for name in config.voc_sets)
    sets += "" if config.limit is None else f" --limit {config.limit}"
    click.echo(f"next: python cli.py train --voc-root {config.voc_root} {sets} --cached-teachers {config.out}")


@cli.command(cls=TrainingVerb)
@options(
    click.option("--eval-every-epoch", "evaluate", flag_value="every-epoch", default="every-epoch",
                 help="Score the validation images after every epoch. [default]"),
    click.option("--eval-final-only", "evaluate", flag_value="final-only", help="Score them only at the end."),
    click.option("--run-name", help="Names the run's folders. [made from backbone, arm and seed]"),
    click.option("--resume", is_flag=True, help="Go on from the last finished epoch of --run-name."),
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


@cli.command()
@options(
    click.argument("plan", type=PATH),
    click.option("--cached-teachers", type=PATH, multiple=True, is_flag=False, flag_value="data/teachers.zarr",
                 metavar="[STORE]", help="What the plan's arms distil from; repeat to join several."),
    click.option("--voc-root", type=PATH, help="Folder that holds VOC2007. [the plan's, or data/VOCdevkit]"),
    click.option("--out", type=PATH, help="Folder of everything it makes. [sweeps/NAME of the plan]"),
    click.option("--set", "overrides", multiple=True, metavar="OPTION=VALUE", help="Option of every run."),
    click.option("--seeds", callback=seed_list, metavar="0,1,2", help="Instead of the plan's."),
    click.option("--parallel", type=click.IntRange(1), metavar="K", help="Runs beside each other. [one a device]"),
    click.option("--devices", callback=name_list, metavar="cuda:0,cuda:1", help="Devices to share them out over."),
    click.option("--retries", type=click.IntRange(0), default=2, show_default=True, help="More tries of a failed run."),
    click.option("--dry-run", is_flag=True, help="Check everything; show the runs, and what they will take."),
    click.option("--emit-commands", is_flag=True, help="Print a line a run, for a scheduler."),
    click.option("--live-ratio", type=click.FloatRange(0, min_open=True), metavar="X",
                 help="A step with live teachers takes X times as long: for the break-even."),
    click.option("--measure-live", is_flag=True, help="Measure that on a few steps, once the runs are done."),
    JSON,
)  # fmt: skip
def sweep(
    dry_run: bool, emit_commands: bool, live_ratio: float | None, measure_live: bool, as_json: bool, **flags: Any
) -> None:
    """Work through an experiment plan, every run from the store.

    PLAN is a YAML file: arms, grids, seeds; see plans/ and docs/sweeps.md. Running it again goes on: finished runs are
    skipped, interrupted ones resumed. Several processes and machines may share the folder. Exits 1 where a run failed.
    """
    from pipeline.sweep.command import SweepRequest, prepare, run_sweep

    request = SweepRequest(**flags)
    if emit_commands:
        for line in prepare(request).commands():
            click.echo(line)
        return
    if dry_run:
        from pipeline.sweep.dry_run import forecast, forecast_json, forecast_parts

        standing = prepare(request).standing
        ahead = forecast(standing)
        if as_json:
            click.echo(json.dumps(forecast_json(standing, ahead), indent=2))
        else:
            print_rich(*forecast_parts(standing, ahead, request.num_parallel))
        return
    from pipeline.sweep import closing

    done = run_sweep(request)
    live = closing.live_ratio(done.collected, live_ratio, measure_live)
    parts = closing.closing_parts(done, live)
    if as_json:
        click.echo(json.dumps(closing.sweep_json(done), indent=2))
    else:
        print_rich(*parts)
    click.get_current_context().exit(1 if done.failed else 0)


@cli.command("eval")
@options(
    click.option("--checkpoint", type=PATH, help="A student's checkpoint."),
    click.option("--detections", type=PATH, metavar="DIR|FILE.json",
                 help="Or: a folder of <prefix>_<class>.txt files, or COCO's results."),
    click.option("--compare", type=PATH, nargs=2, metavar="A B",
                 help="Or: two of these, or of runs' folders: B − A with intervals."),
    click.option("--detail", is_flag=True, help="Intervals, kinds of mistakes and what they cost, calibration."),
    click.option("--backbone", help="Insist on this backbone."),
    click.option("--voc-root", type=PATH, help="Folder that holds VOC2007. [the checkpoint's, or data/VOCdevkit]"),
    click.option("--voc-set", "voc_sets", multiple=True, help="Images to score. [the checkpoint's validation set]"),
    click.option("--metric", type=click.Choice(["voc", "voc07", "coco"]), default="voc", show_default=True,
                 help="All-point area or 11-point AP by the devkit's rules, or COCO's."),
    click.option("--save-detections", type=PATH, metavar="DIR|FILE.json",
                 help="Write them in the devkit's format or as COCO's results."),
    click.option("--visualize", type=click.IntRange(0), default=0, metavar="N", help="Draw N images."),
    click.option("--out", type=PATH, default="pictures", show_default=True, help="Folder of the pictures."),
    click.option("--agreement", "agreement_stores", type=PATH, multiple=True, metavar="STORE",
                 help="Also: how close the student is to its stored teachers on these images."),
    click.option("--feature-teacher", metavar="KEY", help="Whose features. [those it was distilled from]"),
    click.option("--logit-teacher", metavar="KEY", help="Whose logits. [those it was distilled from]"),
    WORKERS,
    DEVICE,
    JSON,
)  # fmt: skip
def evaluate_verb(
    checkpoint: Path | None,
    detections: Path | None,
    compare: tuple[Path, Path] | None,
    detail: bool,
    agreement_stores: tuple[Path, ...],
    feature_teacher: str | None,
    logit_teacher: str | None,
    as_json: bool,
    **flags: Any,
) -> None:
    """Score a checkpoint or files of detections, or compare two.

    By the devkit's rules or COCO's. Scoring --detections needs the annotations only: no images, no torch.
    """
    from pipeline.agreement_options import open_agreement
    from pipeline.scoring import ScoreRequest, score

    if [checkpoint, detections, compare].count(None) != 2:
        raise UsageError("give one of --checkpoint, --detections and --compare")
    request = ScoreRequest(checkpoint=checkpoint, detections=detections, **flags)
    teachers = open_agreement(checkpoint, agreement_stores, feature_teacher, logit_teacher, flags)
    if compare is not None:
        if detail:
            raise UsageError("--detail goes with one detector: --checkpoint or --detections")
        _print_comparison(compare, request, as_json)
        return
    found = None
    if detail:
        from pipeline.detail import score_in_detail

        result, found, notes = score_in_detail(request)
    else:
        result, notes = score(request)
    agreement = None if teachers is None else teachers.measure()
    if teachers is not None:
        notes += teachers.draw(flags["out"], flags["visualize"])
    if as_json:
        added = {} if found is None else {"detail": found.to_json()}
        added |= {} if agreement is None else {"agreement": agreement.to_json()}
        click.echo(json.dumps(result.to_json() | added, indent=2))
    else:
        from evaluation.table import result_table

        parts = [part for part in (found, agreement) if part is not None]
        print_rich(result_table(result), *(table for part in parts for table in part.tables()))
    for note in notes:
        click.echo(note, err=as_json)


def _print_comparison(pair: tuple[Path, Path], request: Any, as_json: bool) -> None:
    from pipeline.comparison import compare

    comparison = compare(pair, request)
    if as_json:
        click.echo(json.dumps(comparison.to_json(), indent=2))
    else:
        print_rich(*comparison.tables())
    for note in comparison.notes:
        click.echo(note, err=as_json)


@cli.command()
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
    """Write a student's detector alone, as ONNX or as a torch file.

    Without the auxiliary head and training state. It is compared with PyTorch before it is there; exits 1, and writes
    nothing, where it finds something else.
    """
    from pipeline.export import ExportRequest, export_lines
    from pipeline.export import export as run

    for line in export_lines(run(ExportRequest(**flags))):
        click.echo(line)


@cli.command("inspect-cache")
@options(
    click.argument("store", type=PATH),
    JSON,
    click.option("--verify", is_flag=True, help="Read every byte; compare checksums and digests."),
    click.option("--voc-root", type=PATH, help="Are these the images it was made from? With --sample: draw its image."),
    click.option("--voc-set", "voc_sets", multiple=True, help="Images to train on. [those it was made from]"),
    click.option("--sample", "samples", multiple=True, metavar="ID",
                 help="Draw this sample's features, as VOC2007/000005; repeat for several."),
    click.option("--heatmap", type=PATH, metavar="PNG", help="Where to."),
    click.option("--teacher", metavar="KEY", help="Whose features to draw. [the first that has some]"),
    click.option("--view", type=click.Choice(["original", "hflip"]), default="original", show_default=True,
                 help="View to draw."),
    click.option("--cell", callback=grid_cell, metavar="ROW,COLUMN",
                 help="Compare with this cell, counted from 0. [the largest object's centre, else the grid's]"),
)  # fmt: skip
def inspect_cache(
    store: Path, as_json: bool, verify: bool, voc_root: Path | None, voc_sets: tuple[str, ...],
    samples: tuple[str, ...], heatmap: Path | None, **drawn: Any,
) -> None:  # fmt: skip
    """Show what a store holds and whether it is whole.

    Exits 3 unless it is complete. What a training run would miss is told too.
    """
    from pipeline import inspection

    go_together = "--sample VOC2007/000005 --heatmap sample.png"
    if bool(samples) != (heatmap is not None):
        raise UsageError("--sample and --heatmap go together", hint=go_together)
    if (drawn["teacher"] or drawn["cell"]) and not samples:
        raise UsageError("--teacher and --cell are for --sample", hint=go_together)
    if voc_sets and voc_root is None:
        voc_root = Path("data/VOCdevkit")
    if heatmap is not None:
        heatmap.write_bytes(inspection.heatmap(store, samples, voc_root, **drawn))
        click.echo(f"wrote {heatmap}")
        return
    summary = inspection.inspect_with_progress(store, verify=verify, voc_root=voc_root, voc_sets=voc_sets)
    if as_json:
        click.echo(json.dumps(summary, indent=2))
    else:
        print_rich(inspection.summary_table(summary), *inspection.closing_lines(summary))
    click.get_current_context().exit(0 if summary["status"] == "complete" else 3)


@cli.command("convert-cache")
@options(
    click.argument("source", metavar="SRC", type=PATH),
    click.argument("out", metavar="DST", type=PATH),
    click.option("--dtype", type=click.Choice(["float16", "float32", "int8"]),
                 help="Stored dtype of features. [that of SRC]"),
    click.option("--pca", type=click.IntRange(1), metavar="R", help="Project features on R principal components."),
    click.option("--fit-set", "fit_sets", multiple=True, metavar="2007:train",
                 help="Images to fit them on. [all of SRC]"),
    VOC_ROOT,
    click.option("--teacher", "teachers", multiple=True, metavar="KEY", help="Teacher to take over. [all]"),
    click.option("--view", "views", multiple=True, type=click.Choice(["original", "hflip"]),
                 help="View to take over. [all]"),
    click.option("--format", type=click.Choice(["zarr", "hdf5"]),
                 help="Container of a new store. [hdf5 for .h5 and .hdf5, else zarr]"),
    click.option("--shard-samples", type=click.IntRange(1, 65536), help="Images a shard file holds. [as SRC]"),
    click.option("--repair", is_flag=True, help="Verify every byte of DST first; write what is damaged again."),
)  # fmt: skip
def convert_cache(**flags: Any) -> None:
    """Write a smaller store, DST, derived from SRC.

    Running it again resumes. Prints what was saved and how close the targets still are.
    """
    from pipeline.convert import ConvertConfig, conversion_lines, conversion_table, convert

    done = convert(ConvertConfig(**flags))
    print_rich(conversion_table(done), *conversion_lines(done))


@cli.command("relabel-logits")
@options(
    click.argument("store", type=PATH),
    click.option("--prompts", type=PATH, required=True, metavar="FILE", help="Templates and class names (YAML)."),
    click.option("--teacher", metavar="KEY", help="Whose embeddings to use, where several teachers have some."),
    click.option("--as", "key", metavar="KEY", help="Key of the new teacher. [the teacher's and the file's name]"),
    WEIGHTS,
    UNTRAINED,
    click.option("--logit-scale", type=float, help="Factor on the cosines. [the teacher's own]"),
    click.option("--voc-root", type=PATH,
                 help="Judge the logits by these annotations. [data/VOCdevkit, where it is there]"),
    click.option("--voc-set", "voc_sets", multiple=True, help="Images to judge them on. [those of the store]"),
    click.option("--repair", is_flag=True, help="Verify the new teacher's bytes first; write what is damaged again."),
)  # fmt: skip
def relabel_logits(**flags: Any) -> None:
    """Make new logits from stored embeddings and other prompts.

    Adds a teacher to the store in seconds; no image is looked at. Running it again resumes.
    """
    from pipeline.relabel import RelabelConfig, relabel, relabel_lines

    for line in relabel_lines(relabel(RelabelConfig(**flags))):
        click.echo(line)


@cli.command()
@options(
    click.option("--out", type=PATH, default="demo", show_default=True, help="Folder of everything it makes."),
    DEVICE,
)
def demo(out: Path, device: str) -> None:
    """Show the whole pipeline on drawn images, in minutes."""
    from pipeline.demo import run_demo

    print_rich(*run_demo(out, device))


@cli.command("debug-batch", cls=TrainingVerb)
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


@cli.command("report")
@options(
    click.argument("runs", metavar="RUN…", nargs=-1, required=True, type=PATH),
    click.option("--out", type=PATH, default="report.html", show_default=True, help="The file to write."),
    click.option("--voc-root", type=PATH, help="Folder that holds VOC2007. [the runs' own]"),
    click.option("--baseline", metavar="RUN", help="Compare with this one. [the first without distillation]"),
    click.option("--images", type=click.IntRange(0), default=24, show_default=True, metavar="N",
                 help="Pictures, of the images that matter most; 0 for none."),
    click.option("--set", "image_set", type=click.Choice(["val", "test"]), default="val", show_default=True,
                 help="Report the validation or the test images."),
    click.option("--resamples", type=click.IntRange(100), default=1000, show_default=True, metavar="N",
                 help="Behind each interval over images."),
)  # fmt: skip
def report_verb(**flags: Any) -> None:
    """Compare finished runs in one HTML file.

    RUN is a run's folder, as runs/baseline-s0. The file needs nothing beside it and can be mailed.
    """
    from pipeline.report import ReportRequest, write_report

    for line in write_report(ReportRequest(**flags)):
        click.echo(line)


@cli.command("make-synthetic-voc")
@options(
    click.argument("folder", type=PATH),
    click.option("--train", "num_train", type=click.IntRange(1), default=64, show_default=True),
    click.option("--val", "num_val", type=click.IntRange(0), default=32, show_default=True),
    click.option("--test", "num_test", type=click.IntRange(0), default=0, show_default=True),
    click.option("--empty", "num_empty", type=click.IntRange(0), default=0, show_default=True,
                 help="Images without objects."),
    click.option("--class", "classes", multiple=True, help="Draw only these classes. [all twenty]"),
    click.option("--seed", type=click.IntRange(0), default=0, show_default=True),
)  # fmt: skip
def make_synthetic_voc(folder: Path, classes: tuple[str, ...], **flags: Any) -> None:
    """Write a devkit of drawn shapes to FOLDER."""
    from data.records import VOC_CLASSES
    from data.synthetic import make_devkit

    made = make_devkit(folder, classes=classes or VOC_CLASSES, **flags)
    click.echo(f"wrote {made}")
    click.echo(f"next: python cli.py extract-teachers --voc-root {made} --teacher tiny_dino --teacher tiny_clip")


@cli.command("check-voc")
@options(
    VOC_ROOT,
    click.option("--voc-set", "voc_sets", multiple=True, default=["2007:trainval"], show_default=True),
    click.option("--annotations-only", is_flag=True, help="Do not decode the images."),
)
def check_voc(voc_root: Path, voc_sets: tuple[str, ...], annotations_only: bool) -> None:
    """List everything that is wrong with image sets.

    Exits 1 where anything is.
    """
    from pipeline.checking import check_with_progress, report_lines

    report = check_with_progress(voc_root, voc_sets, decode=not annotations_only)
    for line in report_lines(report):
        click.echo(line)
    click.get_current_context().exit(1 if any(p.level == "error" for p in report.problems) else 0)


@cli.command("download-voc")
@options(
    VOC_ROOT,
    click.option("--year", type=click.IntRange(2007, 2012), default=2007, show_default=True),
    click.option("--image-set", default="trainval", show_default=True, help="train, val, trainval or test."),
)
def download_voc(voc_root: Path, year: int, image_set: str) -> None:
    """Download Pascal VOC (torchvision's downloader)."""
    from data.download import download_voc as download

    click.echo(f"{download(voc_root, year, image_set)} is there")


def print_rich(*renderables: Any) -> None:
    """Print tables to stdout, at the terminal's width or 80 columns off one."""
    from rich.console import Console

    # No markup: a path may well hold square brackets.
    console = Console(width=None if sys.stdout.isatty() else 80, markup=False)
    for renderable in renderables:
        if isinstance(renderable, str):
            click.echo(renderable)  # unwrapped: paths and commands are there to be copied
        else:
            console.print(renderable)


def main() -> int:
    """Run the command line and return the exit code."""
    # Before torch loads OpenMP: threads that wait give their core up soon, so that runs beside each other do not spin
    # against each other (docs/decisions/0007).
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    try:
        result = cli.main(standalone_mode=False)
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted: what was finished is kept; the same command goes on (train: with --resume)", err=True)
        return 130
    return result if isinstance(result, int) else 0


if __name__ == "__main__":
    sys.exit(main())

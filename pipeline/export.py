"""`export`: the detector of a checkpoint alone, as ONNX or as a torch file, checked on images before it is there."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from data.errors import ExportError, UsageError
from data.geometry import FRAME_SIZE
from pipeline.checkpoint import load_checkpoint
from pipeline.export_formats import describe, load_detector, onnx_model, torch_file
from pipeline.onnx_check import (
    BOX_TOLERANCE_PX,
    SCORE_TOLERANCE,
    Agreement,
    CheckImages,
    FrameDetections,
    can_run_onnx,
    check_images,
    compare,
    onnx_detections,
    student_detections,
)
from pipeline.text_tables import readable_size

DEFAULT_OPSET = 17
ExportFormat = Literal["onnx", "torch"]

_INSTALL_ONNX = "python -m pip install 'onnx>=1.17' onnxruntime"
_INSTALL_RUNTIME = "python -m pip install onnxruntime"


@dataclass(frozen=True)
class ExportRequest:
    """What `export` was asked for; every field is one of its options.

    format: by default `torch` for an `out` that ends in .pth, else `onnx`.  opset: of ONNX, 17 by default.
    """

    checkpoint: Path
    out: Path
    format: ExportFormat | None = None
    opset: int | None = None
    check_images: int = 8
    voc_root: Path | None = None
    voc_sets: tuple[str, ...] = ()

    @property
    def chosen_format(self) -> ExportFormat:
        """The format, with the choice made."""
        return self.format or ("torch" if self.out.suffix == ".pth" else "onnx")


@dataclass(frozen=True)
class Exported:
    """What was written. opset: None for a torch file. agreement: None where nothing here can run the model."""

    path: Path
    size_bytes: int
    description: dict[str, Any]
    opset: int | None
    checked_on: str
    agreement: Agreement | None


def export(request: ExportRequest) -> Exported:
    """Write a checkpoint's detector and return what was written; `out` is there checked and whole, or not at all.

    Raises UsageError, CheckpointError, DatasetError, and ExportError for a backbone that cannot be exported, a file
    that cannot be written, a missing `onnx` package, and a model that finds something else than PyTorch.
    """
    as_onnx = request.chosen_format == "onnx"
    _refuse_taken(request.out)
    if as_onnx and importlib.util.find_spec("onnx") is None:
        raise ExportError("ONNX export needs the package onnx, which is not installed", hint=_INSTALL_ONNX)
    if not as_onnx and request.opset is not None:
        raise UsageError("--opset is for ONNX; a torch file has none", hint="drop --opset, or give --format onnx")
    checkpoint = load_checkpoint(request.checkpoint)
    student = checkpoint.build_student(torch.device("cpu"))
    images = check_images(checkpoint.config, request.check_images, request.voc_root, request.voc_sets)
    description = describe(request.checkpoint, checkpoint, student)
    opset = (request.opset or DEFAULT_OPSET) if as_onnx else None
    content = torch_file(student, description) if opset is None else onnx_model(student, description, opset)

    def check(path: Path) -> Agreement | None:
        if as_onnx and not can_run_onnx():
            return None
        found = onnx_detections(path, images) if as_onnx else _detector_detections(path, images)
        return _require_agreement(compare(student_detections(student, images), found, images.ids), request.out)

    agreement = _write_checked(request.out, content, check)
    return Exported(request.out, len(content), description, opset, images.what, agreement)


def export_lines(done: Exported) -> list[str]:
    """Return what was written, how close it is to PyTorch, and the next command, one line each."""
    kind = "torch file" if done.opset is None else f"ONNX, opset {done.opset}"
    known = done.description
    lines = [
        f"wrote {done.path}: {known['backbone']}, run {known['run_name']}, epoch {known['epoch']};"
        f" {kind}, {readable_size(done.size_bytes)}"
    ]
    if known["untrained_teachers"]:
        lines.append(f"UNTRAINED teachers: {', '.join(known['untrained_teachers'])}")
    if done.agreement is None:
        return [*lines, "NOT compared with PyTorch: onnxruntime is not installed", f"next: {_INSTALL_RUNTIME}"]
    lines.extend(_agreement_lines(done.agreement, done.checked_on))
    return [*lines, f"next: python -c {shlex.quote(_first_run(done))}"]


def _first_run(done: Exported) -> str:
    """Return a line of Python that runs what was written on an empty image."""
    path, size = json.dumps(str(done.path), ensure_ascii=False), ", ".join(map(str, FRAME_SIZE))
    if done.opset is None:
        return (
            "import torch; from pathlib import Path; from pipeline.export_formats import load_detector;"
            f" print(load_detector(Path({path}))([torch.zeros(3, {size})]))"
        )
    run = f'run(None, {{"image": n.zeros((1, 3, {size}), "f")}})'
    return f"import numpy as n, onnxruntime as o; print(o.InferenceSession({path}).{run})"


def _agreement_lines(agreement: Agreement, checked_on: str) -> list[str]:
    images = f"{agreement.images} image{'s' * (agreement.images != 1)} {checked_on}"
    if not agreement.detections:
        return [f"compared with PyTorch on {images}: neither finds anything there, which says little"]
    lines = [
        f"compared with PyTorch on {images}: {agreement.detections} detections,"
        f" boxes within {agreement.box_px:.1e} px, scores within {agreement.score:.1e}"
    ]
    if agreement.reordered or agreement.unpaired:
        lines.append(
            f"near-ties that fell the other way: {agreement.reordered} detections in another order,"
            f" {agreement.unpaired} without a counterpart"
        )
    return lines


def _detector_detections(path: Path, images: CheckImages) -> list[FrameDetections]:
    detector = load_detector(path)
    with torch.inference_mode():
        results = [detector([frame[0]])[0] for frame in images.frames]
    return [FrameDetections(*(found[name].numpy() for name in ("boxes", "labels", "scores"))) for found in results]


def _require_agreement(agreement: Agreement, out: Path) -> Agreement:
    if not agreement.holds:
        raise ExportError(
            f"{out}: not written: expected PyTorch's detections (equal labels, boxes within {BOX_TOLERANCE_PX:g} px,"
            f" scores within {SCORE_TOLERANCE:g}), found {agreement.unpaired} without a counterpart where PyTorch has"
            f" {agreement.detections}; {agreement.first_unpaired}",
            hint="try another --opset or onnxruntime, or --format torch",
        )
    return agreement


def _refuse_taken(out: Path) -> None:
    if out.is_dir():
        raise UsageError(f"{out}: expected a file to write, found a folder", hint=f"--out {out / 'student.onnx'}")
    if out.exists() or out.is_symlink():
        raise UsageError(
            f"{out}: something is here already; an export is never written over it",
            hint="choose another --out, or remove this file first",
        )


def _write_checked(out: Path, content: bytes, check: Callable[[Path], Agreement | None]) -> Agreement | None:
    """Write beside `out`, check what was written, then give it its name."""
    temporary = out.with_name(f".{out.name}.tmp-{os.getpid()}")
    try:
        with _telling_of(out):
            out.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        agreement = check(temporary)
        with _telling_of(out):
            temporary.replace(out)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
    return agreement


@contextlib.contextmanager
def _telling_of(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ExportError(
            f"{out}: cannot be written ({error.strerror or error})", hint="free some space, or choose another --out"
        ) from error

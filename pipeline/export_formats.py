"""The two forms a student's detector is exported in. Neither holds the auxiliary logit head, nor anything of training.

ONNX: input `image` [1, 3, 480, 480] float32, RGB in [0, 1], the whole image squashed to the frame; it is normalised in
the graph. Outputs `boxes` [n, 4] xyxy in frame px, `labels` [n] int64 in 1..20, `scores` [n] falling; n may be 0. One
image a call: torchvision goes through a batch in a Python loop, which a trace unrolls. The description is its metadata.

torch file: `detector_format`, `student` (a `StudentConfig`), `detector` (the state dict) and the description;
`load_detector` reads it.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.jit import TracerWarning  # type: ignore[attr-defined]  # torch's own declarations forget it

from data.errors import CheckpointError, ExportError
from data.geometry import FRAME_SIZE
from data.records import VOC_CLASSES
from pipeline.checkpoint import Checkpoint
from students.config import StudentConfig
from students.detector import Student, build_student

DETECTOR_FORMAT = 1
_OUTPUTS = ("boxes", "labels", "scores")
# What the exporter says of any torchvision detector: that it is deprecated, and that the trace fixes shapes and
# constants, which on the one frame it should. The comparison with PyTorch is what tells whether it did so rightly.
_EXPORTER_SAYS = (
    (TracerWarning, ""),
    (DeprecationWarning, "You are using the legacy TorchScript-based ONNX export"),
    (DeprecationWarning, "The feature will be removed"),
    (Warning, r"`torch\.jit\.script` is deprecated"),
    (UserWarning, "Exporting aten::index operator of advanced indexing in opset"),
    (UserWarning, "Constant folding - Only steps=1 can be constant folded"),
)


def describe(path: Path, checkpoint: Checkpoint, student: Student) -> dict[str, Any]:
    """Return what an export of the checkpoint at `path` says of itself. class_names: that of label k at k − 1."""
    body = student.detector.backbone.body
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {
        "backbone": checkpoint.config.student.backbone,
        "class_names": list(VOC_CLASSES),
        "frame": list(FRAME_SIZE),
        "mean": list(body.mean),
        "std": list(body.std),
        "run_name": checkpoint.config.run_name,
        "epoch": checkpoint.epoch,
        "checkpoint_sha256": digest,
        "untrained_teachers": list(checkpoint.targets.get("untrained") or ()),
    }


def onnx_model(student: Student, description: dict[str, Any], opset: int) -> bytes:
    """Return an ONNX model of a student in evaluation mode, checked by onnx; the description is its metadata.

    Raises ExportError where the exporter has no words for the backbone, or the model is larger than 2 GB.
    """
    import onnx

    try:
        model = onnx.load_from_string(_traced(student, opset))
        model.producer_name = "TeachOnce"
        model.graph.output[0].type.tensor_type.shape.dim[1].dim_value = 4  # the trace gives this axis a name instead
        texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in description.items()}
        onnx.helper.set_model_props(model, texts)
        onnx.checker.check_model(model, full_check=True)
    except (RuntimeError, onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ExportError(
            f"{student.config.backbone}: cannot be exported to ONNX opset {opset} ({first})",
            hint="try another --opset, or --format torch",
        ) from error
    return bytes(model.SerializeToString(deterministic=True))


def torch_file(student: Student, description: dict[str, Any]) -> bytes:
    """Return the bytes of a torch file of the student's detector; see the module's text."""
    content = {
        "detector_format": DETECTOR_FORMAT,
        "student": student.config.without_weights().model_dump(mode="json"),
        "detector": student.detector.state_dict(),
        **description,
    }
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def load_detector(path: Path) -> nn.Module:
    """Return the detector of an exported torch file: torchvision's Faster R-CNN, in evaluation mode, on the CPU.

    It takes a list of images [3, 480, 480] in [0, 1] and returns a dict an image, as `Student` does.

    Raises CheckpointError for a file that is missing, damaged, or something else.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        if content["detector_format"] != DETECTOR_FORMAT:
            raise CheckpointError(f"{path}: expected format {DETECTOR_FORMAT}, found {content['detector_format']}")
        detector: nn.Module = build_student(StudentConfig.model_validate(content["student"])).detector
        detector.load_state_dict(content["detector"])
    except CheckpointError:
        raise
    except Exception as error:  # the unpickler raises whatever the damage makes of it
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(
            f"{path}: cannot be read as an exported detector ({first})",
            hint="make one: python cli.py export --checkpoint FILE --out detector.pth",
        ) from error
    return detector.eval()


def _traced(student: Student, opset: int) -> bytes:
    buffer = io.BytesIO()
    with warnings.catch_warnings(), torch.no_grad(), _silent_stdout():
        for category, message in _EXPORTER_SAYS:
            warnings.filterwarnings("ignore", message, category)
        torch.onnx.export(
            _OneImage(student).eval(),
            (torch.zeros(1, 3, *FRAME_SIZE),),
            buffer,  # type: ignore[arg-type]  # declared for the other exporter only
            dynamo=False,  # the other exporter fails on Faster R-CNN
            opset_version=opset,
            input_names=["image"],
            output_names=list(_OUTPUTS),
            dynamic_axes={name: {0: "detections"} for name in _OUTPUTS},
        )
    return buffer.getvalue()


@contextlib.contextmanager
def _silent_stdout() -> Iterator[None]:
    """Keep the block's C++ from stdout: where the exporter fails, it prints the whole graph there, half a megabyte."""
    kept = os.dup(1)
    try:
        with Path(os.devnull).open("wb") as nowhere:
            os.dup2(nowhere.fileno(), 1)
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


class _OneImage(nn.Module):
    """The student as a function of one image, with tensors for outputs."""

    def __init__(self, student: Student) -> None:
        super().__init__()
        self.student = student

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        results = self.student(image)
        assert isinstance(results, list)
        return tuple(results[0][name] for name in _OUTPUTS)

"""`eval --compare A B`: how two detectors differ on the same images, and whether these images can tell."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from pydantic import ValidationError
from rich.console import RenderableType

from data.errors import DetectionsError, UsageError
from data.records import ImageRecord, Target
from data.voc import read_voc
from evaluation.average_precision import EvaluationResult, evaluate
from evaluation.bootstrap import Difference, paired_bootstrap
from evaluation.detail_tables import difference_table, verdict
from evaluation.detection_files import read_detections
from evaluation.detections import Detections
from pipeline.config import TrainConfig
from pipeline.progress import progress
from pipeline.scoring import ScoreRequest, find_detections

RESAMPLES = 1000
CAVEAT = (
    "Images were resampled, not seeds: this tells whether these two detectors\n"
    "differ, not whether the methods do. For that, train each with several seeds."
)
_EXPECTED = (
    "give a checkpoint, a run's folder, a folder of <prefix>_<class>.txt files, or COCO's results in a .json file"
)
_BY_CHANCE = "* the interval does not hold 0; of twenty classes, one is expected so by chance"

Side = tuple[list[ImageRecord], Detections, list[str]]  # images, what was found in them, notes


@dataclass(frozen=True)
class Comparison:
    """Two detectors on the same images; differences are second less first, as `paired_bootstrap` gives them."""

    paths: tuple[Path, Path]
    first: EvaluationResult
    second: EvaluationResult
    differences: dict[str, Difference]
    notes: list[str]

    def to_json(self) -> dict[str, object]:
        """Return everything, ready for `json.dumps`."""
        differences = {name: found.to_json() for name, found in self.differences.items()}
        return {
            "images": self.first.images,
            "metric": self.first.metric,
            "resamples": RESAMPLES,
            "first": {"path": str(self.paths[0]), **self.first.to_json()},
            "second": {"path": str(self.paths[1]), **self.second.to_json()},
            "mAP": differences.pop("mAP"),
            "AP50": differences.pop("AP50"),
            "per_class": differences,
        }

    def tables(self) -> list[RenderableType]:
        """Return everything as rich renderables and lines for 80 columns."""
        return [
            f"A: {self.paths[0]}\nB: {self.paths[1]}\n",
            difference_table(self.first, self.second, self.differences),
            _BY_CHANCE,
            f"\n{verdict(self.differences)}\n\n{CAVEAT}",
        ]


def compare(paths: tuple[Path, Path], request: ScoreRequest) -> Comparison:
    """Return how the second detector differs from the first; request: images, metric and device of both.

    paths: each a checkpoint, a run's folder, a folder of the devkit's files, or COCO's results.

    Raises UsageError, DatasetError, DetectionsError or CheckpointError; the images of both must be the same.
    """
    if request.save_detections is not None or request.visualize or request.backbone is not None:
        raise UsageError("--save-detections, --visualize and --backbone go with one detector, not with --compare")
    (records, first, notes), (others, second, other_notes) = _sides(paths, request)
    _expect_same_images(paths, records, others)
    with progress("resampling", RESAMPLES, "resamples") as tick:
        differences = paired_bootstrap(first, second, records, request.metric, resamples=RESAMPLES, tick=tick)
    return Comparison(
        paths=paths,
        first=evaluate(first, records, request.metric),
        second=evaluate(second, records, request.metric),
        differences=differences,
        notes=[*notes, *other_notes],
    )


def _sides(paths: tuple[Path, Path], request: ScoreRequest) -> list[Side]:
    """Return what each path holds; files, which do not say of which images they are, follow the other path."""
    sides: dict[int, Side] = {}
    for index in sorted(range(2), key=lambda index: _is_files(paths[index])):
        known = next((records for records, _, _ in sides.values()), None)
        sides[index] = _side(paths[index], request, known)
    return [sides[0], sides[1]]


def _side(path: Path, request: ScoreRequest, known: list[ImageRecord] | None) -> Side:
    if not path.exists():
        raise DetectionsError(f"{path}: no such file or folder to compare", hint=_EXPECTED)
    if _is_run(path):
        return _of_run(path, request)
    if not _is_files(path):
        return find_detections(replace(request, checkpoint=path, detections=None))
    if known is not None and not request.voc_sets:
        return known, *read_detections(path, known)
    return find_detections(replace(request, checkpoint=None, detections=path))


def _of_run(run: Path, request: ScoreRequest) -> Side:
    """Return the detections that a run kept of its last epoch, over its validation or test images."""
    path = run / "config.json"
    try:
        config = TrainConfig.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, ValidationError) as error:
        raise DetectionsError(f"{path}: expected a run's configuration ({error})") from error
    kept = {"val": config.val_sets, "test": config.test_sets}
    wanted = request.voc_sets or config.val_sets
    name = next((name for name, sets in kept.items() if sets == wanted), None)
    hint = f"compare its checkpoint instead: {config.checkpoint_dir / 'student_latest.pth'}"
    if name is None:
        known = " and ".join("+".join(sets) for sets in kept.values() if sets)
        raise DetectionsError(f"{run}: this run keeps detections of {known}, not of {'+'.join(wanted)}", hint=hint)
    folder = run / "detections" / name
    if not folder.is_dir():
        raise DetectionsError(f"{folder}: this run has kept no detections; a finished one does", hint=hint)
    records = read_voc(request.voc_root or config.voc_root, wanted)
    return records, *read_detections(folder, records)


def _is_run(path: Path) -> bool:
    return (path / "config.json").is_file()


def _is_files(path: Path) -> bool:
    """Return whether these are files of detections, which do not say what made them."""
    return (path.is_dir() and not _is_run(path)) or path.suffix.lower() == ".json"


def _expect_same_images(paths: tuple[Path, Path], first: Sequence[ImageRecord], second: Sequence[ImageRecord]) -> None:
    targets, others = ({record.id: record.target for record in records} for records in (first, second))
    differing = sorted(targets.keys() ^ others.keys())
    if differing:
        holder = paths[differing[0] not in targets]
        raise DetectionsError(
            f"expected detections of the same images, found {len(targets)} and {len(others)} images;"
            f" {differing[0]} is only among those of {holder}",
            hint="name the images to compare on with --voc-set",
        )
    for image_id, target in targets.items():
        if not _same(target, others[image_id]):
            raise DetectionsError(
                f"expected the same annotations for both, found two of {image_id}",
                hint="name the devkit with --voc-root",
            )


def _same(one: Target, other: Target) -> bool:
    return all(np.array_equal(getattr(one, field), getattr(other, field)) for field in vars(one))

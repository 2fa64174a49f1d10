"""`eval --detail` and `eval --compare A B`, as they are typed."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from data.records import VOC_CLASSES, ImageRecord
from data.voc import read_voc
from evaluation.average_precision import evaluate
from evaluation.detection_files import write_detections
from evaluation.detections import Detections, ImageDetections
from pipeline.checkpoint import Checkpoint, save_checkpoint
from students.detector import build_student
from tests.command_line import run
from tests.pipeline.small_runs import SMALL_STUDENT, small_run


def jittered(records: list[ImageRecord], seed: int, lost: float = 0.2) -> Detections:
    """The objects, moved a little, some left out, and noise of low score."""
    rng = np.random.default_rng(seed)
    results = []
    for record in records:
        kept = rng.random(len(record.target)) >= lost
        boxes = record.target.boxes_xyxy_orig[kept]
        noise = np.array([[0, 0, 20, 20], [5, 5, 40, 30]], np.float32)
        height, width = record.image_size
        moved = (boxes + rng.uniform(-2, 2, boxes.shape)).clip(0, [width, height, width, height])
        results.append(
            ImageDetections(
                np.concatenate([moved, noise]).astype(np.float32),
                np.concatenate([record.target.labels[kept], rng.integers(1, 21, 2)]),
                np.concatenate([rng.uniform(0.5, 1, kept.sum()), [0.2, 0.1]]).astype(np.float32),
            )
        )
    return Detections.from_images([record.id for record in records], results)


@pytest.fixture(scope="module")
def val_records(devkit: Path) -> list[ImageRecord]:
    return read_voc(devkit, ("2007:val",))


@pytest.fixture(scope="module")
def files(val_records: list[ImageRecord], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A as the devkit's files, B as COCO's results, worse."""
    folder = tmp_path_factory.mktemp("detections")
    write_detections(jittered(val_records, 0), folder / "a")
    write_detections(jittered(val_records, 1, lost=0.9), folder / "b.json")
    return folder / "a", folder / "b.json"


def test_detail_is_printed_below_the_figures_at_80_columns(devkit: Path, files: tuple[Path, Path]) -> None:
    done = run("eval", "--detections", files[0], "--voc-root", devkit, "--detail")
    assert done.code == 0, done.err
    lines = done.out.splitlines()
    assert max(map(len, lines)) <= 80
    titles = [
        "95 % interval over images",
        "Mistakes at IoU 0.50",
        "Most confused",
        "Best F1 by class",
        "calibration: D-ECE",
    ]
    places = [next(number for number, line in enumerate(lines) if title in line) for title in titles]
    assert places == sorted(places)
    for kind in ("classification", "localisation", "both", "duplicate", "background", "missed", "false negative"):
        assert any(line.lstrip().startswith(kind) for line in lines)


def test_detail_in_json_is_what_the_table_says(
    devkit: Path, val_records: list[ImageRecord], files: tuple[Path, Path]
) -> None:
    done = run("eval", "--detections", files[0], "--voc-root", devkit, "--detail", "--json")
    said = json.loads(done.out)
    result = evaluate(jittered(val_records, 0), val_records)
    assert said["mAP"] == result.mAP
    detail = said["detail"]
    assert detail["intervals"]["mAP"]["estimate"] == pytest.approx(result.mAP, abs=1e-12)
    assert detail["errors"]["average_precision"] == pytest.approx(result.per_iou["0.50"], abs=1e-12)
    counts = detail["errors"]["counts"]
    assert counts["true positive"] + counts["ignored"] + counts["false positive"] == len(jittered(val_records, 0))
    assert sum(detail["calibration"]["counts"]) == counts["true positive"] + counts["false positive"]
    assert list(detail["curves"]) == [name for name in VOC_CLASSES if result.per_class[name]["AP50"] is not None]


def test_scores_above_one_are_told_and_the_rest_is_there(
    devkit: Path, val_records: list[ImageRecord], tmp_path: Path
) -> None:
    detections = jittered(val_records, 0)
    write_detections(replace(detections, scores=detections.scores * 10), tmp_path / "logits")
    done = run("eval", "--detections", tmp_path / "logits", "--voc-root", devkit, "--detail")
    assert done.code == 0, done.err
    assert "calibration: scores above 1 cannot be read as probabilities" in done.out


def test_comparison_says_which_is_better(devkit: Path, files: tuple[Path, Path]) -> None:
    done = run("eval", "--compare", *files, "--voc-root", devkit)
    assert done.code == 0, done.err
    paths, table = done.out.split("B − A in percent")
    assert paths.split() == ["A:", str(files[0]), "B:", str(files[1])]
    assert max(map(len, table.splitlines())) <= 80
    assert "AP50: B is worse by" in table
    assert "Images were resampled, not seeds" in table


def test_comparison_in_json_holds_both_and_their_difference(devkit: Path, files: tuple[Path, Path]) -> None:
    said = json.loads(run("eval", "--compare", *files, "--voc-root", devkit, "--metric", "coco", "--json").out)
    for side, path in zip(("first", "second"), files, strict=True):
        alone = json.loads(run("eval", "--detections", path, "--voc-root", devkit, "--metric", "coco", "--json").out)
        assert said[side] == {"path": str(path), **alone}
    first, second = said["first"], said["second"]
    assert said["mAP"]["estimate"] == pytest.approx(second["mAP"] - first["mAP"], abs=1e-12)
    assert said["mAP"]["high"] < 0
    assert said["mAP"]["share_below_zero"] == 1
    for name, found in said["per_class"].items():
        change = second["per_class"][name]["AP50"] - first["per_class"][name]["AP50"]
        assert found["estimate"] == pytest.approx(change, abs=1e-12)


def test_a_detector_compared_with_itself_cannot_be_told_apart(devkit: Path, files: tuple[Path, Path]) -> None:
    done = run("eval", "--compare", files[0], files[0], "--voc-root", devkit)
    assert "mAP: the interval [0.0, 0.0] holds 0: these images cannot tell the two apart." in done.out


# --- runs and checkpoints --------------------------------------------------------------------------------------------


@pytest.fixture
def finished(devkit: Path, val_records: list[ImageRecord], tmp_path: Path) -> Path:
    """The folder of a run that kept its detections of the validation images."""
    return kept_run(devkit, val_records, tmp_path / "first", ("2007:val",))


def kept_run(devkit: Path, records: list[ImageRecord], folder: Path, sets: tuple[str, ...]) -> Path:
    config = small_run(devkit, folder, val_sets=sets)
    config.run_dir.mkdir(parents=True)
    (config.run_dir / "config.json").write_text(config.model_dump_json())
    write_detections(jittered(records, 1), config.run_dir / "detections" / "val")
    return config.run_dir


def test_runs_say_their_own_images_and_files_follow(files: tuple[Path, Path], finished: Path) -> None:
    # No --voc-root and no --voc-set: the run's configuration has both, whichever side it is on.
    for pair in ((finished, files[0]), (files[0], finished)):
        done = run("eval", "--compare", *pair, "--json")
        assert done.code == 0, done.err
        assert json.loads(done.out)["images"] == 6


def test_a_checkpoint_is_its_own_detections(devkit: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = small_run(devkit, tmp_path)
    path = tmp_path / "student.pth"
    save_checkpoint(path, Checkpoint(config, build_student(SMALL_STUDENT).state_dict(), 1, 1, [], {}))
    saved = tmp_path / "saved"
    common = ("--workers", "0", "--device", "cpu")
    assert run("eval", "--checkpoint", path, "--save-detections", saved, *common).code == 0
    done = run("eval", "--compare", path, saved, *common, "--json")
    assert done.code == 0, done.err
    said = json.loads(done.out)
    assert (said["mAP"]["low"], said["mAP"]["high"]) == (0, 0)
    assert "epoch 1; 2007:val" in done.err


# --- what cannot be compared -----------------------------------------------------------------------------------------


def test_other_images_are_refused_with_the_first_that_differs(devkit: Path, finished: Path, tmp_path: Path) -> None:
    train = read_voc(devkit, ("2007:train",))
    other = kept_run(devkit, train, tmp_path / "second", ("2007:train",))
    done = run("eval", "--compare", finished, other)
    first = min({record.id for record in train} | {record.id for record in read_voc(devkit, ("2007:val",))})
    assert done.code == 1
    assert "expected detections of the same images, found 6 and 12 images" in done.err
    assert f"{first} is only among those of" in done.err
    assert "--voc-set" in done.err


def test_other_annotations_are_refused(devkit: Path, finished: Path, tmp_path: Path) -> None:
    changed = tmp_path / "VOCdevkit"
    copy_devkit(devkit, changed)
    stem = (changed / "VOC2007/ImageSets/Main/val.txt").read_text().split()[0]
    annotation = changed / "VOC2007" / "Annotations" / f"{stem}.xml"
    annotation.write_text(annotation.read_text().replace("<difficult>0<", "<difficult>1<", 1))
    other = kept_run(changed, read_voc(changed, ("2007:val",)), tmp_path / "second", ("2007:val",))
    done = run("eval", "--compare", finished, other)
    assert (done.code, f"expected the same annotations for both, found two of VOC2007/{stem}" in done.err) == (1, True)


def copy_devkit(devkit: Path, to: Path) -> None:
    for part in ("Annotations", "ImageSets/Main"):
        (to / "VOC2007" / part).mkdir(parents=True)
        for file in (devkit / "VOC2007" / part).iterdir():
            (to / "VOC2007" / part / file.name).write_bytes(file.read_bytes())


def test_a_run_that_kept_nothing_names_its_checkpoint(finished: Path, files: tuple[Path, Path]) -> None:
    for file in (finished / "detections" / "val").iterdir():
        file.unlink()
    (finished / "detections" / "val").rmdir()
    done = run("eval", "--compare", files[0], finished)
    assert done.code == 1
    assert "this run has kept no detections" in done.err
    assert "student_latest.pth" in done.err


def test_a_run_is_not_compared_on_images_it_kept_nothing_of(finished: Path, files: tuple[Path, Path]) -> None:
    done = run("eval", "--compare", finished, files[0], "--voc-set", "2007:train")
    assert done.code == 1
    assert "this run keeps detections of 2007:val, not of 2007:train" in done.err


def test_a_broken_configuration_is_told(finished: Path, files: tuple[Path, Path]) -> None:
    (finished / "config.json").write_text("{}")
    done = run("eval", "--compare", finished, files[0])
    assert (done.code, "config.json: expected a run's configuration" in done.err) == (1, True)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--compare", "a", "none"], 1, "none: no such file or folder to compare"),
        (["--compare", "a", "b.json", "--detail"], 2, "--detail goes with one detector"),
        (["--compare", "a", "b.json", "--visualize", "1"], 2, "go with one detector, not with --compare"),
        (["--compare", "a", "b.json", "--detections", "a"], 2, "give one of --checkpoint, --detections and --compare"),
        (["--compare", "a"], 2, "requires 2 arguments"),
    ],
)
def test_refused(
    devkit: Path,
    files: tuple[Path, Path],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    code: int,
    message: str,
) -> None:
    monkeypatch.chdir(files[0].parent)
    done = run("eval", "--voc-root", devkit, *arguments)
    assert done.code == code
    assert message in done.err
    assert not done.out


def test_nothing_to_find_has_no_detail(devkit: Path, files: tuple[Path, Path], tmp_path: Path) -> None:
    copy_devkit(devkit, tmp_path)
    for annotation in (tmp_path / "VOC2007" / "Annotations").iterdir():
        annotation.write_text(annotation.read_text().replace("<difficult>0<", "<difficult>1<"))
    done = run("eval", "--detections", files[0], "--voc-root", tmp_path, "--detail")
    assert (done.code, "found none: there is no AP to resample" in done.err) == (1, True)

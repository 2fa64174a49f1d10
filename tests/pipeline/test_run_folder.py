"""What a run leaves behind, read back by whoever needs it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from data.records import VOC_CLASSES, ImageRecord
from data.voc import read_voc
from evaluation.average_precision import evaluate
from evaluation.devkit_files import read_devkit
from pipeline.checkpoint import BEST, LATEST, load_checkpoint
from pipeline.config import TrainConfig
from pipeline.evaluate import detect
from pipeline.recorder import Recorder
from pipeline.train import train
from pipeline.trainer import Trainer
from tests.pipeline.small_runs import PulledPlugError, from_store, small_run, stop_in_epoch, weights_of

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def run(devkit: Path, store: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainConfig, Any]:
    """A run of two epochs that was stopped after the first and resumed, scored on a test set at the end."""
    recipe = {"epochs": 2}
    config = small_run(
        devkit,
        tmp_path_factory.mktemp("run"),
        recipe=recipe,
        distillation=from_store(store),
        test_sets=("2007:val",),
    )
    with pytest.MonkeyPatch.context() as patched:
        stop_in_epoch(patched, 2)
        with pytest.raises(PulledPlugError):
            train(config)
    return config, train(config, resume=True)


def test_config_json_is_the_run_whole(run: tuple[TrainConfig, Any]) -> None:
    config = run[0]
    read = TrainConfig.model_validate_json((config.run_dir / "config.json").read_text())
    assert read == config.resolved()
    assert (read.recipe.optimizer, read.recipe.learning_rate) == ("sgd", pytest.approx(0.0025))


def test_metrics_jsonl_has_a_line_an_epoch(run: tuple[TrainConfig, Any]) -> None:
    lines = [json.loads(line) for line in (run[0].run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [(line["epoch"], line["step"]) for line in lines] == [(1, 2), (2, 4)]
    losses = lines[0]["losses"]
    assert {"total", "detection", "feature", "logit", "gradient_norm", "loss_classifier"} <= losses.keys()
    assert losses["total"] == pytest.approx(losses["detection"] + losses["feature"] + losses["logit"], rel=1e-5)
    assert lines[1]["val"]["images"] == 6


def test_result_json_says_what_was_run_and_what_came_out(run: tuple[TrainConfig, Any]) -> None:
    result = json.loads((run[0].run_dir / "result.json").read_text())
    assert result == run[1]
    assert result["images"] == {"train": 4, "val": 6, "test": 6}
    assert (result["epochs"], result["steps"], result["run_name"]) == (2, 4, "run")
    assert result["targets"]["untrained"] == ["tiny_dino", "tiny_clip"]
    assert set(result["seconds"]) == {"training", "data_wait", "targets"}
    assert 0 <= result["data_wait_share"] < 1
    assert result["selected_and_reported_on_the_same_images"] is False


def test_the_test_set_is_scored_with_the_last_and_the_best_weights(run: tuple[TrainConfig, Any]) -> None:
    result = run[1]
    # The test set here is the validation set, so each pair must agree.
    assert result["test"]["last"] == result["last"]["val"]
    assert result["test"]["best"] == result["best"]["val"]


@pytest.mark.parametrize("images", ["val", "test"])
def test_what_the_last_epoch_found_is_kept(run: tuple[TrainConfig, Any], devkit: Path, images: str) -> None:
    """Read back as any detector's output, it gives the figures of `result.json`, and what the checkpoint finds."""
    config, result = run
    scored = read_voc(devkit, ("2007:val",))
    folder = config.run_dir / "detections" / images
    assert sorted(path.name for path in folder.iterdir()) == [f"comp4_det_{images}_{name}.txt" for name in VOC_CLASSES]
    found, _ = read_devkit(folder, scored)
    figures = result["last"]["val"] if images == "val" else result["test"]["last"]
    assert evaluate(found, scored).to_json() == figures
    expected = detect(load_checkpoint(config.checkpoint_dir / LATEST).build_student(CPU), scored, CPU)
    assert len(found) == len(expected) > 0
    for record in scored:
        one, other = (np.sort(d.of_image(record.id).boxes_xyxy_orig, axis=0) for d in (found, expected))
        np.testing.assert_array_equal(one, other)


def test_checkpoints_hold_nothing_but_plain_values(run: tuple[TrainConfig, Any]) -> None:
    for name, resumable in ((LATEST, True), (BEST, False)):
        content = torch.load(run[0].checkpoint_dir / name, weights_only=True)
        assert ("training" in content) == resumable
        assert content["config"]["run_name"] == "run"
        assert set(content["targets"]["stores"][0]["arrays"]) >= {"tiny_dino/original/features"}


def test_nothing_of_an_adapter_is_in_the_students_weights(run: tuple[TrainConfig, Any]) -> None:
    assert {name.partition(".")[0] for name in weights_of(run[0])} == {"detector", "logit_head"}


def test_the_latest_checkpoint_is_linked(run: tuple[TrainConfig, Any]) -> None:
    link = run[0].checkpoints_dir / LATEST
    assert link.is_symlink()
    assert link.readlink() == Path("run") / LATEST
    assert link.resolve() == (run[0].checkpoint_dir / LATEST).resolve()


def test_nothing_temporary_is_left(run: tuple[TrainConfig, Any]) -> None:
    names = {path.name for path in run[0].run_dir.parent.parent.rglob("*")}
    assert not [name for name in names if ".tmp" in name]


def test_a_rebuilt_student_detects_the_same(run: tuple[TrainConfig, Any], records: list[ImageRecord]) -> None:
    config = run[0]
    checkpoint = load_checkpoint(config.checkpoint_dir / LATEST)
    trainer = Trainer(config.resolved(), records[:4], CPU, None)
    trainer.student.load_state_dict(checkpoint.student)
    expected = detect(trainer.student, records[:4], CPU)
    found = detect(checkpoint.build_student(CPU), records[:4], CPU)
    assert len(found) == len(expected) > 0
    assert (found.scores == expected.scores).all()
    assert (found.boxes_xyxy_orig == expected.boxes_xyxy_orig).all()


@pytest.mark.filterwarnings("ignore::DeprecationWarning:tensorboard")
def test_tensorboard_reads_every_epoch_of_a_resumed_run(run: tuple[TrainConfig, Any]) -> None:
    events = EventAccumulator(str(run[0].run_dir))
    events.Reload()
    lines = [json.loads(line) for line in (run[0].run_dir / "metrics.jsonl").read_text().splitlines()]
    for tag, values in (
        ("epoch/total", [line["losses"]["total"] for line in lines]),
        ("val/mAP", [line["val"]["mAP"] for line in lines]),
        ("val/AP@0.50", [line["val"]["per_iou"]["0.50"] for line in lines]),
    ):
        assert [(event.step, event.value) for event in events.Scalars(tag)] == [
            (2, pytest.approx(values[0], rel=1e-6)),
            (4, pytest.approx(values[1], rel=1e-6)),
        ]


def test_events_of_steps_are_read_back(devkit: Path, tmp_path: Path) -> None:
    """A resumed recorder hides what came after its first step, and nothing before."""
    config = small_run(devkit, tmp_path)
    for first, steps in ((0, (20, 40, 60)), (40, (60, 80))):
        with Recorder(config, first, []) as recorder:
            for step in steps:
                recorder.scalars({"loss/total": first + step}, step)
    events = EventAccumulator(str(config.run_dir))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss/total")] == [
        (20, 20),
        (40, 40),
        (60, 100),
        (80, 120),
    ]


@pytest.mark.filterwarnings("ignore::DeprecationWarning:tensorboard")
def test_tensorboard_has_pictures_and_settings(devkit: Path, store: Path, tmp_path: Path) -> None:
    config = small_run(devkit, tmp_path, limit=2, distillation=from_store(store), pictures=2)
    train(config)
    events = EventAccumulator(str(config.run_dir), size_guidance={"images": 0})
    events.Reload()
    tags = events.Tags()
    assert {tag for tag in tags["images"] if tag.startswith("detections/")}
    (picture,) = events.Images("features")
    assert picture.width > 500
    assert picture.encoded_image_string.startswith(b"\x89PNG")
    assert "_hparams_/session_start_info" in events.summary_metadata
    names = {tag.partition("/")[0] for tag in tags["scalars"]}
    assert {"loss", "gradient", "gradient_share", "weight", "optimisation", "val", "seconds", "hparam"} <= names

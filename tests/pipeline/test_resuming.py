import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import features.tiny
import pipeline.train
from cache.reader import TeacherStore
from data.errors import CheckpointError
from pipeline.checkpoint import BEST, LATEST, Checkpoint, load_checkpoint
from pipeline.config import TrainConfig
from pipeline.extract import extract
from pipeline.train import train
from tests.pipeline.small_runs import (
    PulledPlugError,
    equal,
    extraction,
    files_of,
    from_store,
    small_run,
    stop_in_epoch,
    weights_of,
    without_seconds,
)


@pytest.fixture(scope="module")
def whole(devkit: Path, store: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainConfig, Any]:
    """An uninterrupted run of two epochs, and its result."""
    config = run_of(devkit, store, tmp_path_factory.mktemp("whole"))
    return config, train(config)


def run_of(devkit: Path, store: Path, folder: Path) -> TrainConfig:
    return small_run(
        devkit, folder, recipe={"epochs": 2, "batch_size": 1, "jitter": 0.2}, limit=2, distillation=from_store(store)
    )


def killed(devkit: Path, store: Path, folder: Path, epoch: int) -> TrainConfig:
    config = run_of(devkit, store, folder)
    with pytest.MonkeyPatch.context() as patched:
        stop_in_epoch(patched, epoch)
        with pytest.raises(PulledPlugError):
            train(config)
    return config


@pytest.fixture(scope="module")
def stopped(devkit: Path, store: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    """That run, killed in its second epoch. Shared: copy it to go on with it."""
    return killed(devkit, store, tmp_path_factory.mktemp("stopped"), 2)


def copied(config: TrainConfig, folder: Path) -> TrainConfig:
    """A run's folders at another place, where it goes on."""
    places = {"runs_dir": folder / "runs", "checkpoints_dir": folder / "checkpoints"}
    for name, place in places.items():
        shutil.copytree(getattr(config, name), place, symlinks=True)
    return config.model_copy(update=places)


class TestResuming:
    def test_a_killed_run_ends_like_an_uninterrupted_one(
        self, tmp_path: Path, stopped: TrainConfig, whole: tuple[TrainConfig, Any]
    ) -> None:
        config = copied(stopped, tmp_path)
        assert load_checkpoint(config.checkpoint_dir / LATEST).epoch == 1
        assert not (config.run_dir / "result.json").exists()
        torch.manual_seed(1)
        result = train(config, resume=True)
        for name in (LATEST, BEST):
            assert equal(weights_of(config, name), weights_of(whole[0], name))
        folders = {"runs_dir", "checkpoints_dir"}
        expected, found = (without_seconds(r) for r in (whole[1], result))
        for content in (expected, found):
            for name in folders:
                content["config"].pop(name)
        assert found == expected
        history = [json.loads(line) for line in (config.run_dir / "metrics.jsonl").read_text().splitlines()]
        assert without_seconds(history) == without_seconds(
            [json.loads(line) for line in (whole[0].run_dir / "metrics.jsonl").read_text().splitlines()]
        )

    def test_a_run_killed_in_its_first_epoch_starts_anew(
        self, devkit: Path, store: Path, tmp_path: Path, whole: tuple[TrainConfig, Any]
    ) -> None:
        config = killed(devkit, store, tmp_path, 1)
        train(config, resume=True)
        assert equal(weights_of(config), weights_of(whole[0]))

    def test_lines_beyond_the_last_checkpoint_are_dropped(
        self, devkit: Path, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A kill between an epoch's line in metrics.jsonl and its checkpoint."""
        config = run_of(devkit, store, tmp_path)

        def die(path: Path, checkpoint: Checkpoint) -> None:
            if checkpoint.training is None or checkpoint.training["partial"] is None:
                raise PulledPlugError

        with monkeypatch.context() as patched:
            patched.setattr(pipeline.train, "save_checkpoint", die)
            with pytest.raises(PulledPlugError):
                train(config)
        assert len((config.run_dir / "metrics.jsonl").read_text().splitlines()) == 1
        train(config, resume=True)
        lines = (config.run_dir / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line)["epoch"] for line in lines] == [1, 2]

    def test_the_best_weights_outlive_a_kill_between_the_two_checkpoints(
        self, devkit: Path, store: Path, tmp_path: Path, whole: tuple[TrainConfig, Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        config = run_of(devkit, store, tmp_path)
        save, calls = pipeline.train.save_checkpoint, []

        def save_once(*args: Any) -> None:
            if calls:
                raise PulledPlugError
            calls.append(1)
            save(*args)

        with monkeypatch.context() as patched:
            patched.setattr(pipeline.train, "save_checkpoint", save_once)
            with pytest.raises(PulledPlugError):
                train(config)
        train(config, resume=True)
        assert equal(weights_of(config, BEST), weights_of(whole[0], BEST))
        assert load_checkpoint(config.checkpoint_dir / BEST).epoch == whole[1]["best"]["epoch"]

    def test_the_last_detections_outlive_a_kill_after_the_last_checkpoint(
        self, devkit: Path, store: Path, tmp_path: Path, whole: tuple[TrainConfig, Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        config = run_of(devkit, store, tmp_path)

        def die(*args: Any, **kwargs: Any) -> None:
            raise PulledPlugError

        with monkeypatch.context() as patched:
            patched.setattr(pipeline.train, "write_devkit", die)
            with pytest.raises(PulledPlugError):
                train(config)
        assert load_checkpoint(config.checkpoint_dir / LATEST).epoch == 2
        assert not (config.run_dir / "result.json").exists()
        train(config, resume=True)
        found, expected = (files_of(of.run_dir / "detections") for of in (config, whole[0]))
        assert found == expected
        assert len(found) == 20
        assert any(found.values())

    def test_a_finished_run_is_only_told_again(self, whole: tuple[TrainConfig, Any]) -> None:
        config, result = whole
        before, detections = weights_of(config), files_of(config.run_dir / "detections")
        assert without_seconds(train(config, resume=True)) == without_seconds(result)
        assert equal(weights_of(config), before)
        assert files_of(config.run_dir / "detections") == detections

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"seed": 5}, "seed: stored 0, found 5"),
            ({"limit": 4}, "limit: stored 2, found 4"),
            ({"recipe": {"epochs": 3, "batch_size": 1, "jitter": 0.2}}, "recipe.epochs: stored 2, found 3"),
            ({"recipe": {"epochs": 2, "batch_size": 1}}, "recipe.jitter: stored 0.2, found 0.0"),
            ({"distillation": {"beta": 2.0}}, "distillation.beta: stored 1.0, found 2.0"),
        ],
        ids=str,
    )
    def test_other_settings_are_refused_by_their_name(
        self, store: Path, whole: tuple[TrainConfig, Any], change: dict[str, Any], message: str
    ) -> None:
        if "distillation" in change:
            change = {"distillation": from_store(store, **change["distillation"])}
        config = whole[0]
        other = small_run(
            config.voc_root,
            config.runs_dir.parent,
            **{
                "recipe": {"epochs": 2, "batch_size": 1, "jitter": 0.2},
                "limit": 2,
                "distillation": config.distillation,
                **change,
            },
        )
        with pytest.raises(CheckpointError, match="other settings") as caught:
            train(other, resume=True)
        assert f"\n  {message}" in caught.value.message
        assert caught.value.exit_code == 3

    def test_where_things_are_may_change(
        self, devkit: Path, store: Path, tmp_path: Path, stopped: TrainConfig, whole: tuple[TrainConfig, Any]
    ) -> None:
        config = copied(stopped, tmp_path)
        moved = shutil.copytree(devkit, tmp_path / "elsewhere")
        distillation = from_store(Path(shutil.copytree(store, tmp_path / "moved.zarr")))
        update = {"voc_root": Path(moved), "device": "auto", "distillation": distillation}
        train(config.model_copy(update=update), resume=True)
        assert equal(weights_of(config), weights_of(whole[0]))

    def test_other_targets_are_refused(self, store32: Path, stopped: TrainConfig) -> None:
        other = stopped.model_copy(update={"distillation": from_store(store32)})
        with pytest.raises(CheckpointError, match="other teacher targets") as caught:
            train(other, resume=True)
        assert caught.value.exit_code == 3
        assert "\n  stores[1].tiny_dino/hflip/features.dtype: stored float16, found float32\n" in caught.value.message
        fingerprint = TeacherStore(store32).catalog.fingerprints["tiny_dino/hflip/features"]
        assert "stores[1].tiny_dino/hflip/features.fingerprint: stored " in caught.value.message
        assert f", found {fingerprint}\n" in caught.value.message

    def test_another_teacher_under_the_same_key_is_told_by_the_field_that_differs(
        self, devkit: Path, tmp_path: Path, stopped: TrainConfig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        identity = features.tiny.TinyDinoTeacher.identity
        monkeypatch.setattr(
            features.tiny.TinyDinoTeacher, "identity", lambda teacher: {**identity(teacher), "layer": "one before"}
        )
        other = extract(extraction(devkit, tmp_path / "s.zarr")).store
        layer = load_checkpoint(stopped.checkpoint_dir / LATEST).targets["identities"]["tiny_dino"]["layer"]
        with pytest.raises(CheckpointError) as caught:
            train(stopped.model_copy(update={"distillation": from_store(other)}), resume=True)
        cause = f"\n  tiny_dino.identity.layer: stored {layer}, found one before\n"
        assert f"{cause}  stores[1].tiny_dino/hflip/features.fingerprint: stored " in caught.value.message

    def test_stores_in_another_order_are_other_targets(
        self, devkit: Path, store: Path, store32: Path, tmp_path: Path
    ) -> None:
        one = extract(extraction(devkit, tmp_path / "dino.zarr", teachers=("tiny_dino",), limit=4)).store
        other = extract(extraction(devkit, tmp_path / "clip.zarr", teachers=("tiny_clip",), limit=4)).store
        config = run_of(devkit, store, tmp_path).model_copy(update={"distillation": from_store(one, other)})
        with pytest.MonkeyPatch.context() as patched:
            stop_in_epoch(patched, 2)
            with pytest.raises(PulledPlugError):
                train(config)
        swapped = config.model_copy(update={"distillation": from_store(other, one)})
        with pytest.raises(CheckpointError, match="in their order") as caught:
            train(swapped, resume=True)
        assert "stores[1].tiny_clip/hflip/logits: stored None, found {" in caught.value.message
        assert train(config, resume=True)["steps"] == 4

    def test_a_teacher_that_was_added_leaves_the_choice_as_it_was(
        self, devkit: Path, store: Path, tmp_path: Path, stopped: TrainConfig
    ) -> None:
        store = Path(shutil.copytree(store, tmp_path / "s.zarr"))
        extract(extraction(devkit, store, teachers=("another=tiny_dino",)))
        config = copied(stopped, tmp_path).model_copy(update={"distillation": from_store(store)})
        named = config.model_copy(update={"distillation": from_store(store, feature_teacher="another")})
        with pytest.raises(CheckpointError, match="feature_teacher: stored tiny_dino, found another"):
            train(named, resume=True)
        result = train(config, resume=True)
        assert result["targets"]["teachers"] == {"features": "tiny_dino", "logits": "tiny_clip"}
        assert result["config"]["distillation"]["feature_teacher"] is None
        again = config.model_copy(update={"distillation": from_store(store, feature_teacher="tiny_dino")})
        assert train(again, resume=True)["steps"] == 4

    @pytest.mark.parametrize("residency", ["ram", "device"])
    def test_targets_may_be_held_elsewhere(
        self, store: Path, tmp_path: Path, stopped: TrainConfig, whole: tuple[TrainConfig, Any], residency: str
    ) -> None:
        config = copied(stopped, tmp_path)
        fingerprint = TeacherStore(store).catalog.fingerprint
        update = {"residency": residency, "distillation": from_store(store, expect_fingerprints=(fingerprint,))}
        assert train(config.model_copy(update=update), resume=True)["config"]["residency"] == residency
        assert equal(weights_of(config), weights_of(whole[0]))

    def test_a_view_that_is_not_read_may_be_added(self, devkit: Path, tmp_path: Path) -> None:
        store = extract(extraction(devkit, tmp_path / "s.zarr", views=("original",))).store
        config = small_run(
            devkit,
            tmp_path,
            recipe={"epochs": 2, "batch_size": 1, "flip": 0.0},
            limit=2,
            distillation=from_store(store),
        )
        with pytest.MonkeyPatch.context() as patched:
            stop_in_epoch(patched, 2)
            with pytest.raises(PulledPlugError):
                train(config)
        extract(extraction(devkit, store))
        assert train(config, resume=True)["steps"] == 4

    def test_a_run_that_is_not_there_cannot_be_resumed(self, devkit: Path, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match="no such checkpoint") as caught:
            train(small_run(devkit, tmp_path), resume=True)
        assert caught.value.exit_code == 3
        assert list(tmp_path.iterdir()) == []

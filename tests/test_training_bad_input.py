"""What can go wrong in a training run, through the command line: told in plain words, and nothing saved is lost.

A run that was stopped, by whatever, goes on with --resume and ends as one that was left alone.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import pipeline.train
from cache.plan import StorePlan
from cache.writer import open_writer
from data.synthetic import make_devkit
from data.voc import read_voc
from pipeline.checkpoint import LATEST, Checkpoint, load_checkpoint, save_checkpoint
from pipeline.dataset import LoadedBatch
from pipeline.extract import digest_images, extract, teacher_plan
from pipeline.stored_targets import StoredTargets
from pipeline.targets import TeacherTargets
from pipeline.teachers import TeacherChoices, build_teachers
from pipeline.trainer import Trainer
from tests.command_line import SHORT_RUN, Done, run
from tests.data.tiny_devkit import TinyDevkit
from tests.pipeline.small_runs import TINY_TEACHERS, equal, extraction, without_seconds

# Four steps of one image, saved after each; the last option of a name is the one that counts.
FOUR_STEPS = ("--epochs", "2", "--limit", "2", "--batch-size", "1", "--checkpoint-steps", "1", "--eval-final-only",
              "--run-name", "r")  # fmt: skip


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four images to train on and one to score."""
    return make_devkit(tmp_path_factory.mktemp("few") / "VOCdevkit", num_train=4, num_val=1, seed=3)


@pytest.fixture(scope="module")
def stores(few: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Stores of the four images, each made once: `stores(name, **changes)`."""
    folder = tmp_path_factory.mktemp("stores")

    def store(name: str = "whole", **changes: Any) -> Path:
        path = folder / f"{name}.zarr"
        return path if path.exists() else extract(extraction(few, path, **changes)).store

    return store


def train(few: Path, folder: Path, *more: str | Path) -> Done:
    places = ("--runs-dir", folder / "runs", "--checkpoints-dir", folder / "checkpoints")
    return run("train", "--voc-root", few, *SHORT_RUN, *FOUR_STEPS, *places, *more)


def refused(done: Done, code: int, *said: str) -> None:
    """Assert a plain refusal: the exit code, nothing on stdout, and one message that says all of this."""
    assert done.code == code, done
    assert done.out == ""
    assert "Traceback" not in done.err
    for words in said:
        assert words in done.err


class TestBeforeTheFirstStep:
    @pytest.mark.parametrize(
        ("teacher", "said"),
        [
            ("tiny_clip", ["has features (it holds tiny_clip)", "turn the loss off: --beta 0"]),
            ("tiny_dino", ["has logits (it holds tiny_dino)", "turn the loss off: --gamma 0"]),
        ],
    )
    def test_a_loss_without_targets_names_the_option_that_turns_it_off(
        self, few: Path, stores: Callable[..., Path], tmp_path: Path, teacher: str, said: list[str]
    ) -> None:
        store = stores(teacher, teachers=(teacher,))
        refused(train(few, tmp_path, "--cached-teachers", store), 2, *said)
        assert list(tmp_path.iterdir()) == []

    def test_a_view_that_the_store_lacks_names_the_command_that_adds_it(
        self, few: Path, stores: Callable[..., Path], tmp_path: Path
    ) -> None:
        store = Path(shutil.copytree(stores("original", views=("original",)), tmp_path / "s.zarr"))
        done = train(few, tmp_path, "--cached-teachers", store)
        refused(done, 3, "view 'hflip' is not in the store", "(found original)", "train with --flip 0, or add it")
        for teacher in TINY_TEACHERS:  # each is told when it is its turn
            command = done.err.rpartition("add it: python cli.py ")[2].split()
            assert command[0] == "extract-teachers"
            assert command[command.index("--teacher") + 1] == teacher
            command[command.index("--voc-root") + 1] = str(few)
            added = run(*command, "--workers", "0", "--device", "cpu")
            assert added.code == 0, added.err
            done = train(few, tmp_path / teacher, "--cached-teachers", store, "--limit", "1", "--epochs", "1")
        assert done.code == 0, done.err

    def test_a_store_of_other_images_is_refused_by_their_ids(
        self, few: Path, stores: Callable[..., Path], tmp_path: Path
    ) -> None:
        done = train(few, tmp_path, "--cached-teachers", stores(), "--voc-set", "2007:trainval", "--limit", "5")
        refused(done, 3, "1 of 5 training images are not in the store", "(VOC2007/000005)", "4 images of 2007:train")
        assert list(tmp_path.iterdir()) == []

    def test_a_store_of_another_frame_is_refused(self, few: Path, tmp_path: Path) -> None:
        teachers = build_teachers(TINY_TEACHERS, TeacherChoices(), torch.device("cpu"))

        plan = StorePlan(
            sets=("2007:train",), limit=None, samples=digest_images(read_voc(few, ("2007:train",))),
            teachers=[teacher_plan(key, teacher) for key, teacher in teachers.items()], views=("original", "hflip"),
            feature_dtype="float16", shard_samples=4, batch_size=3, frame=(512, 512),
        )  # fmt: skip
        with open_writer(tmp_path / "s.zarr", plan):
            pass
        done = train(few, tmp_path / "run", "--cached-teachers", tmp_path / "s.zarr")
        refused(done, 3, "s.zarr", "expected frame (480, 480), found (512, 512)")
        assert not (tmp_path / "run").exists()


def test_a_batch_without_any_object_is_trained_on(tmp_path: Path) -> None:
    tiny = TinyDevkit(tmp_path / "VOCdevkit")
    for stem in ("000001", "000002"):
        tiny.add(stem, objects="")
    tiny.list("train", ["000001", "000002"])
    tiny.list("val", ["000001"])
    done = train(tiny.root, tmp_path, "--epochs", "1", "--batch-size", "2", "--json")
    assert done.code == 0, done.err
    losses = json.loads(done.out)["last"]["losses"]
    assert losses["loss_box_reg"] == losses["loss_rpn_box_reg"] == 0
    assert losses["loss_classifier"] > 0


class TestStopped:
    """Stopped at the third of four steps by something that goes away: --resume ends as if it had not been."""

    @pytest.fixture(scope="class")
    @staticmethod
    def whole(few: Path, stores: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
        folder = tmp_path_factory.mktemp("whole")
        done = train(few, folder, "--cached-teachers", stores())
        assert done.code == 0, done.err
        return folder

    @pytest.fixture
    def goes_on(self, few: Path, stores: Callable[..., Path], tmp_path: Path, whole: Path) -> Iterator[None]:
        """After the test: what was saved holds the step that was reached, and the run goes on to the same end."""
        yield
        saved = load_checkpoint(tmp_path / "checkpoints/r" / LATEST)
        assert saved.step == 2
        done = train(few, tmp_path, "--cached-teachers", stores(), "--resume")
        assert done.code == 0, done.err
        ended, expected = (load_checkpoint(folder / "checkpoints/r" / LATEST) for folder in (tmp_path, whole))
        assert equal(ended.student, expected.student)
        assert without_seconds(ended.history) == without_seconds(expected.history)
        assert not [path for path in tmp_path.rglob("*") if ".tmp" in path.name]

    @pytest.mark.usefixtures("goes_on")
    def test_a_loss_that_is_not_finite_names_step_and_images(
        self, few: Path, stores: Callable[..., Path], tmp_path: Path
    ) -> None:
        gather, calls = StoredTargets.__call__, []

        def spoilt(self: StoredTargets, loaded: LoadedBatch) -> TeacherTargets:
            targets = gather(self, loaded)
            calls.append(loaded.batch.ids)
            if len(calls) == 3:
                assert targets.logits is not None
                targets.logits[0, 3] = float("nan")
            return targets

        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(StoredTargets, "__call__", spoilt)
            done = train(few, tmp_path, "--cached-teachers", stores())
        refused(done, 1, "the loss is not finite at step 3", "'logit': nan", f"images {', '.join(calls[2])}")
        assert "the last checkpoint is as it was" in done.err

    @pytest.mark.usefixtures("goes_on")
    def test_a_disk_that_is_full_leaves_the_last_checkpoint(
        self, few: Path, stores: Callable[..., Path], tmp_path: Path
    ) -> None:
        """Linux writes up to the limit, as a disk does, and refuses the next write."""
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)

        def save(path: Path, checkpoint: Checkpoint) -> None:
            if checkpoint.step == 3:
                resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, limits[1]))
            save_checkpoint(path, checkpoint)

        try:
            with pytest.MonkeyPatch.context() as patched:
                patched.setattr(pipeline.train, "save_checkpoint", save)
                done = train(few, tmp_path, "--cached-teachers", stores())
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        path = tmp_path / "checkpoints/r" / LATEST
        refused(done, 1, f"{path}: cannot be written: File too large", "free some space", "--resume")

    @pytest.mark.usefixtures("goes_on")
    def test_ctrl_c_saves_the_step_under_way_and_exits_130(
        self, few: Path, stores: Callable[..., Path], tmp_path: Path
    ) -> None:
        run_step = Trainer.run_step

        def interrupted(self: Trainer, parts: Sequence[LoadedBatch | None], num_images: int) -> dict[str, Tensor]:
            if self.step == 1:
                os.kill(os.getpid(), signal.SIGINT)
            return run_step(self, parts, num_images)

        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(Trainer, "run_step", interrupted)
            done = train(few, tmp_path, "--cached-teachers", stores(), "--checkpoint-steps", "100")
        refused(done, 130, "ending after this step", "saved at step 2: --resume goes on from there")

    def test_batches_of_one_train_the_batch_norms(self, whole: Path) -> None:
        """Statistics of one image over its places are statistics still."""
        saved = load_checkpoint(whole / "checkpoints/r" / LATEST)
        assert (saved.config.recipe.batch_size, saved.config.student.freezes_norms) == (1, False)
        variances = [weight for name, weight in saved.student.items() if name.endswith("running_var")]
        assert variances
        assert all(torch.isfinite(each).all() and not torch.all(each == 1) for each in variances)

    def test_an_exploding_run_keeps_its_last_checkpoint(self, few: Path, tmp_path: Path) -> None:
        done = train(few, tmp_path, "--learning-rate", "1e30", "--clip-norm", "1e30")
        refused(done, 1, "is not finite at step 2", "images VOC2007/", "lower --learning-rate")
        assert load_checkpoint(tmp_path / "checkpoints/r" / LATEST).step == 1

    @pytest.mark.parametrize(
        ("option", "said"),
        [
            (("--seed", "5"), "seed: stored 0, found 5"),
            (("--beta", "2"), "distillation.beta: stored 1.0, found 2.0"),
            (("--backbone", "resnet18"), "student.backbone: stored mobilenet_v3_small, found resnet18"),
        ],
        ids=lambda value: value[0] if isinstance(value, tuple) else "",
    )
    def test_another_configuration_is_refused_by_its_field(
        self, few: Path, stores: Callable[..., Path], whole: Path, option: tuple[str, str], said: str
    ) -> None:
        before = (whole / "checkpoints/r" / LATEST).read_bytes()
        done = train(few, whole, "--cached-teachers", stores(), "--resume", *option)
        refused(done, 3, "started with other settings", said, "choose another --run-name")
        assert (whole / "checkpoints/r" / LATEST).read_bytes() == before

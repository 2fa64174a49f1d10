import contextlib
import pickle
import random
from pathlib import Path
from typing import Any

import pytest
import torch

import pipeline.checkpoint
from data.errors import CheckpointError, TrainingError
from pipeline.checkpoint import BEST, LATEST, Checkpoint, link_latest, load_checkpoint, save_checkpoint
from students.config import StudentConfig
from students.detector import build_student
from tests.pipeline.small_runs import SMALL_STUDENT, small_run

CPU = torch.device("cpu")


def checkpoint(**changes: Any) -> Checkpoint:
    fields: dict[str, Any] = {
        "config": small_run(Path("voc"), Path("out")).resolved(),
        "student": {"weight": torch.arange(4.0)},
        "epoch": 3,
        "step": 12,
        "history": [{"epoch": 1, "losses": {"total": 1.5}, "val": None}],
        "targets": {"source": "none"},
    }
    return Checkpoint(**{**fields, **changes})


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "run" / LATEST
    path.parent.mkdir()
    save_checkpoint(path, checkpoint(training={"optimizer": {"state": {0: {"step": 3}}}}))
    return path


def test_what_is_saved_is_loaded(saved: Path) -> None:
    loaded, expected = load_checkpoint(saved), checkpoint()
    assert torch.equal(loaded.student["weight"], expected.student["weight"])
    for name in ("config", "epoch", "step", "history", "targets"):
        assert getattr(loaded, name) == getattr(expected, name)
    assert loaded.training == {"optimizer": {"state": {0: {"step": 3}}}}


class TestLoading:
    def test_a_missing_file_lists_those_that_are_there(self, saved: Path) -> None:
        with pytest.raises(CheckpointError, match=rf"no such checkpoint; found {saved}") as caught:
            load_checkpoint(saved.parent.parent / "typo" / LATEST)
        assert caught.value.exit_code == 3

    def test_an_environments_pth_files_are_not_taken_for_checkpoints(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        packages = tmp_path / ".venv" / "lib" / "site-packages"
        packages.mkdir(parents=True)
        (packages / "distutils-precedence.pth").touch()
        monkeypatch.chdir(tmp_path)
        with pytest.raises(CheckpointError) as caught:
            load_checkpoint(Path("student.pth"))
        assert caught.value.message == "student.pth: no such checkpoint"

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b"", "cannot be read as a checkpoint"),
            (b"<html>not found</html>", "cannot be read as a checkpoint"),
            (pickle.dumps({"format": 1, "x": Path("x")}), "cannot be read as a checkpoint"),
            (b"PK\x03\x04" + b"\0" * 60, "cannot be read as a checkpoint"),
        ],
        ids=["empty", "html", "foreign pickle", "broken zip"],
    )
    def test_other_files_are_refused(self, tmp_path: Path, content: bytes, message: str) -> None:
        path = tmp_path / "student.pth"
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=message):
            load_checkpoint(path)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda c: [c], "not a TeachOnce checkpoint"),
            (lambda c: {k: v for k, v in c.items() if k != "format"}, "not a TeachOnce checkpoint"),
            (lambda c: c | {"format": 2}, "expected format 1, found the newer 2"),
            (lambda c: {k: v for k, v in c.items() if k != "student"}, "damaged"),
            (lambda c: {k: v for k, v in c.items() if k != "config"}, "damaged"),
            (lambda c: c | {"config": c["config"] | {"seed": "x"}}, "damaged"),
            (lambda c: c | {"extra": 1}, "damaged"),
        ],
        ids=["a list", "no format", "newer", "no student", "no config", "other config", "extra"],
    )
    def test_other_contents_are_refused(self, saved: Path, change: Any, message: str) -> None:
        torch.save(change(torch.load(saved, weights_only=True)), saved)
        with pytest.raises(CheckpointError, match=message):
            load_checkpoint(saved)

    def test_a_damaged_file_is_refused_or_reads_as_what_was_saved(self, saved: Path) -> None:
        """Random bytes of the file are changed, and it is cut short: never another error than ours."""
        draw = random.Random(5)
        whole = saved.read_bytes()
        for _ in range(150):
            damaged = bytearray(whole)
            for _ in range(draw.randint(1, 20)):
                damaged[draw.randrange(len(damaged))] = draw.randrange(256)
            saved.write_bytes(bytes(damaged[: draw.randint(1, len(damaged))] if draw.random() < 0.3 else damaged))
            with contextlib.suppress(CheckpointError):
                load_checkpoint(saved)

    def test_another_backbone_is_refused_with_both_names(self, saved: Path) -> None:
        load_checkpoint(saved, "mobilenet_v3_small")
        with pytest.raises(CheckpointError, match="backbone resnet18, found one of mobilenet_v3_small") as caught:
            load_checkpoint(saved, "resnet18")
        assert "--backbone mobilenet_v3_small" in str(caught.value)
        assert caught.value.exit_code == 3

    def test_weights_that_do_not_fit_their_configuration_are_refused(self) -> None:
        with pytest.raises(CheckpointError, match="do not fit its own configuration"):
            checkpoint().build_student(CPU)

    def test_a_student_is_rebuilt_without_its_backbones_weights_file(self) -> None:
        student = build_student(SMALL_STUDENT.model_copy(update={"norms": "frozen"}))
        config = StudentConfig(**{**SMALL_STUDENT.model_dump(), "backbone_weights": "/no/longer/there.pth"})
        run = checkpoint().config.model_copy(update={"student": config})
        rebuilt = checkpoint(config=run, student=student.state_dict()).build_student(CPU)
        assert not rebuilt.training


class TestSaving:
    def test_a_failed_write_leaves_the_old_file_whole(self, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        before = saved.read_bytes()

        def full(*_: Any) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(pipeline.checkpoint.os, "fsync", full)
        with pytest.raises(TrainingError, match="cannot be written: No space left on device"):
            save_checkpoint(saved, checkpoint())
        assert saved.read_bytes() == before
        assert [path.name for path in saved.parent.iterdir()] == [LATEST]

    def test_a_disk_that_fills_up_while_writing_is_told_in_plain_words(
        self, saved: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """torch wraps what the file's own `write` raises."""
        original = Path.open

        class Full:
            def __init__(self, path: Path) -> None:
                self.file = original(path, "wb")

            def __enter__(self) -> "Full":
                return self

            def __exit__(self, *_: object) -> None:
                self.file.close()

            def __getattr__(self, name: str) -> Any:
                return getattr(self.file, name)

            def write(self, data: bytes) -> int:
                raise OSError(28, "No space left on device")

        before = saved.read_bytes()
        monkeypatch.setattr(Path, "open", lambda self, *_: Full(self))
        with pytest.raises(TrainingError, match="cannot be written"):
            save_checkpoint(saved, checkpoint())
        monkeypatch.undo()
        assert saved.read_bytes() == before
        assert [path.name for path in saved.parent.iterdir()] == [LATEST]

    def test_the_link_follows_the_last_run(self, tmp_path: Path) -> None:
        for name in ("one", "two"):
            (tmp_path / name).mkdir()
            (tmp_path / name / LATEST).write_text(name)
            link_latest(tmp_path, tmp_path / name / LATEST)
            assert (tmp_path / LATEST).read_text() == name
        (tmp_path / LATEST).unlink()
        assert sorted(path.name for path in tmp_path.rglob("*.pth")) == [LATEST, LATEST]
        assert BEST != LATEST

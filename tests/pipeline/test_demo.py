import json
from pathlib import Path

import pytest

import pipeline.demo
from data.errors import UsageError
from pipeline.demo import choose_teachers, run_demo
from tests.command_line import run


@pytest.fixture
def shrunk(monkeypatch: pytest.MonkeyPatch, unreachable_hub: Path) -> None:
    """A demo of two images and one epoch, where the real teachers cannot be had."""
    for name in ("_NUM_TRAIN", "_NUM_VAL", "_NUM_PICTURES"):
        monkeypatch.setattr(pipeline.demo, name, 2)
    monkeypatch.setattr(pipeline.demo, "_EPOCHS", 1)


@pytest.mark.usefixtures("shrunk")
def test_it_makes_a_store_two_runs_and_pictures_from_nothing(tmp_path: Path) -> None:
    out = tmp_path / "demo"
    done = run("demo", "--out", out, "--device", "cpu")
    assert done.code == 0, done.err
    for words in ("complete", "baseline", "cached-kd", "UNTRAINED", "mAP", "next: "):
        assert words in done.out
    for name in ("baseline", "cached-kd"):
        assert json.loads((out / "runs" / name / "result.json").read_text())["steps"] == 1
    assert len(list((out / "pictures").glob("*.png"))) == 4  # two images, curves, the teacher
    assert len(list((out / "detections").iterdir())) == 20
    # What it made it may make again; what else is there it leaves alone.
    (out / "runs" / "old").mkdir()
    pipeline.demo._clear(out)
    assert [path.name for path in out.iterdir()] == [pipeline.demo.MARKER]


def test_a_folder_that_is_not_its_own_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UsageError, match="holds something that the demo did not make"):
        run_demo(tmp_path, "cpu")
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


@pytest.mark.usefixtures("unreachable_hub")
def test_without_the_real_teachers_it_says_that_the_embedded_ones_are_untrained() -> None:
    teachers, said = choose_teachers()
    assert teachers == ("tiny_dino", "tiny_clip")
    assert "UNTRAINED" in said

import json
from pathlib import Path

import pytest
import yaml

import pipeline.demo
from data.errors import UsageError
from pipeline.demo import choose_teachers, run_demo
from tests.command_line import run


@pytest.fixture
def shrunk(monkeypatch: pytest.MonkeyPatch, unreachable_hub: Path, tmp_path: Path) -> None:
    """A demo of two images, one epoch and one seed, where the real teachers cannot be had."""
    for name in ("_NUM_TRAIN", "_NUM_VAL"):
        monkeypatch.setattr(pipeline.demo, name, 2)
    plan = yaml.safe_load(pipeline.demo.PLAN.read_text(encoding="utf-8"))
    shrunken = {**plan, "train": {**plan["train"], "epochs": 1}, "seeds": [0]}
    path = tmp_path / "demo.yaml"
    path.write_text(yaml.safe_dump(shrunken), encoding="utf-8")
    monkeypatch.setattr(pipeline.demo, "PLAN", path)


@pytest.mark.usefixtures("shrunk")
def test_it_makes_a_store_a_sweep_and_its_report_from_nothing(tmp_path: Path) -> None:
    out = tmp_path / "demo"
    done = run("demo", "--out", out, "--device", "cpu")
    assert done.code == 0, done.err
    for words in (
        "complete",
        "baseline",
        "distilled",
        "UNTRAINED",
        "mAP",
        "too few seeds",
        "Extraction, once",
        "3 steps of",
    ):
        assert words in done.out
    assert "".join(done.out.split()).endswith(f"next:open{out / 'report.html'}")
    results = [json.loads(path.read_text()) for path in sorted((out / "runs").glob("*/result.json"))]
    assert [result["config"]["distillation"]["source"] for result in results] == ["none", "store"]
    assert {result["steps"] for result in results} == {1}
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "UNTRAINED teachers: tiny_clip, tiny_dino" in page
    assert "Runs of seed 0" in page
    assert (out / "teacher-heatmap.png").read_bytes().startswith(b"\x89PNG")
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

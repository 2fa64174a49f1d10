"""`report`: what it reads, computes and refuses."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data.errors import TeachOnceError
from data.synthetic import make_devkit
from data.voc import read_voc
from evaluation.average_precision import evaluate
from evaluation.devkit_files import read_devkit, write_devkit
from evaluation.matching import Metric
from pipeline.report import ReportRequest, write_report
from pipeline.run_folder import read_run_folder
from pipeline.train import DETECTIONS, train
from tests.command_line import run as run_verb
from tests.pipeline.made_runs import CACHED, jittered, make_run
from tests.pipeline.small_runs import small_run

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def pair(devkit: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The folders of a baseline and of a better run. Read only."""
    folder = tmp_path_factory.mktemp("pair")
    return make_run(devkit, folder, "baseline", skill=0.3), make_run(
        devkit, folder, "kd", skill=0.8, distillation=CACHED
    )


@pytest.fixture
def own(pair: tuple[Path, Path], tmp_path: Path) -> Path:
    """A copy of the baseline's folder, to spoil."""
    return Path(shutil.copytree(pair[0], tmp_path / "own"))


def page_of(tmp_path: Path, *runs: Path, **settings: Any) -> str:
    settings = {"out": tmp_path / "report.html", "images": 2, "resamples": 20, **settings}
    write_report(ReportRequest(runs, **settings))
    return settings["out"].read_text(encoding="utf-8")


def text_of(page: str) -> str:
    """What is written on the page, without markup."""
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", page.split("<body>")[1].split("<script>")[0]))


class TestPage:
    def test_its_figures_are_those_of_the_evaluator(
        self, pair: tuple[Path, Path], devkit: Path, tmp_path: Path
    ) -> None:
        text = text_of(page_of(tmp_path, *pair))
        records = read_voc(devkit, ("2007:val",))
        for path in pair:
            found, _ = read_devkit(path / "detections" / "val", records)
            metrics: tuple[Metric, ...] = ("voc", "voc07", "coco")
            for metric in metrics:
                result = evaluate(found, records, metric)
                assert result.mAP is not None
                assert f" {100 * result.mAP:.2f} " in text
        assert "UNTRAINED teachers: tiny_clip, tiny_dino (kd)" in text
        assert "Selected and reported on the same images" in text
        assert "4 epochs from random initialisation" in text
        assert "One seed an arm" in text

    def test_the_same_runs_give_the_same_bytes(self, pair: tuple[Path, Path], tmp_path: Path) -> None:
        assert page_of(tmp_path, *pair) == page_of(tmp_path, *pair)

    @pytest.mark.parametrize(("named", "gained"), [(None, "kd"), ("kd", "baseline")])
    def test_the_baseline_is_the_named_one_or_the_one_without_distillation(
        self, pair: tuple[Path, Path], tmp_path: Path, named: str | None, gained: str
    ) -> None:
        page = page_of(tmp_path, *pair[::-1], baseline=named)
        chart = page.split("Gain in mAP over", 1)[1].split("</figure>")[0]
        assert f">{gained}</text>" in chart

    def test_one_run_alone_has_no_differences(self, pair: tuple[Path, Path], tmp_path: Path) -> None:
        text = text_of(page_of(tmp_path, pair[0]))
        assert "Δ" not in text.split("Before you read")[1].split("Classes")[0]
        assert "One run with one seed" in text

    def test_runs_of_one_name_are_told_apart_by_their_folders(
        self, devkit: Path, tmp_path: Path, pair: tuple[Path, Path]
    ) -> None:
        other = make_run(devkit, tmp_path, "baseline", seed=1)
        text = text_of(page_of(tmp_path, pair[0], other))
        assert str(pair[0]) in text
        assert str(other) in text

    def test_the_test_set_is_reported_where_asked_for(self, tmp_path: Path) -> None:
        voc = make_devkit(tmp_path / "voc", num_train=1, num_val=2, num_test=3, seed=3)
        made = make_run(voc, tmp_path, "run", test_sets=("2007:test",))
        text = text_of(page_of(tmp_path, made, image_set="test"))
        assert "scored on 3 images of 2007:test" in text
        assert "Selected and reported on the same images" not in text

    def test_without_image_files_it_says_so_and_shows_the_figures(
        self, pair: tuple[Path, Path], devkit: Path, tmp_path: Path
    ) -> None:
        shutil.copytree(devkit, tmp_path / "voc", ignore=shutil.ignore_patterns("*.jpg"))
        out = tmp_path / "report.html"
        lines = write_report(ReportRequest(pair, out, tmp_path / "voc"))
        assert "no pictures" in lines[0]
        assert lines[1].startswith("No pictures: none of the image files is in ")
        assert lines[1] in text_of(out.read_text(encoding="utf-8"))

    def test_a_run_scored_at_the_end_only_has_one_point(self, devkit: Path, tmp_path: Path) -> None:
        page = page_of(tmp_path, make_run(devkit, tmp_path, "late", evaluate="final-only"), images=0)
        assert "Validation mAP by epoch as a table" in page

    def test_a_test_of_these_folders_holds_for_trained_ones(self, devkit: Path, tmp_path: Path) -> None:
        config = small_run(devkit, tmp_path, "trained")
        result = train(config)
        made = read_run_folder(make_run(devkit, tmp_path, "made")).result
        assert result.keys() == made.keys()
        assert result["last"].keys() == made["last"].keys()
        assert result["seconds"].keys() == made["seconds"].keys()
        assert DETECTIONS == "detections"
        assert "trained" in text_of(page_of(tmp_path, config.run_dir))

    def test_no_torch_is_loaded(self, pair: tuple[Path, Path], tmp_path: Path) -> None:
        script = (
            "import sys; from pathlib import Path; from pipeline.report import ReportRequest, write_report;"
            "run, out = map(Path, sys.argv[1:]); write_report(ReportRequest((run,), out, images=1, resamples=20));"
            "print([m for m in ('torch', 'zarr', 'matplotlib') if m in sys.modules])"
        )
        command = [sys.executable, "-c", script, str(pair[0]), str(tmp_path / "report.html")]
        done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
        assert done.stdout.strip() == "[]"


class TestVerb:
    def test_it_says_what_it_wrote(self, pair: tuple[Path, Path], tmp_path: Path) -> None:
        out = tmp_path / "new" / "report.html"
        done = run_verb("report", *pair, "--out", out, "--images", "3")
        assert (done.code, done.out) == (0, f"wrote {out}: 2 runs, 3 pictures, {out.stat().st_size / 1e6:.1f} MB\n")

    def test_a_failed_one_leaves_the_earlier_report(self, pair: tuple[Path, Path], tmp_path: Path) -> None:
        out = tmp_path / "report.html"
        out.write_text("earlier")
        assert run_verb("report", pair[0], tmp_path / "no-run", "--out", out).code == 1
        assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
        assert out.read_text() == "earlier"


def no_result(run: Path) -> None:
    (run / "result.json").unlink()


def no_run(run: Path) -> None:
    no_result(run)
    (run / "config.json").unlink()


def no_detections(run: Path) -> None:
    shutil.rmtree(run / "detections")


def half_a_result(run: Path) -> None:
    path = run / "result.json"
    path.write_text(path.read_text()[:100])


def result_of_something_else(run: Path) -> None:
    (run / "result.json").write_text(json.dumps({"run_name": "x"}))


def history_without_losses(run: Path) -> None:
    (run / "metrics.jsonl").write_text('{"epoch": 1, "val": null}\n')


def bad_history(run: Path) -> None:
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"epoch": 5, "los')


def other_detections(run: Path) -> None:
    config = json.loads((run / "config.json").read_text())
    records = read_voc(Path(config["voc_root"]), config["val_sets"])
    write_devkit(jittered(records, 0.9, 5), run / "detections" / "val", prefix="comp4_det_val")


class TestRefusals:
    @pytest.mark.parametrize(
        ("spoil", "message"),
        [
            (shutil.rmtree, r"own: no such folder\n  next: give the folders of runs"),
            (no_run, r"own: no run is in this folder \(no config\.json\)"),
            (no_result, r"own: this run is not finished \(no result\.json\)\n  next: .* --run-name own --resume"),
            (
                no_detections,
                r"own/detections/val: no detections .*\n  next: make them: python cli\.py eval --checkpoint"
                r" \S+/baseline/student_latest\.pth --voc-set 2007:val --save-detections \S+/detections/val",
            ),
            (half_a_result, r"own/result\.json: cannot be read as JSON"),
            (
                result_of_something_else,
                r"own/result\.json: expected what train writes, found no 'config.student.backbone'",
            ),
            (history_without_losses, r"own/metrics\.jsonl: expected what train writes, found no 'losses'"),
            (bad_history, r"own/metrics\.jsonl: cannot be read as JSON, a line an epoch"),
            (
                other_detections,
                r"own/detections/val: these detections come to mAP [0-9.]+, the run's result\.json says",
            ),
        ],
    )
    def test_a_spoilt_folder(self, own: Path, tmp_path: Path, spoil: Callable[[Path], None], message: str) -> None:
        spoil(own)
        with pytest.raises(TeachOnceError, match=message):
            write_report(ReportRequest((own,), tmp_path / "report.html"))
        assert not (tmp_path / "report.html").exists()

    def test_runs_on_different_images(self, pair: tuple[Path, Path], devkit: Path, tmp_path: Path) -> None:
        other = make_run(devkit, tmp_path, "other", val_sets=("2007:train",))
        with pytest.raises(TeachOnceError, match=r"on different images: .*baseline on 2007:val, .*other on 2007:tr"):
            write_report(ReportRequest((pair[0], other), tmp_path / "report.html"))

    def test_runs_on_images_of_the_same_names_in_another_devkit(self, pair: tuple[Path, Path], tmp_path: Path) -> None:
        drawn = make_devkit(tmp_path / "voc", num_train=12, num_val=6, seed=8)
        other = make_run(drawn, tmp_path, "other")
        with pytest.raises(TeachOnceError, match=r"different annotations of VOC2007/000013: .*\n  next: .*--voc-root"):
            write_report(ReportRequest((pair[0], other), tmp_path / "report.html"))

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"baseline": "nothing"}, r"--baseline nothing is none of the runs \(.*baseline, .*kd\)"),
            ({"image_set": "test"}, r"baseline: --set test, but this run was trained without a test set"),
            ({"voc_root": Path("nowhere")}, r"nowhere/VOC2007: no such devkit"),
            ({"out": REPOSITORY}, r"expected the file to write, found a folder\n  next: --out \S+/report\.html"),
        ],
    )
    def test_what_is_asked_for(
        self, pair: tuple[Path, Path], tmp_path: Path, settings: dict[str, Any], message: str
    ) -> None:
        with pytest.raises(TeachOnceError, match=message):
            write_report(ReportRequest(pair, **{"out": tmp_path / "report.html", **settings}))

    def test_a_run_given_twice(self, pair: tuple[Path, Path], tmp_path: Path) -> None:
        with pytest.raises(TeachOnceError, match="baseline: this run is given twice"):
            write_report(ReportRequest((pair[0], pair[1], pair[0]), tmp_path / "report.html"))

    def test_a_damaged_image(self, pair: tuple[Path, Path], devkit: Path, tmp_path: Path) -> None:
        voc = Path(shutil.copytree(devkit, tmp_path / "voc"))
        for path in (voc / "VOC2007" / "JPEGImages").iterdir():
            path.write_bytes(path.read_bytes()[:500])
        with pytest.raises(TeachOnceError, match="damaged image"):
            write_report(ReportRequest((pair[0],), tmp_path / "report.html", voc))

"""The command line's promises: exit codes, what goes to stdout, JSON contracts, light start, layering."""

from __future__ import annotations

import ast
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import cli
import pipeline.train
from pipeline.extract import extract
from tests.command_line import SHORT_RUN, run
from tests.pipeline.small_runs import TINY_TEACHERS, extraction

REPOSITORY = Path(__file__).resolve().parents[1]
VERBS = list(cli.cli.commands)


@pytest.fixture(scope="module")
def store(devkit: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete store of the first four training images."""
    return extract(extraction(devkit, tmp_path_factory.mktemp("cli") / "teachers.zarr", limit=4)).store


@pytest.fixture(scope="module")
def run_folder(devkit: Path, store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of one step, `short`, trained through the command line against the store."""
    folder = tmp_path_factory.mktemp("run")
    places = ("--runs-dir", folder / "runs", "--checkpoints-dir", folder / "checkpoints", "--run-name", "short")
    done = run("train", "--voc-root", devkit, "--limit", "2", *SHORT_RUN, "--cached-teachers", store, *places, "--json")
    assert done.code == 0, done.err
    (folder / "stdout.json").write_text(done.out)
    return folder


def python(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=REPOSITORY, capture_output=True, text=True, env={**os.environ, **environment}, check=False,
    )  # fmt: skip


class TestStart:
    def test_help_of_every_verb_imports_nothing_heavy(self) -> None:
        script = f"""
import sys, cli
for verb in [[], *([verb] for verb in {VERBS})]:
    sys.argv = ["cli.py", *verb, "--help"]
    assert cli.main() == 0, verb
# pydantic is not among them: the options of `train` are read off its models, which takes a tenth of a second.
heavy = {{"torch", "torchvision", "numpy", "zarr", "timm", "rich", "PIL", "matplotlib", "transformers"}}
print("heavy:", sorted(heavy & set(sys.modules)))
"""
        done = python("-c", script)
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines()[-1] == "heavy: []"
        assert done.stdout.count("Usage: ") == 1 + len(VERBS)

    def test_every_verb_of_the_project_is_there_and_explains_itself(self) -> None:
        wanted = {"extract-teachers", "train", "eval", "inspect-cache", "demo", "debug-batch", "make-synthetic-voc",
                  "check-voc", "download-voc", "teachers", "relabel-logits", "convert-cache"}  # fmt: skip
        assert wanted <= set(VERBS)
        for verb in VERBS:
            done = run(verb, "--help")
            assert done.code == 0
            assert "--debug" in done.out
            assert max(map(len, done.out.splitlines())) <= 100

    def test_an_unknown_verb_or_none_is_a_usage_error(self) -> None:
        assert run("trian").code == 2
        assert "No such command 'trian'" in run("trian").err
        assert run().code == 2

    def test_inspect_cache_needs_no_torch_and_no_zarr(self, store: Path) -> None:
        script = (
            "import sys, cli; code = cli.main(); print({'torch', 'zarr', 'h5py'} & set(sys.modules)); sys.exit(code)"
        )
        done = python("-c", script, "inspect-cache", store, "--verify")
        assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "set()")

    def test_the_file_itself_ends_with_the_exit_code(self, tmp_path: Path) -> None:
        done = python("cli.py", "inspect-cache", tmp_path / "none.zarr")
        assert done.returncode == 3
        assert done.stdout == ""
        assert done.stderr.startswith(f"error: {tmp_path / 'none.zarr'} does not exist")


def test_the_command_line_joins_no_packages() -> None:
    """At import it knows the error tree and the shared options alone; verbs call `pipeline`, `cache`, and what of
    `data` and `evaluation` needs no joining. Teachers and students are reached through `pipeline` only."""
    tree = ast.parse((REPOSITORY / "cli.py").read_text())
    ours = {"cache", "data", "evaluation", "features", "pipeline", "students"}

    def imported(nodes: Any) -> set[str]:
        names: set[str] = set()
        for node in nodes:
            if isinstance(node, ast.ImportFrom):
                names.add(node.module or "")
            elif isinstance(node, ast.Import):
                names.update(alias.name for alias in node.names)
        return {name for name in names if name.partition(".")[0] in ours}

    assert imported(tree.body) == {"data.errors", "pipeline.options"}
    assert {name.partition(".")[0] for name in imported(ast.walk(tree))} <= {"pipeline", "cache", "data", "evaluation"}


class TestExitCodes:
    @pytest.mark.parametrize("verb", ["train", "debug-batch"])
    def test_an_interrupt_ends_with_130(self, devkit: Path, verb: str, monkeypatch: pytest.MonkeyPatch) -> None:
        def interrupt(*_: Any, **__: Any) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(pipeline.train, "read_voc", interrupt)
        monkeypatch.setattr("pipeline.debug_batch.read_voc", interrupt)
        done = run(verb, "--voc-root", devkit, *SHORT_RUN)
        assert done.code == 130
        assert "interrupted" in done.err
        assert "--resume" in done.err
        assert "Traceback" not in done.err

    @pytest.mark.skipif(sys.platform == "win32", reason="about signals")
    def test_a_ctrl_c_from_the_terminal_ends_with_130(self, devkit: Path) -> None:
        script = """
import os, signal, sys, cli, pipeline.checking
pipeline.checking.check_with_progress = lambda *_, **__: os.kill(os.getpid(), signal.SIGINT)
sys.exit(cli.main())
"""
        done = python("-c", script, "check-voc", "--voc-root", devkit)
        assert done.returncode == 130
        assert "Traceback" not in done.stderr
        assert signal.SIGINT == 2

    def test_debug_shows_the_traceback_and_the_message(self, tmp_path: Path) -> None:
        plain, told = (run("inspect-cache", tmp_path / "none.zarr", *more) for more in ([], ["--debug"]))
        assert plain.code == told.code == 3
        assert "Traceback" not in plain.err
        assert "Traceback (most recent call last)" in told.err
        assert "StoreMissingError" in told.err
        assert told.err.endswith(plain.err)

    def test_what_is_no_foreseen_failure_comes_with_its_traceback(
        self, store: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def broken(*_: Any, **__: Any) -> None:
            raise AttributeError("a bug")

        monkeypatch.setattr("pipeline.inspection.inspect_with_progress", broken)
        with pytest.raises(AttributeError, match="a bug"):
            run("inspect-cache", store)

    def test_a_full_device_memory_is_told_in_plain_words(self, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        import torch

        def full(*_: Any, **__: Any) -> None:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

        monkeypatch.setattr("pipeline.inspection.inspect_with_progress", full)
        done = run("inspect-cache", store)
        assert (done.code, "lower --batch-size" in done.err) == (1, True)


class TestInspectCache:
    def test_the_json_has_its_keys(self, store: Path) -> None:
        done = run("inspect-cache", store, "--json", "--verify")
        said = json.loads(done.out)
        assert done.code == 0
        assert set(said) >= {
            "store", "format_version", "fingerprint", "frame", "dataset", "teachers", "arrays", "status", "problems",
            "verified",
        }  # fmt: skip
        assert (said["status"], said["problems"], said["verified"]) == ("complete", [], True)
        assert (said["frame"], said["dataset"]["sets"], said["dataset"]["samples"]) == ([480, 480], ["2007:train"], 4)
        assert {name: teacher["untrained"] for name, teacher in said["teachers"].items()} == dict.fromkeys(
            TINY_TEACHERS, True
        )
        array = next(a for a in said["arrays"] if a["path"] == "tiny_dino/original/features")
        assert set(array) >= {
            "path", "shape", "dtype", "chunk", "shard", "bytes", "complete", "missing", "fingerprint", "content",
        }  # fmt: skip
        assert (array["shape"], array["dtype"]) == ([4, 30, 30, 64], "float16")
        assert (array["chunk"], array["shard"]) == ([1, 30, 30, 64], [4, 30, 30, 64])
        assert (array["complete"], array["missing"]) == (True, 0)
        logits = next(a for a in said["arrays"] if a["path"] == "tiny_clip/original/logits")
        assert logits["shard"] is None

    def test_an_incomplete_store_ends_with_3_and_its_json(self, store: Path, tmp_path: Path) -> None:
        copy = Path(shutil.copytree(store, tmp_path / "s.zarr"))
        (copy / "tiny_clip/hflip/logits/ledger.jsonl").unlink()
        done = run("inspect-cache", copy, "--json")
        said = json.loads(done.out)
        assert (done.code, said["status"], said["problems"]) == (3, "incomplete", [])
        missing = {array["path"]: array["missing"] for array in said["arrays"] if not array["complete"]}
        assert missing == {"tiny_clip/hflip/logits": 4}

    def test_a_corrupt_store_ends_with_3_and_its_json(self, store: Path, tmp_path: Path) -> None:
        copy = Path(shutil.copytree(store, tmp_path / "s.zarr"))
        shard = next((copy / "tiny_dino/hflip/features/c").rglob("0/0/0/0"))
        damaged = bytearray(shard.read_bytes())
        damaged[3 * (30 * 30 * 64 * 2 + 4) + 10] ^= 1  # in the fourth sample
        shard.write_bytes(bytes(damaged))
        assert run("inspect-cache", copy, "--json").code == 0  # sizes and indices are as they were
        done = run("inspect-cache", copy, "--json", "--verify")
        said = json.loads(done.out)
        assert (done.code, said["status"]) == (3, "corrupt")
        problem = said["problems"][0]
        assert (problem["array"], problem["shard"], problem["sample"]) == ("tiny_dino/hflip/features", 0, 3)
        assert "corrupt" in run("inspect-cache", copy, "--verify").out

    def test_an_unreadable_manifest_ends_with_3_and_its_json(self, store: Path, tmp_path: Path) -> None:
        copy = Path(shutil.copytree(store, tmp_path / "s.zarr"))
        path = copy / "tiny_dino/zarr.json"
        path.write_text(path.read_text().replace('"untrained": true', '"untrained": false'))
        done = run("inspect-cache", copy, "--json")
        assert (done.code, json.loads(done.out)["status"]) == (3, "corrupt")

    def test_the_table_fits_80_columns(self, store: Path) -> None:
        done = run("inspect-cache", store)
        assert done.code == 0
        assert max(map(len, done.out.splitlines())) <= 80
        for words in ("complete", "tiny_dino", "untrained", "4 of 2007:train, first 4", "4×30×30×64"):
            assert words in done.out

    def test_a_samples_features_are_drawn(self, devkit: Path, store: Path, tmp_path: Path) -> None:
        for name, more in (("alone.png", []), ("beside.png", ["--voc-root", devkit])):
            done = run("inspect-cache", store, "--sample", "VOC2007/000002", "--heatmap", tmp_path / name, *more)
            assert (done.code, done.out) == (0, f"wrote {tmp_path / name}\n")
            with Image.open(tmp_path / name) as picture:
                assert min(picture.size) > 200


class TestExtract:
    def test_a_second_teacher_is_added_although_the_first_was_interrupted(
        self, devkit: Path, store: Path, tmp_path: Path
    ) -> None:
        copy = Path(shutil.copytree(store, tmp_path / "s.zarr"))
        for name in ("ledger.jsonl", "provenance.jsonl"):
            (copy / "tiny_clip/original/logits" / name).unlink()
        common = ("--voc-root", devkit, "--limit", "4", "--out", copy, "--shard-samples", "4", "--workers", "0")
        done = run("extract-teachers", *common, "--teacher", "other=tiny_dino")
        assert done.code == 0, done.err
        assert "image-level multi-label mAP" not in done.out  # of a teacher that has not said all
        done = run("extract-teachers", *common, "--teacher", "tiny_clip")
        assert done.code == 0
        assert "tiny_clip: image-level multi-label mAP" in done.out
        assert "UNTRAINED" in done.out
        assert run("inspect-cache", copy).code == 0

    def test_the_next_command_is_named(self, devkit: Path, store: Path) -> None:
        done = run("extract-teachers", "--voc-root", devkit, "--limit", "4", "--out", store, "--shard-samples", "4",
                   "--teacher", "tiny_clip")  # fmt: skip
        assert done.code == 0
        assert "0 targets computed" in done.out
        images = f"--voc-root {devkit} --voc-set 2007:train --limit 4"  # all that the store holds, and no more
        assert f"next: python cli.py train {images} --cached-teachers {store}" in done.out
        assert "the store is complete" in done.err


class TestTrain:
    def test_json_is_the_result_and_nothing_else(self, run_folder: Path) -> None:
        said = json.loads((run_folder / "stdout.json").read_text())
        assert said == json.loads((run_folder / "runs/short/result.json").read_text())
        assert said["images"]["train"] == 2
        assert said["config"]["distillation"]["source"] == "store"
        assert said["config"]["evaluate"] == "every-epoch"

    def test_resuming_a_finished_run_tells_its_result_again(self, devkit: Path, store: Path, run_folder: Path) -> None:
        places = ("--runs-dir", run_folder / "runs", "--checkpoints-dir", run_folder / "checkpoints")
        done = run(
            "train", "--voc-root", devkit, "--limit", "2", *SHORT_RUN, "--cached-teachers", store, *places,
            "--run-name", "short", "--resume",
        )  # fmt: skip
        assert done.code == 0
        for words in ("run short: mobilenet_v3_small, cached KD", "best epoch (1)", "UNTRAINED teachers: tiny_dino",
                      "selected and reported on the same images", "far from converged"):  # fmt: skip
            assert words in done.out
        best = run_folder / "checkpoints/short/student_best.pth"
        assert f"next: python cli.py eval --checkpoint {best}" in done.out

    def test_a_bare_cached_teachers_reads_the_default_store(self, devkit: Path) -> None:
        for position in (["--cached-teachers", "--limit", "2"], ["--limit", "2", "--cached-teachers"]):
            done = run("train", "--voc-root", devkit, *SHORT_RUN, *position)
            assert done.code == 3
            assert "data/teachers.zarr does not exist" in done.err

    def test_debug_batch_prints_stored_live_and_wrong_view(self, devkit: Path, store: Path) -> None:
        teachers = [option for name in TINY_TEACHERS for option in ("--teacher", name)]
        done = run("debug-batch", "--voc-root", devkit, "--limit", "2", *SHORT_RUN, "--cached-teachers", store,
                   "--distill", *teachers)  # fmt: skip
        assert done.code == 0, done.err
        for words in ("detection", "feature", "logit", "store", "live", "wrong view"):
            assert words in done.out


class TestEval:
    CONTRACT = frozenset({"images", "metric", "mAP", "per_iou", "per_class", "definitions", "by_size"})

    def test_the_json_has_its_keys_and_fractions(self, run_folder: Path) -> None:
        done = run("eval", "--checkpoint", run_folder / "checkpoints/student_latest.pth", "--json", "--workers", "0")
        said = json.loads(done.out)
        assert done.code == 0
        assert set(said) >= self.CONTRACT
        assert (said["images"], said["metric"]) == (6, "voc")
        assert list(said["per_iou"]) == [f"{iou / 100:.2f}" for iou in range(50, 100, 5)]
        assert len(said["per_class"]) == 20
        assert {tuple(values) for values in said["per_class"].values()} == {("mAP", "AP50")}
        numbers = [value for values in said["per_class"].values() for value in values.values() if value is not None]
        assert all(0 <= value <= 1 for value in [said["mAP"], *numbers])
        assert None in [values["mAP"] for values in said["per_class"].values()]  # a class that is not there

    def test_the_checkpoints_figures_are_those_of_training(self, run_folder: Path) -> None:
        done = run(
            "eval", "--checkpoint", run_folder / "checkpoints/short/student_best.pth", "--json", "--workers", "0"
        )
        result = json.loads((run_folder / "runs/short/result.json").read_text())
        assert json.loads(done.out) == result["best"]["val"]

    def test_saved_detections_score_the_same_without_torch(
        self, devkit: Path, run_folder: Path, tmp_path: Path
    ) -> None:
        checkpoint = run_folder / "checkpoints/student_latest.pth"
        for metric, name in (("voc", "found"), ("voc07", "found"), ("coco", "found.json")):
            saved = tmp_path / name
            done = run("eval", "--checkpoint", checkpoint, "--voc-set", "2007:train", "--metric", metric, "--json",
                       "--save-detections", saved, "--workers", "0")  # fmt: skip
            assert done.code == 0, done.err
            script = (
                "import sys, cli; code = cli.main(); print({'torch', 'PIL.Image'} & set(sys.modules), file=sys.stderr);"
                " sys.exit(code)"
            )
            again = python("-c", script, "eval", "--detections", saved, "--voc-root", devkit, "--voc-set", "2007:train",
                           "--metric", metric, "--json")  # fmt: skip
            assert again.returncode == 0, again.stderr
            assert json.loads(again.stdout) == json.loads(done.out)
            assert "torch" not in again.stderr.splitlines()[-1]
        assert len(list((tmp_path / "found").iterdir())) == 20
        assert sum(path.stat().st_size for path in (tmp_path / "found").iterdir()) > 0
        assert len(json.loads((tmp_path / "found.json").read_text())) > 0

    def test_another_backbone_is_refused(self, run_folder: Path) -> None:
        done = run("eval", "--checkpoint", run_folder / "checkpoints/student_latest.pth", "--backbone", "resnet18")
        assert done.code == 3
        assert "expected a checkpoint of backbone resnet18, found one of mobilenet_v3_small" in done.err
        assert "--backbone mobilenet_v3_small" in done.err

    def test_pictures_and_a_table_are_made(self, run_folder: Path, tmp_path: Path) -> None:
        done = run("eval", "--checkpoint", run_folder / "checkpoints/student_latest.pth", "--visualize", "2",
                   "--out", tmp_path / "pictures", "--workers", "0")  # fmt: skip
        assert done.code == 0
        drawn = {path.name for path in (tmp_path / "pictures").glob("*.png")}
        assert len(drawn) == 3
        assert "precision-recall.png" in drawn
        for words in ("mAP in percent, 6 images", "voc: all-point area", "0.50:0.95", "tvmonitor", "UNTRAINED"):
            assert words in done.out

    def test_notes_do_not_mix_with_json(self, run_folder: Path) -> None:
        done = run("eval", "--checkpoint", run_folder / "checkpoints/student_latest.pth", "--json", "--workers", "0")
        assert "run short, epoch 1" in done.err
        assert "run short" not in done.out


class TestDevkits:
    def test_a_sound_devkit_ends_with_0(self, devkit: Path) -> None:
        done = run("check-voc", "--voc-root", devkit)
        assert done.code == 0
        assert "18 images" in done.out
        assert done.out.splitlines()[-1].startswith("sound: 0 errors")

    def test_a_synthetic_devkit_is_never_written_over(self, tmp_path: Path) -> None:
        arguments = ("make-synthetic-voc", tmp_path / "VOCdevkit", "--train", "2", "--val", "1", "--class", "cat")
        done = run(*arguments)
        assert (done.code, f"wrote {tmp_path / 'VOCdevkit'}" in done.out) == (0, True)
        assert "next: python cli.py extract-teachers" in done.out
        again = run(*arguments)
        assert (again.code, "never written over" in again.err) == (1, True)

    def test_from_nothing_to_a_trained_student(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """The shortest commands, with every path left to its default."""
        monkeypatch.chdir(tmp_path)
        common = ("--workers", "0", "--device", "cpu")
        assert run("make-synthetic-voc", "data/VOCdevkit", "--train", "3", "--val", "2", "--empty", "1").code == 0
        assert run("extract-teachers", "--teacher", "tiny_dino", "--teacher", "tiny_clip", *common).code == 0
        assert run("train", *SHORT_RUN, "--cached-teachers").code == 0
        done = run("eval", "--checkpoint", "checkpoints/student_latest.pth", *common)
        assert done.code == 0
        assert "2 images" in done.out
        assert run("train", *SHORT_RUN, "--cached-teachers", "--eval-final-only").code == 0
        names = [path.name for path in sorted((tmp_path / "runs").iterdir())]
        assert names == ["mobilenet_v3_small-kd-b1-g1-s0", "mobilenet_v3_small-kd-b1-g1-s0-2"]

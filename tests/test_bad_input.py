"""What can be wrong with what a user gives: each has its message, its next step and its exit code, and no traceback.

Nothing half made is left behind that could be taken for something whole.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from pipeline.extract import extract
from tests.command_line import SHORT_RUN, Done, run
from tests.data.tiny_devkit import CAT, TinyDevkit
from tests.pipeline.small_runs import TINY_TEACHERS, extraction

Damage = Callable[[TinyDevkit], object]
TEACHERS = [option for name in TINY_TEACHERS for option in ("--teacher", name)]


def refused(done: Done, code: int, *said: str) -> None:
    """Assert a plain refusal: the exit code, nothing on stdout, and one message that says all of this."""
    assert done.code == code, done
    assert done.out == ""
    assert "Traceback" not in done.err
    assert "error: " in done.err.lower()
    for words in said:
        assert words in done.err


def whole_files(folder: Path) -> list[str]:
    """What could be taken for a result: checkpoints, results, committed shards."""
    found = [path.name for path in folder.rglob("*") if path.suffix == ".pth" or path.name == "result.json"]
    return found + [str(path) for path in folder.rglob("ledger*.jsonl") if path.read_bytes()]


@pytest.fixture
def tiny(tmp_path: Path) -> TinyDevkit:
    """Two sound images of 100×80 in `2007:train` and `2007:val`."""
    devkit = TinyDevkit(tmp_path / "VOCdevkit")
    for stem in ("000001", "000002"):
        devkit.add(stem)
    for split in ("train", "val"):
        devkit.list(split, ["000001", "000002"])
    return devkit


def train(root: Path, folder: Path, *more: str | Path) -> Done:
    places = ("--runs-dir", folder / "runs", "--checkpoints-dir", folder / "checkpoints")
    return run("train", "--voc-root", root, *SHORT_RUN, *places, *more)


def box(xmin: int, ymin: int, xmax: int, ymax: int, name: str = "cat") -> str:
    corners = f"<xmin>{xmin}</xmin><ymin>{ymin}</ymin><xmax>{xmax}</xmax><ymax>{ymax}</ymax>"
    return f"<object><name>{name}</name><bndbox>{corners}</bndbox></object>"


SIZE = "<size><width>100</width><height>80</height><depth>3</depth></size>"
ENTITIES = (
    '<?xml version="1.0"?><!DOCTYPE a [<!ENTITY a "aaaa"><!ENTITY b "&a;&a;&a;&a;">]>'
    f"<annotation><filename>&b;</filename>{SIZE}</annotation>"
)
ANNOTATIONS: dict[str, tuple[Damage, list[str]]] = {
    "malformed XML": (lambda t: t.annotate("000002", "<annotation><object>"), ["malformed XML", "restore this file"]),
    "entity expansion": (lambda t: t.annotate("000002", ENTITIES), ["refused", "entities", "hostile"]),
    "path in filename": (
        lambda t: t.annotate("000002", f"<annotation><filename>../../etc/passwd</filename>{SIZE}</annotation>"),
        ["bare file name", "'../../etc/passwd'"],
    ),
    "unknown class": (lambda t: t.add("000002", box(1, 1, 9, 9, "unicorn")), ["unknown class 'unicorn'", "aeroplane"]),
    "inverted box": (lambda t: t.add("000002", box(50, 10, 20, 60)), ["inverted box", "xmin=50", "xmax=20"]),
    "box outside": (lambda t: t.add("000002", box(50, 10, 160, 60)), ["inside the 100×80 image", "xmax=160"]),
    "missing annotation": (
        lambda t: (t.folder / "Annotations" / "000002.xml").unlink(), ["the annotation is missing", "check-voc"],
    ),
}  # fmt: skip


class TestAnnotations:
    @pytest.mark.parametrize("case", ANNOTATIONS)
    def test_train_and_extract_refuse_it_naming_the_file(self, tiny: TinyDevkit, tmp_path: Path, case: str) -> None:
        damage, said = ANNOTATIONS[case]
        damage(tiny)
        for done in (
            train(tiny.root, tmp_path),
            run("extract-teachers", "--voc-root", tiny.root, *TEACHERS, "--out", tmp_path / "s.zarr"),
        ):
            refused(done, 1, "000002.xml", *said)
        assert [path.name for path in tmp_path.iterdir()] == ["VOCdevkit"]

    @pytest.mark.parametrize("case", ANNOTATIONS)
    def test_check_voc_lists_it_and_exits_1(self, tiny: TinyDevkit, case: str) -> None:
        damage, said = ANNOTATIONS[case]
        damage(tiny)
        done = run("check-voc", "--voc-root", tiny.root, "--voc-set", "2007:train")
        assert done.code == 1
        assert "000002.xml" in done.out
        assert said[0] in done.out
        assert "not sound: 1 errors" in done.out


IMAGES: dict[str, tuple[Damage, list[str]]] = {
    "missing": (lambda t: t.image("000002").unlink(), ["the image is missing", "check-voc"]),
    "truncated": (
        lambda t: t.image("000002").write_bytes(t.image("000002").read_bytes()[:-300]), ["damaged image", "restore"],
    ),
    "no image": (lambda t: t.image("000002").write_text("<html>"), ["neither a JPEG nor a PNG", "restore"]),
    "of another size": (
        lambda t: t.add("000002", CAT, size=(90, 80)), ["expected 90×80 as its annotation says, found 100×80"],
    ),
}  # fmt: skip


class TestImages:
    @pytest.mark.parametrize("case", IMAGES)
    def test_train_refuses_it_naming_the_file(self, tiny: TinyDevkit, tmp_path: Path, case: str) -> None:
        damage, said = IMAGES[case]
        damage(tiny)
        refused(train(tiny.root, tmp_path, "--run-name", "r"), 1, "000002.jpg", *said)
        assert whole_files(tmp_path) == []

    @pytest.mark.parametrize("case", IMAGES)
    def test_extract_refuses_it_naming_the_file(self, tiny: TinyDevkit, tmp_path: Path, case: str) -> None:
        damage, said = IMAGES[case]
        damage(tiny)
        store = tmp_path / "s.zarr"
        done = run("extract-teachers", "--voc-root", tiny.root, *TEACHERS, "--out", store, "--workers", "0")
        refused(done, 1, "000002.jpg", *said)
        assert whole_files(tmp_path) == []
        if store.exists():
            assert run("inspect-cache", store).code == 3

    @pytest.mark.parametrize("case", IMAGES)
    def test_check_voc_lists_it(self, tiny: TinyDevkit, case: str) -> None:
        damage, said = IMAGES[case]
        damage(tiny)
        done = run("check-voc", "--voc-root", tiny.root, "--voc-set", "2007:train")
        assert (done.code, "000002.jpg" in done.out, said[0] in done.out) == (1, True, True)
        annotations = run("check-voc", "--voc-root", tiny.root, "--voc-set", "2007:train", "--annotations-only")
        assert annotations.code == 0


class TestSets:
    @pytest.mark.parametrize(
        ("spec", "code", "said"),
        [
            ("foo", 2, ["expected an image set as YEAR:SPLIT, found 'foo'", "2007:trainval"]),
            ("2007:../../x", 2, ["expected an image set as YEAR:SPLIT"]),
            ("2012:train", 1, ["VOC2012: no such devkit (found VOC2007)", "download-voc"]),
            ("2007:test", 1, ["test.txt: no such image set", "2007:train, 2007:val"]),
            ("2007:empty", 1, ["empty.txt", "found an empty image set"]),
            ("2007:paths", 1, ["paths.txt", "'../000001'"]),
        ],
        ids=str,
    )
    def test_a_set_that_cannot_be_read_is_refused(
        self, tiny: TinyDevkit, tmp_path: Path, spec: str, code: int, said: list[str]
    ) -> None:
        tiny.list("empty", [])
        tiny.list("paths", ["../000001"])
        refused(train(tiny.root, tmp_path, "--voc-set", spec), code, *said)
        refused(train(tiny.root, tmp_path, "--val-set", spec), code, *said)
        assert not (tmp_path / "runs").exists()

    def test_a_voc_root_that_is_not_there_is_refused(self, tmp_path: Path) -> None:
        refused(train(tmp_path / "nowhere", tmp_path), 1, "nowhere/VOC2007: no such devkit", "make-synthetic-voc")


class TestStores:
    @pytest.fixture(scope="module")
    @staticmethod
    def store(devkit: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
        """A complete store of the first four training images."""
        return extract(extraction(devkit, tmp_path_factory.mktemp("stores") / "teachers.zarr", limit=4)).store

    def test_a_typo_is_refused_and_makes_nothing(self, devkit: Path, store: Path, tmp_path: Path) -> None:
        typo = store.with_name("teacher.zarr")
        said = (f"{typo} does not exist", f"stores beside it: {store}", "extract-teachers --out")
        refused(run("inspect-cache", typo), 3, *said)
        refused(run("inspect-cache", typo, "--json"), 3, *said)
        refused(train(devkit, tmp_path, "--cached-teachers", typo), 3, *said)
        assert not typo.exists()
        assert list(tmp_path.iterdir()) == []

    def test_a_folder_that_is_no_store_is_refused(self, devkit: Path, tmp_path: Path) -> None:
        refused(run("inspect-cache", devkit), 3, "is not a store")
        refused(train(devkit, tmp_path, "--cached-teachers", devkit), 3, "is not a store")

    def test_an_incomplete_store_is_refused(self, devkit: Path, store: Path, tmp_path: Path) -> None:
        copy = Path(shutil.copytree(store, tmp_path / "s.zarr"))
        (copy / "tiny_dino/original/features/ledger.jsonl").unlink()
        done = train(devkit, tmp_path, "--limit", "4", "--cached-teachers", copy)
        refused(done, 3, "4 of 4 training images are not committed", "it resumes")
        assert not (tmp_path / "runs").exists()

    def test_images_that_the_store_lacks_are_refused(self, devkit: Path, store: Path, tmp_path: Path) -> None:
        done = train(devkit, tmp_path, "--limit", "6", "--cached-teachers", store)
        refused(done, 3, "2 of 6 training images are not in the store", "VOC2007/000005, VOC2007/000006", "--limit")

    def test_other_images_are_refused_by_extract(self, devkit: Path, store: Path) -> None:
        done = run("extract-teachers", "--voc-root", devkit, "--limit", "6", "--out", store, *TEACHERS)
        refused(done, 3, "the store was made from other images", "--out")

    def test_something_else_in_the_stores_place_is_refused(self, devkit: Path, tmp_path: Path) -> None:
        (tmp_path / "notes.txt").write_text("mine")
        done = run("extract-teachers", "--voc-root", devkit, "--limit", "2", "--out", tmp_path, *TEACHERS)
        refused(done, 1, "something that is not a store is already there", "--out")
        assert (tmp_path / "notes.txt").read_text() == "mine"

    def test_no_choice_among_two_teachers_is_refused(self, devkit: Path, tmp_path: Path) -> None:
        teachers = ("tiny_dino", "other=tiny_dino", "tiny_clip")
        out = extract(extraction(devkit, tmp_path / "s.zarr", teachers=teachers, limit=2)).store
        done = train(devkit, tmp_path, "--limit", "2", "--cached-teachers", out)
        refused(done, 2, "other, tiny_dino", "--feature-teacher NAME")

    def test_an_unknown_sample_is_refused(self, store: Path, tmp_path: Path) -> None:
        picture = ("--heatmap", tmp_path / "p.png")
        refused(
            run("inspect-cache", store, "--sample", "VOC2007/999999", *picture), 2, "VOC2007/000001 … VOC2007/000004"
        )
        refused(run("inspect-cache", store, "--sample", "VOC2007/000001"), 2, "go together")
        assert not (tmp_path / "p.png").exists()


class TestOptions:
    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            (["--teacher", "dino"], ["unknown teacher 'dino'", "expected one of dinov2_vits14"]),
            (["--teacher", "dinov2_vits41"], ["did you mean dinov2_vits14?"]),
            (["--weights", "tiny_clip"], ["--weights", "expected NAME=PATH, found 'tiny_clip'"]),
            (["--weights", "=x"], ["expected NAME=PATH"]),
            (["--weights", "nobody=x.pth"], ["--weights nobody=…: no such teacher was asked for"]),
            (["--teacher", "Bad=tiny_clip"], ["expected a teacher key"]),
            (["--view", "vflip"], ["'vflip' is not one of 'original', 'hflip'"]),
            (["--device", "tpu"], ["expected a device auto, cpu, cuda or cuda:N, found 'tpu'"]),
            (["--shard-samples", "0"], ["--shard-samples"]),
            (["--limit", "-1"], ["--limit"]),
            (["--colour"], ["No such option"]),
        ],
        ids=str,
    )
    def test_extract_refuses(self, devkit: Path, tmp_path: Path, arguments: list[str], said: list[str]) -> None:
        given = [] if "--teacher" in arguments else ["--teacher", "tiny_clip"]
        done = run("extract-teachers", "--voc-root", devkit, "--out", tmp_path / "s.zarr", *given, *arguments)
        refused(done, 2, *said)
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            (["--backbone", "resnet81"], ["backbone: expected resnet18, mobilenet_v3_small, vit_tiny or timm:NAME"]),
            (["--backbone", "timm:resnet81"], ["timm has no model 'resnet81'", "resnet18"]),
            (["--backbone-weights", "no/such.pth"], ["no/such.pth: no such weights file", "--backbone-weights"]),
            (["--beta", "-1"], ["beta: ", "found -1.0"]),
            (["--epochs", "0"], ["epochs: ", "found 0"]),
            (["--resume"], ["--resume needs to know which run", "--run-name"]),
            (["--run-name", "../escape"], ["run_name: "]),
            (["--teacher", "tiny_dino"], ["not asked for", "--distill"]),
            (["--feature-loss", "huber"], ["'huber'", "mse"]),
            (["--limit", "0"], ["--limit"]),
        ],
        ids=str,
    )
    def test_train_refuses(self, devkit: Path, tmp_path: Path, arguments: list[str], said: list[str]) -> None:
        refused(train(devkit, tmp_path, *arguments), 2, *said)
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.skipif(torch.cuda.is_available(), reason="about a machine without a GPU")
    def test_a_gpu_that_is_not_there_is_refused(self, devkit: Path, tmp_path: Path) -> None:
        for done in (
            train(devkit, tmp_path, "--device", "cuda"),
            run("extract-teachers", "--voc-root", devkit, "--out", tmp_path / "s.zarr", "--device", "cuda", *TEACHERS),
        ):
            refused(done, 2, "--device cuda: torch", "finds no CUDA device", "--device cpu")
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("given", [[], ["--checkpoint", "a.pth", "--detections", "d"]], ids=["neither", "both"])
    def test_eval_wants_a_checkpoint_or_detections(self, given: list[str]) -> None:
        refused(run("eval", *given), 2, "give one of --checkpoint, --detections and --compare")

    def test_eval_refuses_detections_that_are_not_there(self, devkit: Path, tmp_path: Path) -> None:
        refused(run("eval", "--detections", tmp_path / "none", "--voc-root", devkit), 1, "no such folder of detections")
        refused(run("eval", "--detections", tmp_path, "--voc-root", devkit), 1, "comp4_det_test_aeroplane.txt")
        refused(run("eval", "--detections", tmp_path / "none.json", "--voc-root", devkit), 1, "no such file of")
        (tmp_path / "empty.json").touch()
        said = ("empty.json: expected a list of detections, found an empty file", "the list is empty: []")
        refused(run("eval", "--detections", tmp_path / "empty.json", "--voc-root", devkit), 1, *said)

    def test_eval_refuses_detections_of_another_set(self, devkit: Path, tmp_path: Path) -> None:
        found = tmp_path / "found.json"
        entries = ({"image_id": number, "category_id": 8, "bbox": [1, 1, 9, 9], "score": 0.5} for number in (901, 902))
        found.write_text(json.dumps(list(entries)))
        said = ("found.json: entry 1: unknown image id 901", "2 of the 2 images named", "--voc-set")
        refused(run("eval", "--detections", found, "--voc-root", devkit), 1, *said)

    def test_eval_refuses_a_checkpoint_that_is_not_there(self, tmp_path: Path) -> None:
        refused(run("eval", "--checkpoint", tmp_path / "x.pth"), 3, "x.pth: no such checkpoint", "train")

    def test_a_taken_run_name_is_refused(self, devkit: Path, tmp_path: Path) -> None:
        (tmp_path / "runs" / "mine").mkdir(parents=True)
        (tmp_path / "runs" / "mine" / "config.json").write_text("{}")
        refused(train(devkit, tmp_path, "--run-name", "mine"), 2, "a run of this name is already there", "--resume")
        assert (tmp_path / "runs" / "mine" / "config.json").read_text() == "{}"

    def test_a_run_that_was_never_begun_cannot_be_resumed(self, devkit: Path, tmp_path: Path) -> None:
        refused(train(devkit, tmp_path, "--run-name", "mine", "--resume"), 3, "no such checkpoint")


class TestTheSystem:
    def test_folders_that_cannot_be_written_are_named(self, devkit: Path, tmp_path: Path) -> None:
        blocker = tmp_path / "file"
        blocker.write_text("in the way")
        refused(train(devkit, tmp_path, "--runs-dir", blocker / "runs"), 1, str(blocker), "Not a directory")
        refused(run("demo", "--out", blocker), 1, str(blocker), "Not a directory")

    @pytest.mark.usefixtures("unreachable_hub")
    def test_without_network_extract_names_the_ways_on(self, devkit: Path, tmp_path: Path) -> None:
        done = run("extract-teachers", "--voc-root", devkit, "--teacher", "dinov2_vits14", "--out", tmp_path / "s.zarr")
        refused(done, 1, "dinov2_vits14", "does not answer", "--weights dinov2_vits14=PATH", "--untrained")
        assert not (tmp_path / "s.zarr").exists()

    @pytest.mark.usefixtures("unreachable_hub")
    def test_without_network_train_names_the_ways_on(self, devkit: Path, tmp_path: Path) -> None:
        done = train(devkit, tmp_path, "--backbone-weights", "imagenet")
        refused(done, 1, "mobilenetv3_small_100", "does not answer", "--backbone-weights none", "FILE")
        assert not (tmp_path / "runs").exists()

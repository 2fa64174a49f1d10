"""`inspect-cache` as a person meets it: tables at several widths, the closing lines, pictures, images compared."""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from cache.catalog import read_catalog
from cache.convert import convert
from cache.derive import ConvertRequest
from cache.int8 import dequantise
from cache.reader import TeacherStore
from data.errors import DatasetError, StoreIncompleteError, UsageError
from data.geometry import VIEWS, View
from data.records import VOC_CLASSES, ImageRecord
from evaluation.heatmaps import HeatmapRow
from pipeline.extract import extract
from pipeline.inspection import closing_lines, heatmap, inspect_store, inspect_with_progress, summary_table
from tests.command_line import run
from tests.pipeline.small_runs import extraction

COMMAND = "python cli.py convert-cache SRC DST"


def derive(store: Path, folder: Path, **changes: Any) -> Path:
    return convert(ConvertRequest(store, folder, COMMAND, **changes)).out


@pytest.fixture(scope="module")
def int8(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return derive(store, tmp_path_factory.mktemp("derived") / "int8.zarr", dtype="int8")


@pytest.fixture(scope="module")
def projected(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return derive(store, tmp_path_factory.mktemp("derived") / "pca.zarr", components=6)


@pytest.fixture(scope="module")
def hdf5(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return derive(store, tmp_path_factory.mktemp("derived") / "teachers.h5", format="hdf5", dtype="int8")


@pytest.fixture
def copy(store: Path, tmp_path: Path) -> Path:
    """A copy of the complete store, to damage."""
    return Path(shutil.copytree(store, tmp_path / "copy.zarr"))


def shown(summary: dict[str, Any], width: int) -> str:
    out = io.StringIO()
    Console(file=out, width=width, markup=False).print(summary_table(summary))
    return out.getvalue()


class TestTable:
    def test_a_store_is_told_at_80_columns(self, store: Path) -> None:
        text = shown(inspect_store(store, verify=False), 80)
        assert max(map(len, text.splitlines())) <= 80
        for words in (
            "complete", "12 of 2007:train", "480×480", "% of ", "in float32", "sizes and indices; --verify",
            "tiny_dino", "untrained", "Extraction on ", "outputs", "batch", "tiny_dino/original", "12×30×30×64",
            "float16", "50%", "all", "outliers", "fingerprint", "content", "over 12 of 12 samples",
        ):  # fmt: skip
            assert words in text, words

    def test_every_figure_of_an_array_stands_in_its_row(self, store: Path) -> None:
        summary = inspect_store(store, verify=False)
        array = next(a for a in summary["arrays"] if a["path"] == "tiny_dino/hflip/features")
        lines = shown(summary, 200).splitlines()
        view = lines.index(next(line for line in lines if line.strip() == "tiny_dino/hflip"))
        row = next(line for line in lines[view:] if line.startswith("  features")).split()
        assert row[1:] == [
            "12×30×30×64", "float16", f"{array['bytes'] / 1e6:.1f}", "MB", "50%", "all", f"{array['mean']:.3g}",
            f"{array['std']:.3g}", "0", array["fingerprint"][:12], array["content"][:12],
        ]  # fmt: skip

    @pytest.mark.parametrize(("width", "tables"), [(40, 2), (80, 2), (120, 2), (140, 1), (300, 1)])
    def test_there_is_one_table_where_it_fits_and_nothing_is_ever_cut(
        self, int8: Path, width: int, tables: int
    ) -> None:
        text = shown(inspect_store(int8, verify=False), width)
        lines = text.splitlines()
        assert max(map(len, lines)) <= width
        assert "…" not in text
        assert sum(line.strip() in ("Arrays", "Values") for line in lines) == tables

    def test_a_derived_store_says_from_what_how_and_how_close(self, int8: Path, projected: Path, store: Path) -> None:
        fingerprint = read_catalog(store).fingerprints["tiny_dino/original/features"]
        text = " ".join(shown(inspect_store(int8, verify=False), 80).split())
        assert f"made from the features with fingerprint {fingerprint[:12]} and" in text
        assert f"by: {COMMAND.replace('DST', '')}" in text
        assert "cosine mean, p01" in text
        assert "over all tokens of 12 samples" in text
        assert "Extraction" not in text
        text = " ".join(shown(inspect_store(projected, verify=False), 80).split())
        assert "6 principal components of 64 channels, which hold" in text
        assert "of the variance of 12 images" in text

    def test_outliers_are_named_and_explained(self, store: Path) -> None:
        summary = inspect_store(store, verify=False)
        array = summary["arrays"][-1]
        array.update(outliers=1234, outlier_ids=[f"VOC2007/{n:06d}" for n in range(10)])
        text = " ".join(shown(summary, 80).split())
        assert "1,234" in text
        assert f"{array['path']}: worst VOC2007/000000, VOC2007/000001, VOC2007/000002, …" in text
        assert "six robust standard deviations from the median" in text

    def test_machines_are_told_apart_where_teachers_ran_on_several(self, store: Path) -> None:
        summary = inspect_store(store, verify=False)
        alike = shown(summary, 80)
        summary["teachers"]["tiny_clip"]["cost"].update(devices=["GPU 9"], runs=3, seconds=7200.0, last="2031-05-06T")
        summary["cost"].update(devices=["GPU 9", "x86_64"], last="2031-05-06T")
        text = shown(summary, 80)
        assert "GPU 9" not in alike
        for words in ("GPU 9, x86_64", "2.0 h in 3 runs", " to 2031-05-06"):
            assert words in text

    def test_what_steers_a_terminal_is_not_passed_on(self, store: Path) -> None:
        summary = inspect_store(store, verify=False)
        summary["teachers"]["tiny_dino"].update(layer="\x1b[2J\x07", library="a\nb")
        summary["cost"]["hosts"] = ["\x1b]0;x\x07"]
        summary["dataset"]["sets"] = ["\x9b31m"]
        summary["problems"] = [{"array": "a\x1b", "shard": None, "sample": None, "problem": "\x08"}]
        summary["training"] = [{"teacher": None, "problem": "\x1b[31m", "hint": "\r"}]
        text = shown(summary, 80) + "\n".join(closing_lines(summary))
        assert not {character for character in text if not character.isprintable()} - {"\n"}

    def test_numbers_and_sizes_are_short(self) -> None:
        from pipeline.text_tables import readable_size, readable_time

        sizes = {0: "0 B", 999: "999 B", 1000: "1.0 kB", 999_900: "999.9 kB", 22_880_000_000: "22.88 GB"}
        assert {size: readable_size(size) for size in sizes} == sizes
        times = {0.04: "0.0 s", 59.9: "59.9 s", 90: "1.5 min", 3600: "1.0 h", 360_000: "100.0 h"}
        assert {seconds: readable_time(seconds) for seconds in times} == times


class TestStates:
    def test_a_corrupt_store_names_every_fault_and_the_repair(self, copy: Path) -> None:
        shards = [copy / f"tiny_dino/original/features/c/{shard}/0/0/0" for shard in (0, 2)]
        contents = [shard.read_bytes() for shard in shards]
        for shard, content in zip(shards, reversed(contents), strict=True):
            shard.write_bytes(content)
        summary = inspect_store(copy, verify=True)
        text = " ".join(shown(summary, 80).split())
        assert (summary["status"], "corrupt" in text, "every byte" in text) == ("corrupt", True, True)
        assert "two shards are exchanged: shard 0" in text
        assert closing_lines(summary)[-1] == (
            "next: python cli.py extract-teachers --voc-root DIR --voc-set 2007:train --teacher tiny_dino --untrained"
            f" --shard-samples 4 --out {copy} --repair"
        )

    def test_the_command_that_is_named_repairs_it(self, devkit: Path, copy: Path) -> None:
        shard = copy / "tiny_clip/hflip/logits/c/1/0"
        shard.write_bytes(shard.read_bytes()[:-1] + b"\0")
        command = inspect_store(copy, verify=True)["next"]
        assert run(*command.replace("DIR", str(devkit)).split()[2:], "--workers", "0", "--device", "cpu").code == 0
        assert inspect_store(copy, verify=True)["status"] == "complete"

    def test_a_derived_store_names_its_conversion(self, int8: Path, tmp_path: Path) -> None:
        copy = Path(shutil.copytree(int8, tmp_path / "copy.zarr"))
        (copy / "tiny_dino/hflip/scale_token/c/1/0/0").unlink()
        summary = inspect_store(copy, verify=False)
        assert closing_lines(summary)[-1] == f"next: python cli.py convert-cache SRC {copy} --repair"

    def test_only_the_first_faults_are_shown(self, store: Path) -> None:
        summary = inspect_store(store, verify=False)
        fault = {"array": "a", "shard": 1, "sample": None, "problem": "p"}
        text = shown({**summary, "problems": [fault] * 23}, 80)
        assert "3 more; --json lists all" in text

    def test_an_edited_manifest_is_named_and_nothing_else_said(self, copy: Path) -> None:
        path = copy / "tiny_dino/zarr.json"
        path.write_text(path.read_text().replace('"untrained": true', '"untrained": false'))
        summary = inspect_store(copy, verify=False)
        assert summary["problems"][0]["array"] == "tiny_dino"
        assert "nothing else was read" in shown(summary, 80)
        assert closing_lines(summary) == ["", f"next: python cli.py extract-teachers … --out {copy} --repair"]

    def test_an_incomplete_store_says_what_training_misses_and_how_to_go_on(self, copy: Path) -> None:
        for path in (copy / "tiny_clip").rglob("ledger.jsonl"):
            path.unlink()
        summary = inspect_store(copy, verify=False)
        assert "0/12" in shown(summary, 80)
        lines = closing_lines(summary)
        ids = "VOC2007/000001, VOC2007/000002, VOC2007/000003, … 9 more"
        assert lines[1:4] == [
            "A training run would miss:",
            f"  tiny_clip: original: 12 of 12 samples not committed ({ids})",
            f"  tiny_clip: hflip: 12 of 12 samples not committed ({ids})",
        ]
        assert lines[4].startswith("    → the same command again resumes: python cli.py extract-teachers ")
        assert lines[-1].startswith("next: python cli.py extract-teachers --voc-root DIR --voc-set 2007:train")

    def test_a_whole_store_lacks_nothing(self, store: Path) -> None:
        summary = inspect_store(store, verify=False)
        assert (summary["training"], summary["next"]) == ([], None)
        assert closing_lines(summary)[-1] == "A training run finds all that it reads: features, logits and both views."


def test_extraction_notes_its_cost(store: Path) -> None:
    summary = inspect_store(store, verify=False)
    cost = summary["teachers"]["tiny_dino"]["cost"]
    assert (cost["runs"], cost["outputs"], cost["batch_sizes"]) == (1, 24, [3])
    assert 0 < cost["seconds"] < summary["cost"]["seconds"]
    assert summary["cost"]["outputs"] == 48


def test_int8_fidelity_of_an_extraction_is_shown(devkit: Path, tmp_path: Path) -> None:
    store = extract(extraction(devkit, tmp_path / "s.zarr", teachers=("tiny_dino",), dtype="int8", limit=4)).store
    summary = inspect_store(store, verify=False)
    features = next(array for array in summary["arrays"] if array["path"] == "tiny_dino/original/features")
    assert features["fidelity"]["cosine_p01"] > 0.99
    assert f"{features['fidelity']['cosine_mean']:.5f}" in shown(summary, 80)


@dataclass
class Drawn:
    """What was handed to the drawing."""

    rows: list[HeatmapRow]
    title: str


class TestHeatmap:
    @pytest.fixture
    def drawn(self, monkeypatch: pytest.MonkeyPatch) -> list[Drawn]:
        """What is handed to the drawing, in place of the drawing."""
        pictures: list[Drawn] = []

        def draw(rows: list[HeatmapRow], title: str) -> bytes:
            pictures.append(Drawn(rows, title))
            return b"PNG"

        monkeypatch.setattr("evaluation.heatmaps.heatmap_figure", draw)
        return pictures

    @pytest.fixture
    def several(self, devkit: Path, tmp_path: Path) -> Path:
        """A store of two teachers with features and one without, in the original view."""
        teachers = ("tiny_clip", "tiny_dino", "other=tiny_dino")
        return extract(extraction(devkit, tmp_path / "s.zarr", teachers=teachers, limit=2, views=("original",))).store

    def test_int8_features_are_drawn_as_numbers_from_either_container(
        self, store: Path, int8: Path, hdf5: Path, drawn: list[Drawn]
    ) -> None:
        for path in (int8, hdf5):
            assert heatmap(path, "VOC2007/000005", None, "hflip") == b"PNG"
        original = TeacherStore(store).array("tiny_dino", "hflip", "features").read(4).astype(np.float32)
        names = ("features", "scale_channel", "scale_token")
        stored = [TeacherStore(int8).array("tiny_dino", "hflip", name).read(4) for name in names]
        for picture in drawn:
            (row,) = picture.rows
            np.testing.assert_array_equal(row.features, dequantise(*stored))
            assert np.abs(row.features - original).max() < 0.05 < np.abs(original).max()
            assert (picture.title, row.title) == ("tiny_dino · hflip · untrained", "VOC2007/000005")
            assert (row.image, row.cell) == (None, None)

    def test_projected_features_are_drawn_as_components(self, projected: Path, drawn: list[Drawn]) -> None:
        heatmap(projected, "VOC2007/000001", None)
        (row,) = drawn[0].rows
        assert (row.features.shape, row.features.dtype) == ((30, 30, 6), np.float32)
        assert drawn[0].title == "tiny_dino · original · 6 principal components · untrained"

    def test_several_samples_are_rows_of_one_picture(self, store: Path, devkit: Path, drawn: list[Drawn]) -> None:
        heatmap(store, ["VOC2007/000007", "VOC2007/000002", "VOC2007/000007"], devkit)
        rows = drawn[0].rows
        assert [row.title.split(" · ")[0] for row in rows] == ["VOC2007/000007", "VOC2007/000002"]
        for row, index in zip(rows, (6, 1), strict=True):
            np.testing.assert_array_equal(
                row.features, TeacherStore(store).array("tiny_dino", "original", "features").read(index)
            )

    @pytest.mark.parametrize("view", VIEWS)
    def test_the_largest_object_is_marked_in_its_view(
        self, view: View, store: Path, devkit: Path, records: list[ImageRecord], drawn: list[Drawn]
    ) -> None:
        """By hand: the centre of its box as a share of the original image, mirrored or not."""
        heatmap(store, [record.id for record in records], devkit, view)
        cells = []
        for row, record in zip(drawn[0].rows, records, strict=True):
            height, width = record.image_size
            boxes = [tuple(map(float, box)) for box in record.target.boxes_xyxy_orig]
            x1, y1, x2, y2 = max(boxes, key=lambda b: (b[2] - b[0]) * (b[3] - b[1]))
            label = record.target.labels[boxes.index((x1, y1, x2, y2))]
            across = (x1 + x2) / 2 / width
            column = int((across if view == "original" else 1 - across) * 30)
            assert row.cell == (int((y1 + y2) / 2 / height * 30), column)
            assert row.title == f"{record.id} · marked: centre of the largest object, {VOC_CLASSES[label - 1]}"
            cells.append(row.cell)
        assert len(set(cells)) > 6

    def test_the_image_is_the_frame_in_the_view(self, store: Path, devkit: Path, drawn: list[Drawn]) -> None:
        for view in VIEWS:
            heatmap(store, "VOC2007/000003", devkit, view)
        original, mirrored = (picture.rows[0].image for picture in drawn)
        assert original is not None
        assert mirrored is not None
        assert original.shape == (480, 480, 3)
        # Mirrored before the resize, hence not the same to the last bit.
        assert (
            np.abs(original[:, ::-1].astype(int) - mirrored).mean() < 1 < np.abs(original.astype(int) - mirrored).mean()
        )

    def test_without_objects_or_with_a_cell_nothing_is_looked_for(
        self, store: Path, devkit: Path, tmp_path: Path, drawn: list[Drawn]
    ) -> None:
        heatmap(store, "VOC2007/000001", devkit, cell=(29, 0))
        copy = Path(shutil.copytree(devkit, tmp_path / "VOCdevkit"))
        annotation = copy / "VOC2007/Annotations/000001.xml"
        annotation.write_text(re.sub("<object>.*</object>", "", annotation.read_text(), flags=re.DOTALL))
        heatmap(store, "VOC2007/000001", copy)
        assert [(row.cell, row.title) for picture in drawn for row in picture.rows] == [
            ((29, 0), "VOC2007/000001"), (None, "VOC2007/000001"),
        ]  # fmt: skip

    def test_the_first_teacher_with_features_is_drawn_unless_another_is_named(
        self, several: Path, drawn: list[Drawn]
    ) -> None:
        heatmap(several, "VOC2007/000001", None)
        heatmap(several, "VOC2007/000001", None, teacher="tiny_dino")
        assert [picture.title for picture in drawn] == [
            "other · original · untrained",
            "tiny_dino · original · untrained",
        ]

    @pytest.mark.parametrize("kind", ["int8", "projected", "hdf5"])
    def test_a_picture_comes_of_every_kind_of_store(
        self, kind: str, devkit: Path, tmp_path: Path, request: pytest.FixtureRequest
    ) -> None:
        png = tmp_path / "h.png"
        done = run("inspect-cache", request.getfixturevalue(kind), "--sample", "VOC2007/000002", "--heatmap", png,
                   "--voc-root", devkit)  # fmt: skip
        assert done.code == 0, done.err
        with Image.open(png) as picture:
            assert min(picture.size) > 200

    def test_what_is_not_there_cannot_be_drawn(self, store: Path, devkit: Path, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match=r"no sample 'VOC2007/9' in .*; it holds VOC2007/000001 … VOC2007/000012"):
            heatmap(store, ["VOC2007/000001", "VOC2007/9"], None)
        only = extract(extraction(devkit, tmp_path / "s.zarr", teachers=("tiny_clip",), limit=2)).store
        view: View = "original"
        with pytest.raises(StoreIncompleteError, match="no teacher has features of view 'original'"):
            heatmap(only, "VOC2007/000001", None, view)

    @pytest.mark.parametrize(
        ("asked", "message"),
        [
            ({"teacher": "nobody"}, "--teacher nobody: .* has no features of it in view 'original'"),
            ({"teacher": "tiny_clip"}, r"no features of it in view 'original' \(teachers with them: tiny_dino\)"),
            (
                {"cell": (30, 0)},
                "--cell 30,0: expected a row 0 to 29 and a column 0 to 29 of the 30×30 grid of tiny_dino",
            ),
            ({"cell": (0, -1)}, "--cell 0,-1: expected a row 0 to 29"),
            ({"samples": []}, "expected 1 to 24 samples in a picture, found 0"),
            ({"samples": [f"VOC2007/{n}" for n in range(25)]}, "expected 1 to 24 samples in a picture, found 25"),
        ],
        ids=["unknown teacher", "logits only", "row", "column", "no sample", "too many"],
    )
    def test_what_cannot_be_meant_is_refused(self, store: Path, asked: dict[str, Any], message: str) -> None:
        arguments: dict[str, Any] = {"samples": "VOC2007/000001", "voc_root": None, **asked}
        with pytest.raises(UsageError, match=message):
            heatmap(store, **arguments)

    def test_drawing_needs_no_torch(self, store: Path, devkit: Path) -> None:
        script = (
            "import sys; from pathlib import Path; from pipeline.inspection import heatmap\n"
            "heatmap(Path(sys.argv[1]), 'VOC2007/000001', Path(sys.argv[2]))\n"
            "print([m for m in ('torch', 'zarr') if m in sys.modules])"
        )
        done = subprocess.run([sys.executable, "-c", script, store, devkit], capture_output=True, text=True, check=True)
        assert done.stdout.strip() == "[]"


class TestImages:
    @pytest.fixture
    def images(self, devkit: Path, tmp_path: Path) -> Path:
        """A copy of the devkit, to change."""
        return Path(shutil.copytree(devkit, tmp_path / "VOCdevkit"))

    def gaps(self, store: Path, voc_root: Path, *sets: str, verify: bool = False) -> list[str]:
        summary = inspect_with_progress(store, verify=verify, voc_root=voc_root, voc_sets=sets)
        assert all(gap["teacher"] is None and gap["hint"] for gap in summary["training"])
        return [gap["problem"] for gap in summary["training"]]

    def test_the_images_it_was_made_from_are_there(self, store: Path, images: Path) -> None:
        assert self.gaps(store, images) == []
        assert self.gaps(store, images, "2007:train", verify=True) == []

    def test_ids_that_the_store_lacks_are_counted(self, store: Path, images: Path) -> None:
        (told,) = self.gaps(store, images, "2007:train", "2007:val")
        assert told.startswith("6 of 18 images of 2007:train + 2007:val are not in the store (VOC2007/000013,")

    def test_without_sets_the_limit_of_the_store_holds(self, devkit: Path, tmp_path: Path) -> None:
        store = extract(extraction(devkit, tmp_path / "s.zarr", limit=4)).store
        assert self.gaps(store, devkit) == []
        assert len(self.gaps(store, devkit, "2007:train")) == 1

    def test_images_of_another_size_missing_and_damaged_ones_are_named(self, store: Path, images: Path) -> None:
        folder = images / "VOC2007" / "JPEGImages"
        with Image.open(folder / "000002.jpg") as image:
            was = f"{image.width}×{image.height}"
        Image.new("RGB", (7, 9)).save(folder / "000002.jpg")
        (folder / "000004.jpg").unlink()
        (folder / "000005.jpg").write_bytes(b"no image")
        (told,) = self.gaps(store, images)
        named = f"(VOC2007/000002: 7×9 instead of {was}, VOC2007/000004: missing, VOC2007/000005: unreadable)"
        assert told == f"3 of 12 image files are not what the teachers saw {named}"

    def test_other_bytes_of_the_same_size_are_told_with_verify(self, store: Path, images: Path) -> None:
        path = images / "VOC2007/JPEGImages/000003.jpg"
        path.write_bytes(path.read_bytes() + b"\0")
        assert self.gaps(store, images) == []
        (told,) = self.gaps(store, images, verify=True)
        assert told == "1 of 12 image files are not what the teachers saw (VOC2007/000003: other bytes)"

    def test_damaged_ids_leave_nothing_to_compare(self, copy: Path, images: Path) -> None:
        (copy / "samples.jsonl").write_bytes(b"")
        summary = inspect_with_progress(copy, verify=False, voc_root=images)
        assert (summary["status"], summary["training"]) == ("corrupt", [])

    def test_sets_that_cannot_be_read_are_errors(self, store: Path, devkit: Path) -> None:
        with pytest.raises(DatasetError, match="no such image set"):
            self.gaps(store, devkit, "2007:nothing")
        with pytest.raises(UsageError, match="expected an image set as YEAR:SPLIT"):
            self.gaps(store, devkit, "train")

    def test_what_training_would_miss_does_not_change_the_exit_code(self, store: Path, devkit: Path) -> None:
        arguments = ("inspect-cache", store, "--voc-root", devkit, "--voc-set", "2007:val")
        done = run(*arguments, "--json")
        assert (done.code, len(json.loads(done.out)["training"])) == (0, 1)
        done = run(*arguments)
        assert (done.code, "A training run would miss:" in done.out) == (0, True)

    def test_the_comparison_shows_its_progress(self, store: Path, devkit: Path) -> None:
        done = run("inspect-cache", store, "--voc-root", devkit)
        assert done.err.startswith("comparing images: 12/12 images")


def test_progress_of_a_verification_goes_to_stderr(store: Path) -> None:
    assert run("inspect-cache", store, "--verify").err.startswith("verifying: ")
    assert run("inspect-cache", store).err == ""

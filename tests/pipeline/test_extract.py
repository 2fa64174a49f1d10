import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

import features.tiny
import pipeline.extract
import pipeline.teachers
from cache.plan import StorePlan
from cache.reader import TeacherStore
from data.errors import ImageError, StoreStaleError, StoreWriteError, TeacherError, UsageError
from data.geometry import VIEWS, View
from data.records import ImageRecord
from features.registry import build_teacher
from features.teacher import Teacher, TeacherOutput
from features.zero_shot import ZeroShotTeacher
from pipeline.extract import extract
from pipeline.inspection import inspect_store
from pipeline.teachers import TeacherChoices, build_teachers
from tests.pipeline.small_runs import extraction, files_of

CPU = torch.device("cpu")


@pytest.fixture
def own_devkit(devkit: Path, tmp_path: Path) -> Path:
    """A copy of the devkit, to damage."""
    return Path(shutil.copytree(devkit, tmp_path / "VOCdevkit"))


def by_hand(teacher: Teacher, records: list[ImageRecord], view: View) -> dict[str, NDArray[np.float32]]:
    """What the teacher says of images that were decoded, mirrored and resized with Pillow's own calls."""
    height, width = teacher.input.size
    said: dict[str, list[Tensor]] = {}
    for rows in BATCHES:
        pixels = []
        for row in rows:
            image = Image.open(records[row].image_path).convert("RGB")
            image = ImageOps.mirror(image) if view == "hflip" else image
            pixels.append(np.asarray(image.resize((width, height), Image.Resampling.BICUBIC)))
        for name, values in teacher(torch.from_numpy(np.stack(pixels))).arrays().items():
            said.setdefault(name, []).append(values)
    return {name: torch.cat(values).numpy() for name, values in said.items()}


# Batches of three lie on a grid that starts anew at each shard of four.
BATCHES = ([0, 1, 2], [3], [4, 5, 6], [7], [8, 9, 10], [11])


class TestValues:
    def test_the_store_is_complete_to_the_last_byte(self, store: Path) -> None:
        summary = inspect_store(store, verify=True)
        assert (summary["status"], summary["problems"]) == ("complete", [])
        assert summary["dataset"]["samples"] == 12
        assert {array["path"] for array in summary["arrays"]} == {
            f"{teacher}/{view}/{name}"
            for teacher, names in (("tiny_dino", ("features", "moments")), ("tiny_clip", ("logits", "embeddings")))
            for view in ("original", "hflip")
            for name in names
        }

    @pytest.mark.parametrize("view", ["original", "hflip"])
    def test_features_are_the_teachers_rounded_to_half(
        self, store: Path, records: list[ImageRecord], view: View
    ) -> None:
        expected = by_hand(build_teacher("tiny_dino"), records, view)["features"].astype(np.float16)
        found = TeacherStore(store).array("tiny_dino", view, "features").gather(range(12))
        np.testing.assert_array_equal(found, expected)

    @pytest.mark.parametrize("view", ["original", "hflip"])
    def test_logits_and_embeddings_are_the_teachers(self, store: Path, records: list[ImageRecord], view: View) -> None:
        expected = by_hand(build_teacher("tiny_clip"), records, view)
        for name in ("logits", "embeddings"):
            np.testing.assert_array_equal(
                TeacherStore(store).array("tiny_clip", view, name).gather(range(12)), expected[name]
            )

    def test_a_float32_store_is_not_rounded(self, store32: Path, records: list[ImageRecord]) -> None:
        expected = by_hand(build_teacher("tiny_dino"), records, "original")["features"]
        np.testing.assert_array_equal(
            TeacherStore(store32).array("tiny_dino", "original", "features").gather(range(12)), expected
        )

    def test_another_view_is_another_target(self, store: Path) -> None:
        opened = TeacherStore(store)
        original, mirrored = (
            opened.array("tiny_dino", view, "features").gather(range(12)).astype(np.float32)
            for view in ("original", "hflip")
        )
        step = np.abs(original).mean()
        assert np.abs(original - mirrored).mean() > 0.1 * step
        # Nor are they the features of the original, mirrored.
        assert np.abs(original[:, :, ::-1] - mirrored).mean() > 0.01 * step

    def test_text_embeddings_are_stored_with_the_logit_teacher(self, store: Path) -> None:
        np.testing.assert_array_equal(
            TeacherStore(store).text_embeddings("tiny_clip"), build_teacher("tiny_clip").text_embeddings
        )

    def test_what_untrained_teachers_said_is_marked(self, store: Path) -> None:
        teachers = inspect_store(store, verify=False)["teachers"]
        assert {key: teacher["untrained"] for key, teacher in teachers.items()} == {
            "tiny_dino": True,
            "tiny_clip": True,
        }


def fail_at(monkeypatch: pytest.MonkeyPatch, call: int, change: Callable[[TeacherOutput], TeacherOutput]) -> None:
    """Change what tiny_dino says at its k-th call; the probe is the first."""
    calls = iter(range(1, 1_000))
    forward = features.tiny.TinyDinoTeacher.forward

    def changed(self: features.tiny.TinyDinoTeacher, pixels: Tensor) -> TeacherOutput:
        output = forward(self, pixels)
        return change(output) if next(calls) == call else output

    monkeypatch.setattr(features.tiny.TinyDinoTeacher, "forward", changed)


def stop(_: TeacherOutput) -> TeacherOutput:
    raise RuntimeError("pulled the plug")


class TestResuming:
    @pytest.mark.parametrize("call", [2, 6, 8, 13])
    def test_an_interrupted_store_ends_with_the_bytes_of_an_uninterrupted_one(
        self, devkit: Path, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int
    ) -> None:
        config = extraction(devkit, tmp_path / "store.zarr")
        with monkeypatch.context() as patched:
            fail_at(patched, call, stop)
            with pytest.raises(RuntimeError, match="pulled the plug"):
                extract(config)
        before = inspect_store(config.out, verify=True)
        assert before["status"] == "incomplete"
        extract(config)
        assert files_of(config.out) == files_of(store)

    def test_only_what_is_missing_is_computed(
        self, devkit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        config = extraction(devkit, tmp_path / "store.zarr", teachers=("tiny_dino",), views=("original",))
        with monkeypatch.context() as patched:
            # After the probe, two batches a shard: the fourth batch is the second shard's last.
            fail_at(patched, 5, stop)
            with pytest.raises(RuntimeError):
                extract(config)
        assert extract(config).computed == 12 - 4
        assert extract(config).computed == 0

    def test_another_teacher_and_view_touch_no_committed_byte(self, devkit: Path, store: Path, tmp_path: Path) -> None:
        config = extraction(devkit, tmp_path / "store.zarr", teachers=("tiny_dino",), views=("original",))
        extract(config)
        committed = files_of(config.out)
        times = {path: (config.out / path).stat().st_mtime_ns for path in committed}
        assert extract(extraction(devkit, config.out)).computed == 3 * 12
        assert {path: (config.out / path).stat().st_mtime_ns for path in committed} == times
        assert {path: data for path, data in files_of(config.out).items() if path in committed} == committed
        assert files_of(config.out) == files_of(store)

    def test_a_changed_image_is_refused_by_its_name(self, own_devkit: Path, tmp_path: Path) -> None:
        config = extraction(own_devkit, tmp_path / "store.zarr", teachers=("tiny_clip",))
        extract(config)
        before = files_of(config.out)
        path = own_devkit / "VOC2007/JPEGImages/000005.jpg"
        path.write_bytes(path.read_bytes() + b"\0")
        with pytest.raises(StoreStaleError, match=r"VOC2007/000005\]\.sha256: stored \w+, found \w+") as caught:
            extract(config)
        assert caught.value.exit_code == 3
        assert files_of(config.out) == before

    @pytest.mark.parametrize(
        ("change", "named"),
        [
            ({"limit": 6}, r"dataset\.samples: .*12 images.* 6 images"),
            ({"voc_sets": ("2007:val",)}, r"dataset\.samples: .*2007:train.*2007:val"),
            ({"dtype": "float32"}, r"features\.dtype: stored float16, found float32"),
            ({"shard_samples": 3}, r"layout\.shard_samples: stored 4, found 3"),
            ({"batch_size": 2}, r"layout\.batch_size: stored 3, found 2"),
            ({"teachers": ("tiny_dino=tiny_clip",)}, r"tiny_dino\.\w+.*stored"),
        ],
        ids=str,
    )
    def test_other_settings_are_refused_by_their_name(
        self, devkit: Path, store: Path, change: dict[str, Any], named: str
    ) -> None:
        with pytest.raises(StoreStaleError, match=named) as caught:
            extract(extraction(devkit, store, **change))
        assert caught.value.exit_code == 3

    @pytest.mark.parametrize("field", sorted(build_teacher("tiny_clip").identity()))
    def test_every_field_of_a_teachers_identity_is_refused_when_it_changes(
        self, devkit: Path, store: Path, monkeypatch: pytest.MonkeyPatch, field: str
    ) -> None:
        real = ZeroShotTeacher.identity
        monkeypatch.setattr(ZeroShotTeacher, "identity", lambda self: {**real(self), field: "something else"})
        before = files_of(store)
        with pytest.raises(StoreStaleError, match=rf"tiny_clip\.{field}.*: stored .*, found ") as caught:
            extract(extraction(devkit, store))
        assert caught.value.exit_code == 3
        assert files_of(store) == before

    def test_another_frame_is_refused(self, devkit: Path, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        real = StorePlan.root_manifest
        monkeypatch.setattr(
            StorePlan, "root_manifest", lambda self: real(self).model_copy(update={"frame": (512, 512)})
        )
        with pytest.raises(StoreStaleError, match=r"frame: stored \[480,480\], found \[512,512\]"):
            extract(extraction(devkit, store))

    def test_other_images_are_refused_before_any_teacher_is_built(
        self, devkit: Path, store: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(pipeline.teachers, "build_teacher", None)
        with pytest.raises(StoreStaleError, match=r"dataset\.samples"):
            extract(extraction(devkit, store, limit=6))

    def test_the_recorded_batch_size_is_reused(self, devkit: Path, tmp_path: Path) -> None:
        out = tmp_path / "store.zarr"
        extract(extraction(devkit, out, teachers=("tiny_clip",), views=("original",)))
        extract(extraction(devkit, out, teachers=("tiny_clip",), batch_size=None))
        views = TeacherStore(out).catalog.teachers["tiny_clip"].views
        assert {view: stored.manifest.layout.batch_size for view, stored in views.items()} == {
            "original": 3,
            "hflip": 3,
        }

    def test_a_teacher_that_says_something_else_is_refused(
        self, devkit: Path, store: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(pipeline.extract, "probe", lambda _: np.linspace(-1, 1, 256, dtype=np.float32))
        with pytest.raises(StoreStaleError, match="no longer says what it said"):
            extract(extraction(devkit, store))

    def test_every_array_says_who_made_it(self, devkit: Path, store: Path) -> None:
        lines = (store / "tiny_dino/hflip/features/provenance.jsonl").read_text().splitlines()
        facts = json.loads(lines[0])
        assert len(lines) == 1
        assert facts["samples"] == 12
        assert facts["weights_source"] == "seed"
        assert {"torch", "numpy", "python"} <= facts["versions"].keys()

    def test_an_interrupted_pass_notes_what_it_committed(
        self, devkit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        config = extraction(devkit, tmp_path / "store.zarr", teachers=("tiny_dino",), views=("original",))
        with monkeypatch.context() as patched:
            fail_at(patched, 5, stop)
            with pytest.raises(RuntimeError):
                extract(config)
        extract(config)
        lines = (config.out / "tiny_dino/original/features/provenance.jsonl").read_text().splitlines()
        assert [json.loads(line)["samples"] for line in lines] == [4, 8]


class TestRepair:
    def test_only_the_damaged_shard_is_computed_again(self, devkit: Path, store: Path, tmp_path: Path) -> None:
        copy = Path(shutil.copytree(store, tmp_path / "copy.zarr"))
        shard = copy / "tiny_dino/hflip/features/c/1/0/0/0"
        data = bytearray(shard.read_bytes())
        data[100] ^= 1
        shard.write_bytes(data)
        done = extract(extraction(devkit, copy, repair=True))
        assert done.computed == 4
        assert [(r.array, r.shard, r.same_bytes) for r in done.repaired] == [("tiny_dino/hflip/features", 1, True)]
        assert files_of(copy) == files_of(store)


class TestInt8:
    def test_stored_features_are_near_the_teachers_and_the_fidelity_is_noted(
        self, devkit: Path, store32: Path, tmp_path: Path
    ) -> None:
        out = tmp_path / "int8.zarr"
        extract(extraction(devkit, out, teachers=("tiny_dino",), dtype="int8"))
        opened, exact = TeacherStore(out), TeacherStore(store32)
        for view in VIEWS:
            q, channel, token = (
                opened.array("tiny_dino", view, name).gather(range(12)).astype(np.float64)
                for name in ("features", "scale_channel", "scale_token")
            )
            restored = q * token[..., None] * channel[:, None, None, :]
            expected = exact.array("tiny_dino", view, "features").gather(range(12)).astype(np.float64)
            norms = np.linalg.norm(restored, axis=-1) * np.linalg.norm(expected, axis=-1)
            assert np.percentile((restored * expected).sum(axis=-1) / norms, 1) > 0.9995
            line = (out / f"tiny_dino/{view}/features/provenance.jsonl").read_text().splitlines()[0]
            fidelity = json.loads(line)["fidelity"]
            assert fidelity["samples"] == 3  # one of each shard
            assert 0.9995 < fidelity["cosine_p01"] <= fidelity["cosine_mean"] <= 1


class TestNames:
    def test_key_equals_spec_chooses_the_folder(self, devkit: Path, tmp_path: Path) -> None:
        extract(extraction(devkit, tmp_path / "s.zarr", teachers=("mine=tiny_clip",), limit=3))
        catalog = TeacherStore(tmp_path / "s.zarr").catalog
        assert list(catalog.teachers) == ["mine"]
        assert catalog.teachers["mine"].manifest.identity["spec"] == "tiny_clip"

    @pytest.mark.parametrize(
        ("specs", "weights", "message"),
        [
            (["tiny_clip", "tiny_clip"], {}, "--teacher tiny_clip is given twice"),
            (["a=tiny_clip", "a=tiny_dino"], {}, "--teacher a is given twice"),
            (["A=tiny_clip"], {}, "--teacher A=tiny_clip: expected a teacher key"),
            (["../x=tiny_clip"], {}, "expected a teacher key"),
            (["=tiny_clip"], {}, "expected a teacher key"),
            (["nope"], {}, "unknown teacher 'nope'"),
            (["tiny_clip"], {"tiny_dino": Path("w.pth")}, r"--weights tiny_dino=…: no such teacher .*asked: tiny_clip"),
            (["a=tiny_clip"], {"b": Path("w.pth")}, "--weights b=…"),
            (["tiny_clip"], {"tiny_clip": Path("w.pth")}, "built from a seed"),
        ],
        ids=str,
    )
    def test_what_cannot_be_named_is_refused(self, specs: list[str], weights: dict[str, Path], message: str) -> None:
        with pytest.raises(UsageError, match=message):
            build_teachers(specs, TeacherChoices(weights), CPU)


class TestBadInput:
    def test_values_that_are_not_finite_name_their_image(
        self, devkit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def spoil(output: TeacherOutput) -> TeacherOutput:
            assert output.features is not None
            output.features[1, 3, 4, 5] = float("nan")
            return output

        config = extraction(devkit, tmp_path / "store.zarr", teachers=("tiny_dino",), views=("original",))
        with monkeypatch.context() as patched:
            fail_at(patched, 4, spoil)  # after the probe, [0, 1, 2] and [3]: the batch [4, 5, 6]
            with pytest.raises(TeacherError, match=r"tiny_dino: features of VOC2007/000006 \(original\)") as caught:
                extract(config)
        assert caught.value.exit_code == 1
        arrays = {array["path"]: array for array in inspect_store(config.out, verify=True)["arrays"]}
        assert arrays["tiny_dino/original/features"]["missing"] == 8  # the first shard is committed and sound
        extract(config)
        assert inspect_store(config.out, verify=True)["status"] == "complete"

    def test_values_too_large_for_half_name_their_image(
        self, devkit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def blow_up(output: TeacherOutput) -> TeacherOutput:
            assert output.features is not None
            output.features[0, 0, 0, 0] = 1e6
            return output

        fail_at(monkeypatch, 3, blow_up)
        with pytest.raises(StoreWriteError, match=r"VOC2007/000004 .*not finite in\s+float16"):
            extract(extraction(devkit, tmp_path / "s.zarr", teachers=("tiny_dino",), views=("original",)))

    def test_a_missing_image_leaves_no_store(self, own_devkit: Path, tmp_path: Path) -> None:
        (own_devkit / "VOC2007/JPEGImages/000005.jpg").unlink()
        with pytest.raises(ImageError, match=r"000005\.jpg: the image is missing"):
            extract(extraction(own_devkit, tmp_path / "store.zarr"))
        assert not (tmp_path / "store.zarr").exists()

    def test_an_image_that_changes_under_the_run_is_noticed(
        self, own_devkit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = own_devkit / "VOC2007/JPEGImages/000002.jpg"
        open_writer = pipeline.extract.open_writer

        def open_late(*args: Any, **options: Any) -> Any:
            path.write_bytes(path.read_bytes() + b"\0")  # after its digest was taken, before it is decoded
            return open_writer(*args, **options)

        monkeypatch.setattr(pipeline.extract, "open_writer", open_late)
        with pytest.raises(ImageError, match=r"000002\.jpg: the image changed"):
            extract(extraction(own_devkit, tmp_path / "store.zarr"))


# Python 3.12 warns of every fork in a process that has threads, and torch of more workers than cores.
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning", "ignore:This DataLoader will create:UserWarning")
class TestWorkers:
    def test_worker_processes_change_no_byte(self, devkit: Path, store: Path, tmp_path: Path) -> None:
        extract(extraction(devkit, tmp_path / "store.zarr", workers=2))
        assert files_of(tmp_path / "store.zarr") == files_of(store)

    def test_a_truncated_image_is_told_in_plain_words(self, own_devkit: Path, tmp_path: Path) -> None:
        path = own_devkit / "VOC2007/JPEGImages/000003.jpg"
        path.write_bytes(path.read_bytes()[:2000])
        with pytest.raises(ImageError) as caught:
            extract(extraction(own_devkit, tmp_path / "store.zarr", workers=2))
        assert str(caught.value).startswith(f"{path}: damaged image")
        assert "Traceback" not in str(caught.value)
        assert "restore this file" in str(caught.value)

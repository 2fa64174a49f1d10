"""`relabel-logits` on the tiny teacher's store. Referees: its stored logits, and an extraction with those prompts."""

from __future__ import annotations

import hashlib
import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import pipeline.relabel
from cache.reader import TeacherStore
from data.errors import DatasetError, StoreStaleError, UsageError
from data.geometry import VIEWS, View
from data.records import ImageRecord
from data.voc import read_voc
from evaluation.multilabel import multilabel_map, presence_matrix
from pipeline.extract import extract
from pipeline.relabel import RelabelConfig, Relabelled, relabel, relabel_lines
from pipeline.teacher_check import logit_teacher_maps
from pipeline.train import train
from tests.command_line import run
from tests.pipeline.small_runs import extraction, from_store, load, small_run, stored_targets

REPOSITORY = Path(__file__).resolve().parents[2]
OTHER_PROMPTS = """
templates: ["a photo of {}.", "{} on a table"]
class_names: {tvmonitor: television, sofa: [sofa, couch, settee]}
articles: false
"""


@pytest.fixture
def copy(store: Path, tmp_path: Path) -> Path:
    """A copy of the tiny teachers' store, to relabel."""
    return Path(shutil.copytree(store, tmp_path / "copy.zarr"))


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    """A prompt file that deviates in everything."""
    path = tmp_path / "Other prompts.yaml"
    path.write_text(OTHER_PROMPTS)
    return path


@pytest.fixture
def default_prompts(tmp_path: Path) -> Path:
    path = tmp_path / "default.yaml"
    path.write_text("# all as usual\n")
    return path


def relabelled(store: Path, prompts: Path, **changes: Any) -> Relabelled:
    return relabel(RelabelConfig(store, prompts, **changes))


def logits(store: Path, key: str, view: View = "original") -> NDArray[np.float32]:
    return TeacherStore(store).array(key, view, "logits").gather(range(12))


def notes(store: Path, key: str, view: View = "original") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (store / key / view / "logits/provenance.jsonl").read_text().splitlines()]


class TestLogits:
    def test_the_default_prompts_give_the_stored_logits(self, copy: Path, default_prompts: Path) -> None:
        done = relabelled(copy, default_prompts)
        assert (done.source, done.key, done.done.written) == ("tiny_clip", "tiny_clip_default", 24)
        for view in VIEWS:
            np.testing.assert_allclose(
                logits(copy, "tiny_clip_default", view), logits(copy, "tiny_clip", view), rtol=0, atol=1e-4
            )
        stored = TeacherStore(copy)
        assert stored.text_embeddings("tiny_clip").tobytes() == stored.text_embeddings("tiny_clip_default").tobytes()

    def test_other_prompts_give_what_an_extraction_with_them_gives(
        self, devkit: Path, copy: Path, prompts: Path, tmp_path: Path
    ) -> None:
        key = relabelled(copy, prompts).key
        assert key == "tiny_clip_other-prompts"
        live = extract(extraction(devkit, tmp_path / "live.zarr", teachers=("tiny_clip",), prompts=prompts)).store
        for view in VIEWS:
            np.testing.assert_allclose(logits(copy, key, view), logits(live, "tiny_clip", view), rtol=0, atol=1e-4)
        made, extracted = (TeacherStore(s).catalog.teachers[k].manifest for s, k in ((copy, key), (live, "tiny_clip")))
        assert made.identity == extracted.identity
        assert made.identity["prompts"]["articles"] is False
        assert ["sofa", "couch", "settee"] in made.identity["prompts"]["class_names"]
        assert np.abs(logits(copy, key) - logits(copy, "tiny_clip")).max() > 1

    def test_no_image_is_looked_at_and_no_tower_runs(
        self, copy: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for place in (
            "PIL.Image.open", "data.images.read_image_bytes", "data.images.decode_image", "features.teacher.probe",
            "features.teacher.Teacher.__call__", "features.zero_shot.CosineClassifier.forward",
            "features.tiny.TinyImageTower.forward", "features.tiny.TinyViT.forward",
        ):  # fmt: skip
            monkeypatch.setattr(place, lambda *_, **__: pytest.fail("looked at an image"))
        assert relabelled(copy, prompts).done.written == 24

    def test_another_factor_scales_them_and_is_of_their_identity(self, copy: Path, default_prompts: Path) -> None:
        key = relabelled(copy, default_prompts, key="soft", logit_scale=12.5).key
        np.testing.assert_allclose(logits(copy, key), logits(copy, "tiny_clip") / 8, rtol=0, atol=1e-4)
        assert TeacherStore(copy).catalog.teachers[key].manifest.identity["logit_scale"] == 12.5

    def test_a_teacher_of_low_precision_is_built_as_it_was(
        self, devkit: Path, default_prompts: Path, tmp_path: Path
    ) -> None:
        config = extraction(devkit, tmp_path / "s.zarr", teachers=("tiny_clip",), precision="bfloat16", limit=12)
        store = extract(config).store
        key = relabelled(store, default_prompts).key
        np.testing.assert_allclose(logits(store, key), logits(store, "tiny_clip"), rtol=0, atol=1e-4)


class TestTraining:
    def test_the_targets_of_a_run_are_the_new_logits(
        self, copy: Path, prompts: Path, records: list[ImageRecord]
    ) -> None:
        key = relabelled(copy, prompts).key
        targets = stored_targets(copy, records=records, logit_teacher=key)
        found = targets(load(records[:2], ["original", "hflip"])).logits
        assert found is not None
        expected = [logits(copy, key, view)[row] for row, view in enumerate(VIEWS)]
        np.testing.assert_array_equal(found.numpy(), np.stack(expected))
        assert targets.record()["identities"][key]["prompts"]["templates"] == ["a photo of {}.", "{} on a table"]
        with pytest.raises(UsageError, match=f"tiny_clip, {key}"):
            stored_targets(copy, records=records)

    def test_a_student_trains_on_them(self, devkit: Path, copy: Path, prompts: Path, tmp_path: Path) -> None:
        key = relabelled(copy, prompts).key
        result = train(small_run(devkit, tmp_path, distillation=from_store(copy, logit_teacher=key, beta=0.0)))
        assert result["targets"]["teachers"]["logits"] == key

    def test_two_stores_relabelled_alike_are_joined(self, devkit: Path, prompts: Path, tmp_path: Path) -> None:
        parts = []
        for name in ("train", "val"):
            config = extraction(devkit, tmp_path / f"{name}.zarr", voc_sets=(f"2007:{name}",), teachers=("tiny_clip",))
            parts.append(extract(config).store)
            relabelled(parts[-1], prompts, key="new")
        maps = logit_teacher_maps(parts, read_voc(devkit, ("2007:train", "2007:val")))
        assert maps.keys() == {"tiny_clip", "new"}


class TestJudgement:
    def test_both_maps_are_measured_shown_and_noted(
        self, devkit: Path, copy: Path, prompts: Path, records: list[ImageRecord]
    ) -> None:
        done = relabelled(copy, prompts, voc_root=devkit, key="new")
        presence = presence_matrix(records)
        expected = {key: multilabel_map(logits(copy, key), presence)[0] for key in ("tiny_clip", "new")}
        assert done.maps == expected
        note = notes(copy, "new")[-1]
        assert (note["multilabel_map"], note["multilabel_map_before"]) == (expected["new"], expected["tiny_clip"])
        assert note["multilabel_map_sets"] == ["2007:train"]
        lines = relabel_lines(done)
        shown = [f"{100 * value:.1f}" for value in expected.values() if value is not None]
        untrained = "on 2007:train (UNTRAINED: expect chance)"
        assert lines[0] == f"tiny_clip: image-level multi-label mAP {shown[0]} {untrained}"
        assert lines[1] == f"new: image-level multi-label mAP {shown[1]} {untrained}"
        assert lines[2].startswith("new: 24 logits made from the embeddings of tiny_clip in ")
        next_command = f"train --voc-root {devkit} --voc-set 2007:train --cached-teachers {copy} --logit-teacher new"
        assert lines[3] == f"next: python cli.py {next_command}"

    def test_without_annotations_at_hand_a_line_says_so(
        self, copy: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr(pipeline.relabel, "DEFAULT_VOC_ROOT", copy.parent / "none")
        done = relabelled(copy, prompts)
        assert done.maps == {}
        assert "mAP" not in "".join(relabel_lines(done))
        assert "mAP not measured, for want of annotations: " in capsys.readouterr().err
        assert "multilabel_map" not in notes(copy, done.key)[-1]

    def test_a_devkit_that_was_named_must_be_there(self, copy: Path, prompts: Path) -> None:
        with pytest.raises(DatasetError, match="no such devkit"):
            relabelled(copy, prompts, voc_root=copy.parent / "none")
        assert not (copy / "tiny_clip_other-prompts").exists()

    def test_images_that_the_store_lacks_are_not_judged(
        self, devkit: Path, copy: Path, prompts: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        done = relabelled(copy, prompts, voc_root=devkit, voc_sets=("2007:val",))
        assert done.maps == {}
        assert f"mAP not measured: not all images of 2007:val are in {copy}" in capsys.readouterr().err

    def test_the_first_images_alone_are_judged_where_the_store_holds_no_more(
        self, devkit: Path, prompts: Path, tmp_path: Path
    ) -> None:
        store = extract(extraction(devkit, tmp_path / "s.zarr", teachers=("tiny_clip",), limit=5)).store
        done = relabelled(store, prompts, voc_root=devkit)
        assert done.maps.keys() == {"tiny_clip", done.key}
        assert "--voc-set 2007:train --limit 5 --cached-teachers" in relabel_lines(done)[-1]


class TestAgain:
    def test_the_same_command_says_that_it_is_complete_and_builds_nothing(
        self, copy: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        relabelled(copy, prompts, key="new")
        monkeypatch.setattr(pipeline.relabel, "build_teacher", lambda *_, **__: pytest.fail("built"))
        capsys.readouterr()
        done = relabelled(copy, prompts, key="new")
        assert done.done.written == 0
        assert "new is complete: nothing to do\n" in capsys.readouterr().err
        assert "new: 0 logits made" in relabel_lines(done)[-2]

    def test_other_prompts_under_the_key_are_refused_before_anything_is_built(
        self, copy: Path, prompts: Path, default_prompts: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        relabelled(copy, prompts, key="new")
        monkeypatch.setattr(pipeline.relabel, "build_teacher", lambda *_, **__: pytest.fail("built"))
        with pytest.raises(StoreStaleError, match=r"new\.prompts\.templates: stored \[\"a photo of {}\.\"") as caught:
            relabelled(copy, default_prompts, key="new")
        assert caught.value.exit_code == 3
        with pytest.raises(StoreStaleError, match=r"new\.logit_scale: stored 100\.0, found 50\.0"):
            relabelled(copy, prompts, key="new", logit_scale=50.0)

    def test_the_noted_command_asks_for_the_same(self, devkit: Path, copy: Path, prompts: Path) -> None:
        config = RelabelConfig(
            copy, prompts, "tiny_clip", "new", {}, untrained=True, logit_scale=12.5, voc_root=devkit,
            voc_sets=("2007:train",),
        )  # fmt: skip
        relabel(config)
        (command,) = {note["command"] for note in notes(copy, "new")}
        assert shlex.split(command) == [
            "python", "cli.py", "relabel-logits", str(copy), "--prompts", str(prompts), "--teacher", "tiny_clip",
            "--as", "new", "--untrained", "--logit-scale", "12.5", "--voc-root", str(devkit), "--voc-set", "2007:train",
        ]  # fmt: skip
        weights = {"tiny_clip": Path("a b.pth")}
        assert (
            RelabelConfig(copy, prompts, weights=weights)
            .command("tiny_clip", "k")
            .endswith("--as k --weights 'tiny_clip=a b.pth'")
        )

    def test_the_file_that_was_read_is_noted(self, copy: Path, prompts: Path) -> None:
        key = relabelled(copy, prompts).key
        expected = {"file": str(prompts), "sha256": hashlib.sha256(prompts.read_bytes()).hexdigest()}
        assert [note["prompts"] for note in notes(copy, key, "hflip")] == [expected, expected]
        for note in notes(copy, key, "hflip"):
            assert note["weights_source"] == "seed"
            assert note["versions"].keys() == {"numpy", "pillow", "python", "torch"}


class TestRefusals:
    @pytest.mark.parametrize(
        ("place", "value", "field"),
        [
            ("features.tiny._LOGIT_SCALE", 50.0, "tiny_clip.logit_scale: stored 100.0, found 50.0"),
            ("features.tiny.weights_digest", lambda _: "0" * 64, f"found {'0' * 64}"),
            ("features.tiny._MEAN", (0.4, 0.5, 0.5), "tiny_clip.mean: stored [0.5,0.5,0.5], found [0.4,0.5,0.5]"),
        ],
        ids=["another scale", "other weights", "another normalisation"],
    )
    def test_another_teacher_than_the_stored_one_is_named_by_field(
        self, copy: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch, place: str, value: Any, field: str
    ) -> None:
        monkeypatch.setattr(place, value)
        with pytest.raises(StoreStaleError) as caught:
            relabelled(copy, prompts)
        (line,) = caught.value.message.splitlines()[1:]
        assert field in line
        assert "--weights tiny_clip=PATH" in str(caught.value)
        assert not (copy / "tiny_clip_other-prompts").exists()

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"key": "No"}, r"--as No: expected a teacher key of a–z"),
            ({"key": "tiny_clip"}, "tiny_clip is a teacher of this store that relabel-logits did not make"),
            ({"teacher": "tiny_dino"}, "teacher tiny_dino has no embeddings to make logits from"),
            ({"logit_scale": 0.0}, "--logit-scale: expected a factor above 0, found 0.0"),
            ({"logit_scale": float("nan")}, "--logit-scale: expected a factor above 0, found nan"),
            ({"weights": {"clip": Path("x")}}, "--weights clip=…: the teacher to relabel is tiny_clip$"),
            ({"weights": {"tiny_clip": Path("x")}}, "tiny_clip: built from a seed, it has no other weights"),
        ],
        ids=str,
    )
    def test_what_cannot_be_asked_is_a_usage_error(
        self, copy: Path, prompts: Path, changes: dict[str, Any], message: str
    ) -> None:
        with pytest.raises(UsageError, match=message):
            relabelled(copy, prompts, **changes)

    def test_a_file_without_a_usable_name_asks_for_a_key(self, copy: Path, prompts: Path) -> None:
        nameless = prompts.rename(prompts.with_name("提示.yaml"))
        with pytest.raises(UsageError, match=r"its name gives no key for the new logits\n  next: name them: --as KEY"):
            relabelled(copy, nameless)

    def test_a_long_name_is_cut_to_a_key(self, copy: Path, prompts: Path) -> None:
        key = relabelled(copy, prompts.rename(prompts.with_name(f"{'long' * 20}.yaml"))).key
        assert key == f"tiny_clip_{'long' * 20}"[:64]

    def test_a_teacher_that_does_not_say_how_its_logits_were_made_is_refused(
        self, copy: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        find = pipeline.relabel.find_source

        def without_scale(*args: Any) -> Any:
            source = find(*args)
            source.manifest.identity.pop("logit_scale")
            return source

        monkeypatch.setattr(pipeline.relabel, "find_source", without_scale)
        with pytest.raises(StoreStaleError, match="tiny_clip does not say how its logits were made"):
            relabelled(copy, prompts)

    def test_weights_precision_and_prompts_reach_the_teacher(
        self, copy: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        class BuiltError(Exception):
            pass

        asked: dict[str, Any] = {}

        def build(spec: str, **settings: Any) -> None:
            asked.update(settings, spec=spec)
            raise BuiltError

        monkeypatch.setattr(pipeline.relabel, "build_teacher", build)
        for weights, untrained in (({}, True), ({"tiny_clip": Path("w.pth")}, False)):
            with pytest.raises(BuiltError):
                relabelled(copy, prompts, weights=weights)
            assert (asked["spec"], asked["untrained"]) == ("tiny_clip", untrained)
            assert asked["weights"] == weights.get("tiny_clip")
            assert (asked["precision"], asked["prompts"].articles) == ("float32", False)


class TestElsewhere:
    def test_inspect_cache_finds_it_whole(self, copy: Path, prompts: Path) -> None:
        key = relabelled(copy, prompts).key
        done = run("inspect-cache", copy, "--verify", "--json")
        summary = json.loads(done.out)
        assert (done.code, summary["status"], summary["problems"]) == (0, "complete", [])
        assert summary["teachers"][key]["untrained"] is True
        assert summary["teachers"][key]["command"].startswith(f"python cli.py relabel-logits {copy} --prompts ")
        (gap,) = summary["training"]
        assert gap["problem"] == f"2 teachers have logits: tiny_clip, {key}"
        shown = run("inspect-cache", copy)
        assert (shown.code, key in shown.out) == (0, True)

    def test_mistakes_are_told_before_torch_is_loaded(self, copy: Path, prompts: Path) -> None:
        script = (
            "import sys; from pathlib import Path; from pipeline.relabel import RelabelConfig, relabel\n"
            "from data.errors import UsageError\n"
            "try: relabel(RelabelConfig(Path(sys.argv[1]), Path(sys.argv[2]), 'tiny_dino'))\n"
            "except UsageError: print('torch' in sys.modules)"
        )
        done = subprocess.run(
            [sys.executable, "-c", script, copy, prompts], cwd=REPOSITORY, capture_output=True, text=True, check=False
        )
        assert done.stdout == "False\n", done.stderr

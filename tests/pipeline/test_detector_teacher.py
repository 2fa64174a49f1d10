"""`detector:CHECKPOINT`: what every teacher promises, the student it was made of as referee, and a run that distils."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cache.reader import TeacherStore, read_features
from data.collate import Batch
from data.errors import CheckpointError, UsageError
from data.geometry import PATCH_GRID, View
from data.records import VOC_CLASSES, ImageRecord
from features.registry import build_teacher
from features.teacher import Teacher
from pipeline.checkpoint import BEST, LATEST, load_checkpoint
from pipeline.dataset import LoadedBatch, SampleKey, TrainingImages, collate_loaded
from pipeline.detector_teacher import class_log_odds
from pipeline.extract import extract
from pipeline.train import train
from students.config import StudentConfig
from students.detector import Student
from tests.command_line import run
from tests.pipeline.small_runs import SMALL_STUDENT, extraction, from_store, save_as, save_student, small_run

CPU = torch.device("cpu")
CHANNELS = {"mobilenet_v3_small": 48, "resnet18": 256, "vit_tiny": 192}


@dataclass
class Made:
    """A teacher, the student of its checkpoint, and images as each gets them."""

    path: Path
    teacher: Teacher
    student: Student
    batch: Batch
    images: Tensor
    arrays: dict[str, Tensor]


def load_for(teacher: Teacher, records: list[ImageRecord], views: list[View]) -> LoadedBatch:
    images = TrainingImages(records, teacher_inputs=(teacher.input,))
    return collate_loaded([images.load(SampleKey(index, view, 0)) for index, view in enumerate(views)])


def make(path: Path, records: list[ImageRecord]) -> Made:
    teacher = build_teacher(f"detector:{path}")
    student = load_checkpoint(path).build_student(CPU)
    loaded = load_for(teacher, records, ["original", "hflip"])
    images = loaded.teacher_images[teacher.input]
    return Made(path, teacher, student, loaded.batch, images, teacher(images).arrays())


@pytest.fixture(scope="module", params=list(CHANNELS))
def made(request: pytest.FixtureRequest, records: list[ImageRecord], tmp_path_factory: pytest.TempPathFactory) -> Made:
    config = SMALL_STUDENT.model_copy(update={"backbone": request.param})
    return make(save_student(tmp_path_factory.mktemp("checkpoint"), config), records)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of the small student."""
    return save_student(tmp_path_factory.mktemp("small"), SMALL_STUDENT)


@pytest.fixture(scope="module")
def made_small(small: Path, records: list[ImageRecord]) -> Made:
    return make(small, records)


class TestFeatures:
    def test_they_are_the_map_that_the_student_compares(self, made: Made) -> None:
        with torch.no_grad():
            expected, _ = made.student.distillation_maps(made.batch.images_float())
        channels = CHANNELS[made.student.config.backbone]
        assert expected.shape == (2, channels, *PATCH_GRID)
        torch.testing.assert_close(made.arrays["features"].permute(0, 3, 1, 2), expected, rtol=1e-6, atol=1e-6)

    def test_a_blob_moved_by_whole_cells_moves_the_response_by_as_many(self, made: Made) -> None:
        cells = [(13, 14), (15, 14), (14, 17)]
        frames = torch.full((1 + len(cells), 480, 480, 3), 90, dtype=torch.uint8)
        for frame, (row, column) in zip(frames[1:], cells, strict=True):
            frame[16 * row : 16 * row + 16, 16 * column : 16 * column + 16] = torch.tensor([255, 230, 0])
        features = made.teacher(frames).features
        assert features is not None
        response = (features[1:] - features[0]).norm(dim=3).flatten(1).argmax(dim=1).tolist()
        found = [divmod(index, PATCH_GRID[1]) for index in response]
        (first_row, first_column), (row, column) = found[0], cells[0]
        # A transformer answers in the blob's own cell, random convolutions in one beside it at most.
        allowed = 0 if made.student.config.backbone == "vit_tiny" else 1
        assert max(abs(first_row - row), abs(first_column - column)) <= allowed
        moves = [(i - row, j - column) for i, j in cells]
        assert [(i - first_row, j - first_column) for i, j in found] == moves


def captured(student: Student, images: Tensor) -> tuple[list[Tensor], list[int], list[dict[str, Tensor]]]:
    """Class scores [P, 21] and the number of proposals of each image, and the detections, by torchvision's own call."""
    scores, counts = [], []
    predictor = student.detector.roi_heads.box_predictor
    hooks = [
        predictor.register_forward_hook(lambda _, __, output: scores.append(output[0])),
        student.detector.rpn.register_forward_hook(lambda _, __, output: counts.extend(map(len, output[0]))),
    ]
    with torch.no_grad():
        detections = student.detector(list(images))
    for hook in hooks:
        hook.remove()
    return scores, counts, detections


class TestLogits:
    def test_they_are_the_largest_log_odds_of_any_proposal(self, made: Made) -> None:
        """By the whole detector's call, in double precision, through the probabilities."""
        (scores,), counts, _ = captured(made.student, made.batch.images_float())
        assert counts == [20, 20]
        probs = scores.double().softmax(dim=1)[:, 1:]
        odds = (probs / (1 - probs)).log().reshape(2, 20, 20)
        assert odds.std(dim=1).min() > 0.01, "proposals that all score alike would show nothing"
        torch.testing.assert_close(made.arrays["logits"].double(), odds.amax(dim=1), rtol=1e-4, atol=1e-4)

    def test_the_best_detection_of_a_class_has_the_probability_that_its_logit_says(self, made: Made) -> None:
        _, _, detections = captured(made.student, made.batch.images_float())
        for found, logits in zip(detections, made.arrays["logits"], strict=True):
            labels = found["labels"].unique().tolist()
            assert labels
            for label in labels:
                best = found["scores"][found["labels"] == label].max()
                torch.testing.assert_close(torch.sigmoid(logits[label - 1]), best, rtol=1e-4, atol=1e-6)

    def test_log_odds_by_hand(self) -> None:
        scores = torch.zeros(2, 21)
        scores[0, 3] = np.log(20.0)  # p = 20 / 40 for class 3, 1 / 40 for each other
        scores[1, 5] = 500.0  # p rounds to 1 and 0
        odds = class_log_odds(scores)
        expected = torch.full((2, 20), -np.log(39.0))
        expected[0, 2] = 0.0
        expected[1] = -500.0
        expected[1, 4] = 500.0 - np.log(20.0)
        torch.testing.assert_close(odds, expected, rtol=1e-5, atol=1e-5)

    def test_an_image_without_proposals_is_scored_as_one(
        self, made_small: Made, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        module: Any = made_small.teacher.module
        propose = module.detector.rpn.forward

        def none_for_the_first(*arguments: Any) -> Any:
            (_, *others), losses = propose(*arguments)
            return [torch.zeros(0, 4), *others], losses

        def the_frame_for_the_first(*arguments: Any) -> Any:
            (_, *others), losses = propose(*arguments)
            return [torch.tensor([[0.0, 0.0, 480.0, 480.0]]), *others], losses

        logits = []
        for proposals in (none_for_the_first, the_frame_for_the_first):
            monkeypatch.setattr(module.detector.rpn, "forward", proposals)
            logits.append(made_small.teacher(made_small.images).logits)
        assert logits[0] is not None
        assert logits[1] is not None
        assert torch.equal(logits[0], logits[1])
        assert torch.equal(logits[0][1], made_small.arrays["logits"][1])
        assert not torch.equal(logits[0][0], made_small.arrays["logits"][0])

    def test_the_auxiliary_head_has_no_part_in_them(self, small: Path, tmp_path: Path) -> None:
        student = load_checkpoint(small).build_student(CPU)
        with torch.no_grad():
            student.logit_head.weight.fill_(7.0)
        other = build_teacher(f"detector:{save_as(tmp_path / BEST, student)}")
        first = build_teacher(f"detector:{small}")
        assert other.identity() == first.identity()
        image = torch.randint(0, 256, (1, 480, 480, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
        ours, theirs = first(image).logits, other(image).logits
        assert ours is not None
        assert theirs is not None
        assert torch.equal(ours, theirs)


def test_bfloat16_reaches_the_backbone_and_spares_the_box_head(made_small: Made) -> None:
    half = build_teacher(f"detector:{made_small.path}", precision="bfloat16")
    seen: list[tuple[str, torch.dtype]] = []

    def note(name: str) -> Callable[[nn.Module, Any, Any], None]:
        return lambda _, __, output: seen.append((name, output.dtype))

    detector: Any = half.module.detector
    detector.roi_heads.box_head.register_forward_hook(note("box head"))
    next(m for m in detector.backbone.body.modules() if isinstance(m, nn.Conv2d)).register_forward_hook(note("stem"))
    arrays = half(made_small.images).arrays()
    assert seen == [("stem", torch.bfloat16), ("box head", torch.float32)]
    assert half.identity() == made_small.teacher.identity() | {"autocast": "bfloat16"}
    assert all(tensor.dtype == torch.float32 and tensor.isfinite().all() for tensor in arrays.values())
    similarity = F.cosine_similarity(arrays["features"], made_small.arrays["features"], dim=3)
    assert 0.99 < similarity.mean() < 1 - 1e-6


class TestIdentity:
    def test_a_moved_checkpoint_is_the_same_teacher(self, small: Path, tmp_path: Path) -> None:
        here = build_teacher(f"detector:{small}")
        there = build_teacher(f"detector:{shutil.copy(small, tmp_path / 'renamed.pth')}")
        assert here.name == "detector:CHECKPOINT"
        assert here.identity() == there.identity()
        assert str(tmp_path) not in json.dumps(here.identity())
        assert here.weights_source.startswith(f"{small}: run run, epoch 1 of 1, trained on 2007:train, first 4 from")
        assert there.weights_source.startswith(f"{tmp_path / 'renamed.pth'}: run run")

    def test_it_holds_what_determines_the_output(self, small: Path) -> None:
        identity = build_teacher(f"detector:{small}").identity()
        assert identity["library"] == "torchvision"
        assert identity["class_order"] == list(VOC_CLASSES)
        assert (identity["input_size"], identity["resample"]) == ([480, 480], "bilinear")
        assert (identity["norm"], identity["patch_grid"]) == ("none", [30, 30])
        assert identity["layer"] == "stride-16 backbone map; largest class log-odds of any proposal"
        architecture = identity["architecture"]
        assert architecture["backbone"] == "timm mobilenetv3_small_100"
        assert (architecture["neck_width"], architecture["eval_proposals"]) == (16, 20)

    def test_every_setting_of_a_student_is_in_it_or_known_to_have_no_effect(self, small: Path) -> None:
        architecture = build_teacher(f"detector:{small}").identity()["architecture"]
        without_effect = {
            "backbone_weights", "rpn_samples", "roi_samples", "train_proposals", "score_threshold",
            "detections_per_image",
        }  # fmt: skip
        assert StudentConfig.model_fields.keys() - without_effect <= architecture.keys()
        assert not without_effect & architecture.keys()

    @pytest.mark.parametrize(
        ("change", "same"),
        [({"eval_proposals": 21}, False), ({"detections_per_image": 7, "train_proposals": 9}, True)],
        ids=["more proposals", "training and detections"],
    )
    def test_settings_count_where_they_change_the_output(
        self, small: Path, tmp_path: Path, change: dict[str, Any], same: bool
    ) -> None:
        stored = load_checkpoint(small)
        student = stored.build_student(CPU)
        config = stored.config.model_copy(update={"student": stored.config.student.model_copy(update=change)})
        other = build_teacher(f"detector:{save_as(tmp_path / BEST, student, config=config)}")
        assert (other.identity() == build_teacher(f"detector:{small}").identity()) is same

    def test_one_other_weight_is_another_teacher(self, small: Path, tmp_path: Path) -> None:
        student = load_checkpoint(small).build_student(CPU)
        with torch.no_grad():
            student.detector.roi_heads.box_predictor.cls_score.bias[4] += 1e-3
        other = build_teacher(f"detector:{save_as(tmp_path / BEST, student)}")
        assert other.weights_digest != build_teacher(f"detector:{small}").weights_digest

    def test_it_says_what_it_was_itself_distilled_from(self, small: Path, tmp_path: Path) -> None:
        student = load_checkpoint(small).build_student(CPU)
        targets = {"source": "store", "teachers": {"features": "dino", "logits": None}, "untrained": ["dino"]}
        teacher = build_teacher(f"detector:{save_as(tmp_path / BEST, student, targets=targets)}")
        assert teacher.weights_source.endswith(
            "from backbone weights none, distilled from features of dino (untrained)"
        )
        assert not teacher.untrained


class TestAsked:
    def test_it_is_trained_whatever_was_asked_for(self, small: Path) -> None:
        teacher = build_teacher(f"detector:{small}", untrained=True)
        assert not teacher.untrained
        assert teacher.identity() == build_teacher(f"detector:{small}").identity()

    def test_other_weights_are_refused(self, small: Path) -> None:
        with pytest.raises(UsageError, match="its weights are those of the checkpoint that is named") as caught:
            build_teacher(f"detector:{small}", weights=Path("other.pth"))
        assert "leave --weights out" in str(caught.value)

    def test_options_are_refused(self, small: Path) -> None:
        with pytest.raises(UsageError, match="does not take the option grid"):
            build_teacher(f"detector:{small}@grid=15")

    def test_what_is_no_checkpoint_of_ours_is_refused(self, small: Path, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match="no such checkpoint"):
            build_teacher(f"detector:{tmp_path / 'nothing.pth'}")
        foreign = tmp_path / "foreign.pth"
        torch.save({"state_dict": {}}, foreign)
        with pytest.raises(CheckpointError, match="not a TeachOnce checkpoint"):
            build_teacher(f"detector:{foreign}")
        foreign.write_bytes(small.read_bytes()[:5000])
        with pytest.raises(CheckpointError, match="cannot be read"):
            build_teacher(f"detector:{foreign}")


@pytest.fixture(scope="module")
def extracted(small: Path, devkit: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float32 store of four images."""
    folder = tmp_path_factory.mktemp("extracted")
    spec = f"mine=detector:{small}"
    return extract(extraction(devkit, folder / "s.zarr", teachers=(spec,), limit=4, dtype="float32")).store


class TestPipeline:
    def test_the_store_holds_what_it_says(self, extracted: Path, small: Path, records: list[ImageRecord]) -> None:
        teacher = build_teacher(f"detector:{small}")
        views: list[View] = ["hflip"] * 4
        live = teacher(load_for(teacher, records[:4], views).teacher_images[teacher.input]).arrays()
        store = TeacherStore(extracted)
        manifest = store.catalog.teachers["mine"].manifest
        assert (manifest.identity, manifest.untrained) == (teacher.identity(), False)
        for row in range(4):
            for name, stored in (
                ("features", read_features(store, "mine", "hflip", row)),
                ("logits", store.array("mine", "hflip", "logits").read(row)),
            ):
                np.testing.assert_allclose(stored, live[name][row].numpy(), rtol=1e-3, atol=1e-4)

    def test_extraction_goes_on_with_the_moved_checkpoint_and_not_with_another(
        self, extracted: Path, small: Path, devkit: Path, tmp_path: Path
    ) -> None:
        moved = shutil.copy(small, tmp_path / "moved.pth")
        arguments = ("extract-teachers", "--voc-root", devkit, "--limit", "4", "--out", extracted, "--dtype", "float32",
                     "--shard-samples", "4", "--workers", "0", "--device", "cpu", "--untrained")  # fmt: skip
        done = run(*arguments, "--teacher", f"mine=detector:{moved}")
        assert done.code == 0, done.err
        assert "0 targets computed" in done.out
        other = save_student(tmp_path, SMALL_STUDENT.model_copy(update={"eval_proposals": 21}))
        done = run(*arguments, "--teacher", f"mine=detector:{other}")
        assert (done.code, "eval_proposals" in done.err) == (3, True), done.err

    def test_a_student_distils_both_its_features_and_its_logits(
        self, extracted: Path, devkit: Path, tmp_path: Path
    ) -> None:
        config = small_run(devkit, tmp_path, distillation=from_store(extracted), recipe={"batch_size": 4})
        train(config)
        saved = load_checkpoint(config.checkpoint_dir / LATEST)
        assert saved.step == 1
        assert saved.targets["teachers"] == {"features": "mine", "logits": "mine"}
        losses = saved.history[0]["losses"]
        assert all(np.isfinite(losses[name]) and losses[name] > 0 for name in ("feature", "logit"))

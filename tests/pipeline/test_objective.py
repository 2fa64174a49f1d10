"""The objective's options, each through a whole step of a real student against a real store."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from cache.reader import TeacherStore
from cache.selection import Selection
from data.errors import UsageError
from data.records import ImageRecord
from features.regions import region_logits
from pipeline.config import Distillation, TrainConfig
from pipeline.dataset import SampleKey, TrainingImages, collate_loaded
from pipeline.extract import extract
from pipeline.gradient_shares import gradient_norms, shares
from pipeline.objective import GroundTruth, image_labels
from pipeline.stored_targets import StoredTargets
from pipeline.train import train
from pipeline.trainer import Trainer
from students.losses.binary_kl import teacher_probs
from tests.pipeline.small_runs import extraction, from_store, small_run
from tests.teacher_families import FAMILIES

CPU = torch.device("cpu")
VIEWS = ("original", "hflip")


@pytest.fixture(scope="module")
def dense_store(devkit: Path, store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Dense CLIP features of four images, beside tiny_clip's logits."""
    folder = tmp_path_factory.mktemp("dense")
    FAMILIES["open_clip, dense"].prepare(folder)
    specs = (f"dense={FAMILIES['open_clip, dense'].spec}", "tiny_clip")
    return extract(extraction(devkit, folder / "s.zarr", teachers=specs, untrained=True, limit=4)).store


def trainer_of(devkit: Path, records: list[ImageRecord], distillation: Distillation, **changes: Any) -> Trainer:
    config = small_run(devkit, Path("unused"), distillation=distillation, **changes).resolved()
    source = StoredTargets(distillation, records, VIEWS, CPU) if distillation.stores else None
    return Trainer(config, records, CPU, source)


def losses_of(trainer: Trainer, count: int = 2) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    images = TrainingImages(trainer.records)
    keys = [SampleKey(index, VIEWS[index % 2], 0) for index in range(count)]
    loaded = collate_loaded([images.load(key) for key in keys])
    return trainer.losses_against(loaded, None if trainer.source is None else trainer.source(loaded))


def number(value: torch.Tensor | int) -> float:
    return float(value.detach() if isinstance(value, torch.Tensor) else value)


def metrics_of(config: TrainConfig) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((config.run_dir / "metrics.jsonl").read_text().splitlines()[-1])
    return found


@pytest.mark.parametrize("name", ["mse", "cosine", "cwd", "pkd", "mgd", "attention", "fgd"])
def test_every_feature_loss_trains_adapter_and_backbone(
    devkit: Path, store: Path, records: list[ImageRecord], name: str
) -> None:
    trainer = trainer_of(devkit, records[:4], from_store(store, feature_loss=name, gamma=0.0))
    total, parts = losses_of(trainer)
    assert torch.isfinite(total)
    parts["feature"].backward()
    assert trainer.objective.adapter is not None
    stem = next(w for w in trainer.student.detector.backbone.body.parameters() if w.requires_grad)
    for weight in (trainer.objective.adapter.projection.weight, stem):
        assert weight.grad is not None
        assert weight.grad.abs().sum() > 0


def test_the_weights_are_applied_to_their_terms(devkit: Path, store: Path, records: list[ImageRecord]) -> None:
    trainer = trainer_of(devkit, records[:4], from_store(store, alpha=0.5, beta=3.0, gamma=0.25))
    total, parts = losses_of(trainer)
    detection = sum(parts[name] for name in parts if name.startswith("loss_"))
    assert number(parts["detection"]) == pytest.approx(number(detection), rel=1e-6)
    expected = 0.5 * parts["detection"] + 3 * parts["feature"] + 0.25 * parts["logit"]
    assert number(total) == pytest.approx(number(expected), rel=1e-6)


def test_the_tap_behind_the_neck_has_its_width(devkit: Path, store: Path, records: list[ImageRecord]) -> None:
    trainer = trainer_of(devkit, records[:4], from_store(store, feature_tap="neck", gamma=0.0))
    assert trainer.objective.adapter is not None
    assert trainer.objective.adapter.projection.in_channels == 16  # the small student's neck
    losses_of(trainer)[1]["feature"].backward()
    assert any(w.grad is not None for w in trainer.student.detector.backbone.neck.parameters())


def test_binary_kl_centres_the_teacher_over_the_training_images(
    devkit: Path, store: Path, records: list[ImageRecord]
) -> None:
    trainer = trainer_of(devkit, records[:6], from_store(store, beta=0.0, logit_loss="binary"))
    logits = TeacherStore(store).array("tiny_clip", "original", "logits").gather(range(6)).astype(np.float64)
    centre = trainer.objective.centre
    assert centre is not None
    np.testing.assert_allclose(centre.numpy(), logits.mean(axis=0), rtol=1e-5)
    probs = teacher_probs(torch.from_numpy(logits).float(), trainer.config.distillation.temperature, centre)
    assert float((probs - 0.5).mean().abs()) < 0.1  # neither everything is there nor nothing
    assert torch.isfinite(losses_of(trainer)[0])


class TestControls:
    def test_shuffled_targets_are_another_images(self, store: Path, records: list[ImageRecord]) -> None:
        config = from_store(store, target_shuffle=3)
        shuffled, own = (StoredTargets(c, records, ("original",), CPU) for c in (config, from_store(store)))
        assert sorted(shuffled._place) == list(range(12))
        assert all(place != index for index, place in enumerate(shuffled._place))
        images = TrainingImages(records)
        loaded = collate_loaded([images.load(SampleKey(index, "original", 0)) for index in range(12)])
        theirs, mine = shuffled(loaded), own(loaded)
        assert theirs.logits is not None
        assert mine.logits is not None
        assert torch.equal(theirs.logits, mine.logits[list(shuffled._place)])
        with shuffled.following([[key] for key in loaded.keys[:2]]):
            ahead = [shuffled(collate_loaded([images.load(key)])).logits for key in loaded.keys[:2]]
            assert ahead[1] is not None
            assert torch.equal(ahead[1][0], mine.logits[shuffled._place[1]])

    def test_one_image_cannot_be_shuffled(self, store: Path, records: list[ImageRecord]) -> None:
        with pytest.raises(UsageError, match="two training images or more, found 1"):
            StoredTargets(from_store(store, target_shuffle=0), records[:1], ("original",), CPU)

    def test_the_head_can_be_trained_on_the_images_own_labels(self, devkit: Path, records: list[ImageRecord]) -> None:
        trainer = trainer_of(devkit, records[:4], Distillation(logit_targets="labels"))
        torch.manual_seed(0)
        output_logits: list[torch.Tensor] = []
        trainer.student.logit_head.register_forward_hook(lambda _, __, output: output_logits.append(output))
        _, parts = losses_of(trainer)
        expected = np.zeros((2, 20), dtype=np.float32)
        for row, record in zip(expected, records[:2], strict=True):
            row[record.target.labels - 1] = 1
        loss = F.binary_cross_entropy_with_logits(output_logits[0], torch.from_numpy(expected))
        assert number(parts["logit"]) == pytest.approx(number(loss), rel=1e-6)

    def test_labels_of_an_image_without_objects_are_all_zero(self) -> None:
        labels = [torch.zeros(0, dtype=torch.int64), torch.tensor([1, 20, 20])]
        found = image_labels(labels, torch.zeros(2, 20))
        assert found.sum(dim=1).tolist() == [0, 2]
        assert found[1, 0] == found[1, 19] == 1


class TestRegions:
    def test_the_region_loss_is_that_of_the_live_map_at_the_students_proposals(
        self, devkit: Path, dense_store: Path, records: list[ImageRecord]
    ) -> None:
        config = from_store(dense_store, beta=0.0, gamma=0.0, delta=2.0)
        trainer = trainer_of(devkit, records[:4], config)
        images = TrainingImages(trainer.records)
        loaded = collate_loaded([images.load(SampleKey(index, VIEWS[index], 0)) for index in range(2)])
        assert trainer.source is not None
        targets = trainer.source(loaded)
        assert targets.regions is not None
        output, truth = trainer._seen(loaded)
        parts = trainer.objective(output, targets, truth)
        store = TeacherStore(dense_store)
        stored = [store.array("dense", VIEWS[i], "features").read(i).astype(np.float32) for i in range(2)]
        teacher = region_logits(
            torch.from_numpy(np.stack(stored)), output.proposals,
            torch.from_numpy(np.array(store.text_embeddings("dense"))),
            logit_scale=float(store.catalog.teachers["dense"].manifest.identity["logit_scale"]),
        )  # fmt: skip
        t = trainer.config.distillation.temperature
        p = torch.softmax(teacher / t, dim=1)
        q = torch.log_softmax(output.class_logits[:, 1:] / t, dim=1)
        expected = t**2 * (p * (p.log() - q)).sum(dim=1).mean()
        assert number(parts["region"]) == pytest.approx(number(expected), rel=1e-4)
        assert number(trainer.objective.weighted(parts)["region"]) == pytest.approx(2 * number(expected), rel=1e-4)

    def test_a_store_without_dense_features_says_what_is_missing(self, store: Path, records: list[ImageRecord]) -> None:
        with pytest.raises(UsageError, match=r"has dense CLIP features .*\n.*--delta 0"):
            StoredTargets(from_store(store, delta=1.0), records, ("original",), CPU)

    def test_a_run_with_all_four_terms(self, devkit: Path, dense_store: Path, tmp_path: Path) -> None:
        config = small_run(devkit, tmp_path, distillation=from_store(dense_store, delta=0.5))
        result = train(config)
        assert result["targets"]["teachers"] == {"features": "dense", "logits": "tiny_clip", "regions": "dense"}
        assert {"detection", "feature", "logit", "region"} <= metrics_of(config)["losses"].keys()


class TestGradientShares:
    def test_norms_are_those_of_gradients_taken_one_by_one(self) -> None:
        weight = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
        terms = {"detection": (weight * torch.tensor([3.0, 4.0])).sum(), "feature": (weight**2).sum() / 2}
        norms = gradient_norms({**terms, "logit": torch.ones(1, requires_grad=True).sum()}, [weight])
        assert norms == {"detection": 5.0, "feature": pytest.approx(5**0.5), "logit": 0.0}
        assert shares(norms)["feature"] == pytest.approx(5**0.5 / (5 + 5**0.5))

    def test_auto_gives_distillation_its_share_of_the_gradient(
        self, devkit: Path, store: Path, records: list[ImageRecord]
    ) -> None:
        distillation = from_store(store, kd_weight="auto", kd_share=0.25, beta=7.0, gamma=0.01)
        trainer = trainer_of(devkit, records[:4], distillation)
        images = TrainingImages(trainer.records)
        loaded = collate_loaded([images.load(SampleKey(index, "original", 0)) for index in range(2)])
        trainer.run_step([loaded], 2)
        beta, gamma = float(trainer.objective.beta), float(trainer.objective.gamma)
        assert (beta, gamma) != (7.0, 0.01)
        fresh = trainer_of(devkit, records[:4], from_store(store, beta=beta, gamma=gamma))
        output, targets, truth = fresh._forward(loaded)
        terms = fresh.objective.weighted(fresh.objective(output, targets, truth))
        weights = [w for w in fresh.student.detector.backbone.body.parameters() if w.requires_grad]
        for share in shares(gradient_norms(terms, weights)).values():
            assert share == pytest.approx(0.25, rel=1e-3)


def test_truth_without_objects_is_served_by_every_feature_loss(devkit: Path, store: Path, tmp_path: Path) -> None:
    """fgd has no foreground there."""
    from students.losses.feature_loss import FeatureLoss

    truth = GroundTruth(boxes=[torch.zeros(0, 4)], labels=[torch.zeros(0, dtype=torch.int64)], mask_seeds=[1])
    loss = FeatureLoss("fgd", 3)(torch.randn(1, 3, 30, 30), torch.zeros(1, 3, 30, 30), truth.boxes)
    assert torch.isfinite(loss)


def test_the_stores_are_selected_once_for_all_arrays(store: Path, records: list[ImageRecord]) -> None:
    selection = Selection([TeacherStore(store)], [record.id for record in records])
    assert selection.text_embeddings("tiny_clip").shape[0] == 20

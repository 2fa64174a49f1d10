import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from data.errors import (
    StoreStaleError,
    TrainingError,
    UsageError,
)
from data.records import ImageRecord
from pipeline.checkpoint import BEST, LATEST, load_checkpoint
from pipeline.config import Distillation
from pipeline.dataset import LoadedBatch
from pipeline.extract import extract
from pipeline.stored_targets import StoredTargets
from pipeline.targets import TeacherTargets
from pipeline.train import best_epoch, train, training_loader
from pipeline.trainer import Trainer
from students.detector import Student
from tests.data.tiny_devkit import TinyDevkit
from tests.pipeline.small_runs import (
    TINY_TEACHERS,
    PulledPlugError,
    equal,
    extraction,
    files_of,
    from_store,
    small_run,
    weights_of,
)

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def trained(devkit: Path, store: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    folder = tmp_path_factory.mktemp("arms")
    baseline = small_run(devkit, folder, "baseline", limit=6, evaluate="final-only", recipe={"jitter": 0.2})
    train(baseline)

    def run(name: str, **weights: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        config = baseline.model_copy(update={"run_name": name, "distillation": from_store(store, **weights)})
        torch.manual_seed(len(name))  # nothing may come from the global generator
        train(config)
        return weights_of(baseline), weights_of(config)

    return run


class TestArmsArePaired:
    """Three steps of the baseline, of a store's run whose losses weigh nothing, and of one whose losses weigh."""

    def test_losses_without_weight_give_the_baseline_bit_by_bit(self, trained: Callable[..., Any]) -> None:
        baseline, other = trained("nothing", beta=0, gamma=0)
        assert equal(baseline, other)

    def test_the_feature_loss_moves_the_backbone(self, trained: Callable[..., Any]) -> None:
        baseline, other = trained("features", gamma=0)
        moved = {name for name in baseline if not torch.equal(baseline[name], other[name])}
        assert any(name.startswith("detector.backbone.body") for name in moved)

    def test_the_logit_loss_moves_the_logit_head(self, trained: Callable[..., Any]) -> None:
        baseline, other = trained("logits", beta=0)
        assert not torch.equal(baseline["logit_head.weight"], other["logit_head.weight"])

    def test_all_arms_start_from_the_same_student(self, devkit: Path, store: Path, records: list[ImageRecord]) -> None:
        students = []
        for distillation in (Distillation(), from_store(store)):
            config = small_run(devkit, Path("unused"), distillation=distillation).resolved()
            source = StoredTargets(distillation, records, ("original",), CPU) if distillation.stores else None
            students.append(Trainer(config, records, CPU, source).student.state_dict())
        assert equal(*students)

    def test_the_adapter_starts_from_a_stream_of_its_own(
        self, devkit: Path, store: Path, records: list[ImageRecord]
    ) -> None:
        config = small_run(devkit, Path("unused"), distillation=from_store(store)).resolved()
        source = StoredTargets(config.distillation, records, ("original",), CPU)
        adapters = []
        for seed in (1, 2):
            torch.manual_seed(seed)  # nothing may come from the global generator
            adapters.append(Trainer(config, records, CPU, source).objective.state_dict())
        assert equal(*adapters)

    def test_an_images_sampling_stream_is_its_own(
        self, devkit: Path, records: list[ImageRecord], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Whatever the batch size, an image's anchors and proposals are drawn from the same seed."""
        given: list[int] = []

        def remember(_: Student, seeds: list[int]) -> None:
            given[:] = seeds
            raise PulledPlugError

        monkeypatch.setattr(Student, "seed_sampling", remember)
        seeds_by_id: list[dict[str, int]] = []
        for batch_size in (2, 3):
            config = small_run(devkit, Path("unused"), recipe={"batch_size": batch_size}).resolved()
            trainer = Trainer(config, records[:6], CPU, None)
            seeds_by_id.append({})
            for loaded in training_loader(trainer):
                with pytest.raises(PulledPlugError):
                    trainer.losses_against(loaded, None)
                seeds_by_id[-1].update(zip(loaded.batch.ids, given, strict=True))
                trainer.step += 1
        assert seeds_by_id[0] == seeds_by_id[1]
        assert len(set(seeds_by_id[0].values())) == 6


class TestStarting:
    @pytest.mark.parametrize("taken", ["runs/run/config.json", "checkpoints/run/student_latest.pth"])
    def test_a_taken_name_is_refused_and_nothing_touched(self, devkit: Path, tmp_path: Path, taken: str) -> None:
        path = tmp_path / taken
        path.parent.mkdir(parents=True)
        path.write_text("another run's")
        with pytest.raises(UsageError, match="a run of this name is already there") as caught:
            train(small_run(devkit, tmp_path))
        assert caught.value.exit_code == 2
        assert "--resume" in str(caught.value)
        assert files_of(tmp_path) == {taken: b"another run's"}

    def test_what_the_store_cannot_serve_leaves_nothing_behind(self, devkit: Path, store: Path, tmp_path: Path) -> None:
        config = small_run(devkit, tmp_path, voc_sets=("2007:val",), distillation=from_store(store))
        with pytest.raises(Exception, match="are not in the store"):
            train(config)
        assert list(tmp_path.iterdir()) == []

    def test_two_teachers_and_no_choice_are_refused(self, devkit: Path, tmp_path: Path) -> None:
        teachers = ("tiny_dino", "other=tiny_dino", "tiny_clip")
        store = extract(extraction(devkit, tmp_path / "s.zarr", teachers=teachers, limit=4)).store
        with pytest.raises(
            UsageError, match=r"have features: (tiny_dino, other|other, tiny_dino)\n.*--feature-teacher"
        ):
            train(small_run(devkit, tmp_path, distillation=from_store(store)))
        train(small_run(devkit, tmp_path, limit=2, distillation=from_store(store, feature_teacher="other")))

    def test_a_store_without_features_asks_for_beta_0(self, devkit: Path, tmp_path: Path) -> None:
        store = extract(extraction(devkit, tmp_path / "s.zarr", teachers=("tiny_clip",), limit=4)).store
        with pytest.raises(UsageError, match="--beta 0"):
            train(small_run(devkit, tmp_path, distillation=from_store(store)))


class TestEpochs:
    def test_the_limit_cuts_training_only(self, devkit: Path, tmp_path: Path) -> None:
        result = train(small_run(devkit, tmp_path, limit=2))
        assert result["images"] == {"train": 2, "val": 6, "test": 0}
        assert result["steps"] == 1
        assert result["test"] is None
        assert result["selected_and_reported_on_the_same_images"] is True

    def test_final_only_scores_the_last_epoch_alone(self, devkit: Path, tmp_path: Path) -> None:
        config = small_run(devkit, tmp_path, limit=2, evaluate="final-only", recipe={"epochs": 2})
        result = train(config)
        lines = [json.loads(line) for line in (config.run_dir / "metrics.jsonl").read_text().splitlines()]
        assert [line["val"] is None for line in lines] == [True, False]
        assert result["best"]["epoch"] == 2
        assert load_checkpoint(config.checkpoint_dir / BEST).epoch == 2

    def test_images_without_objects_are_trained_on(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        tiny = TinyDevkit(tmp_path / "VOCdevkit")
        for stem in ("000001", "000002", "000003"):
            tiny.add(stem, objects="")
        tiny.add("000004")
        tiny.list("train", ["000001", "000002", "000003", "000004"])
        tiny.list("val", ["000001", "000004"])
        result = train(small_run(tiny.root, tmp_path, limit=None))
        assert result["steps"] == 2
        assert result["last"]["val"]["per_class"]["cat"]["mAP"] is not None

    def test_a_validation_set_without_any_object_has_no_score(self, tmp_path: Path) -> None:
        tiny = TinyDevkit(tmp_path / "VOCdevkit")
        tiny.add("000001", objects="")
        tiny.list("train", ["000001"])
        tiny.list("val", ["000001"])
        result = train(small_run(tiny.root, tmp_path, limit=None))
        assert result["last"]["val"]["mAP"] is None
        assert result["best"]["epoch"] == 1

    def test_live_teachers_train_a_step(self, devkit: Path, tmp_path: Path) -> None:
        live = Distillation(source="live", teachers=TINY_TEACHERS)
        config = small_run(devkit, tmp_path, limit=2, distillation=live)
        result = train(config)
        assert {"feature", "logit"} <= result["last"]["losses"].keys()
        assert set(result["targets"]["identities"]) == set(TINY_TEACHERS)
        assert load_checkpoint(config.checkpoint_dir / LATEST).targets == result["targets"]

    def test_the_first_of_equal_epochs_is_the_best(self) -> None:
        history = [
            {"epoch": n, "val": val} for n, val in enumerate([None, {"mAP": 0.2}, {"mAP": 0.2}, {"mAP": None}], 1)
        ]
        assert best_epoch(history) == 2


class TestStoppingEarly:
    def test_a_loss_that_is_not_finite_names_step_and_images(
        self, devkit: Path, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        gather = StoredTargets.__call__

        def spoilt(self: StoredTargets, loaded: LoadedBatch) -> TeacherTargets:
            targets = gather(self, loaded)
            assert targets.logits is not None
            targets.logits[0, 3] = float("nan")
            return targets

        monkeypatch.setattr(StoredTargets, "__call__", spoilt)
        config = small_run(devkit, tmp_path, distillation=from_store(store))
        with pytest.raises(
            TrainingError, match=r"not finite at step 1: .*'logit': nan.*; images VOC2007/\d{6}, VOC2007/\d{6}"
        ):
            train(config)
        assert not (config.checkpoint_dir / LATEST).exists()

    def test_an_image_that_changed_since_extraction_is_refused(self, devkit: Path, tmp_path: Path) -> None:
        root = Path(shutil.copytree(devkit, tmp_path / "VOCdevkit"))
        store = extract(extraction(root, tmp_path / "s.zarr", limit=4)).store
        path = root / "VOC2007/JPEGImages/000002.jpg"
        path.write_bytes(path.read_bytes() + b"\0")
        with pytest.raises(StoreStaleError, match=r"000002\.jpg: the image changed since the teachers saw it"):
            train(small_run(root, tmp_path, distillation=from_store(store)))

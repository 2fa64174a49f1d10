"""Stage 2: trains a student, as a baseline, against a teacher cache, or with live teachers.

One `Trainer` holds a run's state; `train` runs it from its configuration, or resumes it from its latest checkpoint.
Randomness comes from named streams only (see `pipeline.randomness`), so a resumed run needs no generator's state and
β = γ = 0 with a store gives the baseline's weights, bit by bit on the CPU.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from data.collate import Batch
from data.errors import CheckpointError, TrainingError
from data.records import ImageRecord
from data.voc import read_voc
from evaluation.average_precision import EvaluationResult
from pipeline.checkpoint import BEST, LATEST, Checkpoint, link_latest, load_checkpoint, save_checkpoint
from pipeline.config import TrainConfig
from pipeline.dataset import EpochBatches, LoadedBatch, TrainingImages, collate_loaded
from pipeline.device import choose_device
from pipeline.evaluate import score_student
from pipeline.loading import BatchLoader, load_batches
from pipeline.objective import Objective
from pipeline.optimisation import build_optimizer, clip_gradients, learning_rate, set_learning_rate
from pipeline.progress import progress, say
from pipeline.randomness import stream_seed, torch_stream
from pipeline.recorder import Recorder
from pipeline.resuming import as_chosen, find_resumable, refuse_other_targets, refuse_taken_name
from pipeline.stored_targets import StoredTargets
from pipeline.targets import LiveTargets, TargetSource, TeacherTargets, views_drawn
from pipeline.teachers import TeacherChoices, build_teachers
from students.detector import Student, StudentOutput, build_student

_STEPS_BETWEEN_SCALARS = 20


@dataclass
class Clock:
    """Where the seconds of one epoch's training steps went; evaluation is left out."""

    total: float = 0.0
    data_wait: float = 0.0
    targets: float = 0.0

    def seconds(self) -> dict[str, float]:
        """Return the seconds in all, waiting for images, and getting teacher targets."""
        return {"training": self.total, "data_wait": self.data_wait, "targets": self.targets}


@dataclass
class Trainer:
    """The state of a run between steps."""

    config: TrainConfig
    records: list[ImageRecord]
    device: torch.device
    source: TargetSource | None
    student: Student = field(init=False)
    objective: Objective = field(init=False)
    clock: Clock = field(default_factory=Clock)
    step: int = 0

    def __post_init__(self) -> None:
        config = self.config
        with torch_stream(config.seed, "student-init"):
            student = build_student(config.student)
        self.student = student.to(self.device)
        self.objective = Objective(config.distillation, self.source, student.feature_channels, config.seed).to(
            self.device
        )
        self.optimizer = build_optimizer(config.recipe, self._modules())
        recipe = config.recipe
        self.batches = EpochBatches(self.records, recipe.batch_size, recipe.flip, config.seed)
        self.total_steps = len(self.batches) * recipe.epochs

    def loader(self) -> BatchLoader[Any, Any, LoadedBatch]:
        """Return the loader of this run's batches; it follows `batches.epoch`."""
        images = TrainingImages(
            self.records,
            seed=self.config.seed,
            jitter_strength=self.config.recipe.jitter,
            teacher_inputs=() if self.source is None else self.source.teacher_inputs,
            digests=None if self.source is None or self.source.digests is None else dict(self.source.digests),
        )
        workers = training_workers(self.config.workers, self.device)
        return load_batches(images.load, self.batches, collate_loaded, workers=workers, device=self.device)

    def run_epoch(self, loader: BatchLoader[Any, Any, LoadedBatch], epoch: int, recorder: Recorder) -> dict[str, float]:
        """Train one epoch (counted from 0) and return the mean of every loss part over its images.

        Raises TrainingError for a loss or a gradient that is not finite.
        """
        self.batches.epoch = epoch
        self.clock = Clock()
        sums: dict[str, Tensor] = defaultdict(lambda: torch.zeros((), device=self.device))
        seen = 0
        start = time.monotonic()
        following = nullcontext() if self.source is None else self.source.following(list(self.batches))
        with following, progress(f"epoch {epoch + 1}/{self.config.recipe.epochs}", len(self.records)) as tick:
            batches = iter(loader)
            while True:
                waited = time.monotonic()
                loaded = next(batches, None)
                self.clock.data_wait += time.monotonic() - waited
                if loaded is None:
                    break
                parts = self.run_step(loaded)
                for name, value in parts.items():
                    sums[name] += value * len(loaded.keys)
                seen += len(loaded.keys)
                if self.step % _STEPS_BETWEEN_SCALARS == 0:
                    recorder.scalars({f"loss/{name}": float(value) for name, value in parts.items()}, self.step)
                    recorder.scalars({"optimisation/learning_rate": self.optimizer.param_groups[0]["lr"]}, self.step)
                tick(len(loaded.keys), f"loss {float(parts['total']):.3f}")
        self.clock.total += time.monotonic() - start
        return {name: float(value) / seen for name, value in sums.items()}

    def run_step(self, loaded: LoadedBatch) -> dict[str, Tensor]:
        """Take one step and return the loss and its parts, detached scalars by name, and the gradient norm."""
        set_learning_rate(self.optimizer, learning_rate(self.config.recipe, self.step, self.total_steps))
        self.optimizer.zero_grad(set_to_none=True)
        total, parts = self.losses(loaded)
        self._refuse_non_finite("loss", total, parts, loaded)
        total.backward()  # type: ignore[no-untyped-call]
        norm = clip_gradients(self._modules(), self.config.recipe.clip_norm)
        self._refuse_non_finite("gradient norm", norm, parts, loaded)
        self.optimizer.step()
        self.step += 1
        return {"total": total.detach(), **{k: v.detach() for k, v in parts.items()}, "gradient_norm": norm}

    def _refuse_non_finite(self, what: str, value: Tensor, parts: dict[str, Tensor], loaded: LoadedBatch) -> None:
        if not math.isfinite(value.item()):
            named = {name: round(part.item(), 4) for name, part in parts.items()}
            raise TrainingError(
                f"the {what} is not finite at step {self.step + 1}: {named}; images {', '.join(loaded.batch.ids)}",
                hint="lower --learning-rate, or check the images and targets named",
            )

    def losses(self, loaded: LoadedBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the total loss of a batch and its unweighted parts by name, with gradients."""
        asked = time.monotonic()
        targets = None if self.source is None else self.source(loaded)
        self.clock.targets += time.monotonic() - asked
        return self.losses_against(loaded, targets)

    def losses_against(self, loaded: LoadedBatch, targets: TeacherTargets | None) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the losses of a batch against given teacher targets."""
        batch: Batch = loaded.batch.to(self.device, non_blocking=True)
        keys = zip(loaded.keys, batch.ids, strict=True)
        self.student.seed_sampling(
            [stream_seed(self.config.seed, "sampling", k.epoch, image_id) for k, image_id in keys]
        )
        output = self.student(batch.images_float(), list(batch.targets))
        assert isinstance(output, StudentOutput)
        loss: tuple[Tensor, dict[str, Tensor]] = self.objective(output, targets)
        return loss

    def checkpoint(self, epoch: int, history: list[dict[str, Any]], *, resumable: bool) -> Checkpoint:
        """Return the run's state after an epoch; without training state where it need not be resumed."""
        training = {"objective": self.objective.state_dict(), "optimizer": self.optimizer.state_dict()}
        return Checkpoint(
            config=self.config,
            student=self.student.state_dict(),
            epoch=epoch,
            step=self.step,
            history=history,
            targets={"source": "none"} if self.source is None else self.source.record(),
            training=training if resumable else None,
        )

    def restore(self, checkpoint: Checkpoint) -> None:
        """Put the run back to a checkpoint of the same configuration and targets.

        Raises CheckpointError naming what differs.
        """
        mine = {"source": "none"} if self.source is None else self.source.record()
        refuse_other_targets(checkpoint.targets, mine)
        if checkpoint.training is None:
            raise CheckpointError(f"{LATEST} holds no training state", hint="start a new run with another --run-name")
        self.student.load_state_dict(checkpoint.student)
        self.objective.load_state_dict(checkpoint.training["objective"])
        self.optimizer.load_state_dict(checkpoint.training["optimizer"])
        self.step = checkpoint.step

    def _modules(self) -> tuple[Student, Objective]:
        return self.student, self.objective


def train(config: TrainConfig, *, resume: bool = False) -> dict[str, Any]:
    """Run (or resume) a training run and return the content of its `result.json`.

    Raises UsageError, DatasetError, TrainingError, StoreError or CheckpointError; the last epoch's checkpoint stays.
    """
    config = config.resolved()
    device = choose_device(config.device)
    if not resume:
        refuse_taken_name(config)
    latest = find_resumable(config) if resume else None
    records = read_voc(config.voc_root, config.voc_sets, config.limit)
    val_records = read_voc(config.voc_root, config.val_sets)
    test_records = read_voc(config.voc_root, config.test_sets) if config.test_sets else []
    trainer = Trainer(config, records, device, target_source(as_chosen(config, latest), records, device))
    if latest is not None:
        trainer.restore(latest)
    for path in (config.run_dir, config.checkpoint_dir):
        path.mkdir(parents=True, exist_ok=True)
    say(f"run {config.run_name}: {len(records)} images, {trainer.total_steps} steps on {device}")
    return _Run(trainer, val_records, test_records, [] if latest is None else list(latest.history)).finish()


class _Run:
    """Epochs, evaluation and files of a run."""

    def __init__(
        self,
        trainer: Trainer,
        val_records: list[ImageRecord],
        test_records: list[ImageRecord],
        history: list[dict[str, Any]],
    ) -> None:
        self._trainer = trainer
        self._config = trainer.config
        self._val_records = val_records
        self._test_records = test_records
        self._history = history

    def finish(self) -> dict[str, Any]:
        config, trainer = self._config, self._trainer
        with Recorder(config, trainer.step, self._history) as recorder:
            loader = trainer.loader()
            for epoch in range(len(self._history), config.recipe.epochs):
                self._run_epoch(loader, epoch, recorder)
            result = self._result()
            recorder.result(result)
        return result

    def _run_epoch(self, loader: BatchLoader[Any, Any, LoadedBatch], epoch: int, recorder: Recorder) -> None:
        config, trainer = self._config, self._trainer
        losses = trainer.run_epoch(loader, epoch, recorder)
        metrics: dict[str, Any] = {
            "epoch": epoch + 1,
            "step": trainer.step,
            "losses": losses,
            "seconds": trainer.clock.seconds(),
            "val": None,
        }
        if config.evaluate == "every-epoch" or epoch + 1 == config.recipe.epochs:
            metrics["val"] = self._score(self._val_records, "validating").to_json()
            recorder.scalars({"val/mAP": metrics["val"]["mAP"] or 0.0}, trainer.step)
            recorder.scalars(
                {f"val/AP@{iou}": ap or 0.0 for iou, ap in metrics["val"]["per_iou"].items()}, trainer.step
            )
        recorder.scalars({f"epoch/{name}": value for name, value in losses.items()}, trainer.step)
        self._history.append(metrics)
        recorder.epoch(metrics)
        say(_epoch_line(metrics, config.recipe.epochs))
        folder = config.checkpoint_dir
        # The best one first: a kill in between repeats this epoch, where the other way round it would stay unsaved.
        if metrics["val"] is not None and best_epoch(self._history) == epoch + 1:
            save_checkpoint(folder / BEST, trainer.checkpoint(epoch + 1, self._history, resumable=False))
        save_checkpoint(folder / LATEST, trainer.checkpoint(epoch + 1, self._history, resumable=True))
        link_latest(config.checkpoints_dir, folder / LATEST)

    def _score(self, records: list[ImageRecord], what: str) -> EvaluationResult:
        trainer = self._trainer
        workers = training_workers(self._config.workers, trainer.device)
        return score_student(trainer.student, records, trainer.device, workers=workers, what=what)

    def _result(self) -> dict[str, Any]:
        config, trainer = self._config, self._trainer
        best = best_epoch(self._history)
        seconds = {name: sum(m["seconds"][name] for m in self._history) for name in Clock().seconds()}
        test = None
        if self._test_records:
            test = {"last": self._score(self._test_records, "testing").to_json()}
            student = load_checkpoint(config.checkpoint_dir / BEST).build_student(trainer.device)
            workers = training_workers(config.workers, trainer.device)
            scored = score_student(
                student, self._test_records, trainer.device, workers=workers, what="testing the best"
            )
            test["best"] = scored.to_json()
        return {
            "run_name": config.run_name,
            "config": config.model_dump(mode="json"),
            "targets": {"source": "none"} if trainer.source is None else trainer.source.record(),
            "images": {"train": len(trainer.records), "val": len(self._val_records), "test": len(self._test_records)},
            "epochs": config.recipe.epochs,
            "steps": trainer.step,
            "last": self._history[-1],
            "best": self._history[best - 1],
            "test": test,
            "selected_and_reported_on_the_same_images": not config.test_sets,
            "seconds": seconds,
            "seconds_by_epoch": [metrics["seconds"]["training"] for metrics in self._history],
            "data_wait_share": seconds["data_wait"] / max(seconds["training"], 1e-9),
            "device": str(trainer.device),
            "torch": torch.__version__,
        }


def target_source(config: TrainConfig, records: list[ImageRecord], device: torch.device) -> TargetSource | None:
    """Return where the run's teacher targets come from; None for the baseline."""
    distillation = config.distillation
    if distillation.source == "none":
        return None
    if distillation.source == "store":
        return StoredTargets(distillation, records, views_drawn(config.recipe.flip), device, config.residency)
    teachers = build_teachers(
        distillation.teachers, TeacherChoices(distillation.weights, distillation.untrained), device
    )
    return LiveTargets(teachers, distillation, records, device)


def training_workers(asked: int | None, device: torch.device) -> int:
    """Return the number of decoding processes of training and evaluation."""
    if asked is not None:
        return asked
    return min(8, torch.get_num_threads()) if device.type == "cuda" else min(2, torch.get_num_threads())


def best_epoch(history: list[dict[str, Any]]) -> int:
    """Return the epoch (from 1) with the highest validation mAP, the first of equals."""
    scored = [(m["val"]["mAP"] or 0.0, -m["epoch"]) for m in history if m["val"] is not None]
    return int(-max(scored)[1])


def _epoch_line(metrics: dict[str, Any], epochs: int) -> str:
    losses = metrics["losses"]
    shown = [f"{name} {losses[name]:.3f}" for name in ("detection", "feature", "logit") if name in losses]
    text = f"epoch {metrics['epoch']}/{epochs}: {', '.join(shown)}"
    val = metrics["val"]
    if val is not None and val["mAP"] is not None:
        text += f"; val mAP {100 * val['mAP']:.2f}, AP@0.50 {100 * val['per_iou']['0.50']:.2f}"
    return text

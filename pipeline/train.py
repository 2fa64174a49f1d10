"""Stage 2: trains a student, as a baseline, against a teacher cache, or with live teachers.

`train` runs a configuration, or resumes it from its latest checkpoint, also within an epoch; under torchrun all
processes run it together. β = γ = 0 with a store gives the baseline's weights, bit by bit on the CPU.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from cache.image_arrays import StoredImages
from cache.ranks import exchange
from data.records import ImageRecord
from data.voc import read_voc
from evaluation.average_precision import EvaluationResult
from evaluation.detections import Detections
from evaluation.devkit_files import write_devkit
from pipeline.checkpoint import (
    BEST,
    LATEST,
    Checkpoint,
    link_latest,
    load_checkpoint,
    remove_leftovers,
    save_checkpoint,
)
from pipeline.config import TrainConfig
from pipeline.dataset import LoadedBatch, TrainingImages, collate_loaded
from pipeline.device import choose_device
from pipeline.epoch import Epoch
from pipeline.evaluate import score_student
from pipeline.image_cache import ensure_image_store
from pipeline.interruption import Interruption
from pipeline.loading import BatchLoader, load_batches
from pipeline.progress import progress, say
from pipeline.recorder import Recorder, SilentRecorder
from pipeline.resuming import as_chosen, find_resumable, refuse_taken_name
from pipeline.run_pictures import detection_pictures, feature_picture
from pipeline.stored_targets import StoredTargets
from pipeline.targets import LiveTargets, TargetSource
from pipeline.teacher_choice import views_drawn
from pipeline.teachers import TeacherChoices, build_teachers
from pipeline.torch_ranks import joined_ranks, local_device
from pipeline.trainer import Clock, Trainer
from pipeline.training_lines import epoch_lines, step_note
from students.detector import Student

Loader = BatchLoader[Any, Any, LoadedBatch]

# In a run's folder: what the last epoch's student found, in the devkit's format; `val` and, where there is a test set,
# `test` in it.
DETECTIONS = "detections"


def train(config: TrainConfig, *, resume: bool = False) -> dict[str, Any]:
    """Run (or resume) a training run and return the content of its `result.json`.

    Raises UsageError, DatasetError, TrainingError, StoreError or CheckpointError; KeyboardInterrupt where it was
    interrupted, once a checkpoint to resume from was written.
    """
    config = config.resolved()
    device = choose_device(local_device(config.device))
    with joined_ranks(gradients_on=device.type) as ranks:
        if not resume:
            refuse_taken_name(config)
        latest = find_resumable(config) if resume else None
        records = read_voc(config.voc_root, config.voc_sets, config.limit)
        val_records = read_voc(config.voc_root, config.val_sets)
        test_records = read_voc(config.voc_root, config.test_sets) if config.test_sets else []
        source = target_source(as_chosen(config, latest), records, device)
        images = _image_store(config, [*records, *val_records], device)
        if images is not None and source is not None and source.teacher_inputs:
            say("live teachers need the original images: these are still decoded; the cache serves the student's")
        trainer = Trainer(config, records, device, source, ranks, images)
        if latest is not None:
            trainer.restore(latest)
        exchange(ranks, None)  # nobody writes before all have read
        for path in (config.run_dir, config.checkpoint_dir):
            path.mkdir(parents=True, exist_ok=True)
        if ranks.rank == 0:
            remove_leftovers(config.checkpoint_dir)
        of = f" of {ranks.size} processes" if ranks.size > 1 else ""
        say(f"run {config.run_name}: {len(records)} images, {trainer.total_steps} steps on {device}{of}")
        return _Run(trainer, val_records, test_records, latest).finish()


class _Run:
    """Epochs, evaluation and files of a run."""

    def __init__(
        self,
        trainer: Trainer,
        val_records: list[ImageRecord],
        test_records: list[ImageRecord],
        latest: Checkpoint | None,
    ) -> None:
        self._trainer = trainer
        self._config = trainer.config
        self._ranks = trainer.ranks
        self._val_records = val_records
        self._test_records = test_records
        self._history: list[dict[str, Any]] = [] if latest is None else list(latest.history)
        training = {} if latest is None else latest.training or {}
        self._partial: dict[str, Any] | None = training.get("partial")
        self._last_found: Detections | None = None
        self._interruption = Interruption()

    def finish(self) -> dict[str, Any]:
        config, trainer = self._config, self._trainer
        recorder = Recorder(config, trainer.step, self._history) if self._ranks.rank == 0 else SilentRecorder()
        with recorder:
            loader = training_loader(trainer)
            for epoch in range(len(self._history), config.recipe.epochs):
                self._run_epoch(loader, epoch, recorder)
            self._keep_validation_detections()
            result = self._result()
            last, best = result["last"]["val"], result["best"]["val"]
            recorder.hparams(config, {"hparam/mAP": last["mAP"] or 0.0, "hparam/best_mAP": best["mAP"] or 0.0})
            recorder.result(result)
        return result

    def _run_epoch(self, loader: Loader, epoch: int, recorder: Recorder | SilentRecorder) -> None:
        config, trainer = self._config, self._trainer
        done = self._train_epoch(loader, epoch, recorder)
        losses = done.means(self._ranks)
        seconds = trainer.clock.seconds()
        metrics: dict[str, Any] = {
            "epoch": epoch + 1,
            "step": trainer.step,
            "losses": losses,
            "seconds": seconds,
            "val": None,
        }
        if config.evaluate == "every-epoch" or epoch + 1 == config.recipe.epochs:
            # Before what may take long: a kill while the images are scored costs no training.
            self._save(epoch, done.state(trainer.clock, self._ranks))
            self._last_found, scored = self._score(self._val_records, "validating")
            metrics["val"] = scored.to_json()
            recorder.scalars({"val/mAP": metrics["val"]["mAP"] or 0.0}, trainer.step)
            recorder.scalars(
                {f"val/AP@{iou}": ap or 0.0 for iou, ap in metrics["val"]["per_iou"].items()}, trainer.step
            )
            self._draw(recorder)
        recorder.scalars({f"epoch/{name}": value for name, value in losses.items()}, trainer.step)
        recorder.scalars({f"seconds/{name}": value for name, value in seconds.items()}, trainer.step)
        self._history.append(metrics)
        recorder.epoch(metrics)
        recorder.scalars({"epoch/images_per_second": done.images / max(seconds["training"], 1e-9)}, trainer.step)
        say(epoch_lines(metrics, config.recipe.epochs, done.images))
        # The best one first: a kill in between repeats this epoch, where the other way round it would stay unsaved.
        if self._ranks.rank == 0 and metrics["val"] is not None and best_epoch(self._history) == epoch + 1:
            best = trainer.checkpoint(epoch + 1, self._history, resumable=False)
            save_checkpoint(config.checkpoint_dir / BEST, best)
        self._save(epoch + 1, None)

    def _draw(self, recorder: Recorder | SilentRecorder) -> None:
        """Show in TensorBoard what the student finds, and its map beside the teacher's."""
        trainer = self._trainer
        count = self._config.pictures
        if self._ranks.rank > 0 or count == 0:
            return
        for name, image in detection_pictures(trainer.scored, self._val_records, trainer.device, count):
            recorder.picture(f"detections/{name}", image, trainer.step)
        features = feature_picture(trainer)
        if features is not None:
            recorder.picture("features", features, trainer.step)

    def _save(self, epochs: int, partial: dict[str, Any] | None) -> None:
        if self._ranks.rank == 0:
            checkpoint = self._trainer.checkpoint(epochs, self._history, resumable=True, partial=partial)
            save_checkpoint(self._config.checkpoint_dir / LATEST, checkpoint)
            link_latest(self._config.checkpoints_dir, self._config.checkpoint_dir / LATEST)

    def _begin(self, epoch: int) -> Epoch:
        """Return the epoch as far as it has been run: nothing, or what the checkpoint knows of it."""
        trainer, partial = self._trainer, self._partial
        self._partial = None
        trainer.batches.epoch = epoch
        trainer.batches.first_step = 0
        trainer.clock = Clock()
        done = Epoch()
        if partial is not None:
            trainer.batches.first_step = done.steps = partial["steps"]
            done.images = partial["images"]
            seconds = partial["seconds"]
            trainer.clock = Clock(seconds["training"], seconds["data_wait"], seconds["targets"])
            if self._ranks.rank == 0:  # the sums are those of all processes
                done.sums = {n: torch.tensor(value, dtype=torch.float64) for n, value in partial["sums"].items()}
        return done

    def _train_epoch(self, loader: Loader, epoch: int, recorder: Recorder | SilentRecorder) -> Epoch:
        """Take the epoch's steps (epoch: counted from 0).

        Raises TrainingError for a loss or a gradient that is not finite, KeyboardInterrupt between two steps.
        """
        trainer = self._trainer
        done = self._begin(epoch)
        clock = trainer.clock
        steps = trainer.batches.steps()
        following = nullcontext() if trainer.source is None else trainer.source.following(list(trainer.batches))
        what, total = f"epoch {epoch + 1}/{self._config.recipe.epochs}", sum(images for images, _ in steps)
        start, before = time.monotonic(), clock.total
        with self._interruption.deferred(), following, progress(what, max(1, total)) as tick:
            loaded = iter(loader)
            for images, parts in steps:
                waited = time.monotonic()
                batches = [next(loaded) if part else None for part in parts]
                clock.data_wait += time.monotonic() - waited
                losses = trainer.run_step(batches, images)
                done.add(losses, images)
                clock.total = before + time.monotonic() - start
                if (trainer.step - 1) % self._config.report_steps == 0:
                    self._report(losses, recorder)
                tick(images, step_note(losses, clock.seconds(), self._ranks.size))
                self._between_steps(epoch, done, len(trainer.batches))
        trainer.batches.first_step = 0
        return done

    def _between_steps(self, epoch: int, done: Epoch, steps_of_epoch: int) -> None:
        """Save what is due, and end here where the run was interrupted: on all processes at the same step."""
        every = self._config.checkpoint_steps
        interrupted = any(exchange(self._ranks, self._interruption.requested))
        if interrupted or (every is not None and self._trainer.step % every == 0 and done.steps < steps_of_epoch):
            self._save(epoch, done.state(self._trainer.clock, self._ranks))
        if interrupted:
            say(f"saved at step {self._trainer.step}: --resume goes on from there")
            raise KeyboardInterrupt

    def _report(self, losses: dict[str, Tensor], recorder: Recorder | SilentRecorder) -> None:
        trainer = self._trainer
        gathered = exchange(self._ranks, {name: float(value) for name, value in losses.items()})
        total = {name: sum(found.get(name, 0.0) for found in gathered) for name in gathered[0]}
        total["gradient_norm"] = gathered[0]["gradient_norm"]
        recorder.scalars({f"loss/{name}": value for name, value in total.items()}, trainer.step)
        recorder.scalars({"optimisation/learning_rate": trainer.optimizer.param_groups[0]["lr"]}, trainer.step)
        recorder.scalars(trainer.report, trainer.step)

    def _score(
        self, records: Sequence[ImageRecord], what: str, student: Student | None = None
    ) -> tuple[Detections, EvaluationResult]:
        trainer = self._trainer
        images = trainer.images if records is self._val_records else None
        workers = training_workers(self._config.workers, trainer.device)
        return score_student(
            student or trainer.scored,
            records,
            trainer.device,
            workers=workers,
            what=what,
            ranks=self._ranks,
            images=images,
        )

    def _keep_validation_detections(self) -> None:
        """Keep what the last epoch found: what its metrics were computed from."""
        kept = (self._config.run_dir / DETECTIONS / "val").is_dir()
        if self._last_found is None and not exchange(self._ranks, kept)[0]:
            # Killed between the last epoch's checkpoint and here: the same weights find the same again.
            self._last_found, _ = self._score(self._val_records, "validating")
        if self._last_found is not None:
            self._keep_detections(self._last_found, "val")

    def _keep_detections(self, found: Detections, images: str) -> None:
        if self._ranks.rank == 0:
            write_devkit(found, self._config.run_dir / DETECTIONS / images, prefix=f"comp4_det_{images}")

    def _result(self) -> dict[str, Any]:
        config, trainer = self._config, self._trainer
        best = best_epoch(self._history)
        seconds = {name: sum(m["seconds"][name] for m in self._history) for name in Clock().seconds()}
        test = None
        if self._test_records:
            found, scored = self._score(self._test_records, "testing")
            self._keep_detections(found, "test")
            test = {"last": scored.to_json()}
            exchange(self._ranks, None)  # until the first process has written the best
            student = load_checkpoint(config.checkpoint_dir / BEST).build_student(trainer.device)
            test["best"] = self._score(self._test_records, "testing the best", student)[1].to_json()
        return {
            "run_name": config.run_name,
            "config": config.model_dump(mode="json"),
            "targets": {"source": "none"} if trainer.source is None else trainer.source.record(),
            "images": {"train": len(trainer.records), "val": len(self._val_records), "test": len(self._test_records)},
            "epochs": config.recipe.epochs,
            "steps": trainer.step,
            "processes": self._ranks.size,
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


def _image_store(config: TrainConfig, records: list[ImageRecord], device: torch.device) -> StoredImages | None:
    """Return the store of decoded images, whole; None where none was asked for."""
    if config.cache_images is None:
        return None
    sets = (*config.voc_sets, *config.val_sets)
    return ensure_image_store(
        config.cache_images, records, sets, config.limit, training_workers(config.workers, device)
    )


def training_loader(trainer: Trainer) -> Loader:
    """Return the loader of what this process takes of a run's steps, in parts; it follows `trainer.batches`."""
    config, source = trainer.config, trainer.source
    images = TrainingImages(
        trainer.records,
        seed=config.seed,
        jitter_strength=config.recipe.jitter,
        teacher_inputs=() if source is None else source.teacher_inputs,
        digests=None if source is None or source.digests is None else dict(source.digests),
        images=trainer.images,
    )
    workers = training_workers(config.workers, trainer.device)
    return load_batches(images.load, trainer.batches, collate_loaded, workers=workers, device=trainer.device)


def target_source(config: TrainConfig, records: list[ImageRecord], device: torch.device) -> TargetSource | None:
    """Return where the run's teacher targets come from; None for the baseline."""
    distillation = config.distillation
    if distillation.source == "none":
        return None
    if distillation.source == "store":
        return StoredTargets(distillation, records, views_drawn(config.recipe.flip), device, config.residency)
    choices = TeacherChoices(distillation.weights, distillation.untrained)
    teachers = build_teachers(distillation.teachers, choices, device)
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

"""A training run's state, and one step of it.

A step's images may go through the network in parts (`accumulate`) and over several processes: every term is weighted
so that the gradients add up to those of the whole batch. Randomness comes from named streams only (see
`pipeline.randomness`).
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from cache.image_arrays import StoredImages
from cache.ranks import ALONE, Ranks
from data.collate import Batch
from data.errors import CheckpointError, TrainingError, UsageError
from data.records import ImageRecord
from pipeline.checkpoint import LATEST, Checkpoint
from pipeline.config import TrainConfig
from pipeline.data_parallel import detection_shares, mean_over_ranks, sum_gradients
from pipeline.dataset import EpochBatches, LoadedBatch
from pipeline.gradient_shares import gradient_norms, reweigh, shares
from pipeline.objective import GroundTruth, Objective
from pipeline.optimisation import build_optimizer, clip_gradients, learning_rate, set_learning_rate
from pipeline.randomness import stream_seed, torch_stream
from pipeline.resuming import refuse_other_targets
from pipeline.step_batches import StepBatches
from pipeline.targets import TargetSource, TeacherTargets
from students.detector import DETECTION_LOSSES, Student, StudentOutput, build_student

_AMP_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
# Below this scale float16 has overflowed at every step for long: it is the run that explodes.
_SMALLEST_SCALE = 1.0


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
    ranks: Ranks = ALONE
    images: StoredImages | None = None
    student: Student = field(init=False)
    objective: Objective = field(init=False)
    ema: AveragedModel | None = field(init=False, default=None)
    clock: Clock = field(default_factory=Clock)
    report: dict[str, float] = field(default_factory=dict)
    step: int = 0

    def __post_init__(self) -> None:
        config, recipe = self.config, self.config.recipe
        with torch_stream(config.seed, "student-init"):
            student = build_student(config.student)
        over_ranks = mean_over_ranks if self.ranks.size > 1 else None
        self.objective = Objective(config.distillation, self.source, student, config.seed, over_ranks).to(self.device)
        if self.ranks.size > 1 and self.device.type == "cuda" and not config.student.freezes_norms:
            student = nn.SyncBatchNorm.convert_sync_batchnorm(student)  # type: ignore[no-untyped-call]
        if recipe.channels_last:
            student = student.to(memory_format=torch.channels_last)
        self.student = student.to(self.device)
        if recipe.ema is not None:
            self.ema = AveragedModel(self.student, multi_avg_fn=_averaging(recipe.ema))
        if recipe.compile:
            # In place, so that no name in the state dict changes; proposals and boxes have shapes of their own.
            self.student.detector.backbone.body.compile()
            self.student.detector.backbone.neck.compile()
        self.optimizer = build_optimizer(recipe, self.modules)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=recipe.amp == "float16")
        batches = EpochBatches(self.records, recipe.batch_size, recipe.flip, config.seed)
        self.batches = StepBatches(batches, parts=recipe.accumulate, rank=self.ranks.rank, ranks=self.ranks.size)
        self.total_steps = len(self.batches) * recipe.epochs
        if config.distillation.feature_loss == "pkd" and self.ranks.size > 1:
            self._refuse_idle_processes()

    def _refuse_idle_processes(self) -> None:
        # Its moments are those of the whole batch: a process without an image would leave the others waiting.
        batch_size = self.config.recipe.batch_size
        if any(len(keys) < self.ranks.size * self.config.recipe.accumulate for keys in self.batches.whole()):
            raise UsageError(
                f"--feature-loss pkd: expected an image for each of {self.ranks.size} processes in every batch and"
                f" part, found a batch with fewer ({len(self.records)} images in batches of {batch_size})",
                hint="choose another --batch-size, or --limit to a multiple of it",
            )

    @property
    def modules(self) -> tuple[Student, Objective]:
        """What is trained."""
        return self.student, self.objective

    @property
    def scored(self) -> Student:
        """The student that is evaluated and deployed: the averaged one where there is an average."""
        if self.ema is None:
            return self.student
        assert isinstance(self.ema.module, Student)
        return self.ema.module

    def run_step(self, parts: Sequence[LoadedBatch | None], num_images: int) -> dict[str, Tensor]:
        """Take one step and return this process's share of every loss, scalars by name, and the gradient norm.

        parts: of the step's images, None for one without any here.  num_images: of the whole step, over all processes.

        Raises TrainingError for a loss or a gradient that is not finite.
        """
        recipe = self.config.recipe
        set_learning_rate(self.optimizer, learning_rate(recipe, self.step, self.total_steps))
        self.optimizer.zero_grad(set_to_none=True)
        found: dict[str, Tensor] = {}
        norms: dict[str, float] = {}
        reports = self.step % self.config.report_steps == 0
        for number, loaded in enumerate(parts):
            measured = norms if reports and number == 0 else None
            for name, value in self._backward(loaded, num_images, measured).items():
                found[name] = found[name] + value if name in found else value
        sum_gradients(self.modules, self.ranks)
        self.scaler.unscale_(self.optimizer)
        norm = clip_gradients(self.modules, recipe.clip_norm)
        self._refuse_non_finite(norm, found, parts)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.ema is not None:
            self.ema.update_parameters(self.student)
        if reports:
            self._report(norms)
        self.step += 1
        return {**found, "gradient_norm": norm}

    def _backward(
        self, loaded: LoadedBatch | None, num_images: int, norms: dict[str, float] | None
    ) -> dict[str, Tensor]:
        """Add a part's gradients; return its share of every loss, detached.

        norms: where to put what each term pulls at the backbone, None where that is not asked for.
        """
        if loaded is None:
            # The others count, and wait for this process to count too.
            detection_shares(dict.fromkeys(DETECTION_LOSSES, 0), 0, self.ranks, self.device)
            return {}
        with self._autocast():
            output, targets, truth = self._forward(loaded)
            parts = self.objective(output, targets, truth)
        parts = self._shared(parts, output, len(loaded.keys), num_images)
        terms = self.objective.weighted(parts)
        weights = [w for w in self.student.detector.backbone.body.parameters() if w.requires_grad]
        if norms is not None and len(terms) > 1 and weights:
            norms.update(gradient_norms(terms, weights))
        total = torch.stack(list(terms.values())).sum()
        self.scaler.scale(total).backward()  # type: ignore[no-untyped-call]
        return {"total": total.detach(), **{name: value.detach() for name, value in parts.items()}}

    def _shared(self, parts: dict[str, Tensor], output: StudentOutput, here: int, num_images: int) -> dict[str, Tensor]:
        """Return every loss times this part's share of it, so that shares add up to the loss of the whole step.

        What is divided by a count of anchors or proposals is shared by these counts between processes, by images
        between parts.
        """
        names = list(output.normalisers)
        found = detection_shares(output.normalisers, here, self.ranks, self.device)
        of_part = here / (num_images * found[-1])  # images of this part, over all processes, of the step's
        weights = dict(zip(names, (found[:-1] * of_part).float(), strict=True))
        shared = {name: parts[name] * weights[name] for name in names}
        if "region" in parts:  # the mean over this part's proposals, as the classifier's
            shared["region"] = parts["region"] * weights["loss_classifier"]
        by_images = parts.keys() - {*names, "detection", "region"}
        rest = {name: parts[name] * (here / num_images) for name in parts if name in by_images}
        detection = torch.stack([shared[name] for name in names]).sum()
        return {"detection": detection, **shared, **rest}

    def _report(self, norms: dict[str, float]) -> None:
        """Keep what each term pulls at the backbone, and set the weights that are set by that, for the next step on.

        norms: empty for a process that had no image, or where there is one term only.
        """
        if self.config.distillation.kd_weight == "auto":
            reweigh(self.objective, norms, self.ranks, first=self.step == 0)
        if not norms:
            return
        self.report = {f"gradient/{name}": value for name, value in norms.items()}
        self.report |= {f"gradient_share/{name}": value for name, value in shares(norms).items()}
        self.report |= {"weight/beta": float(self.objective.beta), "weight/gamma": float(self.objective.gamma)}

    def losses_against(self, loaded: LoadedBatch, targets: TeacherTargets | None) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the total loss of a batch against given teacher targets, and its unweighted parts by name."""
        output, truth = self._seen(loaded)
        parts: dict[str, Tensor] = self.objective(output, targets, truth)
        return torch.stack(list(self.objective.weighted(parts).values())).sum(), parts

    def _forward(self, loaded: LoadedBatch) -> tuple[StudentOutput, TeacherTargets | None, GroundTruth]:
        asked = time.monotonic()
        targets = None if self.source is None else self.source(loaded)
        self.clock.targets += time.monotonic() - asked
        output, truth = self._seen(loaded)
        return output, targets, truth

    def _seen(self, loaded: LoadedBatch) -> tuple[StudentOutput, GroundTruth]:
        batch: Batch = loaded.batch.to(self.device, non_blocking=True)
        keys = list(zip(loaded.keys, batch.ids, strict=True))

        def seeds(name: str) -> list[int]:
            return [stream_seed(self.config.seed, name, key.epoch, image_id) for key, image_id in keys]

        self.student.seed_sampling(seeds("sampling"))
        images = batch.images_float()
        if self.config.recipe.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        output = self.student(images, list(batch.targets))
        assert isinstance(output, StudentOutput)
        truth = GroundTruth(
            boxes=[target["boxes"] for target in batch.targets],
            labels=[target["labels"] for target in batch.targets],
            mask_seeds=seeds("feature-mask"),
        )
        return output, truth

    def _autocast(self) -> torch.autocast:
        dtype = _AMP_DTYPES.get(self.config.recipe.amp)
        return torch.autocast(self.device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None)

    def _refuse_non_finite(self, norm: Tensor, found: dict[str, Tensor], parts: Sequence[LoadedBatch | None]) -> None:
        # One look at the device a step; float16 overflows now and then, and its scaler then leaves the step out.
        if math.isfinite(norm.item()) or (self.scaler.is_enabled() and self.scaler.get_scale() > _SMALLEST_SCALE):
            return
        named = {name: round(float(value), 4) for name, value in found.items()}
        wrong = "loss" if not all(map(math.isfinite, named.values())) else "gradient norm"
        ids = [image_id for loaded in parts if loaded is not None for image_id in loaded.batch.ids]
        raise TrainingError(
            f"the {wrong} is not finite at step {self.step + 1}: {named}; images {', '.join(ids)}",
            hint="lower --learning-rate, or check the images and targets named; the last checkpoint is as it was",
        )

    def checkpoint(
        self, epoch: int, history: list[dict[str, Any]], *, resumable: bool, partial: dict[str, Any] | None = None
    ) -> Checkpoint:
        """Return the run's state after so many whole epochs; without training state where it need not be resumed.

        partial: what has been of the next epoch, as `Epoch.state` gives it.  What is not resumable holds the weights
        that are scored.
        """
        training = {
            "objective": self.objective.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "ema": None if self.ema is None else self.ema.state_dict(),
            "partial": partial,
            "random_states": _random_states(self.device),
        }
        return Checkpoint(
            config=self.config,
            student=(self.student if resumable else self.scored).state_dict(),
            epoch=epoch,
            step=self.step,
            history=copy.deepcopy(history),
            targets={"source": "none"} if self.source is None else self.source.record(),
            training=training if resumable else None,
        )

    def restore(self, checkpoint: Checkpoint) -> None:
        """Put the run back to a checkpoint of the same configuration and targets.

        Raises CheckpointError naming what differs.
        """
        mine = {"source": "none"} if self.source is None else self.source.record()
        refuse_other_targets(checkpoint.targets, mine)
        state = checkpoint.training
        if state is None:
            raise CheckpointError(f"{LATEST} holds no training state", hint="start a new run with another --run-name")
        self.student.load_state_dict(checkpoint.student)
        self.objective.load_state_dict(state["objective"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state.get("scaler") or {})
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])
        _set_random_states(state.get("random_states"), self.device)
        self.step = checkpoint.step


def _averaging(decay: float) -> Any:
    average: Any = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]
    return average


def _random_states(device: torch.device) -> dict[str, Tensor]:
    # Nothing of ours draws from the global generators; a backbone with dropout does.
    states = {"torch": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def _set_random_states(states: dict[str, Tensor] | None, device: torch.device) -> None:
    if states is None:
        return
    torch.set_rng_state(states["torch"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)

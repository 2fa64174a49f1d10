"""Writes what a run does to `runs/<run_name>/`: TensorBoard events, `config.json`, `metrics.jsonl`, `result.json`."""

from __future__ import annotations

import json
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from pipeline.config import TrainConfig
from pipeline.whole_files import write_text

# What of the distillation TensorBoard lists beside the results.
_KD_SETTINGS = ("alpha", "beta", "gamma", "delta", "temperature", "feature_loss", "feature_tap", "logit_loss")


class Recorder:
    """A run's folder, open for writing. A resumed run appends; steps after the resumed one are dropped from view."""

    def __init__(self, config: TrainConfig, first_step: int, history: list[dict[str, Any]]) -> None:
        self._folder = config.run_dir
        self._folder.mkdir(parents=True, exist_ok=True)
        write_text(self._folder / "config.json", config.model_dump_json(indent=2))
        # A killed run may have written lines beyond its last checkpoint.
        write_text(self._folder / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in history))
        # TensorBoard hides what was recorded from this step on; an epoch's figures stand at its last step.
        self._events = SummaryWriter(str(self._folder), purge_step=first_step + 1 if first_step else None)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._events.close()

    def scalars(self, values: dict[str, float], step: int) -> None:
        """Write scalars to TensorBoard."""
        for name, value in values.items():
            self._events.add_scalar(name, value, step)

    def picture(self, name: str, image: NDArray[np.uint8], step: int) -> None:
        """Write a picture [H, W, 3] to TensorBoard."""
        self._events.add_image(name, image, step, dataformats="HWC")

    def hparams(self, config: TrainConfig, metrics: dict[str, float]) -> None:
        """Write what the run was and came to where TensorBoard compares runs."""
        settings = {
            "backbone": config.student.backbone, "source": config.distillation.source, "seed": config.seed,
            **{f"recipe/{k}": v for k, v in config.recipe.model_dump(mode="json").items() if v is not None},
            **{f"kd/{name}": getattr(config.distillation, name) for name in _KD_SETTINGS},
        }  # fmt: skip
        summaries: Any = hparams
        writer: Any = self._events.file_writer
        for summary in summaries(settings, metrics):
            writer.add_summary(summary)
        self.scalars(metrics, config.recipe.epochs)

    def epoch(self, metrics: dict[str, Any]) -> None:
        """Append an epoch's figures to `metrics.jsonl`."""
        with (self._folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(metrics) + "\n")

    def result(self, result: dict[str, Any]) -> None:
        """Write `result.json`, atomically: a run that has one is finished."""
        write_text(self._folder / "result.json", json.dumps(result, indent=2))


class SilentRecorder:
    """Records nothing: of several processes, the first one does."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    def scalars(self, values: dict[str, float], step: int) -> None:
        """Do nothing."""

    def picture(self, name: str, image: NDArray[np.uint8], step: int) -> None:
        """Do nothing."""

    def hparams(self, config: TrainConfig, metrics: dict[str, float]) -> None:
        """Do nothing."""

    def epoch(self, metrics: dict[str, Any]) -> None:
        """Do nothing."""

    def result(self, result: dict[str, Any]) -> None:
        """Do nothing."""

"""The configuration of a training run: every choice that `config.json` and a checkpoint record. No torch."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from data.errors import UsageError
from students.config import StudentConfig

DEFAULT_STORE = Path("data/teachers.zarr")
DEFAULT_IMAGE_STORE = Path("data/images.zarr")
Residency = Literal["mmap", "ram", "device"]
# Where things are, not what is computed. Stores that were moved are known by the fingerprints of what is read of them.
_PLACES: dict[str, Any] = {
    "run_name": True,
    "runs_dir": True,
    "checkpoints_dir": True,
    "device": True,
    "workers": True,
    "residency": True,
    "cache_images": True,
    "checkpoint_steps": True,
    "pictures": True,
    "voc_root": True,
    "distillation": {"stores", "expect_fingerprints"},
}


class Recipe(BaseModel):
    """How a student is optimised. `None` means: as fits the backbone, filled in by `TrainConfig.resolved`."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    epochs: int = Field(default=20, ge=1)
    """Passes over the training images."""
    batch_size: int = Field(default=8, ge=1)
    """Images a step, over all processes and parts."""
    accumulate: int = Field(default=1, ge=1)
    """Parts in which a step's images go through the network, where they do not fit at once."""
    optimizer: Literal["sgd", "adamw"] | None = None
    """Optimiser: SGD has momentum 0.9. [sgd for convolutional backbones, adamw for ViTs]"""
    learning_rate: float | None = Field(default=None, gt=0)
    """Peak learning rate. [SGD 0.01 at batch 8, scaled linearly with the batch; AdamW 1e-4]"""
    schedule: Literal["cosine", "constant"] = "cosine"
    """What the rate does after the warm-up: fall to zero along a cosine, or stay."""
    weight_decay: float | None = Field(default=None, ge=0)
    """Weight decay; AdamW spares biases and norms. [1e-4 for SGD, 0.05 for AdamW]"""
    warmup_fraction: float = Field(default=0.05, ge=0, le=1)
    """Share of all steps in which the rate rises linearly."""
    warmup_max_steps: int = Field(default=500, ge=0)
    """Most steps in which the rate rises."""
    clip_norm: float = Field(default=10.0, gt=0)
    """Largest gradient norm over all trained weights."""
    flip: float = Field(default=0.5, ge=0, le=1)
    """Probability of the `hflip` view."""
    jitter: float = Field(default=0.0, ge=0, lt=1)
    """Strength of the photometric jitter of the student's image, in [0, 1); live teachers see the image without it."""
    ema: float | None = Field(default=None, gt=0, lt=1)
    """Decay of an exponential moving average of the weights, as 0.999; it is what is scored. [none]"""
    amp: Literal["none", "bfloat16", "float16"] = "none"
    """Mixed precision of backbone and neck; float16 scales the loss."""
    channels_last: bool = False
    """Keep images and convolutions in channels-last order."""
    compile: bool = False
    """Compile backbone and neck (torch.compile)."""


class Distillation(BaseModel):
    """L = α · L_det + β · L_feature + γ · L_logit + δ · L_region, and where the teachers' targets come from."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    source: Literal["none", "store", "live"] = "none"
    """`none`: the baseline; `store`: teacher caches; `live`: teachers run in every step, for comparison."""
    stores: tuple[Path, ...] = ()
    """The teacher caches, joined by image id; where two hold the same, the first one serves it."""
    expect_fingerprints: tuple[str, ...] = ()
    """Fingerprints that the stores must have, in their order: 64 hexadecimal digits, or at least the first twelve."""
    teachers: tuple[str, ...] = ()
    """Live teachers, NAME or KEY=SPEC."""
    weights: dict[str, Path] = Field(default_factory=dict)
    """Local weights of live teachers."""
    untrained: bool = False
    """Live teachers with seeded weights."""
    feature_teacher: str | None = None
    """The teacher whose features are matched; needed only where several have features."""
    logit_teacher: str | None = None
    """The teacher whose logits are matched; needed only where several have logits."""
    alpha: float = Field(default=1.0, ge=0)
    """Weight of the detection losses."""
    beta: float = Field(default=1.0, ge=0)
    """Weight of the feature loss."""
    gamma: float = Field(default=1.0, ge=0)
    """Weight of the logit loss."""
    delta: float = Field(default=0.0, ge=0)
    """Weight of the region loss: class logits of the student's proposals, from stored dense CLIP features."""
    kd_weight: Literal["manual", "auto"] = "manual"
    """`auto` sets the weights of feature and logit loss anew after each report, for a given share of the gradient."""
    kd_share: float = Field(default=0.5, gt=0, lt=1)
    """That share: of the backbone's gradient norm, of each distillation loss over detection and itself."""
    temperature: float = Field(default=2.0, gt=0)
    """T of the softened class distributions."""
    feature_loss: Literal["mse", "cosine", "cwd", "pkd", "mgd", "attention", "fgd"] = "mse"
    """Distance between the adapted student map and the teacher's features."""
    feature_norm: Literal["channel", "none"] = "channel"
    """`channel`: teacher features are standardised per channel over the training images."""
    feature_tap: Literal["backbone", "neck"] = "backbone"
    """Where the student's stride-16 map is taken: before the neck or behind it."""
    logit_loss: Literal["kl", "binary"] = "kl"
    """KL over the classes, or binary KL a class on logits centred over the training images."""
    target_shuffle: int | None = Field(default=None, ge=0)
    """Control arm: another image's targets, by a permutation of this seed. [none]"""
    logit_targets: Literal["teacher", "labels"] = "teacher"
    """Control arm: `labels` trains the auxiliary head on the image's own labels instead of the teacher's logits."""
    region_teacher: str | None = None
    """Whose dense CLIP features give region logits, where several have some."""

    @model_validator(mode="before")
    @classmethod
    def _one_store(cls, data: Any) -> Any:
        # Version 0.1.0 wrote `store`, one path or null.
        if isinstance(data, dict) and "store" in data:
            store = data["store"]
            return {k: v for k, v in data.items() if k != "store"} | {"stores": () if store is None else (store,)}
        return data

    @field_validator("expect_fingerprints")
    @classmethod
    def _are_fingerprints(cls, given: tuple[str, ...]) -> tuple[str, ...]:
        for fingerprint in given:
            if not re.fullmatch(r"[0-9A-Fa-f]{12,64}", fingerprint):
                raise ValueError(f"expected 12 to 64 hexadecimal digits, found {fingerprint!r}")
        return tuple(fingerprint.lower() for fingerprint in given)

    @model_validator(mode="after")
    def _source_is_complete(self) -> Self:
        if self.source == "store" and not self.stores:
            raise ValueError("distillation from a store needs the store's path")
        if self.expect_fingerprints and len(self.expect_fingerprints) != len(self.stores):
            raise ValueError(
                f"expected a fingerprint for each of {len(self.stores)} stores, in their order,"
                f" found {len(self.expect_fingerprints)}"
            )
        if self.source == "live" and not self.teachers:
            raise ValueError("live distillation needs at least one teacher")
        return self


class TrainConfig(BaseModel):
    """One training run, whole: `TrainConfig.model_validate_json(config.json)` repeats it."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    run_name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.\-]{0,127}$")
    """Names `runs/<run_name>/` and `checkpoints/<run_name>/`."""
    voc_root: Path
    """The folder that holds `VOC2007`."""
    voc_sets: tuple[str, ...]
    """Training images."""
    val_sets: tuple[str, ...]
    """Images that select the best epoch."""
    test_sets: tuple[str, ...] = ()
    """Images evaluated once, at the end, with the best and the last weights."""
    limit: int | None = Field(default=None, ge=1)
    """First N training images only; validation is never cut."""
    student: StudentConfig = StudentConfig()
    recipe: Recipe = Recipe()
    distillation: Distillation = Distillation()
    evaluate: Literal["every-epoch", "final-only"] = "every-epoch"
    """When the validation images are scored."""
    seed: int = Field(default=0, ge=0)
    """Key of every random stream."""
    device: str = "auto"
    """`auto`, `cpu`, `cuda` or `cuda:N`."""
    workers: int | None = Field(default=None, ge=0)
    """Decoding processes; by default several beside a GPU, two on the CPU."""
    residency: Residency = "mmap"
    """Where stored targets are: read as needed, all in the page cache, all on the device."""
    cache_images: Path | None = None
    """Keep decoded images in this store, so that no JPEG is decoded twice. [none; data/images.zarr without a path]"""
    checkpoint_steps: int | None = Field(default=None, ge=1)
    """Also save a checkpoint to resume from every so many steps. [at the end of an epoch, and when interrupted]"""
    report_steps: int = Field(default=50, ge=1)
    """Steps between two reports of losses and gradients; with distillation, a report costs about as much as a step."""
    pictures: int = Field(default=4, ge=0)
    """Validation images drawn for TensorBoard whenever they are scored, and the adapted map; 0 for none of it."""
    runs_dir: Path = Path("runs")
    checkpoints_dir: Path = Path("checkpoints")

    def resolved(self) -> Self:
        """Return the configuration with every choice that was left open made, so that it says what was run."""
        recipe = self.recipe
        transformer = self.student.timm_name.startswith(("vit", "deit", "swin", "eva", "beit"))
        optimizer = recipe.optimizer or ("adamw" if transformer else "sgd")
        rate = recipe.learning_rate or (0.01 * recipe.batch_size / 8 if optimizer == "sgd" else 1e-4)
        decay = recipe.weight_decay if recipe.weight_decay is not None else (1e-4 if optimizer == "sgd" else 0.05)
        filled = recipe.model_copy(update={"optimizer": optimizer, "learning_rate": rate, "weight_decay": decay})
        return self.model_copy(update={"recipe": filled})

    def computed(self, *, defaults: bool = True) -> dict[str, Any]:
        """Return what is computed, as JSON, without where things are.

        defaults: with the values that are the defaults; what lacks them stays as it is when an option is added.
        """
        return self.model_dump(mode="json", exclude=_PLACES, exclude_defaults=not defaults)

    @property
    def run_dir(self) -> Path:
        """Where events, `config.json`, `metrics.jsonl` and `result.json` go."""
        return self.runs_dir / self.run_name

    @property
    def checkpoint_dir(self) -> Path:
        """Where the checkpoints go."""
        return self.checkpoints_dir / self.run_name


def usage_error(error: ValidationError) -> UsageError:
    """Return a failed validation in plain words: the field, what was wrong, what was given."""
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    message = first["msg"].removeprefix("Value error, ")
    found = f", found {first['input']!r}" if isinstance(first["input"], int | float | str) else ""
    return UsageError(f"{where}: {message}{'' if 'found' in message else found}" if where else message)

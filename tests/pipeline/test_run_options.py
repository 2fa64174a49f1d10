import json
from pathlib import Path
from typing import Any

import pytest

from data.errors import UsageError
from pipeline.config import TrainConfig
from pipeline.run_options import train_config
from students.config import StudentConfig


def options(folder: Path, **changes: Any) -> dict[str, Any]:
    """What the command line hands over when nothing is given."""
    given: dict[str, Any] = {
        "voc_root": Path("data/VOCdevkit"), "voc_sets": ("2007:train",), "val_sets": ("2007:val",), "test_sets": (),
        "limit": None, "backbone": "resnet18", "backbone_weights": "imagenet", "cached_teachers": (),
        "expect_fingerprints": (), "residency": "mmap",
        "distill": False, "teachers": (), "weights": {}, "untrained": False, "feature_teacher": None,
        "logit_teacher": None, "alpha": 1.0, "beta": 1.0, "gamma": 1.0, "temperature": 2.0, "feature_loss": "mse",
        "feature_norm": "channel", "epochs": 20, "batch_size": 8, "learning_rate": None, "flip": 0.5, "jitter": 0.0,
        "seed": 0, "workers": None, "device": "auto", "evaluate": "every-epoch", "run_name": None,
        "runs_dir": folder / "runs", "checkpoints_dir": folder / "checkpoints",
    }  # fmt: skip
    return {**given, **changes}


def made(folder: Path, **changes: Any) -> TrainConfig:
    return train_config(options(folder, **changes))


STORE = Path("teachers.zarr")


class TestArms:
    def test_neither_store_nor_live_teachers_is_the_baseline(self, tmp_path: Path) -> None:
        config = made(tmp_path)
        assert config.distillation.source == "none"
        assert config.student == StudentConfig()
        assert config.run_name == "resnet18-baseline-s0"

    def test_the_weight_of_the_detection_losses_is_the_baselines_too(self, tmp_path: Path) -> None:
        assert made(tmp_path, alpha=0.5).distillation.alpha == 0.5

    def test_a_store(self, tmp_path: Path) -> None:
        config = made(tmp_path, cached_teachers=(STORE,), beta=0.5, feature_teacher="dino")
        assert (config.distillation.source, config.distillation.stores) == ("store", (STORE,))
        assert (config.distillation.beta, config.distillation.feature_teacher) == (0.5, "dino")
        assert config.run_name == "resnet18-kd-b0.5-g1-s0"

    def test_several_stores(self, tmp_path: Path) -> None:
        config = made(tmp_path, cached_teachers=(STORE, Path("b.zarr")), expect_fingerprints=("0" * 64, "ABCDEF012345"))
        assert config.distillation.stores == (STORE, Path("b.zarr"))
        assert config.distillation.expect_fingerprints == ("0" * 64, "abcdef012345")

    def test_live_teachers_are_the_two_defaults_unless_named(self, tmp_path: Path) -> None:
        live = made(tmp_path, distill=True, gamma=0.0).distillation
        assert (live.source, live.teachers, live.gamma) == ("live", ("dinov2_vits14", "clip_vitb32"), 0.0)
        named = made(tmp_path, distill=True, teachers=("tiny_dino",), weights={"a": Path("w")}, untrained=True)
        assert named.distillation.teachers == ("tiny_dino",)
        assert (named.distillation.weights, named.distillation.untrained) == ({"a": Path("w")}, True)

    def test_with_both_the_store_is_used(self, tmp_path: Path) -> None:
        config = made(tmp_path, cached_teachers=(STORE,), distill=True, teachers=("tiny_dino",))
        assert (config.distillation.source, config.distillation.teachers) == ("store", ())

    @pytest.mark.parametrize(
        "given", [{"teachers": ("tiny_dino",)}, {"weights": {"a": Path("w")}}, {"untrained": True}]
    )
    @pytest.mark.parametrize("stores", [(), (STORE,)])
    def test_live_teachers_that_nobody_asked_for_are_refused(
        self, tmp_path: Path, given: dict[str, Any], stores: tuple[Path, ...]
    ) -> None:
        with pytest.raises(UsageError, match="not asked for\n  next: add --distill"):
            made(tmp_path, cached_teachers=stores, **given)


class TestNames:
    def test_a_free_name_is_found(self, tmp_path: Path) -> None:
        (tmp_path / "runs" / "resnet18-baseline-s0").mkdir(parents=True)
        (tmp_path / "checkpoints" / "resnet18-baseline-s0-2").mkdir(parents=True)
        assert made(tmp_path).run_name == "resnet18-baseline-s0-3"

    def test_any_backbones_name_can_be_a_folders(self, tmp_path: Path) -> None:
        assert made(tmp_path, backbone="timm:regnety_002.pycls_in1k").run_name.startswith(
            "timm-regnety_002.pycls_in1k-"
        )

    @pytest.mark.parametrize("name", ["../x", "a/b", ".hidden", "", "x" * 129, "a b", "a\n"])
    def test_names_that_are_paths_are_refused(self, tmp_path: Path, name: str) -> None:
        if name == "":
            return  # as if none was given
        with pytest.raises(UsageError, match="run_name"):
            made(tmp_path, run_name=name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"beta": -1.0}, "beta: Input should be greater than or equal to 0, found -1.0"),
        ({"beta": -1.0, "cached_teachers": (STORE,)}, "beta: .*, found -1.0"),
        ({"gamma": -0.1, "distill": True}, "gamma: .*found -0.1"),
        ({"alpha": float("nan")}, "alpha: "),
        ({"temperature": 0.0}, "temperature: .*greater than 0, found 0.0"),
        ({"epochs": 0}, "epochs: .*found 0"),
        ({"batch_size": -4}, "batch_size: .*found -4"),
        ({"learning_rate": 0.0}, "learning_rate: .*found 0.0"),
        ({"flip": 1.5}, "flip: .*less than or equal to 1, found 1.5"),
        ({"jitter": 1.0}, "jitter: .*less than 1, found 1.0"),
        ({"seed": -1}, "seed: .*found -1"),
        ({"backbone": "resnet81"}, "backbone: expected resnet18, mobilenet_v3_small, vit_tiny or timm:NAME"),
        ({"backbone_weights": ""}, "backbone_weights: "),
        ({"residency": "tape"}, "residency: Input should be 'mmap', 'ram' or 'device', found 'tape'"),
        (
            {"cached_teachers": (STORE,), "expect_fingerprints": ("abc",)},
            "expect_fingerprints: expected 12 to 64 hexadecimal digits, found 'abc'",
        ),
        (
            {"cached_teachers": (STORE,), "expect_fingerprints": ("z" * 12,)},
            "expect_fingerprints: expected 12 to 64 hexadecimal digits, found 'zzzzzzzzzzzz'",
        ),
        (
            {"cached_teachers": (STORE, STORE), "expect_fingerprints": ("0" * 12,)},
            "expected a fingerprint for each of 2 stores, in their order, found 1",
        ),
        ({"expect_fingerprints": ("0" * 12,)}, "expected a fingerprint for each of 0 stores"),
    ],
    ids=str,
)
def test_values_that_cannot_be_name_their_field(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        made(tmp_path, **change)
    assert caught.value.exit_code == 2


def test_a_configuration_reads_back_from_its_json(tmp_path: Path) -> None:
    config = made(tmp_path, cached_teachers=(STORE,), limit=3, workers=2).resolved()
    assert TrainConfig.model_validate_json(config.model_dump_json(indent=2)) == config


@pytest.mark.parametrize(("written", "stores"), [("teachers.zarr", (STORE,)), (None, ())], ids=str)
def test_a_configuration_of_version_0_1_0_is_read(
    tmp_path: Path, written: str | None, stores: tuple[Path, ...]
) -> None:
    """It knew one store, and nothing of fingerprints and residency."""
    config = made(tmp_path, cached_teachers=stores)
    old = json.loads(config.model_dump_json())
    del old["distillation"]["stores"], old["distillation"]["expect_fingerprints"], old["residency"]
    old["distillation"]["store"] = written
    assert TrainConfig.model_validate(old) == config

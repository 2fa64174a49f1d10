"""`train --config FILE`: options from a file, of which those on the command line win."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

import cli
from pipeline.config import Distillation, Recipe
from pipeline.train_options import training_options
from tests.command_line import SHORT_RUN, run


def given(tmp_path: Path, content: Any, *arguments: str) -> dict[str, Any]:
    """What the verb is handed."""
    path = tmp_path / "run.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    command = cli.cli.commands["train"]
    params: dict[str, Any] = command.make_context("train", ["--config", str(path), *arguments]).params
    return params


def test_the_files_options_are_defaults(tmp_path: Path) -> None:
    content = {
        "epochs": 3, "voc-set": ["2007:train", "2012:train"], "beta": 5, "channels-last": True, "ema": 0.999,
        "cached_teachers": "a.zarr", "evaluate": "final-only", "feature_loss": "cwd",
    }  # fmt: skip
    params = given(tmp_path, content, "--beta", "2")
    assert (params["epochs"], params["beta"], params["ema"], params["feature_loss"]) == (3, 2.0, 0.999, "cwd")
    assert params["voc_sets"] == ("2007:train", "2012:train")
    assert params["channels_last"] is True
    assert params["cached_teachers"] == (Path("a.zarr"),)
    assert params["evaluate"] == "final-only"
    assert params["seed"] == 0


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"epoch": 3}, "no option epoch\n  next: did you mean epochs?"),
        ({"epochs": "many"}, "'many' is not a valid int"),
        ({"epochs": {"a": 1}}, "epochs: expected one value, found {'a': 1}"),
        ({"feature-loss": "mae"}, "'mae' is not one of"),
        ("- epochs", "expected option: value, a line each, found list"),
        ("epochs: [", "no YAML"),
    ],
    ids=str,
)
def test_what_cannot_be_meant_exits_2(devkit: Path, tmp_path: Path, content: Any, said: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    done = run("train", "--voc-root", devkit, "--config", path)
    assert done.code == 2
    assert said in done.err


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    done = run("train", "--config", tmp_path / "none.yaml")
    assert (done.code, "none.yaml: cannot be read (No such file or directory)" in done.err) == (2, True)


def test_a_run_from_a_file_records_what_it_used(devkit: Path, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    places = {"runs-dir": str(tmp_path / "runs"), "checkpoints-dir": str(tmp_path / "checkpoints")}
    path.write_text(
        yaml.safe_dump({"limit": 2, "run-name": "r", "weight-decay": 0.5, "eval_final_only": True, **places})
    )
    done = run("train", "--voc-root", devkit, "--config", path, *SHORT_RUN)
    assert done.code == 2  # the flag's own name is `evaluate`
    path.write_text(
        yaml.safe_dump({"limit": 2, "run-name": "r", "weight-decay": 0.5, "evaluate": "final-only", **places})
    )
    done = run("train", "--voc-root", devkit, "--config", path, *SHORT_RUN)
    assert done.code == 0, done.err
    config = json.loads((tmp_path / "runs/r/config.json").read_text())
    assert (config["recipe"]["weight_decay"], config["evaluate"], config["limit"]) == (0.5, "final-only", 2)


def test_every_setting_of_recipe_and_distillation_is_an_option() -> None:
    names = {option.name for option in training_options()}
    by_hand = {"source", "stores"}  # what --distill and --cached-teachers say
    assert set(Recipe.model_fields) <= names
    assert set(Distillation.model_fields) - by_hand <= names

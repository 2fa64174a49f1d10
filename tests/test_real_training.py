"""One epoch of every combination of student and distillation on real Pascal VOC images, through the command line."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from pipeline.extract import extract
from tests.command_line import run
from tests.pipeline.small_runs import extraction

pytestmark = [pytest.mark.slow, pytest.mark.voc]

STUDENTS = ("resnet18", "mobilenet_v3_small", "vit_tiny")
# Weights of the losses, and which of them a run must tell of.
ARMS: dict[str, tuple[tuple[str, ...], set[str]]] = {
    "none": ((), set()),
    "feature": (("--gamma", "0"), {"feature"}),
    "logit": (("--beta", "0"), {"logit"}),
    "both": ((), {"feature", "logit"}),
}
SETS = ("--voc-set", "2007:minitrain", "--val-set", "2007:minival")


@pytest.fixture(scope="module")
def targets(voc_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of the 64 training images, by the embedded teachers."""
    folder = tmp_path_factory.mktemp("targets")
    return extract(
        extraction(voc_root, folder / "s.zarr", voc_sets=("2007:minitrain",), batch_size=8, shard_samples=64)
    ).store


@pytest.mark.parametrize("arm", ARMS)
@pytest.mark.parametrize("backbone", STUDENTS)
def test_an_epoch_is_trained_and_scored(voc_root: Path, targets: Path, tmp_path: Path, backbone: str, arm: str) -> None:
    weights, told = ARMS[arm]
    source = () if arm == "none" else ("--cached-teachers", targets)
    done = run(
        "train", "--voc-root", voc_root, *SETS, "--backbone", backbone, "--backbone-weights", "none", *source, *weights,
        "--epochs", "1", "--batch-size", "8", "--device", "cpu", "--workers", "0", "--pictures", "0", "--json",
        "--runs-dir", tmp_path / "runs", "--checkpoints-dir", tmp_path / "checkpoints",
    )  # fmt: skip
    assert done.code == 0, done.err
    result = json.loads(done.out)
    assert (result["images"]["train"], result["images"]["val"], result["steps"]) == (64, 32, 8)
    losses = result["last"]["losses"]
    assert {"feature", "logit"} & losses.keys() == told
    assert all(math.isfinite(value) for value in losses.values())
    assert result["last"]["val"]["mAP"] is not None

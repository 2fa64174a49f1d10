"""What happens in a process that trains from a store: no teacher is loaded, and no thread keeps denormals."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
# Threads that are there before keep denormals, so the flushing is looked at in a new process with two threads.
SCRIPT = """
import json, sys
from pathlib import Path
import torch
from pipeline.train import train
from tests.pipeline.small_runs import from_store, small_run

torch.set_num_threads(2)
kept = torch.full((4,), 1e-39).mul(0.5).count_nonzero().item()
devkit, store, folder = map(Path, sys.argv[1:])
result = train(small_run(devkit, folder, limit=2, distillation=from_store(store)))
large = torch.full((1 << 21,), 1e-39).mul(0.5).count_nonzero().item()
product = (torch.full((512, 512), 1e-20) @ torch.full((512, 512), 1e-21)).count_nonzero().item()
print(json.dumps({"modules": sorted(sys.modules), "steps": result["steps"], "denormals": [kept, large, product]}))
"""


@pytest.fixture(scope="module")
def said(devkit: Path, store: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, devkit, store, tmp_path_factory.mktemp("process")],
        # Threads that wait sleep: beside other tests on the same cores, spinning ones take many times as long.
        env={**os.environ, "OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "passive", "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)


def test_training_from_a_store_loads_no_teacher(said: Any) -> None:
    assert said["steps"] == 1
    loaded = {name.partition(".")[0] for name in said["modules"]}
    assert not loaded & {"transformers", "open_clip"}
    assert not {"features.dinov2", "features.clip", "features.tiny"} & set(said["modules"])


def test_denormals_are_flushed_on_every_thread(said: Any) -> None:
    assert said["denormals"] == [4, 0, 0]

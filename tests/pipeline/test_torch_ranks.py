"""Several processes of torchrun, over gloo: the store must be the one that a single process writes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from data.synthetic import make_devkit
from pipeline.extract import extract
from pipeline.inspection import inspect_store
from pipeline.torch_ranks import local_device
from tests.pipeline.small_runs import extraction, files_of

ROOT = Path(__file__).parents[2]
TORCHRUN = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint",
            "localhost:0")  # fmt: skip
OPTIONS = ("--teacher", "tiny_dino", "--teacher", "tiny_clip", "--shard-samples", "4", "--batch-size", "3",
           "--workers", "0", "--device", "cpu")  # fmt: skip


@contextmanager
def started(voc_root: Path, out: Path, *more: str) -> Iterator[subprocess.Popen[str]]:
    """Start two processes that extract; whatever is left of them in the end is killed."""
    command = [sys.executable, *TORCHRUN, "cli.py", "extract-teachers", "--voc-root", str(voc_root), "--out", str(out)]
    with subprocess.Popen(
        [*command, *OPTIONS, *more],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    ) as job:
        try:
            yield job
        finally:
            with suppress(ProcessLookupError):
                os.killpg(job.pid, signal.SIGKILL)


def test_two_processes_write_the_store_of_one(devkit: Path, store: Path, tmp_path: Path) -> None:
    with started(devkit, tmp_path / "two.zarr") as job:
        out, err = job.communicate(timeout=120)
    assert job.returncode == 0, err
    assert files_of(tmp_path / "two.zarr") == files_of(store)
    assert out.count("next: python cli.py train") == 1  # the first one tells, and only that one
    assert "48 targets computed" in out  # 12 images × 2 teachers × 2 views, of both ranks
    assert not list(tmp_path.rglob("ledger-*"))


@pytest.mark.slow
def test_what_the_first_process_refuses_ends_both_with_its_message(devkit: Path, store: Path) -> None:
    before = files_of(store)
    with started(devkit, store, "--limit", "6") as job:
        _, err = job.communicate(timeout=120)
    assert job.returncode != 0
    assert "error: " in err
    assert "dataset.samples: stored 2007:train: 12 images" in err
    assert "exitcode  : 3" in err or "exitcode : 3" in err
    assert files_of(store) == before


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_process_costs_nothing_that_was_committed(tmp_path: Path, killed: int) -> None:
    """One of two is killed at work; one process goes on, then two again finish: the bytes of an undisturbed store."""
    devkit = make_devkit(tmp_path / "devkit", num_train=120, num_val=0, seed=3)
    whole = extract(extraction(devkit, tmp_path / "whole.zarr")).store
    out = tmp_path / "killed.zarr"
    for _ in range(2):
        before = num_commits(out)
        with started(devkit, out) as job:
            wait_for_shards(out, job, before)
            os.kill(workers_of(job.pid)[killed], signal.SIGKILL)
            _, err = job.communicate(timeout=120)
        assert job.returncode != 0, err
        assert inspect_store(out, verify=True)["status"] == "incomplete"
    with started(devkit, out) as job:
        _, err = job.communicate(timeout=120)
    assert job.returncode == 0, err
    assert files_of(out) == files_of(whole)


def wait_for_shards(out: Path, job: subprocess.Popen[str], before: int) -> None:
    """Wait until this job has committed something beyond the shards that were there before."""
    deadline = time.monotonic() + 60
    while num_commits(out) < before + 4 and time.monotonic() < deadline:
        assert job.poll() is None, job.communicate()
        time.sleep(0.01)


def num_commits(out: Path) -> int:
    return sum(path.read_bytes().count(b"\n") for path in out.rglob("ledger*.jsonl"))


def workers_of(pid: int) -> list[int]:
    """Return the process ids of torchrun's workers by their rank."""
    ranks = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it may end while we look
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            entries = (folder / "environ").read_bytes().split(b"\0")
            rank = next((entry[5:] for entry in entries if entry.startswith(b"RANK=")), None)
            if int(fields[1]) == pid and rank is not None:
                ranks[int(rank)] = int(folder.name)
    return [ranks[rank] for rank in sorted(ranks)]


def test_each_process_takes_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    monkeypatch.setenv("LOCAL_RANK", "5")
    assert local_device("auto") == local_device("cuda") == "cuda:1"
    assert local_device("cpu") == "cpu"
    assert local_device("cuda:0") == "cuda:0"
    monkeypatch.delenv("LOCAL_RANK")
    assert local_device("auto") == "auto"

"""Fixtures that more than one package's tests use, and settings that make every run the same."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

# Before torch is imported anywhere: one thread is as fast for tensors this small, and sums come out the same.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")

import hypothesis
import pytest

from data.synthetic import make_devkit

hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None, max_examples=60)
hypothesis.settings.load_profile("repeatable")


@pytest.fixture(autouse=True)
def _denormals_as_they_were() -> Iterator[None]:
    """Undo what `choose_device` sets for the whole process: hypothesis refuses to draw floats without denormals."""
    yield
    if "torch" in sys.modules:
        sys.modules["torch"].set_flush_denormal(False)


REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def devkit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A synthetic `VOCdevkit` with 12 train and 6 val images. Shared by all tests: read only."""
    return make_devkit(tmp_path_factory.mktemp("synthetic") / "VOCdevkit", num_train=12, num_val=6, seed=7)


@pytest.fixture(scope="session")
def voc_root() -> Path:
    """The folder that holds the real VOC2007, or a skipped test."""
    root = Path(os.environ.get("VOC_ROOT", REPOSITORY.parent / "shared" / "voc" / "VOCdevkit"))
    if not (root / "VOC2007" / "JPEGImages").is_dir():
        pytest.skip(f"no VOC2007 images below {root}: name their folder with VOC_ROOT")
    return root


@pytest.fixture
def unreachable_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty local cache (its folder is returned) and a hub behind a closed port."""
    from huggingface_hub import constants

    cache = tmp_path / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    return cache

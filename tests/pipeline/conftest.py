"""Stores that the tiny teachers made of the synthetic training images, and their records."""

from pathlib import Path

import pytest

from data.records import ImageRecord
from data.voc import read_voc
from pipeline.extract import extract
from tests.pipeline.small_runs import extraction


@pytest.fixture(scope="session")
def store(devkit: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete float16 store of both tiny teachers and views. Shared by all tests: read only."""
    return extract(extraction(devkit, tmp_path_factory.mktemp("extracted") / "half.zarr")).store


@pytest.fixture(scope="session")
def store32(devkit: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same store in float32."""
    folder = tmp_path_factory.mktemp("extracted")
    return extract(extraction(devkit, folder / "single.zarr", dtype="float32")).store


@pytest.fixture(scope="session")
def records(devkit: Path) -> list[ImageRecord]:
    """The twelve training images."""
    return read_voc(devkit, ("2007:train",))

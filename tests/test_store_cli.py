"""A store's life through the command line: damaged and repaired, kept as int8, converted, joined."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from pipeline.extract import extract
from tests.command_line import SHORT_RUN, Done, run
from tests.pipeline.small_runs import extraction, files_of


@pytest.fixture(scope="module")
def whole(devkit: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete store of eight images in shards of four. Shared: read only."""
    return extract(extraction(devkit, tmp_path_factory.mktemp("life") / "teachers.zarr", limit=8)).store


@pytest.fixture
def store(whole: Path, tmp_path: Path) -> Path:
    """A copy of the store, to damage."""
    return Path(shutil.copytree(whole, tmp_path / "teachers.zarr"))


def extract_again(devkit: Path, store: Path, *options: str) -> Done:
    config = extraction(devkit, store)
    teachers = [word for name in config.teachers for word in ("--teacher", name)]
    given = ("--limit", "8", "--shard-samples", str(config.shard_samples), "--device", "cpu", "--workers", "0")
    return run("extract-teachers", "--voc-root", devkit, "--out", store, *teachers, *given, *options)


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 4
    path.write_bytes(data)


class TestRepair:
    def test_damage_is_found_named_and_repaired(self, devkit: Path, whole: Path, store: Path) -> None:
        flip(store / "tiny_dino/hflip/features/c/1/0/0/0", 1_000)
        found = run("inspect-cache", store, "--verify", "--json")
        assert found.code == 3
        (problem,) = json.loads(found.out)["problems"]
        assert (problem["array"], problem["shard"], problem["sample"]) == ("tiny_dino/hflip/features", 1, 4)
        assert "--repair" in run("inspect-cache", store, "--verify").out

        done = extract_again(devkit, store, "--repair")
        assert done.code == 0, done.err
        assert "repaired tiny_dino/hflip/features, shard 1: the same bytes" in done.out
        assert run("inspect-cache", store, "--verify").code == 0
        assert files_of(store) == files_of(whole)

    def test_without_repair_a_broken_file_stops_the_resume_and_names_it(self, devkit: Path, store: Path) -> None:
        (store / "tiny_dino/hflip/features/c/1/0/0/0").write_bytes(b"")
        done = extract_again(devkit, store)
        assert done.code == 3
        assert "tiny_dino/hflip/features: shard 1: expected" in done.err
        assert "--repair" in done.err

    def test_repairing_a_sound_store_changes_nothing(self, devkit: Path, whole: Path, store: Path) -> None:
        done = extract_again(devkit, store, "--repair")
        assert (done.code, files_of(store)) == (0, files_of(whole)), done.err
        assert "repaired" not in done.out


@pytest.fixture(scope="module")
def int8(devkit: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same store with features as int8, made by the command line."""
    store = tmp_path_factory.mktemp("int8") / "teachers.zarr"
    done = extract_again(devkit, store, "--dtype", "int8")
    assert done.code == 0, done.err
    return store


class TestInt8:
    def test_it_is_complete_and_says_how_close_it_is(self, int8: Path) -> None:
        summary = json.loads(run("inspect-cache", int8, "--verify", "--json").out)
        assert summary["status"] == "complete"
        (features,) = (a for a in summary["arrays"] if a["path"] == "tiny_dino/original/features")
        assert features["dtype"] == "int8"
        assert features["fidelity"]["cosine_p01"] > 0.995

    def test_a_student_trains_on_it_without_a_flag(self, devkit: Path, int8: Path, tmp_path: Path) -> None:
        places = ("--runs-dir", tmp_path / "runs", "--checkpoints-dir", tmp_path / "checkpoints")
        arguments = ("train", "--voc-root", devkit, "--limit", "4", *SHORT_RUN, *places, "--json", "--cached-teachers")
        done = run(*arguments, int8)
        assert done.code == 0, done.err
        assert json.loads(done.out)["last"]["losses"]["feature"] > 0

    def test_it_does_not_resume_as_float16(self, devkit: Path, int8: Path) -> None:
        done = extract_again(devkit, int8)
        assert done.code == 3
        assert "features.dtype: stored int8, found float16" in done.err

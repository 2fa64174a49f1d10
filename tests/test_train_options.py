"""Options of `train` that concern stores: several of them, the ones that were meant, where targets are held."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cache.reader import TeacherStore
from pipeline.extract import extract
from tests.command_line import SHORT_RUN, Done, run
from tests.pipeline.small_runs import extraction


@pytest.fixture(scope="module")
def stores(devkit: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The first two training images: features in one store, logits in the other."""
    folder = tmp_path_factory.mktemp("parts")
    return [
        extract(extraction(devkit, folder / f"{name}.zarr", teachers=(name,), limit=2)).store
        for name in ("tiny_dino", "tiny_clip")
    ]


def train(devkit: Path, folder: Path, *more: str | Path) -> Done:
    places = ("--runs-dir", folder / "runs", "--checkpoints-dir", folder / "checkpoints")
    return run("train", "--voc-root", devkit, "--limit", "2", *SHORT_RUN, *places, "--eval-final-only", *more)


def test_several_stores_are_joined_and_known_by_their_fingerprints(
    devkit: Path, stores: list[Path], tmp_path: Path
) -> None:
    prints = [TeacherStore(path).catalog.fingerprint for path in stores]
    given = [word for path in stores for word in ("--cached-teachers", path)]
    expected = ["--expect-fingerprint", prints[0], "--expect-fingerprint", prints[1][:12]]
    done = train(devkit, tmp_path, *given, *expected, "--residency", "ram", "--json")
    assert done.code == 0, done.err
    said = json.loads(done.out)
    assert [(s["store"], s["fingerprint"]) for s in said["targets"]["stores"]] == [
        (str(path), fingerprint) for path, fingerprint in zip(stores, prints, strict=True)
    ]
    assert said["config"]["residency"] == "ram"
    assert "reading targets into memory" in done.err


def test_other_stores_than_those_that_were_meant_exit_3(devkit: Path, stores: list[Path], tmp_path: Path) -> None:
    prints = [TeacherStore(path).catalog.fingerprint for path in stores]
    done = train(devkit, tmp_path, "--cached-teachers", stores[0], "--gamma", "0", "--expect-fingerprint", prints[1])
    assert done.code == 3
    assert f"{stores[0]}: expected fingerprint {prints[1]}, found {prints[0]}" in done.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--expect-fingerprint", "0123456789ab"], "a fingerprint for each of 1 stores, in their order, found 2"),
        (["--expect-fingerprint", "cafe"], "expected 12 to 64 hexadecimal digits, found 'cafe'"),
        (["--residency", "tape"], "'tape' is not one of 'mmap', 'ram', 'device'"),
    ],
    ids=["too many", "too short", "unknown residency"],
)
def test_what_cannot_be_meant_exits_2(
    devkit: Path, stores: list[Path], tmp_path: Path, options: list[str], said: str
) -> None:
    first = ["--cached-teachers", stores[0], "--expect-fingerprint", "0" * 12]
    done = train(devkit, tmp_path, *first, *options)
    assert done.code == 2
    assert said in done.err
    assert list(tmp_path.iterdir()) == []

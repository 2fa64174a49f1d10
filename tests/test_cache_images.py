"""`train --cache-images`: made by the first run, read by every later one, with the same result."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import data.images
from data.synthetic import make_devkit
from tests.command_line import SHORT_RUN, run


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two images to train on and one to score."""
    return make_devkit(tmp_path_factory.mktemp("few") / "VOCdevkit", num_train=2, num_val=1, seed=7)


def test_the_second_run_decodes_nothing_and_ends_alike(
    few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    common = ("train", "--voc-root", few, *SHORT_RUN, "--json")

    def result(name: str, *more: str | Path) -> dict[str, object]:
        places = ("--runs-dir", tmp_path / name / "runs", "--checkpoints-dir", tmp_path / name / "checkpoints")
        done = run(*common, *places, *more)
        assert done.code == 0, done.err
        last: dict[str, object] = json.loads(done.out)["last"]
        last.pop("seconds")
        return last

    plain = result("plain")
    store = tmp_path / "images.zarr"
    assert result("first", "--cache-images", store) == plain

    def refused(*_: object, **__: object) -> None:
        raise AssertionError("an image was decoded")

    for module in ("data.images", "pipeline.dataset", "data.sample"):
        monkeypatch.setattr(f"{module}.decode_image", refused, raising=False)
    assert data.images.decode_image is refused
    assert result("second", "--cache-images", store) == plain
    done = run("inspect-cache", store, "--verify")
    assert (done.code, "An image store" in done.out) == (0, True)


def test_a_changed_image_is_refused_by_its_name(few: Path, tmp_path: Path) -> None:
    own = Path(shutil.copytree(few, tmp_path / "VOCdevkit"))
    options = ("--voc-root", own, *SHORT_RUN, "--cache-images", tmp_path / "images.zarr")
    places = ("--runs-dir", tmp_path / "runs", "--checkpoints-dir", tmp_path / "checkpoints")
    assert run("train", *options, *places).code == 0
    image = own / "VOC2007/JPEGImages/000001.jpg"
    image.write_bytes(image.read_bytes() + b"\0")
    done = run("train", *options, *places)
    assert done.code == 3
    assert "VOC2007/000001" in done.err

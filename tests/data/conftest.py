from pathlib import Path

import pytest

from tests.data.tiny_devkit import TinyDevkit


@pytest.fixture
def tiny(tmp_path: Path) -> TinyDevkit:
    """A devkit with one sound image, 000001, in the set `2007:train`."""
    devkit = TinyDevkit(tmp_path / "VOCdevkit")
    devkit.add("000001")
    devkit.list("train", ["000001"])
    return devkit

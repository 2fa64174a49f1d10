"""Readers of other makers open a store: tensorstore and xarray. zarr-python is in test_referee.py."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

if TYPE_CHECKING:
    from tests.cache.conftest import TinyStores

FEATURES, LOGITS = "dino/original/features", "clip/hflip/logits"
# Each in a process of its own: tensorstore's threads do not outlive a fork, and other tests fork.
TENSORSTORE = """
import sys
import numpy as np
import tensorstore

spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": sys.argv[1]}}
np.save(sys.argv[2], tensorstore.open(spec, read=True).result().read().result())
"""
XARRAY = """
import sys
import numpy as np
import xarray

group, _, name = sys.argv[1].rpartition("/")
store, teacher, view = group.rsplit("/", 2)
opened = xarray.open_zarr(store, group=f"{teacher}/{view}", consolidated=False, mask_and_scale=False)
expected = {"features": ("sample", "row", "column", "channel"), "logits": ("sample", "class")}
assert opened[name].dims == expected[name], opened[name].dims
np.save(sys.argv[2], opened[name].to_numpy())
"""


@pytest.mark.parametrize("script", [TENSORSTORE, XARRAY], ids=["tensorstore", "xarray"])
@pytest.mark.parametrize(("array", "dtype"), [(FEATURES, "<f2"), (LOGITS, "<f4")])
def test_another_reader_sees_every_value(
    stores: TinyStores, whole_store: Path, tmp_path: Path, script: str, array: str, dtype: str
) -> None:
    out = tmp_path / "values.npy"
    command = [sys.executable, "-W", "error", "-c", script, str(whole_store / array), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    teacher, view, name = array.split("/")
    np.testing.assert_array_equal(np.load(out), stores.values(teacher, view, name, range(7)).astype(dtype))


@pytest.mark.parametrize("script", [TENSORSTORE, XARRAY], ids=["tensorstore", "xarray"])
def test_another_reader_sees_int8_features(stores: TinyStores, tmp_path: Path, script: str) -> None:
    store = stores.build(stores.plan(teachers=["dino"], feature_dtype="int8"))
    out = tmp_path / "values.npy"
    command = [sys.executable, "-c", script, str(store / FEATURES), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    found = np.load(out)
    assert found.dtype == np.int8
    values = stores.values("dino", "original", "features", range(7))
    strongest = np.abs(values).reshape(7, -1).argmax(axis=1)
    assert (np.sign(found.reshape(7, -1)) == np.sign(values.reshape(7, -1)))[np.arange(7), strongest].all()

"""Weights on their way into a network: from a file, from the hub's cache, or from a seed.

A network is built on the meta device, so that nothing is initialised only to be overwritten, and filled by
`load_weights`.
"""

from __future__ import annotations

import json
import math
import pickle
import re
import warnings
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from data.errors import TeacherError
from data.hub import fetch

_SEED = 20070615
# The usual standard deviation of an untrained vision transformer's matrices.
_INITIAL_STD = 0.02
_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt")


def locate_weights(name: str, hub_id: str, filenames: Sequence[str], weights: Path | None) -> tuple[Path, str]:
    """Return a teacher's weights file and, in words, where it came from.

    weights: a file, or a folder that holds one of `filenames`; None for the hub and its local cache.

    Raises TeacherError where there is no such file, WeightsError where the hub cannot give it.
    """
    if weights is None:
        ways_on = f"give a local copy with --weights {name}=PATH, or try things out with --untrained"
        path = fetch(name, hub_id, filenames, ways_on=ways_on)
        return path, f"{hub_id} {path.name} at revision {path.parent.name}"
    candidates = [weights / filename for filename in filenames] if weights.is_dir() else [weights]
    for path in candidates:
        if path.is_file():
            return path, str(path)
    what = f"expected {' or '.join(filenames)} in the folder, found neither" if weights.is_dir() else "no such file"
    raise TeacherError(f"{weights}: {what}", hint=f"give the weights of {name} as --weights {name}=PATH")


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a .safetensors, .pth, .pt, .bin or .ckpt file, by name, on the CPU.

    An index of shards (model.safetensors.index.json) gives the tensors of all the files in its folder that it names.
    Nothing but tensors is unpickled. A training checkpoint's `state_dict` entry is taken out of it.

    Raises TeacherError for a file that cannot be read as one.
    """
    return _read_shards(path) if path.name.endswith(".index.json") else _read_file(path)


def _read_file(path: Path) -> dict[str, Tensor]:
    if path.suffix not in _SUFFIXES:
        raise TeacherError(f"{path}: expected a weights file, {', '.join(_SUFFIXES)}, found another type of file")
    try:
        content = _read_content(path)
    except TeacherError:
        raise
    except Exception as error:  # every reader has its own errors for a damaged file
        raise TeacherError(
            f"{path}: cannot be read as weights ({_in_short(error)})",
            hint="expected a .safetensors file, or a .pth, .pt or .bin file that holds tensors only",
        ) from error
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not (
        isinstance(content, dict)
        and all(isinstance(name, str) and isinstance(value, Tensor) for name, value in content.items())
    ):
        raise TeacherError(f"{path}: expected a state dict (tensors by name), found {type(content).__name__}")
    return content


def _read_content(path: Path) -> Any:
    _refuse_failed_download(path)
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    if _is_torchscript(path):
        raise TeacherError(
            f"{path}: expected a state dict, found a TorchScript archive, which is a program and not only weights",
            hint="use a .safetensors or .bin file of the same weights, as the hub has them",
        )
    with warnings.catch_warnings():
        # torch warns of a pickle that it did not write; what comes of it, tensors or an error, says enough.
        warnings.simplefilter("ignore", UserWarning)
        return torch.load(path, map_location="cpu", weights_only=True)


def _read_shards(index: Path) -> dict[str, Tensor]:
    weight_map = read_json(index).get("weight_map")
    if not (isinstance(weight_map, dict) and all(isinstance(filename, str) for filename in weight_map.values())):
        raise TeacherError(f"{index}: expected a weight_map, file names by tensor name, found none")
    state: dict[str, Tensor] = {}
    for filename in sorted(set(weight_map.values())):
        # Whoever wrote the index shall not choose what is read outside its folder.
        if "/" in filename or "\\" in filename:
            raise TeacherError(f"{index}: expected the names of files in its own folder, found {filename!r}")
        shard = index.parent / filename
        if not shard.is_file():
            raise TeacherError(f"{index}: expected {filename} beside it, found no such file")
        tensors = _read_file(shard)
        differing = {name for name, holder in weight_map.items() if holder == filename} ^ tensors.keys()
        if differing:
            raise TeacherError(
                f"{shard}: expected the tensors that {index.name} lists for it, found others: {_some(differing)}"
            )
        state |= tensors
    return state


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file.

    Raises TeacherError for a file that cannot be read as one.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TeacherError(f"{path}: cannot be read as JSON ({error})") from error
    if not isinstance(content, dict):
        raise TeacherError(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content


def seeded_state(module: nn.Module) -> dict[str, Tensor]:
    """Return untrained weights for a module built on the meta device, the same in every process and on every machine.

    Matrices are uniform with standard deviation 0.02; biases, running means and counters 0; all other vectors and
    scalars 1. A tensor the module has already computed is kept. No global random state is used: the numbers come from
    a generator of their own.

    Raises TeacherError for a table of integers: an index has no untrained value, its module must compute it.
    """
    generator = np.random.Generator(np.random.PCG64(_SEED))
    return {name: _initial(name, tensor, generator) for name, tensor in sorted(module.state_dict().items())}


def load_weights(
    module: nn.Module,
    state: Mapping[str, Tensor],
    name: str,
    source: str,
    ignore: Callable[[str], bool] | None = None,
) -> None:
    """Fill a module, which may lie on the meta device, with the weights, cast to the module's own dtype.

    ignore: says which names may stay unread, as those of a classifier head; None where every one must be used.

    Raises TeacherError unless names and shapes are exactly the module's.
    """
    expected = module.state_dict()
    missing, surplus = expected.keys() - state.keys(), state.keys() - expected.keys()
    if ignore is not None:
        surplus = {key for key in surplus if not ignore(key)}
    misfits = {key for key in expected.keys() & state.keys() if expected[key].shape != state[key].shape}
    problems = []
    if misfits:
        key = min(misfits)
        shapes = f"expected {list(expected[key].shape)}, found {list(state[key].shape)}"
        problems.append(f"the shape of {_some(misfits)} differs ({shapes})")
    if missing:
        problems.append(f"{_some(missing)} expected, but missing")
    if surplus:
        problems.append(f"{_some(surplus)} found, but unknown to the architecture")
    if problems:
        raise TeacherError(
            f"{source}: these are not the weights of {name}: {'; '.join(problems)}",
            hint=f"give the weights of {name} as --weights {name}=PATH, or name the teacher they belong to",
        )
    fitting = {key: state[key].to(tensor.dtype) for key, tensor in expected.items()}
    module.load_state_dict(fitting, assign=True)


def _initial(name: str, tensor: Tensor, generator: np.random.Generator) -> Tensor:
    if not tensor.is_meta:
        return tensor
    if not tensor.is_floating_point():
        if tensor.ndim > 0:
            raise TeacherError(
                f"{name}: a table of integers cannot be made from a seed", hint="this network needs trained weights"
            )
        return torch.zeros((), dtype=tensor.dtype)
    if tensor.ndim < 2:
        return torch.zeros(tensor.shape) if name.endswith(("bias", "running_mean")) else torch.ones(tensor.shape)
    # Uniform numbers and one product each are exact, so that the weights' digest is the same on every CPU.
    half_width = np.float32(_INITIAL_STD * math.sqrt(3.0))
    values = generator.random(tuple(tensor.shape), dtype=np.float32)
    values -= np.float32(0.5)
    values *= 2 * half_width
    return torch.from_numpy(values)


def _some(names: Iterable[str]) -> str:
    first, *others = sorted(names)
    return f"{first} (and {len(others)} more)" if others else first


def _refuse_failed_download(path: Path) -> None:
    with path.open("rb") as file:
        head = file.read(64)
    start = head.lstrip().lower()
    if start.startswith((b"<!doctype", b"<html", b"<?xml")):
        raise TeacherError(f"{path}: expected weights, found a web page", hint="download the file itself")
    if start.startswith(b"version https://git-lfs"):
        raise TeacherError(
            f"{path}: expected weights, found a Git LFS pointer to them", hint="`git lfs pull` gets them"
        )
    # torch reports a cut archive as an invalid argument.
    if head.startswith(b"PK\x03\x04") and not zipfile.is_zipfile(path):
        raise TeacherError(f"{path}: cannot be read as weights (its end is missing)", hint="copy or download it again")


def _in_short(error: Exception) -> str:
    if isinstance(error, pickle.UnpicklingError):
        # torch's own message goes on to advise unpickling it without restraint.
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        return f"it holds code, {found[1]}, which was not run" if found else "not a file that torch has written"
    return f"{type(error).__name__}: {error}".partition("\n")[0].partition(". ")[0]


def _is_torchscript(path: Path) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(member.endswith("/constants.pkl") for member in archive.namelist())

"""Weights on their way into a network: from a file, from the hub's cache, or from a seed.

A network is built on the meta device, so that nothing is initialised only to be overwritten, and filled by
`load_weights`.
"""

from __future__ import annotations

import json
import math
import zipfile
from collections.abc import Iterable, Mapping, Sequence
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
    """Return the tensors of a .safetensors, .pth, .pt or .bin file, by name, on the CPU.

    Nothing but tensors is unpickled. A training checkpoint's `state_dict` entry is taken out of it.

    Raises TeacherError for a file that cannot be read as one.
    """
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            content: Any = load_file(path)
        elif _is_torchscript(path):
            raise TeacherError(
                f"{path}: expected a state dict, found a TorchScript archive, which is a program and not only weights",
                hint="use a .safetensors or .bin file of the same weights, as the hub has them",
            )
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except TeacherError:
        raise
    except Exception as error:  # every reader has its own errors for a damaged file
        raise TeacherError(
            f"{path}: cannot be read as weights ({type(error).__name__}: {error})",
            hint="expected a .safetensors file, or a .pth, .pt or .bin file that holds tensors only",
        ) from error
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not (isinstance(content, dict) and all(isinstance(value, Tensor) for value in content.values())):
        raise TeacherError(f"{path}: expected a state dict (tensors by name), found {type(content).__name__}")
    return content


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

    Matrices are uniform with standard deviation 0.02, biases 0, all other vectors and scalars 1. A tensor the module
    has already computed is kept. No global random state is used: the numbers come from a generator of their own.
    """
    generator = np.random.Generator(np.random.PCG64(_SEED))
    return {name: _initial(name, tensor, generator) for name, tensor in sorted(module.state_dict().items())}


def load_weights(module: nn.Module, state: Mapping[str, Tensor], name: str, source: str) -> None:
    """Fill a module, which may lie on the meta device, with the weights, cast to the module's own dtype.

    Raises TeacherError unless names and shapes are exactly the module's.
    """
    expected = module.state_dict()
    missing, surplus = expected.keys() - state.keys(), state.keys() - expected.keys()
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
    fitting = {key: tensor.to(expected[key].dtype) for key, tensor in state.items()}
    module.load_state_dict(fitting, assign=True)


def _initial(name: str, tensor: Tensor, generator: np.random.Generator) -> Tensor:
    if not tensor.is_meta:
        return tensor
    if tensor.ndim < 2:
        return torch.zeros(tensor.shape) if name.endswith("bias") else torch.ones(tensor.shape)
    # Uniform numbers and one product each are exact, so that the weights' digest is the same on every CPU.
    half_width = np.float32(_INITIAL_STD * math.sqrt(3.0))
    values = generator.random(tuple(tensor.shape), dtype=np.float32)
    values -= np.float32(0.5)
    values *= 2 * half_width
    return torch.from_numpy(values)


def _some(names: Iterable[str]) -> str:
    first, *others = sorted(names)
    return f"{first} (and {len(others)} more)" if others else first


def _is_torchscript(path: Path) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(member.endswith("/constants.pkl") for member in archive.namelist())

"""Chooses the device a verb runs on."""

from __future__ import annotations

import re

import torch

from data.errors import UsageError


def choose_device(name: str) -> torch.device:
    """Return the device named `auto`, `cpu`, `cuda` or `cuda:N`; `auto` takes a GPU where there is one.

    Raises UsageError for an unknown name or a GPU that is not there.
    """
    # Denormal numbers, which the gradients of a trained detector are full of, slow a CPU step 2.6 times. The switch
    # is inherited by threads started later, so it is set before any work.
    torch.set_flush_denormal(True)
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind, _, index = name.partition(":")
    if not re.fullmatch(r"cpu|cuda(:[0-9]+)?", name):
        raise UsageError(f"expected a device auto, cpu, cuda or cuda:N, found {name!r}")
    if kind == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if int(index or 0) >= count:
            found = f"{count} CUDA device{'s' * (count != 1)}" if count else "no CUDA device"
            raise UsageError(f"--device {name}: torch {torch.__version__} finds {found} here", hint="use --device cpu")
        torch.cuda.set_device(int(index or 0))  # else page-locked memory would be had through another GPU
    return torch.device(name)

"""The processes that `torchrun` started, as the ranks that write one store or train one student together.

They exchange small Python objects over gloo whatever the device is: shards, digests, errors. Gradients of GPUs go over
nccl.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from cache.ranks import ALONE, Ranks
from pipeline.progress import silence

# A rank that is done waits for the others' share of the images, however long that takes; one that dies is noticed at
# once, by its closed connection.
_PATIENCE = timedelta(days=7)


class TorchRanks:
    """A process's place among those of a torchrun job."""

    def __init__(self) -> None:
        self.rank: int = dist.get_rank()
        self.size: int = dist.get_world_size()

    def exchange(self, value: Any) -> list[Any]:
        """Return every rank's value, in rank order; waits until all have come.

        Raises RuntimeError where one of them is gone.
        """
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values


@contextmanager
def joined_ranks(*, gradients_on: str = "cpu") -> Iterator[Ranks]:
    """Join the other processes of a torchrun job for the block; alone where there is none.

    gradients_on: the kind of device whose tensors they will add up, `cpu` or `cuda`.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield ALONE
        return
    backend = "gloo" if gradients_on == "cpu" else "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, timeout=_PATIENCE)
    try:
        ranks = TorchRanks()
        if ranks.rank > 0:
            silence()
        yield ranks
    finally:
        dist.destroy_process_group()


def local_device(name: str) -> str:
    """Return the device that a process of a torchrun job is to take: `auto` and `cuda` mean a GPU of its own."""
    local_rank = os.environ.get("LOCAL_RANK")
    if local_rank is None or name not in ("auto", "cuda"):
        return name
    import torch

    if not torch.cuda.is_available():
        return name
    return f"cuda:{int(local_rank) % torch.cuda.device_count()}"

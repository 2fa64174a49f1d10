"""Finds the number of images that teachers see at once, where none was asked for."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from data.errors import TeacherError
from features.teacher import Teacher
from pipeline.teacher_runner import is_out_of_memory

# What a CPU gains beyond this is little (benchmarks/extract_teachers.py, table of batch sizes), and memory grows.
CPU_BATCH_SIZE = 16


def find_batch_size(teachers: Iterable[Teacher], device: torch.device, shard_samples: int) -> int:
    """Return the largest batch that every teacher has run: on a GPU a shard's samples, halved until they fit.

    Batches never cross shards, so that nothing beyond a shard's samples would be used.

    Raises TeacherError where not even one image fits.
    """
    if device.type == "cpu":
        return min(CPU_BATCH_SIZE, shard_samples)
    size = shard_samples
    for teacher in teachers:
        while not _fits(teacher, device, size):
            if size == 1:
                raise TeacherError(
                    f"{teacher.name}: {device} has too little memory for one image",
                    hint="free memory, take a smaller teacher or grid, or --device cpu",
                )
            size //= 2
    return size


def _fits(teacher: Teacher, device: torch.device, size: int) -> bool:
    try:
        teacher(torch.zeros((size, *teacher.input.size, 3), dtype=torch.uint8, device=device))
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
    else:
        return True
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return False

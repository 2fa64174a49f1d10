"""Named, independent random streams.

Every random decision is drawn from a stream of its own, keyed by (seed, name, …) and never from a shared generator, so
that two arms of a comparison see the same images in the same order and views whatever else differs between them.

| name          | keys          | decides                                   |
|---------------|---------------|-------------------------------------------|
| student-init  |               | the student's random initial weights      |
| kd-init       |               | the adapter's initial weights             |
| feature-loss-init |           | initial weights of a feature loss         |
| feature-mask  | epoch, id     | places that a feature loss masks          |
| target-shuffle |              | whose targets an image gets (control arm) |
| order         | epoch         | the order of the images                   |
| view          | epoch, id     | whether an image is mirrored              |
| jitter        | epoch, id     | its photometric jitter                    |
| sampling      | epoch, id     | which anchors and proposals enter the loss |
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np


def stream_seed(seed: int, name: str, *keys: int | str) -> int:
    """Return the seed of a stream, 0 … 2⁶³−1; different names or keys give unrelated seeds."""
    text = "\x1f".join([str(seed), name, *map(str, keys)])
    return int.from_bytes(hashlib.sha256(text.encode("utf-8")).digest()[:8], "little") >> 1


def stream(seed: int, name: str, *keys: int | str) -> np.random.Generator:
    """Return the generator of a stream."""
    return np.random.default_rng(stream_seed(seed, name, *keys))


@contextmanager
def torch_stream(seed: int, name: str, *keys: int | str) -> Iterator[None]:
    """Run the block with torch's global generator on a stream, and put it back as it was afterwards."""
    import torch

    with torch.random.fork_rng():
        torch.manual_seed(stream_seed(seed, name, *keys))
        yield

"""`samples.jsonl`: which image every row of the store belongs to, in order."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

from cache.canonical import canonical_json
from data.errors import StoreCorruptError


@dataclass(frozen=True, slots=True)
class SampleEntry:
    """One row: the image's unique id, its original size in px, and the SHA-256 of its file."""

    id: str
    height: int
    width: int
    sha256: str


def encode_samples(samples: Sequence[SampleEntry]) -> bytes:
    """Return the file's bytes: one canonical JSON line a sample."""
    return b"".join(
        canonical_json({"id": s.id, "height": s.height, "width": s.width, "sha256": s.sha256}) + b"\n" for s in samples
    )


def samples_digest(encoded: bytes) -> str:
    """Return the SHA-256 of the file's bytes: ids, sizes, image digests and order at once."""
    return hashlib.sha256(encoded).hexdigest()


def decode_samples(encoded: bytes, where: str) -> list[SampleEntry]:
    """Return the rows of a `samples.jsonl`.

    Raises StoreCorruptError naming the line for anything but whole, well-formed lines with unique ids.
    """
    lines = encoded.split(b"\n")
    if lines.pop() != b"":
        raise StoreCorruptError(f"{where}: the last line is cut short")
    samples = []
    for number, line in enumerate(lines, start=1):
        try:
            sample = SampleEntry(**json.loads(line))
        except (ValueError, TypeError, RecursionError) as error:
            raise StoreCorruptError(f"{where}: line {number} is not a sample ({error})") from error
        if [type(sample.id), type(sample.height), type(sample.width), type(sample.sha256)] != [str, int, int, str]:
            raise StoreCorruptError(f"{where}: line {number}: expected a text id, height, width and a text digest")
        samples.append(sample)
    if len({sample.id for sample in samples}) != len(samples):
        raise StoreCorruptError(f"{where}: an id stands on two lines")
    return samples

"""Canonical JSON and the digests taken over it: the same content gives the same bytes everywhere."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

Json = Any  # what json.loads returns; a recursive alias would not make any call here safer


def canonical_json(value: Json) -> bytes:
    """Return the value as canonical JSON: sorted keys, no spaces, ASCII.

    Raises ValueError for NaN or infinity, TypeError for what JSON cannot hold.
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False).encode("ascii")


def digest(value: Json) -> str:
    """Return the SHA-256 of the value's canonical JSON, in hex."""
    return hashlib.sha256(canonical_json(value)).hexdigest()


def differences(stored: Json, found: Json, field: str) -> Iterator[tuple[str, Json, Json]]:
    """Yield (field, stored value, found value) for every leaf in which two JSON values differ.

    field: the dotted name of the values themselves. A key that one side lacks yields None on that side.
    """
    if isinstance(stored, Mapping) and isinstance(found, Mapping):
        for key in sorted({*stored, *found}):
            yield from differences(stored.get(key), found.get(key), f"{field}.{key}")
    elif canonical_json(stored) != canonical_json(found):
        yield field, stored, found

from __future__ import annotations

import hashlib

import pytest

from cache.samples import SampleEntry, decode_samples, encode_samples, samples_digest
from data.errors import StoreCorruptError

ENTRIES = [SampleEntry("VOC2007/000005", 375, 500, "ab" * 32), SampleEntry("VOC2012/2008_000002", 1, 2, "cd" * 32)]
ENCODED = (
    b'{"height":375,"id":"VOC2007/000005","sha256":"' + b"ab" * 32 + b'","width":500}\n'
    b'{"height":1,"id":"VOC2012/2008_000002","sha256":"' + b"cd" * 32 + b'","width":2}\n'
)


def test_a_sample_is_one_canonical_line() -> None:
    assert encode_samples(ENTRIES) == ENCODED
    assert decode_samples(ENCODED, "x") == ENTRIES
    assert samples_digest(ENCODED) == hashlib.sha256(ENCODED).hexdigest()


FIRST, SECOND = ENCODED.splitlines(keepends=True)
BAD = {
    "cut short": (ENCODED[:-1], "the last line is cut short"),
    "empty line": (FIRST + b"\n" + SECOND, "line 2 is not a sample"),
    "not json": (FIRST + b"{\n", "line 2 is not a sample"),
    "not an object": (b"[1]\n", "line 1 is not a sample"),
    "a field is lacking": (b'{"height":1,"id":"a","width":1}\n', "line 1 is not a sample"),
    "a field too many": (FIRST.replace(b"{", b'{"more":1,'), "line 1 is not a sample"),
    "an id that is a list": (FIRST.replace(b'"VOC2007/000005"', b"[]"), "line 1: expected a text id"),
    "a size that is text": (FIRST.replace(b"375", b'"375"'), "line 1: expected a text id"),
    "an id twice": (FIRST + FIRST, "an id stands on two lines"),
    "deep": (b"[" * 100_000 + b"\n", "line 1 is not a sample"),
}


@pytest.mark.parametrize(("encoded", "message"), BAD.values(), ids=BAD)
def test_a_bad_line_is_corrupt_and_named(encoded: bytes, message: str) -> None:
    with pytest.raises(StoreCorruptError, match=message):
        decode_samples(encoded, "samples.jsonl")

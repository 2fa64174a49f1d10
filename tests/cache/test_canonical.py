from __future__ import annotations

import hashlib
from typing import Any

import pytest

from cache.canonical import canonical_json, differences, digest


def test_canonical_json_sorts_keys_leaves_no_spaces_and_is_ascii() -> None:
    assert canonical_json({"b": [1, 2.5, None], "a": {"ü": True}}) == b'{"a":{"\\u00fc":true},"b":[1,2.5,null]}'


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {"x": [float("-inf")]}], ids=["nan", "inf", "nested"])
def test_what_json_cannot_say_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        canonical_json(value)


def test_a_digest_is_the_sha256_of_the_canonical_json() -> None:
    assert digest({"b": 1, "a": 2}) == hashlib.sha256(b'{"a":2,"b":1}').hexdigest()


DIFFERENCES = {
    "equal": ({"a": 1, "b": [1, 2]}, {"b": [1, 2], "a": 1}, []),
    "a tuple is a list": ({"a": [1, 2]}, {"a": (1, 2)}, []),
    "a leaf": ({"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "c": 3}}, [("root.a.c", 2, 3)]),
    "a list as a whole": ({"a": [1, 2]}, {"a": [1, 3]}, [("root.a", [1, 2], [1, 3])]),
    "a key added": ({}, {"a": 1}, [("root.a", None, 1)]),
    "a key gone": ({"a": {"b": 1}}, {"a": {}}, [("root.a.b", 1, None)]),
    "another kind": ({"a": {"b": 1}}, {"a": 5}, [("root.a", {"b": 1}, 5)]),
}


@pytest.mark.parametrize(("stored", "found", "expected"), DIFFERENCES.values(), ids=DIFFERENCES)
def test_differences_name_every_leaf_with_both_values(stored: Any, found: Any, expected: list[Any]) -> None:
    assert list(differences(stored, found, "root")) == expected

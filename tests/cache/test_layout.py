from __future__ import annotations

import pytest

from cache.layout import DIMENSIONS, constant_array, sample_array
from cache.manifest import check_teacher_key

FEATURES = sample_array("dino/original/features", 130, (30, 30, 384), "float16", 64)
LOGITS = sample_array("clip/original/logits", 130, (20,), "float32", 64)


def test_a_shard_of_features_is_its_samples_with_four_bytes_each_and_a_checked_index() -> None:
    assert FEATURES.sample_bytes == 30 * 30 * 384 * 2 == 691_200
    assert FEATURES.shard_file_bytes(0) == 64 * (691_200 + 4) + 64 * 16 + 4
    # The last shard has two samples, but an index as long as any.
    assert FEATURES.shard_file_bytes(2) == 2 * (691_200 + 4) + 64 * 16 + 4


def test_a_small_arrays_chunk_is_full_size_even_where_the_last_one_is_not() -> None:
    assert LOGITS.shard_file_bytes(0) == LOGITS.shard_file_bytes(2) == 64 * 20 * 4 + 4


def test_shards_cut_the_samples_without_gap() -> None:
    assert FEATURES.num_shards == 3
    assert [FEATURES.shard_range(shard) for shard in range(3)] == [(0, 64), (64, 64), (128, 2)]


def test_shard_files_have_the_default_chunk_keys() -> None:
    assert FEATURES.shard_file(2) == "c/2/0/0/0"
    assert LOGITS.shard_file(1) == "c/1/0"
    assert constant_array("clip", "text_embeddings", (20, 512)).shard_file(0) == "c/0/0"


def test_features_are_committed_last() -> None:
    assert list(DIMENSIONS) == ["moments", "scale_channel", "scale_token", "logits", "embeddings", "images", "features"]


@pytest.mark.parametrize("key", ["dinov2_vits14", "a", "0", "x" * 64, "v1.2-b_c"])
def test_a_teacher_key_names_a_folder(key: str) -> None:
    check_teacher_key(key)


@pytest.mark.parametrize(
    "key",
    ["", ".", "..", "../x", "a/b", "/etc", "A", "-a", "_a", ".a", "x" * 65, "ü", "a b", "a\n", "a\0", "text_embeddings",
     "pca", "zarr.json", "samples.jsonl"],
)  # fmt: skip
def test_a_key_that_is_a_path_or_taken_is_refused(key: str) -> None:
    with pytest.raises(ValueError, match="expected a teacher key"):
        check_teacher_key(key)

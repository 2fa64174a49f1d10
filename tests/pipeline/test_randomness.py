import hashlib

import numpy as np
import torch

from pipeline.randomness import stream, stream_seed, torch_stream


def test_a_seed_is_63_bits_of_the_sha256_of_its_names() -> None:
    digest = hashlib.sha256(b"7\x1forder\x1f3").digest()
    assert stream_seed(7, "order", 3) == int.from_bytes(digest[:8], "little") // 2


def test_seeds_differ_by_seed_name_and_every_key() -> None:
    seeds = {
        stream_seed(0, "view", 0, "VOC2007/000001"),
        stream_seed(1, "view", 0, "VOC2007/000001"),
        stream_seed(0, "jitter", 0, "VOC2007/000001"),
        stream_seed(0, "view", 1, "VOC2007/000001"),
        stream_seed(0, "view", 0, "VOC2007/000002"),
        stream_seed(0, "view"),
    }
    assert len(seeds) == 6


def test_keys_do_not_run_into_each_other() -> None:
    assert stream_seed(0, "view", 1, "12") != stream_seed(0, "view", 11, "2")


def test_streams_of_different_names_are_not_correlated() -> None:
    one, other = (np.array([stream(0, name, n).random() for n in range(500)]) for name in ("view", "jitter"))
    assert abs(np.corrcoef(one, other)[0, 1]) < 0.1
    assert abs(one.mean() - 0.5) < 0.05


def test_torchs_own_generator_is_put_back() -> None:
    torch.manual_seed(3)
    expected = torch.rand(2, 4)
    torch.manual_seed(3)
    first = torch.rand(4)
    with torch_stream(0, "student-init"):
        inside = torch.rand(4)
    assert torch.equal(torch.stack([first, torch.rand(4)]), expected)
    with torch_stream(0, "student-init"):
        assert torch.equal(torch.rand(4), inside)

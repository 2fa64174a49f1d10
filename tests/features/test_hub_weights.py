from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import save_file

from data.errors import WeightsError
from features.registry import build_teacher, is_available_locally
from features.teacher import Teacher

REVISION = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize("name", ["dinov2_vits14", "clip_vitb32"])
def test_an_unreachable_hub_is_an_error_that_names_the_ways_on(name: str, unreachable_hub: Path) -> None:
    with pytest.raises(WeightsError) as caught:
        build_teacher(name)
    assert "http://127.0.0.1:9 does not answer" in caught.value.message
    assert caught.value.hint is not None
    assert f"--weights {name}=PATH" in caught.value.hint
    assert "--untrained" in caught.value.hint


def test_cached_weights_are_used_without_a_network(untrained: Callable[[str], Teacher], unreachable_hub: Path) -> None:
    teacher = untrained("dinov2_vits14")
    assert not is_available_locally("dinov2_vits14")
    repo = unreachable_hub / "models--facebook--dinov2-small"
    snapshot = repo / "snapshots" / REVISION
    snapshot.mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(REVISION)
    save_file(teacher.module.state_dict(), snapshot / "model.safetensors")
    assert is_available_locally("dinov2_vits14")
    cached = build_teacher("dinov2_vits14")
    assert cached.weights_digest == teacher.weights_digest
    assert cached.provenance()["weights_source"] == f"facebook/dinov2-small model.safetensors at revision {REVISION}"
    assert not cached.untrained

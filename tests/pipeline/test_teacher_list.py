"""`teachers`: the registry as a list, for a person and as JSON."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from cache.manifest import check_teacher_key
from features.registry import TEACHERS, find_entry
from features.spec import parse_spec
from pipeline.teacher_list import closing_lines, list_teachers, teachers_table

KEYS = {"name", "family", "gives", "description", "size", "grid", "licence", "options", "example", "weights", "hub_id",
        "cached"}  # fmt: skip


def shown(width: int) -> str:
    out = io.StringIO()
    Console(file=out, width=width, markup=False).print(teachers_table(list_teachers()))
    return out.getvalue()


@pytest.fixture
def cached_small(unreachable_hub: Path) -> None:
    """A local hub cache that holds the weights of dinov2_vits14 and no other's."""
    repository = unreachable_hub / "models--facebook--dinov2-small"
    snapshot = repository / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0123")
    (snapshot / "model.safetensors").touch()


@pytest.mark.usefixtures("cached_small")
class TestJson:
    def test_every_line_of_the_registry_is_there_with_the_same_keys(self) -> None:
        teachers = json.loads(json.dumps(list_teachers(), allow_nan=False))
        assert [t["name"].partition(":")[0] for t in teachers] == [name.rstrip(":") for name in TEACHERS]
        assert all(t.keys() == KEYS for t in teachers)
        assert [t["name"] for t in teachers if t["family"]] == [
            "timm:NAME", "hf:ID_OR_DIR", "open_clip:ARCH/PRETRAINED", "detector:CHECKPOINT",
        ]  # fmt: skip

    def test_it_says_what_the_registry_says(self) -> None:
        by_name = {t["name"]: t for t in list_teachers()}
        small = by_name["dinov2_vits14"]
        assert (small["gives"], small["grid"], small["licence"]) == (["features"], "30×30", "Apache-2.0")
        assert (small["hub_id"], small["options"]) == ("facebook/dinov2-small", ["grid", "layer", "norm"])
        assert by_name["detector:CHECKPOINT"]["gives"] == ["features", "logits"]
        assert by_name["tiny_clip"]["weights"] == "a seed"

    def test_weights_in_the_local_cache_are_told_from_those_that_are_not(self) -> None:
        cached = {t["name"]: t["cached"] for t in list_teachers()}
        assert [name for name, here in cached.items() if here] == ["dinov2_vits14"]
        assert [name for name, here in cached.items() if here is None] == [
            "timm:NAME", "hf:ID_OR_DIR", "open_clip:ARCH/PRETRAINED", "detector:CHECKPOINT", "tiny_dino", "tiny_clip",
        ]  # fmt: skip

    def test_every_example_can_be_typed(self) -> None:
        for teacher in list_teachers():
            key, separator, spec = teacher["example"].partition("=")
            check_teacher_key(key)
            find_entry(parse_spec(spec if separator else key))


@pytest.mark.usefixtures("cached_small")
class TestTable:
    @pytest.mark.parametrize("width", [60, 80, 200])
    def test_it_fits_and_nothing_is_cut(self, width: int) -> None:
        text = shown(width)
        assert max(map(len, text.splitlines())) <= width
        assert "…" not in text
        for name in TEACHERS:
            assert name in text

    def test_a_teacher_takes_two_lines_at_80_columns(self) -> None:
        lines = [line.split() for line in shown(80).splitlines()]
        start = next(number for number, line in enumerate(lines) if line[:1] == ["dinov2_vits14"])
        assert lines[start : start + 2] == [
            ["dinov2_vits14", "DINOv2", "ViT-S/14,", "384", "channels", "features", "22", "M"],
            ["in", "the", "cache", "facebook/dinov2-small", "30×30", "Apache-2.0"],
        ]
        assert lines[start + 3][:3] == ["to", "download", "facebook/dinov2-base"]

    def test_options_stand_beside_those_that_take_them(self) -> None:
        rows = [line.split("  ", 1) for line in shown(200).splitlines()]
        options = {row[0].strip(): row[1].split(", ") for row in rows if len(row) == 2}
        assert [name.strip() for name in options["dense, grid"]] == [
            "clip_vitb32", "clip_vitb16", "clip_vitl14", "open_clip:",
        ]  # fmt: skip

    def test_examples_can_be_copied_and_offline_mode_is_told(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from huggingface_hub import constants

        lines = closing_lines(list_teachers())
        assert "  --teacher mine=detector:checkpoints/student_latest.pth" in lines
        assert not any("HF_HUB_OFFLINE" in line for line in lines)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        assert closing_lines(list_teachers())[-1] == "HF_HUB_OFFLINE is set: nothing will be downloaded."


def test_it_needs_neither_torch_nor_a_teacher_library(tmp_path: Path) -> None:
    script = (
        "import sys; from pipeline.teacher_list import *; teachers_table(list_teachers())\n"
        "print([m for m in ('torch', 'transformers', 'timm', 'open_clip', 'zarr') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "HF_HOME": str(tmp_path)},
    )
    assert done.stdout.strip() == "[]"

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from data.errors import UsageError
from features.registry import TEACHERS, TeacherEntry, build_teacher, is_available_locally


def test_names_need_neither_torch_nor_a_teacher_library() -> None:
    heavy = {"torch", "torchvision", "transformers", "open_clip", "timm", "huggingface_hub", "numpy"}
    program = f"import sys, features.registry; print(sorted({heavy!r} & sys.modules.keys()))"
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_looking_for_local_weights_needs_no_torch() -> None:
    program = "import sys, features.registry as r; r.is_available_locally('clip_vitb32'); print('torch' in sys.modules)"
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize(
    ("spec", "hint"),
    [
        ("dinov2_vit14", "did you mean dinov2_vits14?"),
        ("clip_vitb23", "did you mean clip_vitb32?"),
        ("zzz", "`python cli.py teachers` lists them all"),
    ],
)
def test_unknown_name_lists_the_names_and_a_close_one(spec: str, hint: str | None) -> None:
    with pytest.raises(UsageError) as caught:
        build_teacher(spec)
    assert caught.value.hint == hint
    assert all(name in caught.value.message for name in (spec, *TEACHERS))
    with pytest.raises(UsageError):
        is_available_locally(spec)


def test_weights_and_untrained_exclude_each_other(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="exclude each other"):
        build_teacher("dinov2_vits14", weights=tmp_path, untrained=True)


@pytest.mark.parametrize("name", ["tiny_dino", "tiny_clip"])
def test_embedded_teachers_refuse_weights(name: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="built from a seed"):
        build_teacher(name, weights=tmp_path)


@pytest.mark.parametrize("name", ["tiny_dino", "tiny_clip"])
def test_embedded_teachers_are_untrained_unasked_and_always_available(name: str) -> None:
    assert build_teacher(name).untrained
    assert is_available_locally(name)


def test_a_family_builds_whatever_follows_its_colon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(
        TEACHERS, "family:", TeacherEntry("features.tiny", "features", "dino", "", "none", embedded=True)
    )
    assert build_teacher("family:a/b:c").identity()["spec"] == "family:a/b:c"


def test_every_entry_says_where_its_weights_are() -> None:
    for name, entry in TEACHERS.items():
        assert entry.description, name
        assert entry.licence, name
        assert entry.embedded or entry.argument or (entry.hub_id and entry.weights_files), name

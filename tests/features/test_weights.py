from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from data.errors import TeacherError
from features.weights import load_weights, locate_weights, read_state_dict, seeded_state


def write_garbage(path: Path) -> None:
    path.write_bytes(b"no weights at all")


def write_list(path: Path) -> None:
    torch.save([torch.zeros(1)], path)


def write_numbers(path: Path) -> None:
    torch.save({"lr": 0.1}, path)


def write_torchscript(path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the format is deprecated, its files are not gone
        torch.jit.save(torch.jit.script(nn.Linear(1, 1)), path)


@pytest.mark.parametrize(
    ("filename", "write", "message"),
    [
        ("w.safetensors", write_garbage, r"cannot be read as weights"),
        ("w.pth", write_garbage, r"cannot be read as weights"),
        ("w.bin", write_list, r"expected a state dict \(tensors by name\), found list"),
        ("w.pt", write_numbers, r"expected a state dict \(tensors by name\), found dict"),
        ("w.pt", write_torchscript, r"found a TorchScript archive"),
    ],
    ids=["safetensors garbage", "pth garbage", "list", "numbers", "torchscript"],
)
def test_unreadable_files_are_named(tmp_path: Path, filename: str, write: Callable[[Path], None], message: str) -> None:
    write(tmp_path / filename)
    with pytest.raises(TeacherError, match=message) as caught:
        read_state_dict(tmp_path / filename)
    assert str(tmp_path / filename) in caught.value.message


def test_code_in_a_pickle_is_not_run(tmp_path: Path) -> None:
    class Hostile:
        def __reduce__(self) -> tuple[object, ...]:
            return Path.touch, (tmp_path / "ran",)

    torch.save({"weight": Hostile()}, tmp_path / "w.pth")
    with pytest.raises(TeacherError, match="cannot be read as weights"):
        read_state_dict(tmp_path / "w.pth")
    assert not (tmp_path / "ran").exists()


def test_missing_file_and_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(TeacherError, match=r"nowhere\.pth: no such file\n.*--weights dinov2_vits14=PATH"):
        locate_weights("dinov2_vits14", "x/y", ("a.safetensors", "b.bin"), tmp_path / "nowhere.pth")
    with pytest.raises(TeacherError, match=r"expected a\.safetensors or b\.bin in the folder, found neither"):
        locate_weights("dinov2_vits14", "x/y", ("a.safetensors", "b.bin"), tmp_path)


def test_folder_gives_the_preferred_file(tmp_path: Path) -> None:
    for name in ("b.bin", "a.safetensors"):
        (tmp_path / name).touch()
    assert locate_weights("t", "x/y", ("a.safetensors", "b.bin"), tmp_path)[0] == tmp_path / "a.safetensors"


def test_seeded_weights_fill_by_kind_and_keep_what_is_computed() -> None:
    with torch.device("meta"):
        module = nn.Sequential(nn.Linear(300, 200), nn.LayerNorm(200))
        module.register_buffer("table", torch.arange(3.0, device="cpu"))
    load_weights(module, seeded_state(module), "t", "seed")
    state = module.state_dict()
    # A uniform distribution on ±a has standard deviation a/√3.
    assert state["0.weight"].std().item() == pytest.approx(0.02, rel=0.02)
    assert state["0.weight"].abs().max().item() <= 0.02 * 3**0.5 * (1 + 1e-6)
    assert state["0.bias"].eq(0).all()
    assert state["1.weight"].eq(1).all()
    assert state["table"].tolist() == [0, 1, 2]


def test_loading_names_every_kind_of_misfit() -> None:
    module = nn.Linear(2, 2)
    with pytest.raises(TeacherError) as caught:
        load_weights(
            module, {"weight": torch.zeros(3, 2), "extra": torch.zeros(1), "more": torch.zeros(1)}, "t", "f.pth"
        )
    assert caught.value.message == (
        "f.pth: these are not the weights of t: the shape of weight differs (expected [2, 2], found [3, 2]);"
        " bias expected, but missing; extra (and 1 more) found, but unknown to the architecture"
    )

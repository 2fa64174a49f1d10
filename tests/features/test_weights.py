from __future__ import annotations

import json
import os
import pickle
import re
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

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


def write_web_page(path: Path) -> None:
    path.write_text("\n<!DOCTYPE html>\n<html><body>404</body></html>\n")


def write_lfs_pointer(path: Path) -> None:
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 88262120\n")


def write_truncated_safetensors(path: Path) -> None:
    save_file({"weight": torch.zeros(100, 100)}, path)
    os.truncate(path, 20_000)


def write_truncated(path: Path) -> None:
    torch.save({"weight": torch.zeros(100, 100)}, path)
    os.truncate(path, 20_000)


def write_truncated_legacy(path: Path) -> None:
    torch.save({"weight": torch.zeros(100, 100)}, path, _use_new_zipfile_serialization=False)
    os.truncate(path, 20_000)


def write_numbered(path: Path) -> None:
    torch.save({0: torch.zeros(1)}, path)


@pytest.mark.parametrize(
    ("filename", "write", "message"),
    [
        ("w.safetensors", write_garbage, r"cannot be read as weights"),
        ("w.pth", write_garbage, r"cannot be read as weights"),
        ("w.bin", write_list, r"expected a state dict \(tensors by name\), found list"),
        ("w.pt", write_numbers, r"expected a state dict \(tensors by name\), found dict"),
        ("w.pt", write_numbered, r"expected a state dict \(tensors by name\), found dict"),
        ("w.pt", write_torchscript, r"found a TorchScript archive"),
        ("w.safetensors", write_truncated_safetensors, r"cannot be read as weights \(SafetensorError: .*incomplete"),
        ("w.pth", write_truncated, r"cannot be read as weights \(its end is missing\)\n"),
        ("w.pth", write_truncated_legacy, r"cannot be read as weights \(RuntimeError: unexpected EOF"),
        ("w.safetensors", Path.touch, r"cannot be read as weights \(SafetensorError: "),
        ("w.pth", Path.touch, r"cannot be read as weights \(EOFError: "),
        ("w.safetensors", write_web_page, r"expected weights, found a web page\n"),
        ("w.pth", write_web_page, r"expected weights, found a web page\n"),
        ("w.bin", write_lfs_pointer, r"expected weights, found a Git LFS pointer to them\n.*git lfs pull"),
        ("w.jpg", write_garbage, r"expected a weights file, \.safetensors, .*, found another type of file"),
        ("w", write_garbage, r"expected a weights file, \.safetensors, .*, found another type of file"),
    ],
    ids=[
        "safetensors garbage", "pth garbage", "list", "numbers", "unnamed", "torchscript", "safetensors truncated",
        "pth truncated", "old pth truncated", "safetensors empty", "pth empty", "web page as safetensors",
        "web page as pth", "git lfs", "photograph", "no suffix",
    ],
)  # fmt: skip
def test_unreadable_files_are_named(tmp_path: Path, filename: str, write: Callable[[Path], None], message: str) -> None:
    write(tmp_path / filename)
    with pytest.raises(TeacherError, match=message) as caught:
        read_state_dict(tmp_path / filename)
    assert str(tmp_path / filename) in caught.value.message


class CreatesFile:
    """Unpickled without restraint, it creates the file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.path),)


def save_with_torch(content: object, path: Path) -> None:
    torch.save(content, path)


def save_as_torch_once_did(content: object, path: Path) -> None:
    torch.save(content, path, _use_new_zipfile_serialization=False)


def save_as_pickle(content: object, path: Path) -> None:
    path.write_bytes(pickle.dumps(content))


def save_as_old_pickle(content: object, path: Path) -> None:
    path.write_bytes(pickle.dumps(content, protocol=2))


@pytest.mark.parametrize("suffix", [".pth", ".bin", ".pt", ".ckpt"])
@pytest.mark.parametrize(
    ("save", "why"),
    [
        (save_with_torch, r"it holds code, posix\.mkdir, which was not run"),
        (save_as_torch_once_did, r"it holds code, posix\.mkdir, which was not run"),
        (save_as_pickle, r"not a file that torch has written"),
        (save_as_old_pickle, r"it holds code, [\w.]+, which was not run"),
    ],
)
def test_code_in_a_pickle_is_refused_and_not_run(
    tmp_path: Path, save: Callable[[object, Path], None], why: str, suffix: str
) -> None:
    content = {"weight": torch.zeros(1), "more": CreatesFile(tmp_path / "ran")}
    path = (tmp_path / "w").with_suffix(suffix)
    save(content, path)
    with pytest.raises(TeacherError, match=rf"cannot be read as weights \(({why})\)\n") as caught:
        read_state_dict(path)
    assert "weights_only" not in str(caught.value)  # torch's advice: to unpickle it without restraint
    assert not (tmp_path / "ran").exists()


def test_that_code_would_have_run(tmp_path: Path) -> None:
    save_with_torch({"more": CreatesFile(tmp_path / "ran")}, tmp_path / "w.pth")
    torch.load(tmp_path / "w.pth", weights_only=False)
    assert (tmp_path / "ran").exists()


class TestShards:
    @pytest.fixture
    def index(self, tmp_path: Path) -> Path:
        """An index of shards as transformers writes them: at most 60 kB a file."""
        from transformers import ViTConfig, ViTModel

        config = ViTConfig(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=32
        )
        model = ViTModel(config, add_pooling_layer=False)
        model.save_pretrained(tmp_path / "whole")
        model.save_pretrained(tmp_path / "shards", max_shard_size="60KB")
        return tmp_path / "shards" / "model.safetensors.index.json"

    def rewrite(self, index: Path, change: Callable[[dict[str, str]], object]) -> None:
        content = json.loads(index.read_text())
        change(content["weight_map"])
        index.write_text(json.dumps(content))

    def test_shards_give_what_the_whole_file_gives(self, index: Path) -> None:
        assert len(list(index.parent.glob("*.safetensors"))) > 1
        whole, shards = load_file(index.parents[1] / "whole" / "model.safetensors"), read_state_dict(index)
        assert shards.keys() == whole.keys()
        assert all(torch.equal(shards[name], tensor) for name, tensor in whole.items())

    def test_missing_shard_is_named(self, index: Path) -> None:
        last = max(index.parent.glob("*.safetensors"))
        last.unlink()
        with pytest.raises(TeacherError, match=rf"index\.json: expected {last.name} beside it, found no such file"):
            read_state_dict(index)

    def test_tensor_that_no_shard_holds_is_named(self, index: Path) -> None:
        self.rewrite(index, lambda weight_map: weight_map.update(lost=max(weight_map.values())))
        with pytest.raises(TeacherError, match=r"expected the tensors that .* lists for it, found others: lost$"):
            read_state_dict(index)

    @pytest.mark.parametrize("filename", ["../whole/model.safetensors", "/etc/w.pth", "..\\whole\\model.safetensors"])
    def test_shard_outside_the_folder_is_refused(self, index: Path, filename: str) -> None:
        self.rewrite(index, lambda weight_map: weight_map.update(weight=filename))
        with pytest.raises(TeacherError, match=r"files in its own folder, found '" + re.escape(repr(filename)[1:-1])):
            read_state_dict(index)

    def test_index_that_names_itself_is_refused(self, index: Path) -> None:
        self.rewrite(index, lambda weight_map: weight_map.update(weight=index.name))
        with pytest.raises(TeacherError, match=r"expected a weights file, .*, found another type of file"):
            read_state_dict(index)

    @pytest.mark.parametrize("content", ["{}", '{"weight_map": ["a.safetensors"]}', '{"weight_map": {"weight": 1}}'])
    def test_index_without_a_map_is_refused(self, tmp_path: Path, content: str) -> None:
        (tmp_path / "model.safetensors.index.json").write_text(content)
        with pytest.raises(TeacherError, match=r"expected a weight_map, file names by tensor name, found none"):
            read_state_dict(tmp_path / "model.safetensors.index.json")


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


class Parts(nn.Module):
    """One of every kind of tensor that vision transformers and their stems hold."""

    def __init__(self) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.empty(1, 1, 64))
        self.reg_token = nn.Parameter(torch.empty(1, 4, 64))
        self.gamma = nn.Parameter(torch.empty(64))
        self.relative_position_bias_table = nn.Parameter(torch.empty(100, 4))
        self.q_bias = nn.Parameter(torch.empty(64))
        self.logit_scale = nn.Parameter(torch.empty(()))
        self.norm = nn.BatchNorm2d(64)
        self.register_buffer("periods", torch.logspace(0, 2, 16, device="cpu"))


def test_seeded_weights_suit_every_kind_of_tensor() -> None:
    with torch.device("meta"):
        module = Parts()
    load_weights(module, seeded_state(module), "t", "seed")
    state: dict[str, Tensor] = module.state_dict()
    for name in ("cls_token", "reg_token", "relative_position_bias_table"):
        assert state[name].std().item() == pytest.approx(0.02, rel=0.2)
    ones, zeros = (
        ("gamma", "logit_scale", "norm.weight", "norm.running_var"),
        ("q_bias", "norm.bias", "norm.running_mean"),
    )
    assert all(state[name].eq(1).all() for name in ones)
    assert all(state[name].eq(0).all() for name in zeros)
    assert state["norm.num_batches_tracked"].dtype == torch.int64
    assert state["norm.num_batches_tracked"].item() == 0
    assert torch.equal(state["periods"], torch.logspace(0, 2, 16))


def test_no_index_is_made_up() -> None:
    module = nn.Module()
    module.register_buffer("relative_position_index", torch.zeros(4, 4, dtype=torch.int64, device="meta"))
    with pytest.raises(TeacherError, match=r"relative_position_index: a table of integers cannot be made from a seed"):
        seeded_state(module)


def test_only_the_names_to_ignore_may_stay_unread() -> None:
    module = nn.Linear(2, 2)
    state = {"weight": torch.ones(2, 2), "bias": torch.zeros(2), "head.weight": torch.zeros(5, 2)}
    load_weights(module, state, "t", "f.pth", ignore=lambda key: key.startswith("head."))
    assert module.state_dict().keys() == {"weight", "bias"}
    assert module.weight.eq(1).all()
    with pytest.raises(TeacherError, match=r"not the weights of t: more found, but unknown to the architecture"):
        load_weights(
            module, {**state, "more": torch.zeros(1)}, "t", "f.pth", ignore=lambda key: key.startswith("head.")
        )
    with pytest.raises(TeacherError, match=r"not the weights of t: weight expected, but missing"):
        load_weights(module, {"bias": torch.zeros(2)}, "t", "f.pth", ignore=lambda key: True)


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

from __future__ import annotations

import inspect
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.utils import logging

from data.errors import TeacherError, UsageError, WeightsError
from features.registry import build_teacher
from features.teacher import Teacher

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
SMALL: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "patch_size": 16,
    "image_size": 64,
}  # fmt: skip
TEXT = {
    "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64, "vocab_size": 50,
    "bos_token_id": 0, "eos_token_id": 1,
}  # fmt: skip
BOTH = {"vision_config": SMALL, "text_config": TEXT}


class Family(NamedTuple):
    """What the library's pages say of a family.

    model: a class and the options of its config.  norm: the attribute that holds the final norm, empty where the tokens
    have none.  normed: whether last_hidden_state has passed it.
    """

    model: str
    options: dict[str, Any]
    num_prefix_tokens: int
    norm: str = "layernorm"
    normed: bool = True


FAMILIES = {
    "vit": Family("ViTModel", SMALL, 1),
    "vit_classifier": Family("ViTForImageClassification", SMALL, 1),
    "deit": Family("DeiTModel", SMALL, 2),
    "dinov2": Family("Dinov2Model", SMALL, 1),
    "dinov2_with_registers": Family("Dinov2WithRegistersModel", {**SMALL, "num_register_tokens": 3}, 4),
    "dinov3_vit": Family("DINOv3ViTModel", {**SMALL, "num_register_tokens": 2}, 3, "norm"),
    "ijepa": Family("IJepaModel", SMALL, 0),
    "siglip": Family("SiglipModel", BOTH, 0, "post_layernorm"),
    "siglip_vision": Family("SiglipVisionModel", SMALL, 0, "post_layernorm"),
    "clip": Family("CLIPModel", BOTH, 1, "post_layernorm", normed=False),
    "clip_vision": Family("CLIPVisionModel", SMALL, 1, "post_layernorm", normed=False),
    "data2vec": Family("Data2VecVisionModel", SMALL, 1, ""),
}
GRID = (4, 6)
CELLS = [(0, 0), (0, 5), (2, 4), (3, 0), (3, 5)]


@pytest.fixture(scope="module", autouse=True)
def _quiet() -> Iterator[None]:
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    yield
    logging.set_verbosity(verbosity)


def save_processor(folder: Path, **changes: Any) -> None:
    content = {"image_mean": MEAN, "image_std": STD, "resample": 3, "rescale_factor": 1 / 255, **changes}
    (folder / "preprocessor_config.json").write_text(json.dumps(content))


def make_model(model: str, options: dict[str, Any]) -> Any:
    model_class = getattr(transformers, model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        made = model_class(model_class.config_class(**options))
        # Norms as trained ones are: with weights 1 and biases 0, one too many would go unseen.
        for name, parameter in made.named_parameters():
            if parameter.ndim == 1 and "norm" in name:
                nn.init.normal_(parameter, mean=1.0 if name.endswith("weight") else 0.0, std=0.1)
    return made.eval()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Model folders as the library itself writes them."""
    made = {name: tmp_path_factory.mktemp(name) for name in FAMILIES}
    for name, folder in made.items():
        make_model(FAMILIES[name].model, FAMILIES[name].options).save_pretrained(folder)
        save_processor(folder)
    return made


def draw(teacher: Teacher, count: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(6)
    return torch.randint(0, 256, (count, *teacher.input.size, 3), dtype=torch.uint8, generator=generator)


def features_of(teacher: Teacher, images: Tensor) -> Tensor:
    return teacher(images).arrays()["features"]


@torch.no_grad()
def reference_tokens(name: str, folder: Path, images: Tensor, layer: int = 2, norm: bool = True) -> Tensor:
    """Tokens [B, T, C] of the library's own model, by its own forward."""
    family = FAMILIES[name]
    model = getattr(transformers, family.model).from_pretrained(folder).eval()
    tower = getattr(model, "vision_model", getattr(model, "vit", model))
    pixels = (images.permute(0, 3, 1, 2) / 255 - torch.tensor(MEAN).view(1, 3, 1, 1)) / torch.tensor(STD).view(
        1, 3, 1, 1
    )
    takes = inspect.signature(tower.forward).parameters
    options = {"interpolate_pos_encoding": True} if "interpolate_pos_encoding" in takes else {}
    output = tower(pixel_values=pixels, output_hidden_states=True, **options)
    raw: Tensor = output.hidden_states[layer]
    if not norm or not family.norm:
        return raw
    normed: Tensor = getattr(tower, family.norm)(raw)
    if layer == 2 and family.normed:
        assert torch.equal(normed, output.last_hidden_state)
    return normed


@pytest.mark.parametrize("name", FAMILIES)
class TestEveryFamily:
    @pytest.mark.parametrize(
        ("options", "layer", "norm"),
        [("", 2, True), (",norm=none", 2, False), (",layer=1", 1, True), (",layer=1,norm=none", 1, False)],
        ids=["default", "raw", "layer 1", "layer 1 raw"],
    )
    def test_features_are_the_patch_tokens_the_library_gives(
        self, folders: dict[str, Path], name: str, options: str, layer: int, norm: bool
    ) -> None:
        teacher = build_teacher(f"hf:{folders[name]}@grid=4x6{options}")
        images = draw(teacher)
        tokens = reference_tokens(name, folders[name], images, layer, norm)
        prefix = FAMILIES[name].num_prefix_tokens
        assert tokens.shape == (2, prefix + 24, 32)
        features = features_of(teacher, images)
        assert features.shape == (2, *GRID, 32)
        for row, column in CELLS:
            expected = tokens[:, prefix + GRID[1] * row + column]
            torch.testing.assert_close(features[:, row, column], expected, rtol=1e-4, atol=1e-4)

    def test_a_bright_blob_shows_in_its_own_cell(self, folders: dict[str, Path], name: str) -> None:
        teacher = build_teacher(f"hf:{folders[name]}@grid=4x6")
        images = torch.full((1 + len(CELLS), *teacher.input.size, 3), 110, dtype=torch.uint8)
        for image, (row, column) in zip(images[1:], CELLS, strict=True):
            image[16 * row : 16 * row + 16, 16 * column : 16 * column + 16] = 255
        features = features_of(teacher, images)
        changes = (features[1:] - features[:1]).norm(dim=-1)
        for change, (row, column) in zip(changes, CELLS, strict=True):
            assert divmod(int(change.argmax()), GRID[1]) == (row, column)
        swapped = changes[2].reshape(GRID[1], GRID[0]).T.reshape(-1)
        assert divmod(int(swapped.argmax()), GRID[1]) != CELLS[2]

    def test_untrained_builds_are_equal_and_leave_the_random_state_alone(
        self, folders: dict[str, Path], name: str
    ) -> None:
        before = torch.random.get_rng_state()
        first, second = (build_teacher(f"hf:{folders[name]}@grid=2x3", untrained=True) for _ in range(2))
        assert torch.equal(torch.random.get_rng_state(), before)
        assert first.untrained
        assert first.weights_source == "seed"
        assert first.identity() == second.identity()
        images = draw(first, 1)
        assert torch.equal(features_of(first, images), features_of(second, images))


def test_the_grid_is_that_of_the_frame_unless_told_otherwise(folders: dict[str, Path], tmp_path: Path) -> None:
    assert build_teacher(f"hf:{folders['vit']}").input.size == (480, 480)
    make_model("Dinov2Model", {**SMALL, "patch_size": 14, "image_size": 56}).save_pretrained(tmp_path)
    save_processor(tmp_path)
    teacher = build_teacher(f"hf:{tmp_path}")
    assert teacher.input.size == (420, 420)
    assert features_of(teacher, draw(teacher, 1)).shape == (1, 30, 30, 32)


def test_identity_says_what_was_read_and_not_where_it_lay(folders: dict[str, Path], tmp_path: Path) -> None:
    moved = shutil.copytree(folders["dinov2_with_registers"], tmp_path / "moved")
    first = build_teacher(f"hf:{folders['dinov2_with_registers']}@layer=2,grid=4x6")
    second = build_teacher(f"hf:{moved}@grid=4x6,layer=2")
    identity = first.identity()
    assert identity == second.identity()
    assert second.weights_source == str(moved / "model.safetensors")
    assert identity["spec"] == "hf:DIR@layer=2,grid=4x6"
    assert (identity["library"], identity["layer"], identity["norm"]) == (
        "transformers", "last block, patch tokens", "final LayerNorm",
    )  # fmt: skip
    assert (identity["mean"], identity["std"], identity["resample"]) == (list(MEAN), list(STD), "bicubic")
    assert identity["architecture"] == {
        "model_type": "dinov2_with_registers", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "patch_size": 16, "image_size": 64, "num_register_tokens": 3, "intermediate_size": 64,
    }  # fmt: skip
    assert json.loads(json.dumps(identity, allow_nan=False)) == identity
    assert str(folders["dinov2_with_registers"]) not in json.dumps(identity)


def test_a_model_that_norms_after_pooling_has_no_norm_to_apply(folders: dict[str, Path]) -> None:
    assert build_teacher(f"hf:{folders['data2vec']}@grid=4x6").norm == "none"
    with pytest.raises(UsageError, match=r"norms after pooling, its tokens have no final norm"):
        build_teacher(f"hf:{folders['data2vec']}@norm=final")


class TestLayouts:
    @pytest.mark.parametrize("layout", ["shards", "pytorch_model.bin", "half", "with the heads", "without the pooler"])
    def test_every_file_layout_of_the_same_weights_is_the_same_teacher(
        self, folders: dict[str, Path], tmp_path: Path, layout: str
    ) -> None:
        source = folders["vit"]
        shutil.copytree(source, tmp_path, dirs_exist_ok=True)
        state = load_file(source / "model.safetensors")
        (tmp_path / "model.safetensors").unlink()
        expected = build_teacher(f"hf:{source}@grid=4x6")
        if layout == "shards":
            transformers.ViTModel.from_pretrained(source).save_pretrained(tmp_path, max_shard_size="20KB")
            assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
        elif layout == "pytorch_model.bin":
            torch.save(state, tmp_path / "pytorch_model.bin")
        elif layout == "half":
            save_file({key: tensor.half() for key, tensor in state.items()}, tmp_path / "model.safetensors")
            save_file({key: tensor.half().float() for key, tensor in state.items()}, tmp_path / "rounded.safetensors")
            expected = build_teacher(f"hf:{source}@grid=4x6", weights=tmp_path / "rounded.safetensors")
        else:
            prefixed = {f"vit.{key}": tensor for key, tensor in state.items()}
            kept = {key: tensor for key, tensor in state.items() if not key.startswith("pooler")}
            heads = {"classifier.weight": torch.zeros(7, 32), "classifier.bias": torch.zeros(7)}
            save_file(prefixed | heads if "heads" in layout else kept, tmp_path / "model.safetensors")
        teacher = build_teacher(f"hf:{tmp_path}@grid=4x6")
        assert teacher.identity() == expected.identity()
        assert not teacher.untrained
        images = draw(teacher, 1)
        assert torch.equal(features_of(teacher, images), features_of(expected, images))

    def test_the_image_tower_alone_is_the_tower_of_the_whole(self, folders: dict[str, Path], tmp_path: Path) -> None:
        transformers.CLIPModel.from_pretrained(folders["clip"]).vision_model.save_pretrained(tmp_path)
        save_processor(tmp_path)
        whole, alone = (build_teacher(f"hf:{folder}@grid=4x6") for folder in (folders["clip"], tmp_path))
        assert alone.weights_digest == whole.weights_digest
        images = draw(whole, 1)
        assert torch.equal(features_of(alone, images), features_of(whole, images))

    def test_settings_inside_a_processor_config(self, folders: dict[str, Path], tmp_path: Path) -> None:
        shutil.copytree(folders["vit"], tmp_path, dirs_exist_ok=True)
        settings = json.loads((tmp_path / "preprocessor_config.json").read_text())
        (tmp_path / "preprocessor_config.json").unlink()
        (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": {**settings, "resample": 2}}))
        assert build_teacher(f"hf:{tmp_path}").input.resample == "bilinear"

    def test_images_that_are_not_normalised(self, folders: dict[str, Path], tmp_path: Path) -> None:
        shutil.copytree(folders["vit"], tmp_path, dirs_exist_ok=True)
        save_processor(tmp_path, do_normalize=False)
        teacher = build_teacher(f"hf:{tmp_path}")
        assert (teacher.input.mean, teacher.input.std) == ((0, 0, 0), (1, 1, 1))


class TestHub:
    REVISION = "0123456789abcdef0123456789abcdef01234567"

    @pytest.fixture
    def snapshot(self, unreachable_hub: Path) -> Path:
        """The folder of one repository in an otherwise empty cache."""
        repo = unreachable_hub / "models--somebody--vit"
        (repo / "refs").mkdir(parents=True)
        (repo / "refs" / "main").write_text(self.REVISION)
        return repo / "snapshots" / self.REVISION

    def test_cached_files_are_used_without_a_network(self, folders: dict[str, Path], snapshot: Path) -> None:
        shutil.copytree(folders["vit"], snapshot)
        teacher = build_teacher("hf:somebody/vit@grid=4x6")
        assert teacher.name == "hf:somebody/vit@grid=4x6"
        assert teacher.weights_source == f"somebody/vit model.safetensors at revision {self.REVISION}"
        assert teacher.weights_digest == build_teacher(f"hf:{folders['vit']}").weights_digest

    def test_cached_shards_are_used_and_a_missing_one_is_named(self, folders: dict[str, Path], snapshot: Path) -> None:
        shutil.copytree(folders["vit"], snapshot)
        (snapshot / "model.safetensors").unlink()
        transformers.ViTModel.from_pretrained(folders["vit"]).save_pretrained(snapshot, max_shard_size="20KB")
        digest = build_teacher(f"hf:{folders['vit']}").weights_digest
        assert build_teacher("hf:somebody/vit@grid=4x6").weights_digest == digest
        next(snapshot.glob("model-00001-*")).unlink()
        with pytest.raises(WeightsError, match=r"somebody/vit are not in the local hub cache"):
            build_teacher("hf:somebody/vit")

    @pytest.mark.parametrize("given", ["folder", "file"])
    def test_a_local_copy_stands_in_for_a_hub_id(
        self, folders: dict[str, Path], unreachable_hub: Path, given: str
    ) -> None:
        path = folders["vit"] if given == "folder" else folders["vit"] / "model.safetensors"
        teacher = build_teacher("hf:somebody/vit@grid=4x6", weights=path)
        assert teacher.name == "hf:somebody/vit@grid=4x6"
        assert teacher.weights_source == str(folders["vit"] / "model.safetensors")

    def test_an_unreachable_hub_is_an_error_that_names_the_way_on(self, unreachable_hub: Path) -> None:
        with pytest.raises(
            WeightsError, match=r"(?s)http://127\.0\.0\.1:9 does not answer.*--weights hf:some/vit=FOLDER"
        ):
            build_teacher("hf:some/vit")


class TestRefusals:
    @pytest.fixture
    def folder(self, folders: dict[str, Path], tmp_path: Path) -> Path:
        """A copy of a good folder, for a test to spoil."""
        return shutil.copytree(folders["vit"], tmp_path / "copy")

    def edit(self, path: Path, **changes: Any) -> None:
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    def test_code_of_the_folder_is_refused_by_name(self, folder: Path) -> None:
        self.edit(folder / "config.json", auto_map={"AutoModel": "modeling_own.OwnModel"})
        (folder / "modeling_own.py").write_text("raise SystemExit('this ran')\n")
        with pytest.raises(TeacherError, match=r"needs code from its folder \(auto_map\), which is never run"):
            build_teacher(f"hf:{folder}")

    @pytest.mark.parametrize("argument", ["./nowhere", "/nowhere/at/all", "a/b/c", "~nobody-here/x"])
    def test_what_is_neither_a_folder_nor_a_hub_id(self, argument: str) -> None:
        with pytest.raises(UsageError, match=r"no such folder"):
            build_teacher(f"hf:{argument}")

    @pytest.mark.parametrize(
        ("missing", "message"),
        [
            ("config.json", r"expected a model folder of transformers, with config\.json, found none"),
            ("preprocessor_config.json", r"with preprocessor_config\.json or processor_config\.json, found none"),
            ("model.safetensors", r"expected model\.safetensors or .* in the folder, found neither"),
        ],
    )
    def test_a_folder_that_lacks_a_file(self, folder: Path, missing: str, message: str) -> None:
        (folder / missing).unlink()
        with pytest.raises(TeacherError, match=message):
            build_teacher(f"hf:{folder}")

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"model_type": "nonsense"}, r"knows no model_type 'nonsense'"),
            ({"model_type": None}, r"knows no model_type None"),
            ({"hidden_size": "wide"}, r"cannot be read as the config of a vit"),
            (
                {"patch_size": [16, 16]},
                r"expected a vision transformer, found model_type 'vit' with patch_size \[16, 16",
            ),
            ({"num_channels": 4}, r"expected a model of RGB images, found 4 channels"),
            ({"num_hidden_layers": 3}, r"layers\.2\..* expected, but missing"),
            ({"num_hidden_layers": 1}, r"layer\w*\.1\..* found, but unknown to the architecture"),
            ({"hidden_size": 48}, r"(?s)the shape of .* differs \(.*expected \[.*48.*\], found \[.*32.*\]\)"),
        ],
        ids=lambda value: str(value) if isinstance(value, dict) else "",
    )
    def test_a_config_that_does_not_fit(self, folder: Path, changes: dict[str, Any], message: str) -> None:
        self.edit(folder / "config.json", **changes)
        with pytest.raises(TeacherError, match=message):
            build_teacher(f"hf:{folder}")

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"resample": 1}, r"expected resample 2 \(bilinear\) or 3 \(bicubic\), found 1"),
            ({"resample": None}, r"expected resample .* found None"),
            ({"image_mean": None}, r"expected image_mean with three numbers, found None"),
            ({"image_std": [0.5]}, r"expected image_std with three numbers, found \[0\.5\]"),
            ({"rescale_factor": 1 / 127.5}, r"expected rescale_factor 1/255, found 0\.0078"),
        ],
        ids=lambda value: str(value) if isinstance(value, dict) else "",
    )
    def test_a_processor_that_prepares_images_otherwise(
        self, folder: Path, changes: dict[str, Any], message: str
    ) -> None:
        save_processor(folder, **changes)
        with pytest.raises(TeacherError, match=message):
            build_teacher(f"hf:{folder}")

    @pytest.mark.parametrize(
        ("config", "options", "message"),
        [
            ("BertConfig", {**TEXT, "vocab_size": 50}, r"expected a vision transformer, found model_type 'bert'"),
            ("ConvNextConfig", {}, r"expected a vision transformer, found model_type 'convnext'"),
            ("SwinConfig", {"depths": [1, 1], "num_heads": [1, 1], "embed_dim": 8}, r"SwinModel"),
            ("ViTMAEConfig", SMALL, r"expected one token for each of 30×30 patches.*ViTMAEModel gives \[226, 32\]"),
            ("YolosConfig", {**SMALL, "image_size": [64, 64]}, r"row by row behind a prefix; YolosModel gives"),
            ("Siglip2VisionConfig", SMALL, r"Siglip2VisionModel cannot be run on a 30×30 grid"),
        ],
    )
    def test_models_whose_output_is_no_grid_of_patches(
        self, tmp_path: Path, config: str, options: dict[str, Any], message: str
    ) -> None:
        getattr(transformers, config)(**options).save_pretrained(tmp_path)
        save_processor(tmp_path)
        with pytest.raises(TeacherError, match=message):
            build_teacher(f"hf:{tmp_path}", untrained=True)

    def test_weights_of_another_family(self, folders: dict[str, Path]) -> None:
        with pytest.raises(TeacherError, match=r"these are not the weights of hf:.*expected, but missing"):
            build_teacher(f"hf:{folders['vit']}", weights=folders["clip"] / "model.safetensors")

    def test_a_layer_that_the_model_does_not_have(self, folders: dict[str, Path]) -> None:
        with pytest.raises(UsageError, match=r"expected a layer from 1 to 2, found 3"):
            build_teacher(f"hf:{folders['vit']}@layer=3")

    def test_a_grid_too_fine_for_the_patches(self, folder: Path) -> None:
        self.edit(folder / "config.json", patch_size=32)
        with pytest.raises(UsageError, match=r"(?s)40×40 cells at patch size 32 .*grid=32x32"):
            build_teacher(f"hf:{folder}@grid=40")

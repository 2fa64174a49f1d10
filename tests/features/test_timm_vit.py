from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor

from data.errors import TeacherError, UsageError, WeightsError
from features import timm_vit
from features.registry import build_teacher
from features.teacher import Teacher, weights_digest

# Name, what timm is told so that its own model takes any size, and the tokens that stand before the patches.
RESIZED = {"dynamic_img_size": True}
MODELS: dict[str, tuple[dict[str, Any], int]] = {
    "test_vit": (RESIZED, 1),
    "deit_tiny_distilled_patch16_224": (RESIZED, 2),  # CLS and the distillation token
    "vit_small_patch16_dinov3": (RESIZED, 5),  # CLS, four registers, rotary positions
    "eva02_tiny_patch14_224": (RESIZED, 1),  # learnt and rotary positions, patch 14, norm after pooling
    "test_vit_relpos": ({"img_size": (96, 144)}, 0),  # relative positions: timm's own model is built at the size
}
GRID = (6, 9)
CELLS = [(0, 0), (0, 8), (2, 7), (5, 0), (5, 8)]


class Reference:
    """timm's own model with random weights, and those weights in a file as the hub has them, heads included."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        options, self.num_prefix_tokens = MODELS[name]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            self.trained = timm.create_model(name)
        self.path = folder / f"{name}.safetensors"
        state = {key: tensor.contiguous() for key, tensor in self.trained.state_dict().items()}
        save_file(state, self.path)
        with torch.random.fork_rng(devices=[]):
            self.model: Any = timm.create_model(name, num_classes=0, **options).eval()
        self.model.load_state_dict({key: state[key] for key in self.model.state_dict()})

    def teacher(self, options: str = "grid=6x9") -> Teacher:
        return build_teacher(f"timm:{self.name}@{options}", weights=self.path)

    @torch.no_grad()
    def tokens(self, images: Tensor, num_blocks: int | None = None, norm: bool = True) -> Tensor:
        """Patch tokens [B, Gh·Gw, C], block by block through timm's modules."""
        model, cfg = self.model, self.model.pretrained_cfg
        mean, std = (torch.tensor(cfg[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
        tokens = model.patch_embed((images.permute(0, 3, 1, 2) / 255 - mean) / std)
        extra: dict[str, Any] = {}
        if self.name == "test_vit_relpos":
            extra = {"shared_rel_pos": model.shared_rel_pos}
        elif isinstance(model, timm.models.Eva):
            tokens, extra["rope"] = model._pos_embed(tokens)
        else:
            tokens = model._pos_embed(tokens)
        if hasattr(model, "norm_pre"):
            tokens = model.norm_pre(tokens)
        for block in model.blocks[:num_blocks]:
            tokens = block(tokens, **extra)
        tokens = model.norm(tokens) if norm else tokens
        return tokens[:, self.num_prefix_tokens :]


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Reference]:
    folder = tmp_path_factory.mktemp("timm")
    return {name: Reference(name, folder) for name in MODELS}


def draw(teacher: Teacher, count: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(8)
    return torch.randint(0, 256, (count, *teacher.input.size, 3), dtype=torch.uint8, generator=generator)


def features_of(teacher: Teacher, images: Tensor) -> Tensor:
    return teacher(images).arrays()["features"]


@pytest.mark.parametrize("name", MODELS)
class TestEveryKind:
    def test_features_are_the_patch_tokens_timm_gives(self, references: dict[str, Reference], name: str) -> None:
        teacher = references[name].teacher()
        images = draw(teacher)
        tokens = references[name].tokens(images)
        features = features_of(teacher, images)
        assert features.shape == (2, *GRID, tokens.shape[-1])
        for row, column in CELLS:
            expected = tokens[:, GRID[1] * row + column]
            torch.testing.assert_close(features[:, row, column], expected, rtol=1e-4, atol=1e-4)

    def test_a_bright_blob_shows_in_its_own_cell(self, references: dict[str, Reference], name: str) -> None:
        teacher = references[name].teacher()
        size = teacher.input.size[0] // GRID[0]
        images = torch.full((1 + len(CELLS), *teacher.input.size, 3), 110, dtype=torch.uint8)
        for image, (row, column) in zip(images[1:], CELLS, strict=True):
            image[row * size : (row + 1) * size, column * size : (column + 1) * size] = 255
        features = features_of(teacher, images)
        changes = (features[1:] - features[:1]).norm(dim=-1)
        for change, (row, column) in zip(changes, CELLS, strict=True):
            assert divmod(int(change.argmax()), GRID[1]) == (row, column)
        swapped = changes[2].reshape(GRID[1], GRID[0]).T.reshape(-1)
        assert divmod(int(swapped.argmax()), GRID[1]) != CELLS[2]

    def test_digest_is_that_of_the_weights_at_their_own_size(self, references: dict[str, Reference], name: str) -> None:
        with torch.device("meta"):
            names = timm.create_model(name, num_classes=0).state_dict()
        state = references[name].trained.state_dict()
        assert references[name].teacher().weights_digest == weights_digest({key: state[key] for key in names})

    def test_untrained_builds_are_equal_and_leave_the_random_state_alone(
        self, references: dict[str, Reference], name: str
    ) -> None:
        before = torch.random.get_rng_state()
        first, second = (build_teacher(f"timm:{name}@grid=2x3", untrained=True) for _ in range(2))
        assert torch.equal(torch.random.get_rng_state(), before)
        assert first.identity() == second.identity()
        assert json.loads(json.dumps(first.identity(), allow_nan=False)) == first.identity()
        images = draw(first, 1)
        assert torch.equal(features_of(first, images), features_of(second, images))


@pytest.mark.parametrize("name", ["test_vit", "vit_small_patch16_dinov3"])
def test_layer_and_norm_choose_what_is_read(references: dict[str, Reference], name: str) -> None:
    reference = references[name]
    for options, num_blocks, norm in [
        ("layer=2", 2, True),
        ("layer=2,norm=none", 2, False),
        ("norm=none", None, False),
    ]:
        teacher = reference.teacher(f"{options},grid=6x9")
        images = draw(teacher, 1)
        tokens = reference.tokens(images, num_blocks, norm).reshape(1, *GRID, -1)
        torch.testing.assert_close(features_of(teacher, images), tokens, rtol=1e-4, atol=1e-4)


def test_layer_and_norm_stand_in_the_identity() -> None:
    found = {
        options: build_teacher(f"timm:test_vit@grid=2x2{options}", untrained=True).identity()
        for options in ("", ",layer=6", ",layer=2", ",norm=none", ",norm=final")
    }
    assert [(identity["layer"], identity["norm"]) for identity in found.values()] == [
        ("last block, patch tokens", "final LayerNorm"),
        ("last block, patch tokens", "final LayerNorm"),
        ("block 2 of 6, patch tokens", "final LayerNorm"),
        ("last block, patch tokens", "none"),
        ("last block, patch tokens", "final LayerNorm"),
    ]


@pytest.mark.parametrize(
    ("name", "size"), [("test_vit", (480, 480)), ("eva02_tiny_patch14_224", (420, 420))], ids=["patch 16", "patch 14"]
)
def test_the_grid_is_that_of_the_frame_unless_told_otherwise(name: str, size: tuple[int, int]) -> None:
    teacher = build_teacher(f"timm:{name}", untrained=True)
    assert teacher.patch_grid == (30, 30)
    assert teacher.input.size == size
    assert features_of(teacher, draw(teacher, 1)).shape[1:3] == (30, 30)


def test_a_model_that_norms_after_pooling_has_no_norm_to_apply(references: dict[str, Reference]) -> None:
    assert references["eva02_tiny_patch14_224"].teacher().norm == "none"
    with pytest.raises(UsageError, match=r"norms after pooling, its tokens have no final norm"):
        build_teacher("timm:eva02_tiny_patch14_224@norm=final", untrained=True)


def test_the_tag_chooses_mean_and_std() -> None:
    spec = "timm:vit_small_patch16_224"
    dino, augreg = (build_teacher(f"{spec}.{tag}", untrained=True) for tag in ("dino", "augreg_in21k_ft_in1k"))
    assert (dino.input.mean, dino.input.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert (augreg.input.mean, augreg.input.std) == ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    assert (dino.input.resample, dino.architecture) == ("bicubic", augreg.architecture)
    assert dino.architecture["model"] == "vit_small_patch16_224"


class TestWeights:
    @pytest.mark.parametrize(
        "layout", ["model.safetensors", "pytorch_model.bin", "any.pth", "without_head.safetensors"]
    )
    def test_every_file_layout_of_the_same_weights_is_the_same_teacher(
        self, references: dict[str, Reference], tmp_path: Path, layout: str
    ) -> None:
        reference = references["test_vit"]
        kept = (reference.model if layout.startswith("without") else reference.trained).state_dict()
        path = tmp_path / layout
        if path.suffix == ".safetensors":
            save_file(kept, path)
        else:
            torch.save(kept, path)
        folder = layout in ("model.safetensors", "pytorch_model.bin")
        teacher = build_teacher("timm:test_vit@grid=6x9", weights=tmp_path if folder else path)
        assert teacher.identity() == reference.teacher().identity()
        assert teacher.weights_source == str(path)
        assert not teacher.untrained

    def test_cached_weights_are_used_without_a_network(
        self, references: dict[str, Reference], unreachable_hub: Path
    ) -> None:
        revision = "0123456789abcdef0123456789abcdef01234567"
        repo = unreachable_hub / "models--timm--test_vit.r160_in1k"
        snapshot = repo / "snapshots" / revision
        snapshot.mkdir(parents=True)
        (repo / "refs").mkdir()
        (repo / "refs" / "main").write_text(revision)
        (snapshot / "model.safetensors").write_bytes(references["test_vit"].path.read_bytes())
        teacher = build_teacher("timm:test_vit@grid=6x9")
        assert teacher.weights_digest == references["test_vit"].teacher().weights_digest
        assert teacher.weights_source == (
            f"timm/test_vit.r160_in1k model.safetensors at revision {revision}, licence apache-2.0"
        )

    def test_an_unreachable_hub_is_an_error_that_names_the_ways_on(self, unreachable_hub: Path) -> None:
        with pytest.raises(
            WeightsError, match=r"(?s)timm/test_vit\.r160_in1k .*--weights timm:test_vit=PATH.*--untrai"
        ):
            build_teacher("timm:test_vit")

    def test_a_model_nobody_has_trained_is_an_error_that_names_the_ways_on(self) -> None:
        with pytest.raises(TeacherError, match=r"(?s)names no trained weights .*--weights timm:vit_giant.*--untrained"):
            build_teacher("timm:vit_giant_patch14_224")

    def test_weights_of_another_width(self, references: dict[str, Reference]) -> None:
        message = (
            r"not the weights of timm:test_vit3: the shape of .* differs \(expected \[.*96.*\], found \[.*64.*\]\)"
        )
        with pytest.raises(TeacherError, match=message):
            build_teacher("timm:test_vit3", weights=references["test_vit"].path)

    def test_weights_of_a_deeper_model(self, references: dict[str, Reference], tmp_path: Path) -> None:
        state = references["test_vit"].trained.state_dict()
        last = {key: tensor.clone() for key, tensor in state.items() if "blocks.5." in key}
        deeper = {key.replace("blocks.5.", "blocks.6."): tensor for key, tensor in last.items()}
        save_file({**state, **deeper}, tmp_path / "deeper.safetensors")
        with pytest.raises(TeacherError, match=r"blocks\.6\..* found, but unknown to the architecture"):
            build_teacher("timm:test_vit", weights=tmp_path / "deeper.safetensors")


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        ("timm:vit_smal_patch16_dinov3", UsageError, r"(?s)has no model .*did you mean timm:vit_small_patch16_dinov3"),
        ("timm:hf-hub:somebody/something", UsageError, r"has no model 'hf-hub:somebody/something'"),
        ("timm:test_vit.nonsense", UsageError, r"no weights 'nonsense' of test_vit; expected one of r160_in1k"),
        ("timm:resnet18", TeacherError, r"expected a plain vision transformer, found timm's ResNet"),
        ("timm:swin_tiny_patch4_window7_224", TeacherError, r"plain vision transformer, found timm's SwinTransformer"),
        ("timm:vit_tiny_r_s16_p8_224", TeacherError, r"square RGB patches side by side, found HybridEmbed"),
        ("timm:test_vit@layer=7", UsageError, r"expected a layer from 1 to 6, found 7"),
        ("timm:test_vit@grid=64x65", UsageError, r"expected 1 to 64 cells"),
        ("timm:vit_base_patch32_224@grid=33", UsageError, r"(?s)patch size 32 needs .*grid=32x32"),
    ],
)  # fmt: skip
def test_what_cannot_be_a_teacher_is_refused(spec: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        build_teacher(spec, untrained=True)


def test_a_resize_filter_that_we_do_not_have_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    build_on_meta = timm_vit._build_on_meta

    def with_lanczos(argument: str, spec: str) -> Any:
        model = build_on_meta(argument, spec)
        model.pretrained_cfg["interpolation"] = "lanczos"
        return model

    monkeypatch.setattr(timm_vit, "_build_on_meta", with_lanczos)
    with pytest.raises(TeacherError, match=r"expected images resized bilinear or bicubic, found lanczos"):
        build_teacher("timm:test_vit", untrained=True)


def test_caches_that_timm_cannot_compute_anew_are_refused() -> None:
    class Table(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("index", torch.empty(3, device="meta"), persistent=False)

    with pytest.raises(TeacherError, match=r"this release of timm cannot compute index anew"):
        timm_vit._fill_caches(torch.nn.Sequential(Table()), "timm:x")

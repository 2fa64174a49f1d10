"""open_clip:ARCH/PRETRAINED: every kind of network against open_clip's own recipe; names, tokenizers, preprocessing."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, RobertaConfig

from data.errors import TeacherError, UsageError, WeightsError
from data.images import squash
from data.records import VOC_CLASSES
from features.open_clip_models import OpenClipModel, find_model
from features.prompts import DEFAULT_PROMPTS
from features.registry import TeacherRequest, build_teacher, find_entry
from features.spec import parse_spec
from features.teacher import draw_probe_image, weights_digest
from features.zero_shot import ZeroShotTeacher

REVISION = "0123456789abcdef0123456789abcdef01234567"
SENTENCES = [sentence for name in DEFAULT_PROMPTS.class_names for sentence in DEFAULT_PROMPTS.sentences_of(name)]
WORDS = sorted({word for sentence in SENTENCES for word in sentence.replace(".", "").replace(",", "").split()})
VOCABULARY = ["</s>", "<pad>", "<unk>", *WORDS, *(name for name in VOC_CLASSES if name not in WORDS)]

VISION = {"image_size": 64, "layers": 2, "width": 128, "patch_size": 16}
TEXT = {"width": 64, "heads": 2, "layers": 2}
BIDIRECTIONAL = {
    "context_length": 24, "vocab_size": len(VOCABULARY), "hf_tokenizer_name": "nobody/words",
    "no_causal_mask": True, "pool_type": "last", **TEXT,
}  # fmt: skip
# One small network of every kind that open_clip builds, configured as its model of that kind is.
CONFIGS: dict[str, dict[str, Any]] = {
    "small-vit": {"embed_dim": 48, "quick_gelu": True, "vision_cfg": VISION, "text_cfg": TEXT},
    "small-sigmoid": {
        "embed_dim": 64,
        "init_logit_bias": -10,
        "custom_text": True,
        "vision_cfg": {
            "image_size": 160, "timm_model_name": "test_vit", "timm_model_pretrained": False,
            "timm_pool": "map", "timm_proj": "none",
        },
        "text_cfg": {**BIDIRECTIONAL, "tokenizer_kwargs": {"clean": "canonicalize"}, "proj_bias": True},
    },
    "small-clipa": {
        "embed_dim": 48,
        "vision_cfg": {**VISION, "no_ln_pre": True, "pool_type": "avg", "final_ln_after_pool": True},
        "text_cfg": BIDIRECTIONAL,
    },
    # Each lacks one of the two things that let a text tower be cut behind the longest sentence.
    "small-unmasked": {"embed_dim": 48, "vision_cfg": VISION, "text_cfg": {**TEXT, "no_causal_mask": True}},
    "small-eos": {
        "embed_dim": 48,
        "vision_cfg": VISION,
        "text_cfg": {**BIDIRECTIONAL, "no_causal_mask": False, "pool_type": "eos", "eos_id": 0},
    },
    "small-resnet": {
        "embed_dim": 48,
        "quick_gelu": True,
        "vision_cfg": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 32, "patch_size": None},
        "text_cfg": {"context_length": 40, **TEXT},
    },
    "small-custom": {"embed_dim": 48, "custom_text": True, "vision_cfg": VISION, "text_cfg": TEXT},
    "small-coca": {
        "embed_dim": 48,
        "custom_text": True,
        "vision_cfg": {**VISION, "attentional_pool": True, "attn_pooler_heads": 2, "output_tokens": True},
        "text_cfg": {"context_length": 76, "embed_cls": True, "output_tokens": True, **TEXT},
        "multimodal_cfg": {"context_length": 76, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 1},
    },
}  # fmt: skip
HALVES = {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5], "interpolation": "bilinear", "resize_mode": "shortest"}


def save_tokenizer(folder: Path, words: Sequence[str] = VOCABULARY) -> None:
    """A tokenizer of whole words in transformers' file layout."""
    tokenizer = Tokenizer(models.WordLevel({word: row for row, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 0)])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    ).save_pretrained(folder)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders as clones of hub repositories are: configuration, weights that open_clip initialised, tokenizer."""
    made = {}
    for architecture, config in CONFIGS.items():
        folder = tmp_path_factory.mktemp("clones") / architecture
        folder.mkdir()
        registered = folder.parent / f"{architecture}.json"
        registered.write_text(json.dumps(config))
        open_clip.add_model_config(registered)
        preprocess = {"preprocess_cfg": HALVES} if architecture == "small-sigmoid" else {}
        (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, **preprocess}))
        if "hf_tokenizer_name" in config["text_cfg"]:
            save_tokenizer(folder)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(11)
            model = open_clip.create_model(architecture)
            torch.nn.init.constant_(model.logit_scale, 3.0)
            if architecture == "small-coca":  # the library leaves it as the memory was
                torch.nn.init.normal_(model.text.cls_emb, std=0.01)
        state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
        if architecture == "small-custom":  # the layout of a plain CLIP, which has no text tower of its own
            state = {name.removeprefix("text."): tensor for name, tensor in state.items()}
        save_file(state, folder / "open_clip_model.safetensors")
        made[architecture] = folder
    return made


Hub = Callable[[str], Path]


@pytest.fixture
def hub(unreachable_hub: Path) -> Hub:
    """Makes an empty repository in a local cache of the hub, which itself is unreachable."""

    def make(name: str) -> Path:
        repository = unreachable_hub / f"models--{name.replace('/', '--')}"
        (repository / "refs").mkdir(parents=True)
        (repository / "refs" / "main").write_text(REVISION)
        snapshot = repository / "snapshots" / REVISION
        snapshot.mkdir(parents=True)
        return snapshot

    return make


@pytest.mark.parametrize("architecture", CONFIGS)
def test_logits_follow_open_clips_recipe(folders: dict[str, Path], architecture: str) -> None:
    folder = folders[architecture]
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{folder}", image_resize_mode="squash")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    image = draw_probe_image()
    with torch.no_grad():
        text = model.eval().encode_text(tokenizer(SENTENCES), normalize=True)
        classes = text.view(20, len(DEFAULT_PROMPTS.templates), -1).mean(dim=1)
        classes /= classes.norm(dim=-1, keepdim=True)
        embedding = model.encode_image(transform(image)[None], normalize=True)[0]
        logits = model.logit_scale.exp() * classes @ embedding
        if model.logit_bias is not None:
            logits = logits + model.logit_bias

    teacher = build_teacher(f"open_clip:{architecture}", weights=folder)
    assert isinstance(teacher, ZeroShotTeacher)
    output = teacher(torch.from_numpy(squash(image, teacher.input.size, teacher.input.resample))[None])
    assert teacher.text_embeddings is not None
    assert output.embeddings is not None
    assert output.logits is not None
    np.testing.assert_allclose(teacher.text_embeddings, classes.numpy(), atol=1e-5)
    torch.testing.assert_close(output.embeddings[0], embedding, rtol=0, atol=1e-5)
    torch.testing.assert_close(output.logits[0], logits, rtol=0, atol=1e-4)
    assert len(set(map(tuple, teacher.text_embeddings.tolist()))) == 20
    assert teacher.weights_digest == weights_digest(model)
    assert list(teacher.input.mean) == list(model.visual.preprocess_cfg["mean"])
    assert list(teacher.input.std) == list(model.visual.preprocess_cfg["std"])
    assert teacher.input.resample == model.visual.preprocess_cfg["interpolation"]


def test_a_sigmoid_model_keeps_bias_normalisation_and_tokenizer_in_its_identity(folders: dict[str, Path]) -> None:
    identity = build_teacher("open_clip:small-sigmoid", weights=folders["small-sigmoid"]).identity()
    assert identity["spec"] == "open_clip:small-sigmoid"
    assert identity["logit_scale"] == pytest.approx(np.exp(3.0))
    assert identity["logit_bias"] == -10.0
    assert (identity["mean"], identity["std"], identity["resample"]) == ([0.5] * 3, [0.5] * 3, "bilinear")
    assert identity["input_size"] == [160, 160]
    assert identity["tokenizer"].startswith("nobody/words, context 24, vocabulary ")
    assert json.loads(json.dumps(identity, allow_nan=False)) == identity


@pytest.mark.parametrize("architecture", ["small-vit", "small-resnet", "small-coca"])
def test_untrained_networks_are_the_same_every_time_and_use_no_global_random_state(
    folders: dict[str, Path], architecture: str
) -> None:
    before = torch.random.get_rng_state(), repr(np.random.get_state()), random.getstate()
    first, second = (build_teacher(f"open_clip:{architecture}", untrained=True) for _ in range(2))
    assert torch.equal(before[0], torch.random.get_rng_state())
    assert before[1:] == (repr(np.random.get_state()), random.getstate())
    assert first.identity() == second.identity()
    assert first.untrained
    generator = torch.Generator().manual_seed(3)
    images = torch.randint(0, 256, (2, 64, 64, 3), dtype=torch.uint8, generator=generator)
    logits = first(images).arrays()["logits"]
    assert torch.equal(logits, second(images).arrays()["logits"])
    assert logits.isfinite().all()
    assert not torch.equal(logits[0], logits[1])


def test_untrained_sigmoid_model_starts_at_its_own_bias(folders: dict[str, Path], hub: Hub) -> None:
    save_tokenizer(hub("nobody/words"))
    teacher = build_teacher("open_clip:small-sigmoid", untrained=True)
    assert teacher.identity()["logit_bias"] == -10.0
    # Neither named weights nor a folder say how images are prepared: open_clip's default holds.
    assert teacher.input.mean == tuple(open_clip.OPENAI_DATASET_MEAN)


@pytest.fixture
def tagged(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Gives one of the small architectures weights with a tag, as open_clip lists them."""
    from open_clip import pretrained

    def add(architecture: str, **said: Any) -> None:
        listed = {"url": "", "hf_hub": "", **HALVES, **said}
        monkeypatch.setitem(pretrained._PRETRAINED, architecture, {"webli": listed})

    return add


class TestWeights:
    def test_named_weights_and_tokenizer_come_from_the_hubs_cache(
        self, folders: dict[str, Path], hub: Hub, tagged: Callable[..., None]
    ) -> None:
        tagged("small-sigmoid", hf_hub="nobody/small-sigmoid/")
        folder = folders["small-sigmoid"]
        shutil.copy(folder / "open_clip_model.safetensors", hub("nobody/small-sigmoid"))
        save_tokenizer(hub("nobody/words"))
        teacher = build_teacher("open_clip:small-sigmoid/webli")
        of_folder = build_teacher("open_clip:small-sigmoid", weights=folder)
        assert teacher.weights_source == f"nobody/small-sigmoid open_clip_model.safetensors at revision {REVISION}"
        assert teacher.identity() == of_folder.identity() | {"spec": "open_clip:small-sigmoid/webli"}
        np.testing.assert_array_equal(teacher.text_embeddings, of_folder.text_embeddings)

    def test_a_hub_file_of_another_name_is_found(
        self, folders: dict[str, Path], hub: Hub, tagged: Callable[..., None]
    ) -> None:
        tagged("small-vit", hf_hub="nobody/small-vit/pytorch_model.bin", quick_gelu=True)
        model = open_clip.create_model(f"local-dir:{folders['small-vit']}")
        torch.save(model.state_dict(), hub("nobody/small-vit") / "pytorch_model.bin")
        assert build_teacher("open_clip:small-vit/webli").weights_digest == weights_digest(model)

    def test_weights_that_only_have_an_address_are_asked_for(
        self, folders: dict[str, Path], tagged: Callable[..., None]
    ) -> None:
        tagged("small-vit", url="https://example.org/small.pt", quick_gelu=True)
        with pytest.raises(TeacherError, match=r"only https://example\.org/small\.pt") as caught:
            build_teacher("open_clip:small-vit/webli")
        assert caught.value.hint is not None
        assert "--weights open_clip:small-vit/webli=PATH" in caught.value.hint

    @pytest.mark.parametrize("layout", ["several processes", "scalars with an axis"])
    def test_other_layouts_of_the_same_weights_are_the_same_teacher(
        self, folders: dict[str, Path], tmp_path: Path, layout: str
    ) -> None:
        folder = shutil.copytree(folders["small-sigmoid"], tmp_path / "clone")
        reference = build_teacher("open_clip:small-sigmoid", weights=folder)
        state = dict(open_clip.create_model(f"local-dir:{folder}").state_dict())
        if layout == "several processes":
            state = {f"module.{name}": tensor for name, tensor in state.items()}
        else:
            state |= {name: state[name].reshape(1) for name in ("logit_scale", "logit_bias")}
        (folder / "open_clip_model.safetensors").unlink()
        torch.save(state, folder / "open_clip_pytorch_model.bin")
        assert build_teacher("open_clip:small-sigmoid", weights=folder).identity() == reference.identity()

    def test_weights_of_another_size_are_refused_and_not_resized(
        self, folders: dict[str, Path], tmp_path: Path
    ) -> None:
        state = dict(open_clip.create_model(f"local-dir:{folders['small-vit']}").state_dict())
        torch.save(state | {"positional_embedding": state["positional_embedding"][:40]}, tmp_path / "w.pt")
        with pytest.raises(
            TeacherError, match=r"positional_embedding differs \(expected \[77, 64\], found \[40, 64\]\)"
        ):
            build_teacher("open_clip:small-vit", weights=tmp_path / "w.pt")

    def test_a_folder_that_prepares_images_differently_is_refused(
        self, folders: dict[str, Path], tagged: Callable[..., None]
    ) -> None:
        tagged("small-sigmoid", hf_hub="nobody/small-sigmoid/", mean=(0.0, 0.0, 0.0))
        with pytest.raises(TeacherError) as caught:
            build_teacher("open_clip:small-sigmoid/webli", weights=folders["small-sigmoid"])
        assert "preprocess_cfg.mean: expected (0.0, 0.0, 0.0), found [0.5, 0.5, 0.5]" in caught.value.message

    def test_a_text_tower_of_transformers_is_described_by_the_hubs_cache(
        self, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        config = {
            "embed_dim": 48,
            "vision_cfg": VISION,
            "text_cfg": {"hf_model_name": "nobody/roberta", "hf_tokenizer_name": "nobody/words", "context_length": 24},
        }
        (tmp_path / "small-roberta.json").write_text(json.dumps(config))
        open_clip.add_model_config(tmp_path / "small-roberta.json")
        save_tokenizer(hub("nobody/words"))
        with pytest.raises(WeightsError, match="nobody/roberta are not in the local hub cache"):
            build_teacher("open_clip:small-roberta", untrained=True)
        RobertaConfig(
            vocab_size=len(VOCABULARY), hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
            intermediate_size=64, max_position_embeddings=40, pad_token_id=1,
        ).save_pretrained(hub("nobody/roberta"))  # fmt: skip
        teacher = build_teacher("open_clip:small-roberta", untrained=True)
        assert teacher.text_embeddings is not None
        assert teacher.text_embeddings.shape == (20, 48)
        assert str(tmp_path) not in json.dumps(teacher.identity())


class TestTokenizer:
    def test_one_that_is_not_here_names_the_ways_on(self, folders: dict[str, Path], unreachable_hub: Path) -> None:
        with pytest.raises(WeightsError, match="its tokenizer nobody/words is not in the local hub cache") as caught:
            build_teacher("open_clip:small-sigmoid", untrained=True)
        assert caught.value.hint is not None
        assert "--weights open_clip:small-sigmoid=FOLDER" in caught.value.hint

    def test_a_cached_configuration_alone_is_no_tokenizer(self, folders: dict[str, Path], hub: Hub) -> None:
        # transformers would make an empty vocabulary of it.
        RobertaConfig().save_pretrained(hub("nobody/words"))
        with pytest.raises(WeightsError, match="nobody/words is not in the local hub cache"):
            build_teacher("open_clip:small-sigmoid", untrained=True)

    def test_one_without_words_is_refused(self, folders: dict[str, Path], hub: Hub) -> None:
        save_tokenizer(hub("nobody/words"), VOCABULARY[:3])
        with pytest.raises(TeacherError, match="does not tell the VOC classes apart"):
            build_teacher("open_clip:small-sigmoid", untrained=True)

    def test_a_damaged_one_in_the_folder_is_refused(self, folders: dict[str, Path], tmp_path: Path) -> None:
        folder = shutil.copytree(folders["small-sigmoid"], tmp_path / "clone")
        (folder / "tokenizer.json").write_text("{}")
        with pytest.raises(TeacherError, match="the tokenizer in it cannot be used"):
            build_teacher("open_clip:small-sigmoid", weights=folder)

    def test_another_vocabulary_is_another_teacher(self, folders: dict[str, Path], tmp_path: Path) -> None:
        folder = shutil.copytree(folders["small-sigmoid"], tmp_path / "clone")
        written = json.loads((folder / "tokenizer.json").read_text())
        words = written["model"]["vocab"]
        words["cat"], words["dog"] = words["dog"], words["cat"]
        (folder / "tokenizer.json").write_text(json.dumps(written))
        swapped = build_teacher("open_clip:small-sigmoid", weights=folder).identity()
        assert (
            swapped["tokenizer"]
            != build_teacher("open_clip:small-sigmoid", weights=folders["small-sigmoid"]).identity()["tokenizer"]
        )


class TestNames:
    @pytest.mark.parametrize(
        ("spec", "message", "hint"),
        [
            ("open_clip:ViT-B-61/openai", "no architecture 'ViT-B-61'", "ViT-B-16"),
            ("open_clip:ViT-B/32", "no architecture 'ViT-B'", "ViT-B-32"),
            ("open_clip:vit-b-16-siglip/webli", "no architecture 'vit-b-16-siglip'", "ViT-B-16-SigLIP"),
            ("open_clip:zzz", "no architecture 'zzz'", "list_models()"),
            ("open_clip:ViT-B-16-SigLIP/webly", "no weights 'webly' of ViT-B-16-SigLIP", "ViT-B-16-SigLIP/webli"),
            ("open_clip:ViT-B-16-SigLIP", "with PRETRAINED one of: webli", "--untrained"),
            ("open_clip:ViT-B-32/openai", "trained with QuickGELU", "open_clip:ViT-B-32-quickgelu/openai"),
            ("open_clip:ViT-B-32-quickgelu/x", "expected one of: openai", None),
            ("clip_vitb32@grid=20x30", "an image embedding has no grid", "clip_vitb32@dense,grid=20x30"),
        ],
    )
    def test_a_name_that_means_nothing_is_explained(self, spec: str, message: str, hint: str | None) -> None:
        with pytest.raises(UsageError) as caught:
            build_teacher(spec)
        assert message in caught.value.message
        assert caught.value.hint is None if hint is None else hint in str(caught.value.hint)

    def test_weights_without_a_name_need_one_where_the_architectures_differ_in_preprocessing(
        self, tmp_path: Path
    ) -> None:
        with pytest.raises(UsageError, match="weights of ViT-L-14 differ in mean, std or interpolation") as caught:
            build_teacher("open_clip:ViT-L-14", weights=tmp_path)
        assert "laion2b_s32b_b82k" in str(caught.value.hint)

    def test_weights_without_a_name_are_prepared_as_all_of_their_architecture(self, tmp_path: Path) -> None:
        found = find("open_clip:ViT-B-16-SigLIP", tmp_path)
        assert (found.mean, found.std, found.resample) == ((0.5,) * 3, (0.5,) * 3, "bicubic")

    def test_every_pretrained_model_of_open_clip_is_understood(self) -> None:
        refused = []
        for architecture, tag in open_clip.list_pretrained():
            expected = open_clip.get_pretrained_cfg(architecture, tag)
            try:
                found = find(f"open_clip:{architecture}/{tag}", None)
            except UsageError as error:
                refused.append((architecture, tag, error.message))
                continue
            assert (found.mean, found.std) == (expected["mean"], expected["std"])
            assert found.resample == expected["interpolation"]
            assert found.hub_id is not None
            assert expected["hf_hub"].startswith(f"{found.hub_id}/")
        # Every other one is there under the name of the right activation.
        assert all("were trained with QuickGELU" in message for *_, message in refused)
        assert all(
            tag in open_clip.list_pretrained_tags_by_model(f"{architecture}-quickgelu")
            for architecture, tag, _ in refused
        )


def find(spec: str, weights: Path | None) -> OpenClipModel:
    parsed = parse_spec(spec)
    return find_model(TeacherRequest(parsed, find_entry(parsed), weights=weights))

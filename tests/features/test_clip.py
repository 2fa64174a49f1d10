"""CLIP against open_clip's own loader, transform and recipe, on a small architecture with random weights."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from data.errors import TeacherError, UsageError
from data.images import squash
from data.records import VOC_CLASSES
from features.prompts import DEFAULT_PROMPTS, PromptSet
from features.registry import TEACHERS, TeacherEntry, build_teacher
from features.teacher import Teacher, draw_probe_image, weights_digest
from features.zero_shot import ZeroShotTeacher

CONFIG: dict[str, Any] = {
    "embed_dim": 48,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 64, "layers": 2, "width": 128, "patch_size": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2},
}


class Small(NamedTuple):
    name: str
    model: Any
    state: dict[str, Tensor]


@pytest.fixture(scope="module", params=["without bias", "with bias"])
def small(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Small]:
    """A small CLIP that open_clip built and initialised, known to the registry under the name `small`."""
    import open_clip

    bias = {} if request.param == "without bias" else {"init_logit_bias": -7.5}
    architecture = "small-clip" + ("-bias" if bias else "")
    path = tmp_path_factory.mktemp("configs") / f"{architecture}.json"
    path.write_text(json.dumps(CONFIG | bias))
    open_clip.add_model_config(path)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(11)
        model = open_clip.create_model(architecture).eval()
        torch.nn.init.constant_(model.logit_scale, 3.0)
    files = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
    TEACHERS["small"] = TeacherEntry(
        "features.clip", "logits", architecture, "for tests", "none", hub_id="nobody/small", weights_files=files
    )
    yield Small("small", model, model.state_dict())
    del TEACHERS["small"]


def save(state: dict[str, Tensor], path: Path) -> Path:
    if path.suffix == ".safetensors":
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, path)
    else:
        torch.save(state, path)
    return path


def test_logits_follow_open_clips_recipe(small: Small, tmp_path: Path) -> None:
    import open_clip

    path = save(small.state, tmp_path / "open_clip_pytorch_model.bin")
    teacher = build_teacher("small", weights=path)
    assert isinstance(teacher, ZeroShotTeacher)

    entry = TEACHERS["small"]
    model = open_clip.create_model(entry.architecture, pretrained=str(path)).eval()
    tokenizer = open_clip.get_tokenizer(entry.architecture)
    transform = open_clip.image_transform(64, is_train=False, resize_mode="squash", interpolation="bicubic")
    image = draw_probe_image()
    with torch.no_grad():
        text = []
        for name in DEFAULT_PROMPTS.class_names:
            embeddings = model.encode_text(tokenizer(DEFAULT_PROMPTS.sentences_of(name)))
            embeddings /= embeddings.norm(dim=-1, keepdim=True)
            average = embeddings.mean(dim=0)
            text.append(average / average.norm())
        embedding = model.encode_image(transform(image)[None])[0]
        embedding /= embedding.norm()
        logits = model.logit_scale.exp() * torch.stack(text) @ embedding
        if model.logit_bias is not None:
            logits = logits + model.logit_bias

    assert teacher.text_embeddings is not None
    np.testing.assert_allclose(teacher.text_embeddings, torch.stack(text).numpy(), atol=1e-5)
    output = teacher(torch.from_numpy(squash(image, teacher.input.size, teacher.input.resample))[None])
    assert output.embeddings is not None
    assert output.logits is not None
    torch.testing.assert_close(output.embeddings[0], embedding, rtol=0, atol=1e-5)
    torch.testing.assert_close(output.logits[0], logits, rtol=0, atol=1e-4)


def test_scale_and_bias_stand_apart_in_the_identity(small: Small, tmp_path: Path) -> None:
    identity = build_teacher("small", weights=save(small.state, tmp_path / "w.bin")).identity()
    assert identity["logit_scale"] == pytest.approx(np.exp(3.0))
    assert identity["logit_bias"] == (-7.5 if "logit_bias" in small.state else None)
    assert identity["prompts"]["class_names"][identity["class_order"].index("tvmonitor")] == "tv monitor"


@pytest.mark.parametrize(
    "layout",
    ["open_clip_model.safetensors", "open_clip_pytorch_model.bin", "folder", "checkpoint.pt", "any_name.safetensors"],
)
def test_every_file_layout_of_the_same_weights_is_the_same_teacher(small: Small, tmp_path: Path, layout: str) -> None:
    reference = build_teacher("small", weights=save(small.state, tmp_path / "reference.bin"))
    path = tmp_path / layout
    if layout == "folder":
        path.mkdir()
        save(small.state, path / "open_clip_model.safetensors")
        (path / "open_clip_config.json").write_text(json.dumps({"model_cfg": CONFIG}))
    elif layout == "checkpoint.pt":
        torch.save({"epoch": 3, "state_dict": small.state}, path)
    else:
        save(small.state, path)
    teacher = build_teacher("small", weights=path)
    assert teacher.weights_digest == weights_digest(small.state)
    assert teacher.identity() == reference.identity()
    images = torch.full((1, 64, 64, 3), 90, dtype=torch.uint8)
    assert torch.equal(teacher(images).arrays()["logits"], reference(images).arrays()["logits"])


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ({**CONFIG, "quick_gelu": False}, "quick_gelu: expected True, found False"),
        (
            {key: value for key, value in CONFIG.items() if key != "quick_gelu"},
            "quick_gelu: expected True, found False",
        ),
        ({**CONFIG, "embed_dim": 512}, "embed_dim: expected 48, found 512"),
        ({**CONFIG, "vision_cfg": {"width": 768}}, "vision_cfg.width: expected 128, found 768"),
    ],
    ids=["activation", "activation left out", "embedding", "width"],
)
def test_folder_of_another_architecture_is_refused(
    small: Small, tmp_path: Path, found: dict[str, Any], message: str
) -> None:
    save(small.state, tmp_path / "open_clip_pytorch_model.bin")
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": found}))
    with pytest.raises(TeacherError) as caught:
        build_teacher("small", weights=tmp_path)
    assert message in caught.value.message


def test_weights_of_another_model_are_refused(small: Small, tmp_path: Path) -> None:
    state = {name: tensor for name, tensor in small.state.items() if name != "ln_final.weight"}
    path = save(state | {"stray": torch.ones(1)}, tmp_path / "w.bin")
    with pytest.raises(TeacherError, match=r"ln_final\.weight expected, but missing; stray found, but unknown"):
        build_teacher("small", weights=path)


@pytest.mark.parametrize("name", ["clip_vitb32", "clip_vitb16", "clip_vitl14"])
def test_names_stand_for_openais_models_as_open_clip_knows_them(name: str) -> None:
    import open_clip

    entry = TEACHERS[name]
    assert open_clip.get_model_config(entry.architecture)["quick_gelu"] is True
    pretrained = open_clip.get_pretrained_cfg(entry.architecture, "openai")
    assert pretrained["hf_hub"] == f"{entry.hub_id}/"
    assert pretrained["quick_gelu"] is True


def test_normalisation_is_openais(small: Small, tmp_path: Path) -> None:
    import open_clip

    teacher = build_teacher("small", weights=save(small.state, tmp_path / "w.bin"))
    assert teacher.input.mean == tuple(open_clip.OPENAI_DATASET_MEAN)
    assert teacher.input.std == tuple(open_clip.OPENAI_DATASET_STD)
    assert teacher.input.size == (64, 64)


VISION = {
    "clip_vitb32": {"image_size": 224, "layers": 12, "width": 768, "patch_size": 32},
    "clip_vitb16": {"image_size": 224, "layers": 12, "width": 768, "patch_size": 16},
    "clip_vitl14": {"image_size": 224, "layers": 24, "width": 1024, "patch_size": 14},
}
# Of the seeded weights, written down before open_clip's other models could be teachers.
SEEDED = {
    "clip_vitb32": "04c0caa3b29ac49987ac10bbbf57ed3a2df5da7cac75aa687b2e3fa3e758edec",
    "clip_vitb16": "e52a042224ce6c8679e09b022bba7ed1a3919ee3b92a4a257fc67b7db2fdc07f",
    "clip_vitl14": "f5a211c05a120c97bdedbf45af363ad39a656ea1805269d488872a3f5b0286ea",
}


@pytest.mark.parametrize(
    "name",
    [
        "clip_vitb32",
        pytest.param("clip_vitb16", marks=pytest.mark.slow),
        pytest.param("clip_vitl14", marks=pytest.mark.slow),
    ],
)
def test_identity_of_the_named_teachers_stays_so_that_their_stores_resume(
    name: str, untrained: Callable[[str], Teacher]
) -> None:
    width, heads = (768, 12) if name == "clip_vitl14" else (512, 8)
    architecture = TEACHERS[name].architecture
    text = {"context_length": 77, "vocab_size": 49408, "width": width, "heads": heads, "layers": 12}
    assert untrained(name).identity() == {
        "spec": name,
        "library": "open_clip_torch",
        "architecture": {
            "model": architecture, "embed_dim": width, "quick_gelu": True, "vision_cfg": VISION[name], "text_cfg": text,
        },
        "weights_digest": SEEDED[name],
        "input_size": [224, 224],
        "decoder": "pillow-rgb",
        "resample": "bicubic",
        "antialias": True,
        "mean": [0.48145466, 0.4578275, 0.40821073],
        "std": [0.26862954, 0.26130258, 0.27577711],
        "layer": "image embedding",
        "norm": "L2",
        "patch_grid": None,
        "compute_dtype": "float32",
        "autocast": None,
        "tf32": False,
        "prompts": DEFAULT_PROMPTS.identity(),
        "class_order": list(VOC_CLASSES),
        "text_tower": f"{architecture} text transformer",
        "tokenizer": "open_clip SimpleTokenizer, context 77",
        "logit_scale": pytest.approx(100.0, abs=1e-4),
        "logit_bias": None,
    }  # fmt: skip


def test_a_tokenizer_of_another_model_is_refused(small: Small, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import open_clip

    def foreign(_: Any, sentences: list[str], context_length: int | None = None) -> Tensor:
        tokens = torch.full((len(sentences), 77), 49408)
        tokens[:, 0] = torch.tensor([len(sentence) for sentence in sentences])
        return tokens

    monkeypatch.setattr(open_clip.SimpleTokenizer, "__call__", foreign)
    with pytest.raises(TeacherError, match=r"expected tokens below 49408, .* found 49408"):
        build_teacher("small", weights=save(small.state, tmp_path / "w.bin"))


def test_a_prompt_that_would_be_cut_is_refused(small: Small, tmp_path: Path) -> None:
    path = save(small.state, tmp_path / "w.bin")
    fits, cut = (PromptSet((" ".join(["very"] * words) + " {}",), DEFAULT_PROMPTS.class_names) for words in (60, 90))
    build_teacher("small", weights=path, prompts=fits)
    with pytest.raises(UsageError, match=r"a prompt fills all 77 tokens of the text tower's context.*'very very"):
        build_teacher("small", weights=path, prompts=cut)

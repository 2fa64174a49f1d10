from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import torch

from data.records import VOC_CLASSES
from features.prompts import DEFAULT_PROMPTS, PromptSet
from features.registry import build_teacher
from features.zero_shot import embed_classes


def test_class_names_keep_the_devkits_order_and_are_words() -> None:
    renamed = {old: new for old, new in zip(VOC_CLASSES, DEFAULT_PROMPTS.class_names, strict=True) if old != new}
    assert renamed == {"diningtable": "dining table", "pottedplant": "potted plant", "tvmonitor": "tv monitor"}


def test_templates_differ_and_have_one_place_for_the_name() -> None:
    assert len(set(DEFAULT_PROMPTS.templates)) == len(DEFAULT_PROMPTS.templates)
    assert all(template.count("{}") == 1 for template in DEFAULT_PROMPTS.templates)


def test_prompts_use_the_right_article() -> None:
    assert DEFAULT_PROMPTS.sentences_of("aeroplane")[0] == "a photo of an aeroplane."
    assert DEFAULT_PROMPTS.sentences_of("dining table")[0] == "a photo of a dining table."
    assert DEFAULT_PROMPTS.sentences_of("Airbus")[0] == "a photo of an Airbus."
    assert replace(DEFAULT_PROMPTS, articles=False).sentences_of("aeroplane")[0] == "a photo of aeroplane."


def test_a_class_of_several_names_has_a_sentence_for_each_name_and_template() -> None:
    prompts = PromptSet(("a photo of {}.", "{}!"), (("sofa", "old couch"),))
    sentences = ["a photo of a sofa.", "a sofa!", "a photo of an old couch.", "an old couch!"]
    assert prompts.sentences_of(prompts.class_names[0]) == sentences


def test_braces_in_a_name_are_left_alone() -> None:
    assert PromptSet(("a photo of {}.",), ("{}",)).sentences_of("{0} {}") == ["a photo of a {0} {}."]


def test_the_identity_of_the_default_is_that_of_stores_that_exist() -> None:
    assert json.dumps(DEFAULT_PROMPTS.identity()) == json.dumps(
        {"templates": list(DEFAULT_PROMPTS.templates), "class_names": list(DEFAULT_PROMPTS.class_names)}
    )
    assert "articles" not in build_teacher("tiny_clip").identity()["prompts"]


def test_only_what_deviates_adds_to_the_identity() -> None:
    prompts = PromptSet(("{}",), ("cat", ("sofa", "couch")), articles=False)
    assert prompts.identity() == {"templates": ["{}"], "class_names": ["cat", ["sofa", "couch"]], "articles": False}


def test_class_embeddings_average_unit_vectors_and_are_unit_vectors() -> None:
    lengths = iter(range(1, 1000))

    def embed(sentences: list[str]) -> torch.Tensor:
        # Class k points along axis k % 2, but its first sentence along axis 2; the lengths must not matter.
        rows = torch.zeros(len(sentences), 3)
        for index in range(len(sentences)):
            class_index, template_index = divmod(index, len(DEFAULT_PROMPTS.templates))
            rows[index, 2 if template_index == 0 else class_index % 2] = float(next(lengths))
        return rows

    embeddings = embed_classes(DEFAULT_PROMPTS, embed)
    others = len(DEFAULT_PROMPTS.templates) - 1
    expected = np.array([others, 0, 1]) / np.hypot(others, 1)
    np.testing.assert_allclose(embeddings[0], expected, atol=1e-6)
    np.testing.assert_allclose(embeddings[1], expected[[1, 0, 2]], atol=1e-6)
    assert embeddings.shape == (20, 3)


def test_a_class_of_several_names_is_the_mean_over_all_its_sentences() -> None:
    vectors = {"a": [2.0, 0, 0], "b": [0, 3.0, 0], "c": [0, 0, 5.0]}
    prompts = PromptSet(("{}", "-{}"), ("a", ("b", "c"), ("a", "b", "c")), articles=False)
    embeddings = embed_classes(prompts, lambda sentences: torch.tensor([vectors[text[-1]] for text in sentences]))
    expected = [[1, 0, 0], np.array([0, 1, 1]) / np.sqrt(2), np.ones(3) / np.sqrt(3)]
    np.testing.assert_allclose(embeddings, expected, atol=1e-6)

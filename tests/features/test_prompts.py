from __future__ import annotations

import numpy as np
import torch

from data.records import VOC_CLASSES
from features.prompts import DEFAULT_PROMPTS
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

"""Image-level logits from the cosine between an image embedding and the embeddings of class prompts.

Source: Radford et al., Learning Transferable Visual Models From Natural Language Supervision (2021), section 3.1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from data.records import VOC_CLASSES

from .prompts import PromptSet
from .teacher import Teacher, TeacherOutput


def embed_classes(prompts: PromptSet, embed_text: Callable[[list[str]], Tensor]) -> NDArray[np.float32]:
    """Return the 20 class embeddings [20, D] float32, in the devkit's order, each of unit length.

    Every prompt's embedding is normalised, averaged over all sentences of its class, and normalised again.
    embed_text: from n sentences to their embeddings [n, D].
    """
    sentences = [prompts.sentences_of(names) for names in prompts.class_names]
    with torch.inference_mode():
        embeddings = F.normalize(embed_text([one for of_class in sentences for one in of_class]).float(), dim=-1)
        by_class = torch.split(embeddings, [len(of_class) for of_class in sentences])
        means = torch.stack([rows.mean(dim=0) for rows in by_class])
        classes: NDArray[np.float32] = F.normalize(means, dim=-1).numpy()
    return classes


class CosineClassifier(nn.Module):
    """An image tower and fixed class embeddings; maps pixels [B, 3, H, W] to embeddings [B, D] and cosines [B, 20]."""

    def __init__(self, image_tower: nn.Module, text_embeddings: NDArray[np.float32]) -> None:
        super().__init__()
        self.image_tower = image_tower
        self.text_embeddings: Tensor
        self.register_buffer("text_embeddings", torch.from_numpy(text_embeddings))

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Return the L2-normalised embeddings [B, D] and their cosines with the classes [B, 20]."""
        vectors = self.image_tower(pixels)
        # A cosine is multiplied by 100 afterwards: bfloat16 would leave it coarser than classes differ.
        with torch.autocast(pixels.device.type, enabled=False):
            embeddings = F.normalize(vectors.float(), dim=-1)
            return embeddings, embeddings @ self.text_embeddings.T


@dataclass(kw_only=True, eq=False)
class ZeroShotTeacher(Teacher):
    """A teacher of logits; its module is a `CosineClassifier`.

    logit_scale: the factor on the cosines (the exponential already taken).  logit_bias: None for a model without one.
    prompts: what the classes were described with.  text_tower, tokenizer: names for the identity.
    """

    text_embeddings: NDArray[np.float32] = field(repr=False)
    prompts: PromptSet
    text_tower: str
    tokenizer: str
    logit_scale: float
    logit_bias: float | None

    def forward(self, pixels: Tensor) -> TeacherOutput:
        """Return embeddings [B, D] and logits [B, 20]."""
        embeddings, cosines = self.module(pixels)
        logits = self.logit_scale * cosines
        return TeacherOutput(
            embeddings=embeddings, logits=logits if self.logit_bias is None else logits + self.logit_bias
        )

    def identity(self) -> dict[str, Any]:
        """Return the teacher's identity with its prompts, text tower, scale and bias."""
        return {
            **super().identity(),
            "prompts": self.prompts.identity(),
            "class_order": list(VOC_CLASSES),
            "text_tower": self.text_tower,
            "tokenizer": self.tokenizer,
            "logit_scale": self.logit_scale,
            "logit_bias": self.logit_bias,
        }

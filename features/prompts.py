"""The words in which the VOC classes are described to a text tower."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from data.records import VOC_CLASSES

# The devkit writes these as one word, which a tokenizer would cut into meaningless pieces.
_RENAMED = {"diningtable": "dining table", "pottedplant": "potted plant", "tvmonitor": "tv monitor"}


@dataclass(frozen=True)
class PromptSet:
    """Sentences for every class: each template with the class's name, an article before it, in place of `{}`.

    templates: with one `{}` each.  class_names: what the 20 VOC classes are called, in the devkit's order.
    """

    templates: tuple[str, ...]
    class_names: tuple[str, ...]

    def sentences_of(self, class_name: str) -> list[str]:
        """Return one sentence per template for one of the class names."""
        article = "an" if class_name[0] in "aeiou" else "a"
        return [template.format(f"{article} {class_name}") for template in self.templates]

    def identity(self) -> dict[str, Any]:
        """Return the prompts as they enter a teacher's identity."""
        return {"templates": list(self.templates), "class_names": list(self.class_names)}


DEFAULT_PROMPTS = PromptSet(
    # VOC photographs show everyday scenes: small, cut off, hidden and out-of-focus objects among others.
    templates=(
        "a photo of {}.",
        "a snapshot that shows {}.",
        "a close-up photo of {}.",
        "a photo of {} in the distance.",
        "a photo of {} among other things.",
        "a photo of {}, partly hidden.",
        "a blurry photo of {}.",
    ),
    class_names=tuple(_RENAMED.get(name, name) for name in VOC_CLASSES),
)

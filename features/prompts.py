"""The words in which the VOC classes are described to a text tower."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from data.records import VOC_CLASSES

# The devkit writes these as one word, which a tokenizer would cut into meaningless pieces.
_RENAMED = {"diningtable": "dining table", "pottedplant": "potted plant", "tvmonitor": "tv monitor"}


@dataclass(frozen=True)
class PromptSet:
    """Sentences for every class: each template with each of the class's names, an article before it, in place of `{}`.

    templates: with one `{}` each.  class_names: what the 20 VOC classes are called, in the devkit's order; a tuple of
    names for a class that is described by several.  articles: whether a or an goes before a name.
    """

    templates: tuple[str, ...]
    class_names: tuple[str | tuple[str, ...], ...]
    articles: bool = True

    def sentences_of(self, names: str | tuple[str, ...]) -> list[str]:
        """Return the sentences of a class, one per name and template: all of a name's before the next name's."""
        return [
            template.replace("{}", self._with_article(name)) for name in _as_tuple(names) for template in self.templates
        ]

    def _with_article(self, name: str) -> str:
        if not self.articles:
            return name
        return f"{'an' if name[0].lower() in 'aeiou' else 'a'} {name}"

    def identity(self) -> dict[str, Any]:
        """Return the prompts as they enter a teacher's identity: what is as usual adds no field."""
        names = [list(names) if isinstance(names, tuple) else names for names in self.class_names]
        usual: dict[str, Any] = {"templates": list(self.templates), "class_names": names}
        return usual if self.articles else {**usual, "articles": False}


def _as_tuple(names: str | tuple[str, ...]) -> tuple[str, ...]:
    return names if isinstance(names, tuple) else (names,)


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

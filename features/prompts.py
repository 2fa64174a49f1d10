"""The words in which the VOC classes are described to a text tower."""

from __future__ import annotations

from data.records import VOC_CLASSES

# The devkit writes these as one word, which a tokenizer would cut into meaningless pieces.
_RENAMED = {"diningtable": "dining table", "pottedplant": "potted plant", "tvmonitor": "tv monitor"}

CLASS_NAMES: tuple[str, ...] = tuple(_RENAMED.get(name, name) for name in VOC_CLASSES)

# VOC photographs show everyday scenes: small, cut off, hidden and out-of-focus objects among others.
TEMPLATES: tuple[str, ...] = (
    "a photo of {}.",
    "a snapshot that shows {}.",
    "a close-up photo of {}.",
    "a photo of {} in the distance.",
    "a photo of {} among other things.",
    "a photo of {}, partly hidden.",
    "a blurry photo of {}.",
)


def prompts_of(class_name: str) -> list[str]:
    """Return one sentence per template for a class name of `CLASS_NAMES`."""
    article = "an" if class_name[0] in "aeiou" else "a"
    return [template.format(f"{article} {class_name}") for template in TEMPLATES]

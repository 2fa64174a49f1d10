"""Annotations like those of VOC2007's test set in number, sizes and crowding, without images: for scoring alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from data.records import VOC_CLASSES

NUM_IMAGES = 4952
WIDTH, HEIGHT = 500, 375
_OBJECT = (
    "<object><name>{}</name><difficult>{}</difficult>"
    "<bndbox><xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax></bndbox></object>"
)
_ANNOTATION = (
    "<annotation><filename>{}.jpg</filename><size><width>{}</width><height>{}</height><depth>3</depth></size>"
    "{}</annotation>"
)


def write_annotations(voc_root: Path, seed: int = 0) -> None:
    """Write the set `2007:test` below a new folder, which plays the role of `VOCdevkit`."""
    rng = np.random.default_rng(seed)
    devkit = voc_root / "VOC2007"
    for folder in ("Annotations", "ImageSets/Main"):
        (devkit / folder).mkdir(parents=True)
    stems = [f"{number:06d}" for number in range(1, NUM_IMAGES + 1)]
    (devkit / "ImageSets" / "Main" / "test.txt").write_text("".join(f"{stem}\n" for stem in stems))
    for stem in stems:
        count = int(min(rng.geometric(0.33), 40))
        classes = rng.choice(len(VOC_CLASSES), count, p=_class_shares())
        # Objects of one image are mostly of one class.
        classes[rng.random(count) < 0.6] = classes[0]
        objects = [_object(VOC_CLASSES[label], rng) for label in classes]
        text = _ANNOTATION.format(stem, WIDTH, HEIGHT, "".join(objects))
        (devkit / "Annotations" / f"{stem}.xml").write_text(text)


def _object(name: str, rng: np.random.Generator) -> str:
    side = np.exp(rng.normal(4.7, 0.8, 2)).clip(8, (WIDTH, HEIGHT))
    x1, y1 = rng.random(2) * (np.array([WIDTH, HEIGHT]) - side)
    corners = np.floor([x1 + 1, y1 + 1, x1 + side[0], y1 + side[1]]).astype(int).tolist()
    return _OBJECT.format(name, int(rng.random() < 0.18), *corners)


def _class_shares() -> list[float]:
    """Return the share of each class: a third of VOC's objects are persons."""
    return [0.35 if name == "person" else 0.65 / (len(VOC_CLASSES) - 1) for name in VOC_CLASSES]

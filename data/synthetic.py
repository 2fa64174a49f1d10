"""Writes a synthetic VOC devkit: the real folder layout, real JPEGs and real XML, drawn from a seed.

It stands in for the real images in the demo and in tests. The same seed gives the same bytes, and an image depends on
(seed, index) alone: a larger devkit begins with the images of a smaller one.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from PIL import Image

from .errors import DatasetError, UsageError
from .records import VOC_CLASSES
from .scene import Scene, SceneObject, render_scene

_JPEG_QUALITY = 90


def make_devkit(
    folder: Path,
    *,
    num_train: int,
    num_val: int,
    num_test: int = 0,
    num_empty: int = 0,
    seed: int = 0,
    classes: Sequence[str] = VOC_CLASSES,
    year: int = 2007,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Write `folder/VOC<year>` and return `folder`, which plays the role of `VOCdevkit`.

    num_train, num_val, num_test: images of each split, numbered on from 000001 in this order. num_empty: how many
    images, from the first on, hold no object.  progress: called with (images done, of all).

    The devkit is built beside its place and renamed into it: it is there entirely or not at all.

    Raises UsageError for impossible counts or classes, DatasetError where something is in the way or the disk fails.
    """
    splits = {"train": num_train, "val": num_val, "test": num_test}
    _check_request(splits, num_empty, classes, year)
    if seed < 0:
        raise UsageError(f"expected a seed of 0 or more, found {seed}")
    target = folder / f"VOC{year}"
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise DatasetError(
            f"{target}: something is here already; a synthetic devkit is never written over it",
            hint="choose another folder, or remove this one first",
        )
    building = folder / f".VOC{year}.new-{os.getpid()}"
    try:
        _write_devkit(building, target.name, splits, num_empty, seed, classes, progress)
        building.rename(target)
    except OSError as error:
        raise DatasetError(f"{target}: cannot be written ({error.strerror or error})") from error
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return folder


def _check_request(splits: dict[str, int], num_empty: int, classes: Sequence[str], year: int) -> None:
    total = sum(splits.values())
    if min(splits.values()) < 0 or total < 1:
        counts = ", ".join(f"{count} {split}" for split, count in splits.items())
        raise UsageError(f"expected at least one image and no negative count, found {counts}")
    if not 0 <= num_empty <= total:
        raise UsageError(f"expected 0 to {total} images without objects, found {num_empty}")
    unknown = [name for name in classes if name not in VOC_CLASSES]
    if unknown or not classes:
        raise UsageError(f"expected classes among {', '.join(VOC_CLASSES)}, found {', '.join(unknown) or 'none'}")
    if not 1000 <= year <= 9999:
        raise UsageError(f"expected a year of four digits, found {year}")


def _write_devkit(
    folder: Path,
    devkit: str,
    splits: dict[str, int],
    num_empty: int,
    seed: int,
    classes: Sequence[str],
    progress: Callable[[int, int], None] | None,
) -> None:
    for name in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (folder / name).mkdir(parents=True)
    present: dict[str, dict[str, bool]] = {}
    total = sum(splits.values())
    for index in range(total):
        scene = render_scene(seed, index, classes, empty=index < num_empty)
        stem = f"{index + 1:06d}"
        Image.fromarray(scene.image).save(folder / "JPEGImages" / f"{stem}.jpg", quality=_JPEG_QUALITY)
        xml = _annotation(scene, devkit, stem)
        (folder / "Annotations" / f"{stem}.xml").write_text(xml, encoding="utf-8")
        present[stem] = _classes_present(scene.objects)
        if progress is not None:
            progress(index + 1, total)
    stems = list(present)
    bounds = {"train": (0, splits["train"]), "trainval": (0, splits["train"] + splits["val"])}
    bounds["val"] = (splits["train"], bounds["trainval"][1])
    bounds["test"] = (bounds["trainval"][1], total)
    for split, (first, last) in bounds.items():
        if last > first:
            _write_lists(folder / "ImageSets" / "Main", split, stems[first:last], present)


def _write_lists(main: Path, split: str, stems: Sequence[str], present: dict[str, dict[str, bool]]) -> None:
    """Write a split's list, and one for each class: 1 present, 0 only difficult ones, -1 absent."""
    (main / f"{split}.txt").write_text("".join(f"{stem}\n" for stem in stems), encoding="utf-8")
    for name in VOC_CLASSES:
        flags = ({None: -1, False: 0, True: 1}[present[stem].get(name)] for stem in stems)
        lines = (f"{stem} {flag:2d}\n" for stem, flag in zip(stems, flags, strict=True))
        (main / f"{name}_{split}.txt").write_text("".join(lines), encoding="utf-8")


def _classes_present(objects: Sequence[SceneObject]) -> dict[str, bool]:
    """Return the classes of a scene, each with whether one of its objects is not difficult."""
    return {
        name: any(not thing.difficult for thing in objects if thing.name == name)
        for name in dict.fromkeys(thing.name for thing in objects)
    }


def _annotation(scene: Scene, devkit: str, stem: str) -> str:
    height, width, depth = scene.image.shape
    objects = "".join(_object_xml(thing) for thing in scene.objects)
    return f"""<annotation>
\t<folder>{devkit}</folder>
\t<filename>{stem}.jpg</filename>
\t<source>
\t\t<database>TeachOnce synthetic devkit</database>
\t\t<annotation>TeachOnce synthetic devkit</annotation>
\t\t<image>drawn</image>
\t</source>
\t<size>
\t\t<width>{width}</width>
\t\t<height>{height}</height>
\t\t<depth>{depth}</depth>
\t</size>
\t<segmented>0</segmented>
{objects}</annotation>
"""


def _object_xml(thing: SceneObject) -> str:
    x1, y1, x2, y2 = thing.box_xyxy
    return f"""\t<object>
\t\t<name>{thing.name}</name>
\t\t<pose>Unspecified</pose>
\t\t<truncated>{thing.truncated:d}</truncated>
\t\t<occluded>{thing.occluded:d}</occluded>
\t\t<difficult>{thing.difficult:d}</difficult>
\t\t<bndbox>
\t\t\t<xmin>{x1 + 1}</xmin>
\t\t\t<ymin>{y1 + 1}</ymin>
\t\t\t<xmax>{x2}</xmax>
\t\t\t<ymax>{y2}</ymax>
\t\t</bndbox>
\t</object>
"""

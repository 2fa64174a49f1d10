"""How files name images: in full, `VOC2007/000005`, bare, `000005`, or in COCO's results as the number 5."""

from __future__ import annotations

import re
from collections.abc import Sequence

from data.errors import DetectionsError

_NUMBERED = re.compile(r"[0-9]+(_[0-9]+)?")
_CHOOSE_SETS = "name the image sets that the detector was run on, as in --voc-set 2007:test"


class WrittenIds:
    """Which image an id in a file means, among the images to score."""

    def __init__(self, image_ids: Sequence[str]) -> None:
        """image_ids: the images to score, as `VOC2007/000005`."""
        # None where an id fits several images.
        self._place: dict[str | int, int | None] = {}
        for index, image_id in enumerate(image_ids):
            for short in (stem(image_id), number(image_id)):
                if short is not None:
                    self._place[short] = None if short in self._place else index
        # Full ids last: they are unique, so nothing can make them ambiguous.
        self._place |= {image_id: index for index, image_id in enumerate(image_ids)}

    def places(self, written: Sequence[str | int]) -> list[int | None]:
        """Return the place in image_ids that each id means, None for one that means none or several."""
        return list(map(self._place.get, written))

    def refusal(self, where: str, row: int, written: Sequence[str | int]) -> DetectionsError:
        """Return the error for an id that means no single image; written: all ids of the files."""
        name = written[row]
        shown = repr(name) if isinstance(name, str) else str(name)
        if name in self._place:
            return DetectionsError(
                f"{where}: the image id {shown} fits images of several devkits",
                hint=f"write ids in full, as in VOC2007/{name if isinstance(name, str) else '000005'}",
            )
        distinct = set(written)
        unknown = len(distinct - self._place.keys())
        share = f"; so it is for {unknown:,} of the {len(distinct):,} images named" if len(distinct) > 1 else ""
        return DetectionsError(
            f"{where}: unknown image id {shown}: the image sets being scored do not hold it{share}", hint=_CHOOSE_SETS
        )


def stem(image_id: str) -> str:
    """Return `000005` of `VOC2007/000005`."""
    return image_id.rpartition("/")[2]


def number(image_id: str) -> int | None:
    """Return 5 of `VOC2007/000005` and 2008000001 of `VOC2012/2008_000001`; None where the stem is no number."""
    digits = stem(image_id)
    return int(digits.replace("_", "")) if _NUMBERED.fullmatch(digits) else None


def short_ids(image_ids: Sequence[str]) -> list[str]:
    """Return bare ids where all images are of one devkit, else full ones."""
    one_devkit = len({image_id.rpartition("/")[0] for image_id in image_ids}) <= 1
    return [stem(image_id) for image_id in image_ids] if one_devkit else list(image_ids)


def numbered_ids(image_ids: Sequence[str]) -> list[int] | list[str]:
    """Return ids as numbers where every image has one of its own, else in full."""
    numbers = [found for image_id in image_ids if (found := number(image_id)) is not None]
    return numbers if len(set(numbers)) == len(image_ids) else list(image_ids)

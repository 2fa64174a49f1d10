"""The report of training runs: its header and all its sections, from a comparison."""

from __future__ import annotations

from collections.abc import Callable

from PIL import Image

from data.records import ImageRecord

from .caveats import arms_of, caveats
from .classes import classes_section, curves_of_classes_section
from .comparison import Comparison
from .errors import calibration_section, confusion_section, errors_section
from .gallery import gallery_section, missing_gallery_section
from .page import Section, build_page
from .settings import settings_section
from .summary import summary_section
from .training import curves_section, time_section

_LONGEST_TITLE = 60
OpenImage = Callable[[ImageRecord], Image.Image]


def report_page(shown: Comparison, open_image: OpenImage | None, count: int, missing: str = "") -> str:
    """Return the HTML of the report of these runs.

    open_image: returns an image at its original size; None where there are none, and `missing` says why.  count: of
    pictures at most.
    """
    pictures = missing_gallery_section(missing) if open_image is None else gallery_section(shown, open_image, count)
    return build_page(
        _title(shown),
        [*report_sections(shown), pictures, time_section(shown)],
        facts=_facts(shown),
        caveats=caveats(shown.runs, shown.runs[shown.baseline]),
    )


def report_sections(shown: Comparison) -> list[Section]:
    """Return the sections of figures, for this page or as part of another one."""
    return [
        summary_section(shown),
        settings_section(shown),
        curves_section(shown),
        classes_section(shown),
        curves_of_classes_section(shown),
        errors_section(shown),
        confusion_section(shown),
        calibration_section(shown),
    ]


def _title(shown: Comparison) -> str:
    names = shown.names
    if len(names) == 1:
        return names[0]
    joined = " · ".join(names)
    return joined if len(joined) <= _LONGEST_TITLE else f"{len(names)} runs against {names[shown.baseline]}"


def _facts(shown: Comparison) -> list[str]:
    runs = shown.runs
    arms = len(arms_of(runs))
    backbones = ", ".join(dict.fromkeys(run.backbone for run in runs))
    epochs = sorted({run.num_epochs for run in runs})
    span = f"{epochs[0]}" if len(epochs) == 1 else f"{epochs[0]} to {epochs[-1]}"
    images = sorted({run.times.images for run in runs})
    trained = f"{images[0]:,}" if len(images) == 1 else f"{images[0]:,} to {images[-1]:,}"
    return [
        f"{len(runs)} run{'s' * (len(runs) != 1)}, {arms} arm{'s' * (arms != 1)}",
        backbones,
        f"trained for {span} epoch{'s' * (epochs[-1] != 1)} on {trained} images",
        f"scored on {len(shown.records):,} images of {shown.image_set}, last epoch",
    ]
